"""Rewards from models: reward model, class probability, embedding similarity, round-trip likelihood.

Texts are built by templates; a completion whose template names a column that is None gets None. Models run where they
are, in evaluation mode, without gradients, in length-sorted batches. `RewardModel` reads the single logit of a
sequence-classification model over prompt and completion (through the reward model's chat template if the prompt is a
conversation), without further special tokens, as TRL's GRPO does.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedConfig

from rsft_hf.checks import check_integer
from rsft_hf.engines.log_probs import chosen_log_probabilities
from rsft_hf.isolation import in_evaluation_mode
from rsft_hf.memory import map_in_batches
from rsft_hf.rewards.templates import Completion, Prompt, fields_of, render

logger = logging.getLogger(__name__)

Encoded = Mapping[str, Sequence[int]]


@contextlib.contextmanager
def scoring(model: torch.nn.Module) -> Iterator[None]:
    """Turns dropout and gradients off inside the block; every module gets its own mode back."""
    with in_evaluation_mode(model), torch.no_grad():
        yield


def pad_right(rows: Sequence[Encoded], pad_token_id: int, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Returns a batch of encoded texts, each tensor of shape (rows, longest row), int64.

    Args:
        rows: What a tokenizer returned for each text: `input_ids`, `attention_mask` and perhaps `token_type_ids`.
        pad_token_id: Fills `input_ids`; everything else is filled with 0.
        device: Where the batch goes.

    Example:
        >>> pad_right([{"input_ids": [5, 6]}, {"input_ids": [7]}], 1, "cpu")["input_ids"].tolist()
        [[5, 6], [7, 1]]
    """
    fill = {"input_ids": pad_token_id}
    return {
        key: pad_sequence([torch.tensor(row[key]) for row in rows], True, fill.get(key, 0)).to(device)
        for key in rows[0]
    }


