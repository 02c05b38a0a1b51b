"""Predictions of labels: log probabilities of every unit of some rows, by a scoring pass shared by the processes."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer

from rsft_hf.distributed import gather_lists
from rsft_hf.isolation import forked_rng, in_evaluation_mode, preserved_trainer_state
from rsft_hf.weighted.labels import IGNORED
from rsft_hf.weighted.losses import Collate, logits_of
from rsft_hf.weighted.measurement import scoring_pass


@dataclass(frozen=True)
class LabelPredictions:
    """Log probabilities of the units of some rows, ordered by row.

    Attributes:
        log_probs: Shape (U, C), float32, on the CPU.
        rows: Row of each unit, shape (U,), int64, ascending.
        labels: Label that the batches held for each unit, shape (U,), int64; -100 for none.
    """

    log_probs: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Predictor:
    """Predictor of the labels of a data set's rows.

    Attributes:
        trainer: Trainer whose processes, devices and number format are used.
        collate: Collator of the training loader.
        kind: "class", "token" or "multi_label".
        label_columns: Names under which a batch can hold labels.
        batch_size: Rows per forward pass and process.
    """

    trainer: Trainer
    collate: Collate
    kind: str
    label_columns: Sequence[str]
    batch_size: int

    def __call__(
        self, dataset: Any, order: Sequence[int], model: torch.nn.Module, seed: int, with_dropout: bool = False
    ) -> LabelPredictions:
        """Returns the predictions of some rows, equal on all processes. Collective.

        Args:
            dataset: Rows as the collator takes them.
            order: Numbers of the rows, each once, in the order of the pass.
            model: Model to ask.
            seed: Seed of dropout and of random collators and transforms.
            with_dropout: Whether dropout is on.
        """
        found: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

        def visit(batch: Any, rows: list[int], is_own: bool) -> None:
            log_probs, labels = self._predicted(model, batch)
            shape = log_probs.shape[:2]
            is_token = self.kind == "token"
            mask = _token_mask(batch, shape, labels) if is_token else torch.ones(shape, dtype=torch.bool)
            if is_own:
                units = torch.tensor(rows)[:, None].expand(mask.shape)[mask]
                known = torch.full(mask.shape, IGNORED) if labels is None else labels.reshape(mask.shape).long()
                found.append((units, log_probs[mask], known[mask]))

        with (
            forked_rng(seed),
            preserved_trainer_state(self.trainer),
            in_evaluation_mode(model),
            _training_mode(model, with_dropout),
        ):
            scoring_pass(self.trainer, dataset, self.collate, order, self.batch_size, seed, visit)
        gathered = gather_lists(self.trainer.accelerator, found)
        rows, log_probs, labels = (torch.cat(parts) for parts in zip(*gathered, strict=True))
        sorting = rows.argsort(stable=True)
        return LabelPredictions(log_probs[sorting], rows[sorting], labels[sorting])

    def _predicted(self, model: torch.nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Log probabilities, shape (B, units, C), and the labels of the batch on the CPU, if it has any."""
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"The collator returned {type(batch).__name__}; PredictionResampler needs batches by name, such as "
                "those of DataCollatorWithPadding."
            )
        labels = next((batch[name] for name in self.label_columns if name in batch), None)
        inputs = self.trainer._prepare_inputs({k: v for k, v in batch.items() if k not in self.label_columns})
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            logits = logits_of(model(**inputs))
        is_token = self.kind == "token"
        if logits is None or logits.ndim != 2 + is_token or logits.shape[-1] < (1 if self.kind == "multi_label" else 2):
            raise ValueError(
                f"PredictionResampler needs logits over the classes of each {'token' if is_token else 'row'}, and the "
                f"model gives {'none' if logits is None else f'shape {tuple(logits.shape)}'}. Load it with the head "
                "of its task, such as AutoModelForSequenceClassification."
            )
        logits = logits.float().cpu()
        if self.kind == "multi_label":
            log_probs = torch.nn.functional.logsigmoid(torch.stack((-logits, logits), dim=-1))
        else:
            log_probs = logits.log_softmax(-1) if is_token else logits.log_softmax(-1)[:, None]
        return log_probs, None if labels is None else labels.cpu()


def _token_mask(batch: Mapping[str, Any], shape: torch.Size, labels: torch.Tensor | None) -> torch.Tensor:
    """Which tokens of a batch are units, shape (B, T): those with a label, or without labels those attended to."""
    if labels is not None and labels.shape == shape:
        return labels.ne(IGNORED)
    mask = batch.get("attention_mask")
    return torch.ones(shape, dtype=torch.bool) if mask is None else mask.cpu().bool()


@contextlib.contextmanager
def _training_mode(model: torch.nn.Module, is_on: bool) -> Iterator[None]:
    """Puts all modules but batch norms into training mode, as some models call dropout as a function by their own mode.

    The caller restores every module's mode.
    """
    if is_on:
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._NormBase):
                module.eval()
    yield
