"""The four arms of a generative comparison: base, supervised, rejection, and a control that accepts at random.

`base` is the untouched model. `supervised` trains on the labelled rows of the same prompts, with as many optimizer
steps. `rejection` trains on its own accepted candidates. `control` does the same, but of each prompt's candidates it
accepts as many as the rule would, chosen at random: what remains between the two is the effect of the choice.

In: options. Out: acceptance rules by name, the resampler of an arm, and the arguments and folder of its run. It knows
no task and no model.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import GenerationConfig, TrainingArguments

from recipes.common import RecipeError, check_arms_and_seeds, option
from recipes.runs import RunFolder, training_configuration
from rsft_hf import RSO, CandidateResampler, Threshold, TopKOverall, TopKPerPrompt
from rsft_hf.acceptance import PerPromptCap, RandomLike, RandomPerPrompt, Sequence

ARMS = ("base", "supervised", "rejection", "control")
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
        RecipeError: If a name is unknown, a parameter is missing, needless, no number, or out of its range.

    Example:
        >>> acceptance_from_name("topk:2")
        TopKPerPrompt(k=2)
    """
    rules = [_one_acceptance(part.strip()) for part in name.split("+")]
    return rules[0] if len(rules) == 1 else Sequence(*rules)


def _one_acceptance(part: str) -> Any:
    name, *values = part.split(":")
    if name not in ACCEPTANCES:
        raise RecipeError(
            f"`--acceptance` {part!r} is unknown. Use one of {', '.join(ACCEPTANCES)}, joined by '+' to chain them."
        )
    rule, parameters = ACCEPTANCES[name]
    if len(values) != len(parameters):
        form = ":".join([name, *(parameter.upper() for parameter in parameters)])
        raise RecipeError(f"`--acceptance` {part!r} has {len(values)} numbers after the name. Write it as {form!r}.")
    try:
        return rule(**{key: kind(value) for (key, kind), value in zip(parameters.items(), values, strict=True)})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"`--acceptance` {part!r}: {error}") from error


@dataclass
class GenerativeArmArguments:
    """What is compared, how often, and how candidates are sampled and accepted."""

    arms: list[str] = field(
        default_factory=lambda: list(ARMS), metadata={"help": "What to compare: base, supervised, rejection, control."}
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
        check_arms_and_seeds(self.arms, self.seeds, ARMS)
        if self.temperature <= 0:
            raise RecipeError(f"`--temperature` {self.temperature} must be above 0: equal candidates leave no choice.")
        if self.num_draws is not None and self.num_draws < 1:
            raise RecipeError(f"`--num_draws` {self.num_draws} must be at least 1.")
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


def make_resampler(
    arguments: GenerativeArmArguments, arm: str, reward_funcs: Any, **more: Any
) -> CandidateResampler | None:
    """Returns the resampler of an arm; None for base and supervised, which generate nothing.

    Args:
        arguments: The options.
        arm: One of `ARMS`.
        reward_funcs: What judges the candidates.
        more: Further keywords of `CandidateResampler`, such as `reward_weights`, or `supervised_dataset`, which is left
            out where `supervised_fraction` is 0.

    Raises:
        RecipeError: If an option is impossible.
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
        raise RecipeError(str(error)) from error


def arguments_of_run(training: TrainingArguments, folder: Path, seed: int) -> Any:
    """Returns the training arguments with the folder and the seed of one run."""
    arguments = copy.copy(training)
    arguments.output_dir, arguments.seed, arguments.data_seed = str(folder), seed, seed
    arguments.dataloader_pin_memory &= training.device.type != "cpu"
    return arguments


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


def open_folders(
    options: Any, arms: GenerativeArmArguments, training: TrainingArguments
) -> dict[tuple[str, int], RunFolder]:
    """Returns the folder of every arm and seed, made ready before the first of them is trained.

    Raises:
        RecipeError: If one of them holds a run of other options.
    """
    folders = {}
    for seed in arms.seeds:
        for arm in arms.arms:
            trained = {} if arm == "base" else training_configuration(training)
            configuration = asdict(options) | arms.configuration(arm) | trained
            folders[arm, seed] = RunFolder(Path(training.output_dir) / arm / f"seed_{seed}", configuration)
    with training.main_process_first(desc="looking for earlier runs"):
        for folder in folders.values() if training.process_index == 0 else ():
            folder.open(arms.overwrite_output_dir)
    return folders
