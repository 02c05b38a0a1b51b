"""What the options of the weighted half may be, alone and together."""

from typing import TYPE_CHECKING

from rsft_hf.rejection import check_num_draws, check_proposal
from rsft_hf.weighted.losses import Reading
from rsft_hf.weighted.predictions import PREDICTION_STATISTICS
from rsft_hf.weighted.scores import check_rule

if TYPE_CHECKING:
    from rsft_hf.weighted.resampler import LossResampler


def check_options(resampler: "LossResampler") -> None:
    """Raises if an option of a LossResampler is out of its range, or two of them exclude each other.

    Raises:
        TypeError: If `weighting` is not a rule, or a count is not an integer.
        ValueError: If a value is out of range, or the rule needs what the source of losses cannot give.
    """
    check_rule(resampler.weighting, "`weighting`")
    if resampler.losses not in ("forward", "training"):
        raise ValueError(f'`losses`={resampler.losses!r} must be "forward" or "training".')
    if resampler.num_draws is not None:
        check_num_draws(resampler.num_draws)
    if resampler.proposal is not None:
        check_proposal(resampler.proposal)
    for name, lowest in (("warmup_epochs", 0), ("uniform_final_epochs", 0), ("every_n_epochs", 1), ("batch_size", 1)):
        _check_count(name, vars(resampler)[name], lowest)
    if not 0.0 <= resampler.importance_correction <= 1.0:
        raise ValueError(
            f"`importance_correction`={resampler.importance_correction} must lie in [0, 1]: 0 is none, 1 is unbiased."
        )
    if not 0.0 <= resampler.ema_decay < 1.0:
        raise ValueError(f"`ema_decay`={resampler.ema_decay} must lie in [0, 1): at 1 no new loss would count.")
    needs = sorted(resampler.weighting.requires & set(PREDICTION_STATISTICS))
    if needs and (resampler.losses == "training" or resampler.per_example_loss is not None):
        raise ValueError(
            f'{resampler.weighting!r} reads {needs}, which only a scoring pass measures. Use losses="forward" '
            "without `per_example_loss`."
        )


def check_reading(reading: Reading, losses: str, importance_correction: float) -> None:
    """Raises ValueError if the way the losses can be read does not allow what was asked for."""
    if losses == "training" and reading.kind == "single":
        raise ValueError(
            'losses="training" needs losses that can be read from the training step, and those of this model cannot '
            '(see the warning above). Use losses="forward", or pass `per_example_loss`.'
        )
    if importance_correction > 0 and reading.kind != "criterion":
        raise ValueError(
            "`importance_correction` scales the losses of torch.nn.functional inside the model or the loss function, "
            "and this loss is computed another way (label smoothing, an added term, a fused head). Set "
            "importance_correction=0."
        )


def _check_count(name: str, value: int | None, lowest: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < lowest:
        raise ValueError(f"`{name}`={value} must be at least {lowest}.")
