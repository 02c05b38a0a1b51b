"""What judges a translation: its reference, nothing but itself and other models, or a verifier.

In: options. Out: reward functions. It knows no data set but the builtin one, whose verifier it names.
"""

from typing import Any

from transformers import AutoModel, AutoModelForSeq2SeqLM, AutoTokenizer

from recipes.builtin_numbers import names_the_number
from recipes.common import RecipeError
from rsft_hf.rewards import ChrfReward, CopyPenalty, RepetitionPenalty, RoundTripReward, SimilarityReward

REWARDS = ("chrf", "free", "verifier")


def make_rewards(options: Any) -> list[Any]:
    """Returns the reward functions; their sum judges a translation.

    "chrf" is the sentence's chrF against its reference. "free" reads no reference: how well a model of the way back
    recovers the sentence (nats per token), how near an encoder of both languages puts the two, less what is repeated
    or copied. "verifier" reads the number words of the builtin task.

    Args:
        options: Has `reward`, `dataset`, `reverse_model` and `similarity_model`.

    Raises:
        RecipeError: If the reward is unknown, does not fit the data set, or lacks its models.
    """
    if options.reward not in REWARDS:
        raise RecipeError(f"`--reward` {options.reward!r} is unknown. Use one of {', '.join(REWARDS)}.")
    is_builtin = options.dataset == "builtin"
    if options.reward == "verifier":
        if not is_builtin:
            raise RecipeError("`--reward verifier` reads the number words of `--dataset builtin`. Use chrf or free.")
        return [names_the_number]
    if options.reward == "chrf":
        if is_builtin:
            raise RecipeError("`--reward chrf` needs references, which the builtin prompts lack. Use verifier or free.")
        return [ChrfReward()]
    if options.reverse_model is None and options.similarity_model is None:
        raise RecipeError("`--reward free` needs `--reverse_model`, `--similarity_model`, or both.")
    functions: list[Any] = [RepetitionPenalty(), CopyPenalty()]
    if options.reverse_model is not None:
        functions.append(RoundTripReward(*_load(AutoModelForSeq2SeqLM, "reverse_model", options.reverse_model)))
    if options.similarity_model is not None:
        functions.append(SimilarityReward(*_load(AutoModel, "similarity_model", options.similarity_model)))
    return functions


def _load(kind: Any, option: str, name: str) -> tuple[Any, Any]:
    try:
        return kind.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(
            f"`--{option}` {name!r} could not be loaded ({reason}). Give a folder or hub name."
        ) from error
