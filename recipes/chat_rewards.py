"""What a good response is, for `chatbot.py`: relevant, consistent with its context, new, of a fair length.

In: options. Out: reward functions that select candidates, with their weights, and a judge that selects nothing. All of
them lie in [-1, 1], so that the weights say what counts.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import AutoModel, AutoTokenizer

import recipes.two_towers  # noqa: F401 - registers the architecture, so that a saved model is found
from recipes.common import RecipeError, option
from rsft_hf.rewards.functions import RewardFunctions
from rsft_hf.rewards.model_rewards import RewardModel, SimilarityReward, load_reward_model
from rsft_hf.rewards.templates import Completion, Prompt
from rsft_hf.rewards.text_rewards import CopyPenalty, LengthWindow, RepetitionPenalty

SHORTEST_COPY = 3  # words in a row that are taken from the context


@dataclass(frozen=True, eq=False)
class Relevance:
    """Probability, under a reward model with one logit, that the response belongs to its context, in (0, 1)."""

    model: RewardModel
    name: str = "relevance"
    requires: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, *, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float]:
        """Returns the probability of each completion."""
        logits = self.model(prompts=prompts, completions=completions)
        return [(1 + math.tanh(logit / 2)) / 2 for logit in logits]  # the logistic function, without overflow


@dataclass
class ChatRewardArguments:
    """What selects the candidates, and what judges the outcome."""

    reward_model: str = option("outputs/reward_model_a", "Reward model that selects: a folder of reward_model.py.")
    judge_model: str = option("outputs/reward_model_b", "Reward model that only judges, trained on other data.")
    encoder: str = option("sentence-transformers/all-MiniLM-L6-v2", "Sentence encoder of the consistency reward.")
    relevance_weight: float = option(1.0, "Weight of the reward model's probability, in [0, 1].")
    consistency_weight: float = option(0.2, "Weight of the cosine of context and response; 0 loads no encoder.")
    novelty_weight: float = option(0.5, "Weight of the penalties for copied and for repeated words, in [-1, 0].")
    length_weight: float = option(0.2, "Weight of a length inside the window, in [0, 1].")
    min_words: int = option(4, "Shortest response inside the window.")
    max_words: int = option(25, "Longest response inside the window.")
    reward_batch_size: int = option(32, "Responses that a reward model reads at a time.")

    def __post_init__(self) -> None:
        if self.reward_model == self.judge_model:
            raise RecipeError(
                f"`--judge_model` {self.judge_model!r} is the model that selects. Train a second one on the other half "
                "of the contexts: recipes/reward_model.py --half b."
            )
        if not any(vars(self)[f"{name}_weight"] for name in ("relevance", "consistency", "novelty", "length")):
            raise RecipeError("`--relevance_weight` and the other weights are all 0: nothing is left to select by.")
        if not 0 <= self.min_words <= self.max_words:
            raise RecipeError(f"`--min_words` {self.min_words} must lie in [0, max_words], and max_words is "
                              f"{self.max_words}.")  # fmt: skip


def selecting_functions(options: ChatRewardArguments) -> tuple[list[Any], list[float]]:
    """Returns the reward functions that select, without those of weight 0, and their weights.

    Raises:
        RecipeError: If a model cannot be loaded.
    """
    weighted: list[tuple[Any, float]] = []
    if options.relevance_weight:
        model = load_relevance(options.reward_model, "reward_model", options.reward_batch_size)
        weighted.append((model, options.relevance_weight))
    if options.consistency_weight:
        weighted.append((_load_consistency(options), options.consistency_weight))
    if options.novelty_weight:
        weighted.append((CopyPenalty(SHORTEST_COPY), options.novelty_weight))
        weighted.append((RepetitionPenalty(), options.novelty_weight))
    if options.length_weight:
        window = LengthWindow(options.min_words, options.max_words, ramp=max(1, options.min_words))
        weighted.append((window, options.length_weight))
    return [function for function, _ in weighted], [weight for _, weight in weighted]


def load_judge(options: ChatRewardArguments) -> RewardFunctions:
    """Returns the reward model that selects nothing, as a reward of its own."""
    return RewardFunctions([load_relevance(options.judge_model, "judge_model", options.reward_batch_size)])


def load_relevance(path: str, option_name: str, batch_size: int) -> Relevance:
    """Returns a saved reward model as a probability.

    Raises:
        RecipeError: If there is none at `path`.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = RewardModel(load_reward_model(path), tokenizer, batch_size)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"`--{option_name}` {path!r} could not be loaded ({str(error).splitlines()[0]}). Train one with "
            "recipes/reward_model.py, or give the folder or hub name of one."
        ) from error
    if tokenizer.chat_template is None:
        raise RecipeError(f"`--{option_name}` {path!r} has no chat template: it cannot be asked about a dialogue.")
    return Relevance(model)


def _load_consistency(options: ChatRewardArguments) -> SimilarityReward:
    try:
        encoder, tokenizer = AutoModel.from_pretrained(options.encoder), AutoTokenizer.from_pretrained(options.encoder)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"`--encoder` {options.encoder!r} could not be loaded ({str(error).splitlines()[0]}). Give a folder or a "
            "hub name, or do without: --consistency_weight 0."
        ) from error
    templates = ("{prompt}", "{completion}")
    return SimilarityReward(encoder, tokenizer, templates, options.reward_batch_size, name="consistency")