@dataclass(frozen=True, eq=False)
class RewardModel:
    """The single logit of a reward model, read over the prompt and the completion together.

    Attributes:
        model: Sequence classifier with one label.
        tokenizer: Tokenizer of the model, with a chat template for conversations.
        batch_size: Maximum number of texts in a forward pass, at least 1.
        chat_template_kwargs: Arguments of the chat template.
        name: Name of the reward in logs and stored candidates.

    Raises:
        ValueError: If the model has another number of labels than one, the tokenizer no token to pad with, or
            `batch_size` is below 1.
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
        check_integer("batch_size", self.batch_size, minimum=1)
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
    """Returns the logits of each encoded text, float32 on the CPU, shape (labels,), independent of its batch.

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
            return map_in_batches(
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


Value = Literal["log_probability", "probability", "logit"]

VALUES = ("log_probability", "probability", "logit")

_NO_LIMIT = 10**6  # a tokenizer that knows no limit says 10^30


class _Templated:
    """A reward of texts that templates make."""

    templates: Any

    @property
    def requires(self) -> frozenset[str]:
        """The columns that the templates name."""
        return fields_of(*self.templates)


@dataclass(frozen=True, eq=False)
class ModelReward(_Templated):
    """Reward from a sequence classifier: the logit of its only label, or the probability of one class.

    Attributes:
        model: A sequence-classification model.
        tokenizer: Its tokenizer; its special tokens are added and long texts are cut at `model_max_length`.
        label: None for a model with one label; otherwise the number or name of the class that is rewarded.
        value: "log_probability" (nats, <= 0), "probability", or "logit"; for `label=None` always the logit.
        templates: One text, or a pair of texts: of {prompt}, {last_turn}, {completion} and columns of the prompts.
        batch_size: Most texts in a batch.

    Raises:
        ValueError: If `label`, `value` or `templates` do not fit the model.
    """

    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    label: int | str | None = None
    value: Value = "log_probability"
    templates: tuple[str, ...] = ("{prompt}", "{completion}")
    batch_size: int = 16
    name: str = "model"

    def __post_init__(self) -> None:
        if self.value not in VALUES:
            raise ValueError(f'`value`="{self.value}" must be one of {list(VALUES)}.')
        if not isinstance(self.templates, (tuple, list)) or len(self.templates) not in (1, 2):
            raise ValueError(f'`templates`={self.templates!r} must hold one text or two, as ("{{completion}}",).')
        fields_of(*self.templates)
        self._position()
        pad_token_id(self.tokenizer)

    def __call__(self, *, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float | None]:
        """Returns the logit, log-probability or probability for each completion."""
        texts = [render(template, prompts, completions, columns) for template in self.templates]
        judged = [row for row in range(len(completions)) if all(text[row] is not None for text in texts)]
        encoded = [_encode(self.tokenizer, *(text[row] for text in texts)) for row in judged]
        logits = class_logits(self.model, self.tokenizer, encoded, self.batch_size)
        return _in_place(judged, [self._read(row) for row in logits], len(completions))

    def _read(self, logits: torch.Tensor) -> float:
        position, config = self._position(), config_of(self.model)
        if self.label is None or self.value == "logit":
            return float(logits[position])
        is_multi_label = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        log_p = F.logsigmoid(logits) if is_multi_label else logits.log_softmax(0)
        return float(log_p[position].exp() if self.value == "probability" else log_p[position])

    def _position(self) -> int:
        names = {int(number): str(name) for number, name in config_of(self.model).id2label.items()}
        if self.label is None and len(names) > 1:
            raise ValueError(f"`label` is None, but the model has {len(names)} classes: {names}. Name one of them.")
        by_label: dict[int | str | None, int] = {None: 0}
        for number, name in names.items():
            by_label |= {name: number, number: number}
        position = by_label.get(self.label)
        if position is None:
            raise ValueError(f"`label`={self.label!r} is not among the classes of the model: {names}.")
        return position


@dataclass(frozen=True, eq=False)
class SimilarityReward(_Templated):
    """Cosine of two embedded texts, in [-1, 1]: the mean of an encoder's last hidden states over the tokens.

    Sentence-BERT, Reimers & Gurevych 2019, arXiv:1908.10084.

    Attributes:
        model: An encoder that returns `last_hidden_state`.
        tokenizer: Its tokenizer; long texts are cut at `model_max_length`.
        templates: The two texts: of {prompt}, {last_turn}, {completion} and columns of the prompts.
        batch_size: Most texts in a batch.

    Raises:
        ValueError: If `templates` are not two.
    """

    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    templates: tuple[str, str] = ("{last_turn}", "{completion}")
    batch_size: int = 32
    name: str = "similarity"

    def __post_init__(self) -> None:
        if not isinstance(self.templates, (tuple, list)) or len(self.templates) != 2:
            raise ValueError(f"`templates`={self.templates!r} must hold the two texts to compare.")
        fields_of(*self.templates)
        pad_token_id(self.tokenizer)

    def __call__(self, *, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float | None]:
        """Returns the cosine of each pair; a text that comes back is embedded once."""
        first, second = (render(template, prompts, completions, columns) for template in self.templates)
        texts = list(dict.fromkeys(text for text in (*first, *second) if text is not None))
        vectors = dict(zip(texts, self._embed(texts), strict=True))
        return [
            None if a is None or b is None else float(vectors[a] @ vectors[b])
            for a, b in zip(first, second, strict=True)
        ]

    def _embed(self, texts: list[str]) -> list[torch.Tensor]:
        rows = [_encode(self.tokenizer, text) for text in texts]
        model, filler = self.model, pad_token_id(self.tokenizer)

        def means(batch: list[int]) -> torch.Tensor:
            inputs = pad_right([rows[row] for row in batch], filler, _device(model))
            mask = inputs["attention_mask"].unsqueeze(-1).float()
            states = model(**inputs).last_hidden_state.float() * mask
            return F.normalize(states.sum(1) / mask.sum(1).clamp(min=1), dim=-1)

        with scoring(model):
            return map_in_batches([len(row["input_ids"]) for row in rows], self.batch_size, means)


@dataclass(frozen=True, eq=False)
class RoundTripReward(_Templated):
    """Mean log-likelihood per token, in nats, of the prompt given the completion, under a model of the way back.

    Attributes:
        model: An encoder-decoder model or a causal one.
        tokenizer: Its tokenizer.
        templates: What is given and what is to be recovered. A causal model reads them one after the other.
        batch_size: Most texts in a batch.

    Raises:
        ValueError: If `templates` are not two.
    """

    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    templates: tuple[str, str] = ("{completion}", "{last_turn}")
    batch_size: int = 16
    name: str = "round_trip"

    def __post_init__(self) -> None:
        if not isinstance(self.templates, (tuple, list)) or len(self.templates) != 2:
            raise ValueError(f"`templates`={self.templates!r} must hold two texts: given, and to be recovered.")
        fields_of(*self.templates)
        pad_token_id(self.tokenizer)

    def __call__(self, *, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float | None]:
        """Returns the mean log-likelihood for each completion, <= 0; None if there is no token to recover."""
        given, wanted = (render(template, prompts, completions, columns) for template in self.templates)
        is_seq2seq = bool(config_of(self.model).is_encoder_decoder)
        rows: dict[int, Encoded] = {}
        for index, (source, target) in enumerate(zip(given, wanted, strict=True)):
            if source is not None and target is not None:
                row = (_source_and_target if is_seq2seq else _one_text)(self.tokenizer, source, target)
                if any(label != -100 for label in row["labels"]):
                    rows[index] = row
        means = self._means(list(rows.values()), is_seq2seq)
        return _in_place(list(rows), [float(mean) for mean in means], len(completions))

    def _means(self, rows: list[Encoded], is_seq2seq: bool) -> list[torch.Tensor]:
        model, filler = self.model, pad_token_id(self.tokenizer)

        def means(batch: list[int]) -> torch.Tensor:
            texts = [{key: rows[row][key] for key in rows[row] if key != "labels"} for row in batch]
            inputs = pad_right(texts, filler, _device(model))
            labels = pad_right([{"input_ids": rows[row]["labels"]} for row in batch], -100, _device(model))["input_ids"]
            if is_seq2seq:
                logits = model(**inputs, labels=labels.clone()).logits
            else:
                logits, labels = model(**inputs).logits[:, :-1], labels[:, 1:]
            is_target = labels != -100
            log_p = chosen_log_probabilities(logits, labels)
            return (log_p * is_target).sum(1) / is_target.sum(1)

        with scoring(model):
            lengths = [len(row["input_ids"]) + len(row["labels"]) for row in rows]
            return map_in_batches(lengths, self.batch_size, means)


def _encode(tokenizer: Any, *texts: Any) -> Encoded:
    limit = tokenizer.model_max_length
    return tokenizer(*texts, truncation=limit < _NO_LIMIT)


def _source_and_target(tokenizer: Any, source: str, target: str) -> Encoded:
    return {**_encode(tokenizer, source), "labels": tokenizer(text_target=target)["input_ids"]}


def _one_text(tokenizer: Any, source: str, target: str) -> Encoded:
    # Tokenized apart, so that the border is known; neither is cut, which would lose the target.
    given = tokenizer(source)["input_ids"]
    wanted = tokenizer(target, add_special_tokens=False)["input_ids"]
    ids = [*given, *wanted]
    labels = [*[-100] * len(given), *wanted] if given else [-100, *wanted[1:]]  # nothing predicts a first token
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _in_place(positions: list[int], values: list[float], length: int) -> list[float | None]:
    placed = dict(zip(positions, values, strict=True))
    return [placed.get(position) for position in range(length)]
