"""A sequence-classification model with one label, as the reward contract takes it: a model object or its path.

Prompts and completions enter, the logit of each pair leaves. The text is the prompt followed by the completion (by the
reward model's own chat template if the prompt is a conversation), without further special tokens, as in TRL's GRPO.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedConfig

from rsft_hf.generative.scorers.forward import Encoded, in_batches, pad_right, scoring
from rsft_hf.generative.scorers.reading import Completion, Prompt


@dataclass(frozen=True, eq=False)
class RewardModel:
    """The single logit of a reward model, read over the prompt and the completion together.

    Raises:
        ValueError: If the model has another number of labels than one, or the tokenizer no token to pad with.
    """

    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    batch_size: int = 16
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    name: str = "reward_model"
    requires: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if (num_labels := config_of(self.model).num_labels) != 1:
            raise ValueError(
                f"Reward model `{self.name}` has {num_labels} labels, a reward is one number. For the "
                "score of one class use ModelReward(model, tokenizer, label=...)."
            )
        pad_token_id(self.tokenizer)

    def __call__(self, *, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float]:
        """Returns the logits, one per completion."""
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        encoded = [self.tokenizer(text, add_special_tokens=False) for text in texts]
        return [float(row[0]) for row in class_logits(self.model, self.tokenizer, encoded, self.batch_size)]

    def _text(self, prompt: Prompt, completion: Completion) -> str:
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        return self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False, **self.chat_template_kwargs)


def class_logits(model: nn.Module, tokenizer: Any, rows: Sequence[Encoded], batch_size: int) -> list[torch.Tensor]:
    """Returns the logits of each encoded text, float32 on the CPU, shape (labels,), whatever batches it shared.

    Args:
        model: A sequence-classification model.
        tokenizer: Says what to pad with.
        rows: What the tokenizer returned for each text.
        batch_size: Most texts in a batch.
    """
    config, filler = config_of(model).get_text_config(), pad_token_id(tokenizer)
    device = next(model.parameters()).device
    kept = config.pad_token_id
    # A decoder is read at the last token that is no padding, which it knows from its configuration.
    config.pad_token_id = filler
    try:
        with scoring(model):
            return in_batches(
                [len(row["input_ids"]) for row in rows],
                batch_size,
                lambda batch: model(**pad_right([rows[row] for row in batch], filler, device)).logits.float(),
            )
    finally:
        config.pad_token_id = kept


def load_reward_model(path: str) -> nn.Module:
    """Returns the sequence-classification model with one label at `path`, a folder or a name on the hub.

    Raises:
        ValueError: If the checkpoint lacks weights of the model, whose rewards would then be noise.
    """
    with torch.random.fork_rng(devices=[]):  # a head is initialised before it is loaded
        model, found = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(
            f"The reward model `{path}` lacks the weights {sorted(found['missing_keys'])}, so that its rewards would "
            "be noise. Pass a sequence-classification model that was trained as a reward model."
        )
    return model


def config_of(model: nn.Module) -> Any:
    """Returns the configuration of a transformers model, also of one that is compiled or has an adapter.

    Raises:
        TypeError: If the module has none, so that nothing says how to read a reward from it.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise TypeError(
            f"The reward {type(model).__name__} is a module without a transformers configuration. Pass a "
            "sequence-classification model, or a function that calls the module."
        )
    return config


def model_name(model: nn.Module) -> str:
    """Returns the last part of the path or hub name a model came from, or its class where it has none."""
    return str(config_of(model).name_or_path).rstrip("/").split("/")[-1] or type(model).__name__


def load_tokenizer(model: nn.Module, name: str) -> Any:
    """Returns the tokenizer saved beside a model.

    Raises:
        ValueError: If the model does not say where it came from.
    """
    if not (path := config_of(model).name_or_path):
        raise ValueError(
            f"Reward model `{name}` does not say where its tokenizer is. Pass `reward_processing_classes`."
        )
    return AutoTokenizer.from_pretrained(path)


def pad_token_id(tokenizer: Any) -> int:
    """Returns the id to pad with: the padding token's, or that of the end of text where there is none.

    Raises:
        ValueError: If the tokenizer has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError(f"{type(tokenizer).__name__} has no `pad_token` and no `eos_token`. Set `tokenizer.pad_token`.")
