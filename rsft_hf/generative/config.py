"""Options of the generative half, validated when they are given."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import GenerationConfig

from rsft_hf.acceptance import Acceptance, TopKPerPrompt, check_acceptance
from rsft_hf.checks import check_fraction, check_integer
from rsft_hf.engines.base import Engine
from rsft_hf.engines.generation_config import check_generation_config
from rsft_hf.generative.exports import round_folders
from rsft_hf.generative.filters import Deduplicate, Filter, RejectEmpty, RejectTruncated
from rsft_hf.rewards.functions import RewardFunctions

_CHOICES = {
    "on_nothing_accepted": ("raise", "skip", "best", "reference"),
    "round_start": ("last", "base", "best"),
    "on_long_prompt": ("raise", "drop"),
}
_MINIMUM = {
    "num_candidates": 1,
    "max_attempts": 1,
    "min_accepted_per_prompt": 1,
    "every_n_epochs": 1,
    "replay_rounds": 0,
}


@dataclass(frozen=True, eq=False)
class CandidateConfig:
    """Options of `CandidateResampler`, one field per argument.

    Attributes:
        reward_funcs: One or several functions with the contract of TRL's GRPO, reward models, or names of such models.
        acceptance: Rule from rewards to accepted candidates; `TopKPerPrompt(1)`, best of n, by default.
        reward_weights: One factor per function; 1 each where None.
        reward_processing_classes: One tokenizer per reward model, None for functions.
        num_candidates: Candidates per prompt and attempt, at least 1.
        generation_config: How to sample: `GenerationConfig(do_sample=True, max_new_tokens=..., temperature=...)`. It
            overrides the model's own; what neither says is plain sampling.
        engine: "auto", "generate", or an `Engine`.
        candidates: Folder that `import_candidates` wrote, whose completions are scored and accepted in the first round
            instead of generating; several rounds where it holds folders named `round-*`.
        proposal_model: Generates instead of the trained model (a teacher); shares its tokenizer.
        reference_model: Gives log p of `DensityRatio` instead of the generating model; "base" is a PEFT model with its
            adapter off.
        merge_adapter: Whether the trained model's adapter is merged into its base while it generates: faster, and other
            candidates, since merging rounds. The base comes back bit for bit.
        filters: Candidates that one of them refuses are neither scored nor accepted.
        dedup: Which candidates of a prompt count as the same, of which the best-rewarded stays.
        max_attempts: Samplings of a prompt in a round, as long as it has fewer accepted than it should; at least 1.
        min_accepted_per_prompt: Accepted candidates below which a prompt is sampled again, or falls back.
        on_nothing_accepted: What becomes of prompts below that after the last attempt: "skip" leaves them out, "best"
            takes their best candidates, "reference" their reference answer; "raise" leaves them out too, and raises if
            nothing at all was accepted in the round.
        num_draws: Rows trained on per round; the number of prompts where None. Accepted rows are shuffled and, if they
            are fewer, repeated.
        every_n_epochs: Epochs from one round to the next; those between read the same rows in another order.
        round_start: Weights that training starts from in each round: "last" goes on, "base" goes back to those of the
            start (ReST-EM), "best" goes back to the best checkpoint before it generates.
        replay_rounds: Earlier rounds whose accepted candidates are trained on again, from 0.
        supervised_dataset: Rows with prompt and `completion`, or `input_ids` and `labels`, mixed into every round.
        supervised_fraction: Their share of the rows trained on, in [0, 1].
        prompt_column: Column of the prompts, text or messages.
        reference_column: Column of the reference answers, for `on_nothing_accepted` and `compute_metrics`.
        chat_template_kwargs: Handed to the chat template.
        max_prompt_length: Maximum number of tokens of a prompt, chat template included; where None, what the model
            reads beside `max_new_tokens`.
        on_long_prompt: Whether prompts above that are refused ("raise") or left out, counted and named ("drop").
        keep_log_probs: Whether to store log q and log p though no rule needs them.
        eval_reward_funcs: Functions that score held-out answers only, and select nothing.
        eval_generation_config: How to generate when evaluating; greedy where None.
        functions: The selecting reward functions, from `reward_funcs`, `reward_weights` and their tokenizers.
        eval_functions: The functions of `eval_reward_funcs`; None where there are none.

    Raises:
        TypeError: If a rule, filter or function is of the wrong kind.
        ValueError: If a number is out of its range, or options contradict each other.
    """

    reward_funcs: Any
    acceptance: Acceptance = field(default_factory=lambda: TopKPerPrompt(1))
    reward_weights: Sequence[float] | None = None
    reward_processing_classes: Any = None
    num_candidates: int = 8
    generation_config: GenerationConfig | None = None
    engine: str | Engine = "auto"
    candidates: Path | str | None = None
    proposal_model: Any = None
    reference_model: Any = None
    merge_adapter: bool = False
    filters: Sequence[Filter] = (RejectTruncated(), RejectEmpty())
    dedup: Deduplicate | None = None
    max_attempts: int = 1
    min_accepted_per_prompt: int = 1
    on_nothing_accepted: Literal["raise", "skip", "best", "reference"] = "raise"
    num_draws: int | None = None
    every_n_epochs: int = 1
    round_start: Literal["last", "base", "best"] = "last"
    replay_rounds: int = 0
    supervised_dataset: Any = None
    supervised_fraction: float = 0.0
    prompt_column: str = "prompt"
    reference_column: str = "reference"
    chat_template_kwargs: Mapping[str, Any] | None = None
    max_prompt_length: int | None = None
    on_long_prompt: Literal["raise", "drop"] = "raise"
    keep_log_probs: bool = False
    eval_reward_funcs: Any = ()
    eval_generation_config: GenerationConfig | None = None
    functions: RewardFunctions = field(init=False)
    eval_functions: RewardFunctions | None = field(init=False)

    def __post_init__(self) -> None:
        functions = RewardFunctions(self.reward_funcs, self.reward_weights, self.reward_processing_classes)
        has_eval = not isinstance(self.eval_reward_funcs, (list, tuple)) or len(self.eval_reward_funcs) > 0
        eval_functions = RewardFunctions(self.eval_reward_funcs) if has_eval else None
        # The dataclass is frozen: what is derived from its options is set once, here.
        vars(self).update(filters=tuple(self.filters), functions=functions, eval_functions=eval_functions)
        self._check_numbers()
        self._check_rules()
        self._check_supervised()

    @property
    def with_log_probs(self) -> bool:
        """Whether the engine has to give log q and log p."""
        return self.keep_log_probs or self.reference_model is not None or bool(self.acceptance.requires)

    @property
    def engine_log_probs(self) -> tuple[str, ...]:
        """Log probabilities that the engine has to give: log p comes from the reference model where there is one."""
        if not self.with_log_probs:
            return ()
        return ("log_q", "log_p") if self.reference_model is None else ("log_q",)

    def _check_numbers(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := vars(self)[name]) not in choices:
                raise ValueError(f"`{name}`={value!r} must be one of {', '.join(map(repr, choices))}.")
        for name, minimum in _MINIMUM.items():
            check_integer(name, vars(self)[name], minimum)
        if self.num_draws is not None:
            check_integer("num_draws", self.num_draws, 1, remedy="None stands for the number of prompts.")
        if self.max_prompt_length is not None:
            check_integer("max_prompt_length", self.max_prompt_length, 1, remedy="None stands for the model's limit.")
        if self.min_accepted_per_prompt > self.num_candidates * self.max_attempts:
            raise ValueError(
                f"`min_accepted_per_prompt`={self.min_accepted_per_prompt} can never be reached by "
                f"`num_candidates`={self.num_candidates} x `max_attempts`={self.max_attempts}."
            )

    def _check_rules(self) -> None:
        if self.merge_adapter and isinstance(self.reference_model, str):
            raise ValueError(
                f"`reference_model`={self.reference_model!r} turns off the adapter that `merge_adapter=True` has "
                "merged. Leave one of them out."
            )
        check_acceptance(self.acceptance, "`acceptance`")
        if self.candidates is not None:
            round_folders(self.candidates)
            if self.with_log_probs:
                raise ValueError(
                    f"`candidates` come without log p, which {self.acceptance!r} and `keep_log_probs` need. Take a "
                    "rule on rewards."
                )
        for rule in self.filters:
            if isinstance(rule, type) or not callable(rule):
                raise TypeError(
                    f"`filters` holds {rule!r}; a filter is an object such as RejectTruncated(), called per candidate."
                )
        if self.dedup is not None and not isinstance(self.dedup, Deduplicate):
            raise TypeError(f"`dedup` must be Deduplicate(...) or None, got {self.dedup!r}.")
        check_generation_config(self.generation_config, self.num_candidates)

    def _check_supervised(self) -> None:
        fraction, dataset = self.supervised_fraction, self.supervised_dataset
        check_fraction("supervised_fraction", fraction)
        if (dataset is None) != (fraction == 0):
            raise ValueError(
                f"`supervised_fraction`={fraction} and `supervised_dataset`={'None' if dataset is None else 'given'} "
                "contradict each other. Give both, or neither."
            )
        if dataset is not None and len(dataset) == 0:
            raise ValueError("`supervised_dataset` has no rows.")
