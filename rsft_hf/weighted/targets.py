"""Target weights of the rows from their losses and a weighting; metrics of the draws and importance correction."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.utils import logging

from rsft_hf.rejection import effective_sample_size, envelope_constant
from rsft_hf.weighted.history import HISTORIES
from rsft_hf.weighted.measurement import PREDICTION_STATISTICS
from rsft_hf.weighted.tasks import Tasks
from rsft_hf.weighted.weightings import ExampleStatistics, Weighting

logger = logging.get_logger(__name__)

COLLAPSED_SHARE = 0.1  # of the rows in the effective sample size, or of the other classes' rows among the draws
WRONG_SHARE = 0.25  # of the draws, expected to have a wrong label
MIN_COUNTED = 10  # draws of other classes that must be expected, or their absence says nothing


def target_weights(
    weighting: Weighting,
    losses: torch.Tensor,
    measured: Mapping[str, torch.Tensor],
    labels: torch.Tensor | None,
    tasks: Tasks | None = None,
) -> torch.Tensor:
    """Returns the weight of every row: 0 for rows without a loss, uniform over the others if the rule gives only 0.

    Args:
        weighting: Rule from losses to weights.
        losses: Shape (N,), float64, NaN for a row without a label.
        measured: Prediction statistics, each of shape (N,), and histories, each of shape (epochs, N), by name.
        labels: Class of each row, shape (N,), if the rule needs it.
        tasks: Tasks to each of which the rule is applied apart.

    Raises:
        TypeError: If the rule returns no numbers.
        ValueError: If no row has a loss, or the rule returns another shape, a negative, NaN or infinite weight.
    """
    rows = (~losses.isnan()).nonzero().squeeze(1)
    if len(rows) == 0:
        raise ValueError("No row of the training set has a loss: all labels are missing or ignored (-100).")
    weights = torch.zeros_like(losses)
    for part in [rows] if tasks is None else tasks.labelled(losses):
        scored = _weights_of(weighting, losses, part, measured, labels)
        if not bool(scored.any()):
            logger.info(f"{weighting!r} gives all {len(part)} rows weight 0: drawing uniformly.")
            scored = torch.ones_like(scored)
        weights[part] = scored
    return weights if tasks is None else tasks.balanced(weights)


def try_weighting(weighting: Weighting, num_rows: int, labels: torch.Tensor | None) -> None:
    """Validate a rule on artificial losses, so that invalid weights are found before the first step.

    A rule that reads `rows` depends on the real losses of each row, and is not tried.
    """
    if "rows" in weighting.requires:
        return
    losses = torch.linspace(0.5, 1.5, num_rows, dtype=torch.float64)
    predictions = {name: torch.linspace(0.25, 0.75, num_rows, dtype=torch.float64) for name in PREDICTION_STATISTICS}
    histories = dict.fromkeys(HISTORIES, torch.stack((2 * losses, losses)))
    _weights_of(weighting, losses, torch.arange(num_rows), predictions | histories, labels)


def draw_metrics(weights: torch.Tensor, indices: torch.Tensor) -> dict[str, float]:
    """Returns the metrics of one epoch's draws.

    Args:
        weights: Shape (N,), >= 0.
        indices: Drawn rows, shape (num_draws,).

    Returns:
        `envelope_M`, `acceptance_rate` (1/M), `effective_sample_size` (rows), `unique_fraction` (distinct rows over
        draws), `max_repeats` (of one row), `top_1_percent_share` (of the weight).
    """
    envelope = envelope_constant(weights)
    counts = torch.bincount(indices, minlength=len(weights))
    num_top = max(1, len(weights) // 100)
    return {
        "envelope_M": envelope,
        "acceptance_rate": 1 / envelope,
        "effective_sample_size": effective_sample_size(weights),
        "unique_fraction": int((counts > 0).sum()) / len(indices),
        "max_repeats": int(counts.max()),
        "top_1_percent_share": float(weights.topk(num_top).values.sum() / weights.sum()),
    }


def collapse(
    weights: torch.Tensor,
    indices: torch.Tensor,
    labels: torch.Tensor | None,
    error_probabilities: torch.Tensor | None = None,
) -> str | None:
    """Returns how the draws of an epoch have collapsed, or None.

    Args:
        weights: Shape (N,), >= 0.
        indices: Drawn rows, shape (num_draws,).
        labels: Class of each row, shape (N,), -100 for none, if known.
        error_probabilities: Probability that a row's label is wrong, shape (N,), NaN if unknown.

    Example:
        >>> collapse(torch.tensor([1.0] * 99 + [1000.0]), torch.tensor([99, 99, 3]), None)
        'an effective sample size of 1.2 of 100 rows: one row was drawn 2 times'
        >>> labels = torch.arange(40) % 2
        >>> collapse(torch.ones(40), torch.arange(0, 40, 2).repeat(2), labels)
        '100% of the draws are of class 0, which has 50% of the rows'
    """
    size, num_rows = effective_sample_size(weights), int((weights > 0).sum())
    if size < COLLAPSED_SHARE * num_rows:
        repeats = int(torch.bincount(indices).max())
        return f"an effective sample size of {size:.1f} of {num_rows} rows: one row was drawn {repeats} times"
    if labels is not None and bool((labels[indices] >= 0).any()):
        of_rows, of_draws = (torch.bincount(some[some >= 0]).double() for some in (labels, labels[indices]))
        largest = int(of_draws.argmax())
        drawn, present = float(of_draws[largest] / of_draws.sum()), float(of_rows[largest] / of_rows.sum())
        is_counted = (1 - present) * float(of_draws.sum()) >= MIN_COUNTED
        if is_counted and 1 - drawn < COLLAPSED_SHARE * (1 - present):
            return f"{drawn:.0%} of the draws are of class {largest}, which has {present:.0%} of the rows"
    if error_probabilities is not None:
        wrong, drawn_wrong = (float(each.nanmean()) for each in (error_probabilities, error_probabilities[indices]))
        if drawn_wrong > WRONG_SHARE and drawn_wrong > 2 * wrong:
            return f"{drawn_wrong:.0%} of the draws have a label that is probably wrong, and {wrong:.0%} of the rows"
    return None


def correction_factors(weights: torch.Tensor, exponent: float) -> torch.Tensor:
    """Returns (1 / (n p_i)) ** exponent, which at exponent 1 makes the mean over drawn rows unbiased.

    E[L_i / (n p_i)] over i ~ p is the mean loss of the n rows that can be drawn. Katharopoulos & Fleuret 2018,
    arXiv:1803.00942.

    Args:
        weights: Shape (N,), >= 0.
        exponent: In [0, 1]; 0 is no correction.

    Returns:
        Factors, shape (N,), float32; 0 for rows of weight 0, which are never drawn.

    Example:
        >>> correction_factors(torch.tensor([1.0, 3.0]), 1.0).tolist()  # 1 / (2 * 1/4), 1 / (2 * 3/4)
        [2.0, 0.6666666865348816]
    """
    num_drawable = int((weights > 0).sum())
    relative = num_drawable * weights / weights.sum()
    return torch.where(weights > 0, relative.clamp(min=1e-300) ** -exponent, 0.0).float()


class FactoredLabels:
    """Labels whose tokens are counted by the factor of their row, where Trainer counts `labels.ne(-100).sum()`.

    Args:
        labels: Shape (rows, tokens), or the mask of such labels.
        factors: Factor of each row, shape (rows,).

    Example:
        >>> labels = torch.tensor([[5, 7, -100], [5, -100, -100]])
        >>> float(FactoredLabels(labels, torch.tensor([0.5, 2.0])).ne(-100).sum())  # .5 * 2 + 2 * 1
        3.0
    """

    def __init__(self, labels: torch.Tensor, factors: torch.Tensor) -> None:
        self.labels, self.factors = labels, factors

    def __getitem__(self, index: Any) -> "FactoredLabels":
        return FactoredLabels(self.labels[index], self.factors)

    def ne(self, value: int) -> "FactoredLabels":
        """Returns the mask of the labels that differ from `value`."""
        return FactoredLabels(self.labels.ne(value), self.factors)

    def sum(self) -> torch.Tensor:
        """Returns the sum of the mask, each row times its factor."""
        return (self.labels.sum(1) * self.factors.to(self.labels.device)).sum()


def with_factored_labels(batches: Sequence[Any], factors: Sequence[torch.Tensor]) -> list[dict[str, Any]] | None:
    """Returns the labels of an accumulation window for Trainer to count by factor, None if they are not (rows, tokens).

    Labels of one class per row are counted as they are: a mean over rows needs no other denominator.
    """
    counted = []
    for batch, row_factors in zip(batches, factors, strict=True):
        labels = {name: batch[name] for name in ("labels", "shift_labels") if name in batch}
        for values in labels.values():
            if not isinstance(values, torch.Tensor) or values.ndim != 2 or len(values) != len(row_factors):
                return None
        counted.append({name: FactoredLabels(values, row_factors) for name, values in labels.items()})
    return counted


def _weights_of(
    weighting: Weighting,
    losses: torch.Tensor,
    rows: torch.Tensor,
    measured: Mapping[str, torch.Tensor],
    labels: torch.Tensor | None,
) -> torch.Tensor:
    statistics = ExampleStatistics(
        **{name: values[..., rows] for name, values in measured.items()},
        labels=None if labels is None else labels[rows],
        rows=rows,
        num_rows=len(losses),
    )
    return _validated(weighting, weighting(losses[rows], statistics), rows)


def _validated(weighting: Weighting, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    try:
        weights = torch.as_tensor(weights).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{weighting!r} must return one weight per loss, got {weights!r}.") from error
    if weights.shape != rows.shape:
        raise ValueError(
            f"{weighting!r} returned weights of shape {tuple(weights.shape)} for {len(rows)} losses. It must return "
            f"one weight per loss, shape ({len(rows)},)."
        )
    is_invalid = ~(weights.isfinite() & (weights >= 0))
    if bool(is_invalid.any()):
        position = int(is_invalid.nonzero()[0])
        raise ValueError(
            f"{weighting!r} gave row {int(rows[position])} the weight {float(weights[position])}. Weights must be "
            "finite and >= 0: end the rule with a clamp, or use Softmax for scores of either sign."
        )
    return weights
