"""Rewards read from a model: a class of a classifier, the cosine of two embeddings, the likelihood of a way back.

Texts enter by templates, one number per completion leaves, None where a column named in a template is None. The model
runs where it is, in evaluation mode, without gradients, in batches sorted by length; nothing of it is changed.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from rsft_hf.generative.scorers.forward import Encoded, in_batches, pad_right, scoring
from rsft_hf.generative.scorers.reading import Completion, Prompt, fields_of, render
from rsft_hf.generative.scorers.reward_model import class_logits, config_of, pad_token_id

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
    """What a sequence classifier says of a completion: the logit of its only label, or how likely one class is.

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
            return in_batches([len(row["input_ids"]) for row in rows], self.batch_size, means)


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
            log_p = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            return (log_p * is_target).sum(1) / is_target.sum(1)

        with scoring(model):
            lengths = [len(row["input_ids"]) + len(row["labels"]) for row in rows]
            return in_batches(lengths, self.batch_size, means)


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
