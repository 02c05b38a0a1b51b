"""The prompts of `chatbot.py`: contexts to train on, to watch and to report on, none of them in two places.

In: options and a tokenizer. Out: rows with `prompt` (messages, the last one the user's) and `references` (what people
answered), and the tokens of those answers for supervised training.
"""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from recipes.chat_measures import REFERENCES
from recipes.common import RecipeError
from recipes.dialogue import CONTEXT, POSITIVE, as_messages, load_dialogues, sample_rows
from rsft_hf.generative.encoding import Encoder


@dataclass(frozen=True)
class ChatPrompts:
    """The contexts of a recipe.

    Attributes:
        train: All contexts that may be trained on.
        watched: Those of the curve, measured after every round.
        reported: Those of the final figures, measured once.
    """

    train: Dataset
    watched: Dataset
    reported: Dataset


def load_prompts(options: Any, tokenizer: Any) -> ChatPrompts:
    """Returns the contexts that are short enough for the model.

    Args:
        options: Has `dataset`, the names of the three splits, `max_turns`, `max_prompt_length`, `max_eval_contexts`
            and `max_test_contexts`.
        tokenizer: The chat model's.

    Raises:
        RecipeError: If a split is missing, or none of its contexts is short enough.
    """
    encoder = Encoder(tokenizer, is_encoder_decoder=False)
    found: dict[str, Dataset] = {}
    seen: set[str] = set()
    for name in ("train_split", "eval_split", "test_split"):
        dialogues = load_dialogues(options.dataset, vars(options)[name], name)
        rows = {}
        for row in dialogues:
            messages = as_messages(row[CONTEXT], options.max_turns)
            if (key := repr(messages)) in seen or key in rows:  # a context stands in the first split that has it, once
                continue
            if len(encoder.prompt_ids(messages)) <= options.max_prompt_length:
                rows[key] = {"prompt": messages, REFERENCES: row[POSITIVE]}
        if not rows:
            raise RecipeError(
                f"`--{name}` {vars(options)[name]!r} has no context of at most {options.max_prompt_length} tokens that "
                "is not in a split before it. Raise `--max_prompt_length`, or name another split."
            )
        seen |= set(rows)
        found[name] = Dataset.from_list(list(rows.values()))
    return ChatPrompts(
        found["train_split"],
        sample_rows(found["eval_split"], options.max_eval_contexts, seed=0),
        sample_rows(found["test_split"], options.max_test_contexts, seed=0),
    )


def supervised_rows(prompts: Dataset, tokenizer: Any) -> Dataset:
    """Returns every context with each of its human responses as token ids, the loss on the response alone."""
    encoder = Encoder(tokenizer, is_encoder_decoder=False)
    rows = []
    for row in prompts:
        prompt_ids = encoder.prompt_ids(row["prompt"])
        rows += [
            encoder.training_row(prompt_ids, encoder.completion_ids(row["prompt"], text)) for text in row[REFERENCES]
        ]
    return Dataset.from_list(rows)
