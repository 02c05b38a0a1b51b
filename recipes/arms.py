"""The three arms of a comparison: plain, rejection, and a control that draws as often but at random.

In: options. Out: the resampler of an arm. Which trainer it goes into, and what it is compared on, a recipe says.
"""

import logging
from dataclasses import dataclass, field
from typing import Literal

import torch

import rsft_hf
from recipes.common import RecipeError, check_arms_and_seeds, option, weighting_from_name
from rsft_hf.weighted import Weighting

logger = logging.getLogger(__name__)

ARMS = ("plain", "rejection", "control")


@dataclass(frozen=True)
class RandomAssignment:
    """The matched random control: the weights of `weighting`, given to rows that a seed chose.

    As many draws, repeats and distinct rows as with `weighting`, and the same rows favoured from epoch to epoch, but
    nothing in the choice of the rows comes from their loss. What remains between the two is the effect of the choice.

    Example:
        >>> control = RandomAssignment(rsft_hf.Proportional(), seed=1)
        >>> sorted(control(torch.tensor([1.0, 2.0, 3.0])).tolist())
        [1.0, 2.0, 3.0]
    """

    weighting: Weighting
    seed: int

    @property
    def requires(self) -> frozenset[str]:
        """The statistics that the rule needs."""
        return self.weighting.requires

    def __call__(
        self, scores: torch.Tensor, statistics: rsft_hf.weighted.ExampleStatistics | None = None
    ) -> torch.Tensor:
        """Returns the weights in an order that depends only on the seed and on their number."""
        weights = self.weighting(scores, statistics)
        # Away from the run's own seed, whose permutation already orders the proposals.
        generator = torch.Generator().manual_seed(2**32 + self.seed)
        return weights[torch.randperm(len(weights), generator=generator)]


@dataclass
class ArmArguments:
    """What is compared, how often, and how the rows of the resampled arms are drawn."""

    arms: list[str] = field(
        default_factory=lambda: list(ARMS), metadata={"help": "What to compare: plain, rejection, control."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [1, 2, 3],
        metadata={"help": "One run per arm and seed; a seed fixes rows, noise, initial weights and order."},
    )
    weighting: str = option("proportional", "Rule from losses to weights, as tempered:0.5 or drop_top:0.1+floored:0.2.")
    losses: Literal["forward", "training"] = option("forward", "Measure losses in their own pass, or while training.")
    num_draws: int | None = option(None, "Rows per epoch; as many as the training set has where not given.")
    warmup_epochs: int = option(0, "Epochs at the start that read every row once.")
    uniform_final_epochs: int = option(0, "Epochs at the end that read every row once.")
    importance_correction: float = option(0.0, "Exponent of the loss factor 1 / (N p); at 1 the gradient is unbiased.")
    overwrite_output_dir: bool = option(False, "Delete earlier runs of these arms and seeds, and begin anew.")

    def __post_init__(self) -> None:
        check_arms_and_seeds(self.arms, self.seeds, ARMS)
        make_resampler(self, "rejection", seed=0)  # wrong options fail here, not after the plain arm has been trained

    def check_epochs(self, num_epochs: float) -> None:
        """Warns if no epoch is left to resample."""
        if self.warmup_epochs + self.uniform_final_epochs >= num_epochs:
            logger.warning(
                f"`--warmup_epochs` {self.warmup_epochs} and `--uniform_final_epochs` {self.uniform_final_epochs} "
                f"leave none of {num_epochs:g} epochs to resample: all arms train alike. Lower them, or train longer."
            )

    def configuration(self, arm: str) -> dict[str, object]:
        """Returns the options that decide what comes out of a run of this arm."""
        names = () if arm == "plain" else ("weighting", "losses", "num_draws", "warmup_epochs", "uniform_final_epochs",
                                           "importance_correction")  # fmt: skip
        return {name: vars(self)[name] for name in names}


def make_resampler(arguments: ArmArguments, arm: str, seed: int) -> rsft_hf.LossResampler | None:
    """Returns the resampler of an arm, None for the plain one.

    Raises:
        RecipeError: If an option is impossible.
    """
    if arm == "plain":
        return None
    weighting = weighting_from_name(arguments.weighting)
    try:
        return rsft_hf.LossResampler(
            RandomAssignment(weighting, seed) if arm == "control" else weighting,
            losses=arguments.losses,
            num_draws=arguments.num_draws,
            warmup_epochs=arguments.warmup_epochs,
            uniform_final_epochs=arguments.uniform_final_epochs,
            importance_correction=arguments.importance_correction,
        )
    except (TypeError, ValueError) as error:
        raise RecipeError(str(error)) from error
