"""Arms of a comparison: weightings and acceptance rules by name, and the resampler of each arm.

Weighted half: `plain`, `rejection`, and `control`, which gives the same weights to rows chosen at random.

Generative half: `base` is the untouched model. `supervised` trains on the labelled rows of the same prompts, with as
many optimizer steps. `rejection` trains on its own accepted candidates. `control` accepts as many candidates of each
prompt as the rule does, chosen at random.

The difference between `rejection` and `control` is the effect of the choice alone.
"""

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import GenerationConfig, TrainingArguments

import rsft_hf
from experiments.harness.arguments import ExperimentError, check_arms_and_seeds, option, weighting_from_name
from rsft_hf import RSO, CandidateResampler, Threshold, TopKOverall, TopKPerPrompt
from rsft_hf.acceptance import PerPromptCap, RandomLike, RandomPerPrompt, Sequence
from rsft_hf.weighted import Weighting

logger = logging.getLogger(__name__)

WEIGHTED_ARMS = ("plain", "rejection", "control")


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
class WeightedArmArguments:
    """What is compared, how often, and how the rows of the resampled arms are drawn."""

    arms: list[str] = field(
        default_factory=lambda: list(WEIGHTED_ARMS), metadata={"help": "What to compare: plain, rejection, control."}
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
        check_arms_and_seeds(self.arms, self.seeds, WEIGHTED_ARMS)
        make_loss_resampler(
            self, "rejection", seed=0
        )  # wrong options fail here, not after the plain arm has been trained

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


def make_loss_resampler(arguments: WeightedArmArguments, arm: str, seed: int) -> rsft_hf.LossResampler | None:
    """Returns the resampler of an arm, None for the plain one.

    Raises:
        ExperimentError: If an option is impossible.
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
        raise ExperimentError(str(error)) from error


GENERATIVE_ARMS = ("base", "supervised", "rejection", "control")

GENERATING_ARMS = ("rejection", "control")

# name -> the rule and its parameters in order, each with the type of its number
ACCEPTANCES: dict[str, tuple[Callable[..., Any], dict[str, type]]] = {
    "topk": (TopKPerPrompt, {"k": int}),
    "topk_overall": (TopKOverall, {"k": int}),
    "threshold": (Threshold, {"minimum": float}),
    "quantile": (Threshold, {"quantile": float}),
    "prompt_quantile": (Threshold, {"prompt_quantile": float}),
    "rso": (RSO, {"beta": float, "k": int}),
    "random": (RandomPerPrompt, {"k": int}),
    "cap": (PerPromptCap, {"k": int}),
}


def acceptance_from_name(name: str) -> Any:
    """Returns the rule that a name stands for; `:` gives its parameters, `+` chains rules from left to right.

    Args:
        name: Such as "topk:1", "threshold:0.5", "rso:0.1:1" (beta, then k), "random:2" or "threshold:0.5+cap:4".

    Raises:
        ExperimentError: If a name is unknown, a parameter is missing, needless, no number, or out of its range.

    Example:
        >>> acceptance_from_name("topk:2")
        TopKPerPrompt(k=2)
    """
    rules = [_one_acceptance(part.strip()) for part in name.split("+")]
    return rules[0] if len(rules) == 1 else Sequence(*rules)


def _one_acceptance(part: str) -> Any:
    name, *values = part.split(":")
    if name not in ACCEPTANCES:
        raise ExperimentError(
            f"`--acceptance` {part!r} is unknown. Use one of {', '.join(ACCEPTANCES)}, joined by '+' to chain them."
        )
    rule, parameters = ACCEPTANCES[name]
    if len(values) != len(parameters):
        form = ":".join([name, *(parameter.upper() for parameter in parameters)])
        raise ExperimentError(
            f"`--acceptance` {part!r} has {len(values)} numbers after the name. Write it as {form!r}."
        )
    try:
        return rule(**{key: kind(value) for (key, kind), value in zip(parameters.items(), values, strict=True)})
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"`--acceptance` {part!r}: {error}") from error


@dataclass
class GenerativeArmArguments:
    """What is compared, how often, and how candidates are sampled and accepted."""

    arms: list[str] = field(
        default_factory=lambda: list(GENERATIVE_ARMS),
        metadata={"help": "What to compare: base, supervised, rejection, control."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [1, 2, 3],
        metadata={"help": "One run per arm and seed; a seed fixes prompts, candidates, initial weights and order."},
    )
    num_candidates: int = option(8, "Candidates per prompt, round and attempt.")
    acceptance: str = option("topk:1", "Rule from rewards to accepted, as topk:1, threshold:0.5+cap:4 or rso:0.1:1.")
    max_attempts: int = option(1, "Samplings of a prompt in a round, as long as nothing of it is accepted.")
    on_nothing_accepted: Literal["raise", "skip", "best", "reference"] = option(
        "skip", "What a prompt without an accepted candidate trains on in a round."
    )
    num_draws: int | None = option(None, "Rows trained on in a round; as many as there are prompts where not given.")
    round_start: Literal["last", "base", "best"] = option("last", "Weights that each round's training starts from.")
    replay_rounds: int = option(0, "Earlier rounds whose accepted candidates are trained on again.")
    supervised_fraction: float = option(0.0, "Share of the rows trained on that are labelled ones.")
    temperature: float = option(1.0, "Temperature of the sampled candidates; measuring is greedy.")
    top_p: float = option(1.0, "Share of the probability that is sampled from.")
    top_k: int = option(0, "Most tokens that are sampled from, 0 for all.")
    max_new_tokens: int = option(128, "Tokens after which a candidate counts as truncated.")
    overwrite_output_dir: bool = option(False, "Delete earlier runs of these arms and seeds, and begin anew.")

    def __post_init__(self) -> None:
        check_arms_and_seeds(self.arms, self.seeds, GENERATIVE_ARMS)
        if self.temperature <= 0:
            raise ExperimentError(
                f"`--temperature` {self.temperature} must be above 0: equal candidates leave no choice."
            )
        if self.num_draws is not None and self.num_draws < 1:
            raise ExperimentError(f"`--num_draws` {self.num_draws} must be at least 1.")
        acceptance_from_name(self.acceptance)  # wrong options fail here, not after an hour of training

    def configuration(self, arm: str) -> dict[str, object]:
        """Returns the options that decide what comes out of a run of this arm."""
        if arm in GENERATING_ARMS:
            silent = {"arms", "seeds", "overwrite_output_dir"}
            return {name: value for name, value in vars(self).items() if name not in silent}
        names = ("max_new_tokens",) if arm == "base" else ("max_new_tokens", "num_draws")
        return {name: vars(self)[name] for name in names}

    def sampling(self) -> GenerationConfig:
        """Returns how candidates are sampled."""
        return GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
        )


def make_candidate_resampler(
    arguments: GenerativeArmArguments, arm: str, reward_funcs: Any, **more: Any
) -> CandidateResampler | None:
    """Returns the resampler of an arm; None for base and supervised, which generate nothing.

    Args:
        arguments: The options.
        arm: One of `GENERATIVE_ARMS`.
        reward_funcs: What judges the candidates.
        more: Further keywords of `CandidateResampler`, such as `reward_weights`, or `supervised_dataset`, which is left
            out where `supervised_fraction` is 0.

    Raises:
        ExperimentError: If an option is impossible.
    """
    if arm not in GENERATING_ARMS:
        return None
    rule = acceptance_from_name(arguments.acceptance)
    if arguments.supervised_fraction == 0:
        more.pop("supervised_dataset", None)
    passed_on = ("num_candidates", "max_attempts", "on_nothing_accepted", "num_draws", "round_start", "replay_rounds",
                 "supervised_fraction")  # fmt: skip
    try:
        return CandidateResampler(
            reward_funcs,
            RandomLike(rule) if arm == "control" else rule,
            generation_config=arguments.sampling(),
            **{name: vars(arguments)[name] for name in passed_on},
            **more,
        )
    except (TypeError, ValueError) as error:
        raise ExperimentError(str(error)) from error


def supervised_schedule(training: TrainingArguments, num_draws: int) -> Any:
    """Returns the arguments of the supervised arm: as many optimizer steps as the others, evaluated after as many.

    Args:
        training: The arguments of the arms that generate, whose epochs are rounds.
        num_draws: Rows that a round trains on.
    """
    rows_per_step = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    steps_per_round = math.ceil(num_draws / rows_per_step)
    schedule = copy.copy(training)
    schedule.max_steps = round(training.num_train_epochs * steps_per_round)
    for kind in ("eval", "save"):
        if getattr(training, f"{kind}_strategy") == "epoch":
            setattr(schedule, f"{kind}_strategy", type(training.eval_strategy)("steps"))
            setattr(schedule, f"{kind}_steps", steps_per_round)
    return schedule
