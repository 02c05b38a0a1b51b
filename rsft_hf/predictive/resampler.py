"""PredictionResampler: labels of unlabelled rows are drawn from the model's own predictions, by rejection sampling.

unlabelled rows -> the model, or the average of its weights -> q(y|x) -> confident enough? -> y ~ q(y|x)
    -> accepted with p(y|x) / (M(x) q(y|x)) -> with the labelled rows in a set share -> shuffled
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from transformers import Trainer
from transformers.utils import logging

from rsft_hf.checkpointing import load_state, save_state, validate_unchanged
from rsft_hf.checks import check_fraction, check_integer, check_interval
from rsft_hf.distributed import FailTogether, broadcast_from_main, run_seed
from rsft_hf.engines.model_access import is_sharded, unwrapped
from rsft_hf.predictive.acceptance import Decisions, decide, expected_calibration_error, is_confident
from rsft_hf.predictive.ema import EmaTeacher
from rsft_hf.predictive.pool import InputRows, PseudoLabels, SemiLabelledRows, write_round
from rsft_hf.predictive.predictions import LabelPredictions, Predictor
from rsft_hf.predictive.targets import Proposals, Sharpened, Target
from rsft_hf.predictive.validation import (
    class_order,
    label_column,
    label_kind,
    labelled_units,
    validate_rows,
)
from rsft_hf.rejection import MANY_REPEATS, rejection_sample, sample_parts
from rsft_hf.resampler import Resampler
from rsft_hf.training_set import dataset_fingerprint, example_lengths
from rsft_hf.weighted.labels import IGNORED, as_list, class_names, label_names
from rsft_hf.weighted.measurement import trained_model, training_loader

logger = logging.get_logger(__name__)


class PredictionResampler(Resampler):
    """Resampler that trains on labelled rows and on others whose labels the model draws anew, round by round.

    For each proposed row a label is drawn from q(y|x) = softmax(logits / temperature) and accepted with probability
    p(y|x) / (M(x) q(y|x)), M(x) = max over y of p / q: accepted labels of a row follow the target p. Self-training by
    pseudo-labels, Lee 2013 and Xie et al. 2020, arXiv:1911.04252; the sampling is ours.

    Args:
        unlabelled_dataset: Rows as those of `train_dataset`, with or without the label column, which is not read; for
            tokens it marks those that have a label, as in `train_dataset`. None with `doubtful_rows`.
        target: p, an object such as Sharpened(0.5), the default, or a function of `Proposals`.
        temperature: Of the proposal, above 0. Above 1 more labels are tried, and fewer accepted.
        min_confidence: Largest probability (of temperature 1) below which a row is proposed no label, one number or one
            per class, in [0, 1]; none where None. Sohn et al. 2020, arXiv:2001.07685 (FixMatch).
        confidence_quantile: Share of the rows of each predicted class, in [0, 1), that are proposed no label, the least
            confident first. Zou et al. 2018, arXiv:1810.07911 (class-balanced self-training).
        accepts_tokens: Whether the label of a token is accepted or rejected alone; by default a row's all together.
        pseudo_fraction: Share of an epoch's rows that have drawn labels, in (0, 1).
        num_draws: Rows per epoch; by default as many as read each labelled row once beside the share.
        num_proposals: Unlabelled rows that a round proposes labels for, drawn at random; all where None.
        every_n_epochs: Epochs from one round to the next.
        warmup_epochs: Epochs at the start that read labelled rows only, at least 1 unless the model knows the classes.
        ema_decay: Decay of the average of the trained weights that proposes instead of the model, in [0, 1); None
            proposes by the model itself. Tarvainen & Valpola 2017, arXiv:1703.01780 (mean teacher).
        doubtful_rows: Labelled rows whose labels are drawn, too: numbers, as of a `LabelReport`, or a mask of all rows.
        reference_column: Column of the unlabelled rows with their true labels, for the logged accuracy alone.
        batch_size: Rows per forward pass and process; `per_device_eval_batch_size` by default.

    Raises:
        TypeError: If the target cannot be called.
        ValueError: If a number is out of its range, or there is nothing to label.
    """

    def __init__(
        self,
        unlabelled_dataset: Any = None,
        target: Target | Callable[[Proposals], torch.Tensor] | None = None,
        *,
        temperature: float = 1.0,
        min_confidence: float | Sequence[float] | None = None,
        confidence_quantile: float | None = None,
        accepts_tokens: bool = False,
        pseudo_fraction: float = 0.5,
        num_draws: int | None = None,
        num_proposals: int | None = None,
        every_n_epochs: int = 1,
        warmup_epochs: int = 1,
        ema_decay: float | None = None,
        doubtful_rows: Sequence[int] = (),
        reference_column: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.unlabelled_dataset = () if unlabelled_dataset is None else unlabelled_dataset
        self.target: Any = Sharpened() if target is None else target
        self.temperature, self.min_confidence = temperature, as_list(min_confidence)
        self.confidence_quantile, self.accepts_tokens = confidence_quantile, accepts_tokens
        self.pseudo_fraction, self.num_draws, self.num_proposals = pseudo_fraction, num_draws, num_proposals
        self.every_n_epochs, self.warmup_epochs, self.ema_decay = every_n_epochs, warmup_epochs, ema_decay
        self.doubtful_rows = _row_numbers(doubtful_rows)
        self.reference_column, self.batch_size = reference_column, batch_size
        _check_options(self)
        self._rows: SemiLabelledRows | None = None
        self.teacher: EmaTeacher | None = None

    def bind(self, trainer: Trainer) -> SemiLabelledRows:
        """Returns the labelled rows with the unlabelled ones behind them. Collective."""
        self.trainer, self.seed = trainer, run_seed(trainer)
        validate_rows(self, trainer)
        self._column = label_column(trainer, trainer.train_dataset[0])
        self.kind = label_kind(trainer.train_dataset[0][self._column])
        if self.accepts_tokens and self.kind != "token":
            raise ValueError(
                f"`accepts_tokens=True` goes with a list of classes per row, and the labels are of kind {self.kind!r}. "
                "Leave it out."
            )
        columns = dict.fromkeys([self._column, *label_names(trainer)])
        rows = trainer.train_dataset, self.unlabelled_dataset, self.doubtful_rows
        self._rows = SemiLabelledRows(*rows, list(columns), self.kind)
        if not self._rows.num_labelled:
            raise ValueError("`doubtful_rows` holds all rows of `train_dataset`: none is left to learn from.")
        self._prior: torch.Tensor | None = None
        self._metrics: dict[str, float] = {}
        self._step, self.teacher = 0, None
        if self.ema_decay is not None:
            if is_sharded(trainer.model) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
                raise ValueError(
                    "`ema_decay` averages whole weights, and these are sharded over the processes. Leave it out."
                )
            self.teacher = EmaTeacher(unwrapped(trainer.model), self.ema_decay)
        return self._rows

    def draws_per_epoch(self) -> int:
        """Returns `num_draws`, or the number of draws of which the labelled rows are the share that is not drawn."""
        if self.num_draws is not None:
            return self.num_draws
        return max(1, round(self._bound().num_labelled / (1 - self.pseudo_fraction)))

    def resample(self, epoch: int) -> torch.Tensor:
        """Returns the rows of the epoch, after new proposals where they are due. Collective."""
        rows, self._metrics = self._bound(), {}
        self._follow()
        number, remainder = divmod(epoch - self.warmup_epochs, self.every_n_epochs)
        if epoch >= self.warmup_epochs and remainder == 0:
            self._run_round(number)
        generator = torch.Generator().manual_seed((self.seed + epoch) % 2**62)
        accepted = rows.pseudo.accepted_rows()
        num_draws = self.draws_per_epoch()
        num_pseudo = min(round(self.pseudo_fraction * num_draws), num_draws - 1) if len(accepted) else 0
        labelled = torch.arange(rows.num_labelled), torch.ones(rows.num_labelled), num_draws - num_pseudo
        if num_pseudo:
            if num_pseudo > MANY_REPEATS * len(accepted):
                logger.warning(
                    f"The {len(accepted)} rows with accepted labels are each read {num_pseudo / len(accepted):.0f} "
                    f"times to fill {num_pseudo} draws. Accept more of them, or lower `pseudo_fraction`."
                )
            drawn = rows.num_labelled + accepted, torch.ones(len(accepted)), num_pseudo
            indices = sample_parts([labelled, drawn], generator)
        else:  # a plain Trainer permutes epoch e with this seed, too: it reads the same rows
            indices = rejection_sample(*labelled[1:], generator)
        self._metrics["drawn"] = num_pseudo
        return broadcast_from_main(self.trainer.accelerator, indices)

    def metrics(self) -> dict[str, float]:
        """Returns the figures of the epoch's proposals, and the number of its rows with drawn labels."""
        return {f"pseudo_labels/{name}": float(value) for name, value in self._metrics.items()}

    @property
    def observes_rows(self) -> bool:
        """Whether training steps move the average of the weights."""
        return self.teacher is not None

    @contextlib.contextmanager
    def observe_loss(self, model: torch.nn.Module, rows: Sequence[int], is_known: bool = False) -> Iterator[None]:
        """Takes the weights of the last step into the average, before the next one is computed."""
        self._follow()
        yield

    def save(self, directory: Path, is_writer: bool) -> None:
        """Writes the accepted labels and the average of the weights. Collective."""
        rows, teacher = self._bound(), self.teacher
        numbers = {
            "seed": self.seed,
            "metrics": self._metrics,
            "step": self._step,
            "num_updates": 0 if teacher is None else teacher.num_updates,
            "settings": self._settings(),
        }
        if is_writer:
            averages = {} if teacher is None else teacher.state()
            save_state(directory, "predictive", numbers, rows.pseudo.state() | averages)

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote.

        Raises:
            ValueError: If it was saved with other unlabelled rows, or with or without an average of the weights.
        """
        numbers, tensors = load_state(directory, "predictive")
        validate_unchanged(numbers["settings"], self._settings())
        self.seed, self._metrics, self._step = numbers["seed"], numbers["metrics"], numbers["step"]
        self._bound().pseudo = PseudoLabels(tensors["pseudo_values"], tensors["pseudo_rows"], self.kind)
        if self.teacher is not None:
            self.teacher.load(tensors, numbers["num_updates"])

    def __repr__(self) -> str:
        return f"PredictionResampler({self.target!r}, pseudo_fraction={self.pseudo_fraction:g})"

    def _bound(self) -> SemiLabelledRows:
        if self._rows is None:
            raise RuntimeError("The resampler is not bound to a trainer yet. Pass it as `resampler=` and call train().")
        return self._rows

    def _settings(self) -> dict[str, Any]:
        dataset = self.unlabelled_dataset
        return {
            "unlabelled rows": len(dataset),
            "fingerprint of the unlabelled rows": dataset_fingerprint(dataset) if len(dataset) else None,
            "doubtful rows": list(self.doubtful_rows),
            "ema_decay": self.ema_decay,
        }

    def _follow(self) -> None:
        """Takes the weights into the average if a step has been made since the last time."""
        if self.teacher is not None and self._step != self.trainer.state.global_step:
            self._step = self.trainer.state.global_step
            self.teacher.update()

    def _run_round(self, number: int) -> None:
        """Proposes labels to unlabelled rows and accepts some. Collective."""
        rows, accelerator = self._bound(), self.trainer.accelerator
        # Far from the seeds of the epochs, which are seed + epoch.
        generator = torch.Generator().manual_seed((self.seed + 2**40 + number) % 2**62)
        order = torch.randperm(rows.num_unlabelled, generator=generator)[: self.num_proposals]
        with contextlib.nullcontext() if self.teacher is None else self.teacher.applied():
            predictions, log_p = self._predict(order.sort().values)
        log_q = (predictions.log_probs.double() / self.temperature).log_softmax(1)
        decision_of = self._decisions(predictions.rows)
        decisions = decide(log_q, log_p, decision_of, generator)
        # Broadcast: sums may differ in the last bit between machines.
        decisions = Decisions(*(broadcast_from_main(accelerator, one) for one in decisions))
        kept = self._confident(predictions, decision_of)
        is_accepted = decisions.is_accepted & kept[decision_of]
        labels = torch.where(is_accepted, decisions.labels, IGNORED)
        rows.pseudo = PseudoLabels(labels, predictions.rows, self.kind)
        facts = _RoundFacts(predictions, decisions, is_accepted, self._references(predictions.rows))
        self._metrics = facts.metrics(kept)
        with FailTogether(accelerator, "writing the proposed labels"):
            if accelerator.is_main_process:
                write_round(Path(self.trainer.args.output_dir), number, facts.columns(self.kind))
        if not bool(is_accepted.any()):
            logger.warning(
                f"Round {number} accepted no label of {len(order)} rows, so its epochs read labelled rows only. Lower "
                "`min_confidence` or `temperature`, or take a target nearer to the predictions."
            )

    def _predict(self, rows: torch.Tensor) -> tuple[LabelPredictions, torch.Tensor]:
        """Predictions of some unlabelled rows, and log p of their units."""
        trainer = self.trainer
        size = self.batch_size or trainer.args.per_device_eval_batch_size
        predictor = Predictor(trainer, training_loader(trainer).collate_fn, self.kind, label_names(trainer), size)
        inputs = InputRows(self._bound())
        lengths = example_lengths(self.unlabelled_dataset, trainer.args.length_column_name) or []
        lengths = [*lengths, *[0] * (len(inputs) - len(lengths))]
        order = sorted(rows.tolist(), key=lambda row: -lengths[row])
        trained = trained_model(trainer)

        def predict(
            model: torch.nn.Module | None = None, seed: int = 0, with_dropout: bool = False
        ) -> LabelPredictions:
            if model is not None:
                model.to(trainer.args.device)
            found = predictor(inputs, order, model or trained, self.seed + seed, with_dropout)
            places = None if model is None else class_order(trained, model, self.kind)
            return found if places is None else replace(found, log_probs=found.log_probs[:, places])

        def held_out(dataset: Any) -> tuple[torch.Tensor, torch.Tensor]:
            found = predictor(dataset, range(len(dataset)), trained, self.seed)
            is_labelled = found.labels != IGNORED
            return found.log_probs[is_labelled], found.labels[is_labelled]

        predictions = predict()
        if self._prior is None:
            num_classes = predictions.log_probs.shape[1]
            self._prior = labelled_units(trainer.train_dataset, self._bound().trusted, self._column, num_classes)
        ask = lambda **options: predict(**options).log_probs  # noqa: E731 - what a target needs of it
        log_p = self.target(Proposals(predictions.log_probs, self._prior, self.kind, ask, held_out))
        if (
            not isinstance(log_p, torch.Tensor)
            or log_p.shape != predictions.log_probs.shape
            or bool(log_p.isnan().any())
        ):
            raise ValueError(
                f"{self.target!r} must return log p of shape {tuple(predictions.log_probs.shape)} without NaN, got "
                f"{log_p if not isinstance(log_p, torch.Tensor) else tuple(log_p.shape)}."
            )
        return predictions, log_p

    def _decisions(self, unit_rows: torch.Tensor) -> torch.Tensor:
        """Decision of each unit: one of its own, or that of its row."""
        if self.accepts_tokens:
            return torch.arange(len(unit_rows))
        return unit_rows.unique_consecutive(return_inverse=True)[1]

    def _confident(self, predictions: LabelPredictions, decision_of: torch.Tensor) -> torch.Tensor:
        """Which decisions are confident enough, shape (D,): of several units their mean, and no class."""
        top = predictions.log_probs.max(1)
        num_units = torch.bincount(decision_of)
        confidences = torch.zeros(len(num_units), dtype=torch.float64)
        confidences.index_add_(0, decision_of, top.values.double().exp())
        classes = torch.zeros(len(num_units), dtype=torch.int64)
        is_single = self.kind == "class" or self.accepts_tokens
        if is_single:
            classes = top.indices
        minimum = self.min_confidence
        if isinstance(minimum, Sequence):
            num_classes = predictions.log_probs.shape[1]
            if len(minimum) != num_classes or not is_single:
                raise ValueError(
                    f"`min_confidence` has {len(minimum)} numbers, and the model {num_classes} classes. Give one for "
                    "each, where each label is accepted alone, or a single number."
                )
        limit = torch.tensor(minimum, dtype=torch.float64) if isinstance(minimum, Sequence) else minimum
        return is_confident(confidences / num_units, classes, limit, self.confidence_quantile)

    def _references(self, unit_rows: torch.Tensor) -> torch.Tensor | None:
        """True labels of the units, shape (U,), -100 where unknown; None without a column of them."""
        if self.reference_column is None:
            return None
        rows, counts = (each.tolist() for each in unit_rows.unique_consecutive(return_counts=True))
        found, numbers = list[int](), self._reference_classes()
        for row, given, count in zip(
            rows, self._bound().given_values(rows, self.reference_column), counts, strict=True
        ):
            value = as_list(given)
            units = [value] if self.kind == "class" else [one for one in value or () if one != IGNORED]
            if wrong := [unit for unit in units if not isinstance(unit, (int, float, NoneType))]:
                raise ValueError(
                    f"Row {row} of `unlabelled_dataset` has {wrong[0]!r} in `reference_column`="
                    f"{self.reference_column!r}. Give the numbers of the classes."
                )
            is_known = len(units) == count and all(unit is not None and unit >= 0 for unit in units)
            found += [numbers.get(int(unit), int(unit)) for unit in units] if is_known else [IGNORED] * count
        return torch.tensor(found)

    def _reference_classes(self) -> dict[int, int]:
        """The class of each number of the reference column, where the data sets name their classes in other orders."""
        own = class_names(self.trainer.train_dataset, self._column)
        others = class_names(self.unlabelled_dataset, self.reference_column)
        if own is None or others is None or own == others:
            return {}
        return {number: own.index(name) if name in own else IGNORED for number, name in enumerate(others)}


class _RoundFacts:
    """What a round proposed, accepted and rejected: for the log and the store."""

    def __init__(
        self,
        predictions: LabelPredictions,
        decisions: Decisions,
        is_accepted: torch.Tensor,
        references: torch.Tensor | None,
    ) -> None:
        self._predictions, self._decisions = predictions, decisions
        self._is_accepted, self._references = is_accepted, references

    def metrics(self, is_confident: torch.Tensor) -> dict[str, float]:
        """Returns counts and shares; accuracy and calibration where true labels are known."""
        accepted, decisions = self._is_accepted, self._decisions
        top = self._predictions.log_probs.max(1)
        rows = self._predictions.rows
        metrics = {
            "proposed_rows": len(rows.unique()),
            "accepted_rows": len(rows[accepted].unique()),
            "confident_fraction": float(is_confident.double().mean()),
            "acceptance_rate": float(accepted.double().mean()),
            "confidence": float(top.values.exp().mean()),
        }
        if bool(accepted.any()):
            counts = torch.bincount(decisions.labels[accepted], minlength=self._predictions.log_probs.shape[1])
            metrics["largest_class_share"] = float(counts.max() / counts.sum())
        if self._references is not None:
            known = self._references != IGNORED
            taken = known & accepted
            wrong = int((decisions.labels != self._references)[taken].sum())
            metrics["wrong"] = wrong
            if bool(taken.any()):
                metrics["accuracy"] = 1 - wrong / int(taken.sum())
            for name, some in (("calibration_error", known), ("accepted_calibration_error", taken)):
                if bool(some.any()):
                    right = (top.indices == self._references)[some]
                    metrics[name] = expected_calibration_error(top.values.exp()[some], right)
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def columns(self, kind: str) -> dict[str, list[Any]]:
        """Returns the columns of the store, one line per row."""
        rows, counts = self._predictions.rows.unique_consecutive(return_counts=True)
        is_single = kind == "class"

        def split(values: torch.Tensor) -> list[Any]:
            return [part.tolist()[0] if is_single else part.tolist() for part in values.split(counts.tolist())]

        def means(values: torch.Tensor) -> list[float]:
            return [float(part.double().mean()) for part in values.split(counts.tolist())]

        labels = self._decisions.labels if is_single else self._decisions.labels.where(self._is_accepted, IGNORED)
        columns = {
            "row": rows.tolist(),
            "label": split(labels),
            "confidence": means(self._predictions.log_probs.max(1).values.exp()),
            "probability": means(self._decisions.probabilities),
            "is_accepted": [value > 0 for value in means(self._is_accepted)],
        }
        if self._references is not None:
            columns["reference"] = split(self._references)
        return columns


def _row_numbers(rows: Any) -> tuple[int, ...]:
    """Numbers of rows, ascending; of a mask those that it marks."""
    given = as_list(rows) if isinstance(rows, (torch.Tensor, np.ndarray)) else list(rows)
    if given and all(isinstance(one, (bool, np.bool_)) for one in given):
        given = [number for number, is_marked in enumerate(given) if is_marked]
    if wrong := [one for one in given if isinstance(one, bool) or not isinstance(one, (int, np.integer))]:
        raise TypeError(f"`doubtful_rows` holds {wrong[0]!r}. Give the numbers of rows, or a mask of all rows.")
    return tuple(sorted({int(one) for one in given}))


def _check_options(resampler: PredictionResampler) -> None:
    if not callable(resampler.target) or isinstance(resampler.target, type):
        raise TypeError(f"`target` must be a rule such as Sharpened(0.5), or a function, got {resampler.target!r}.")
    check_interval("temperature", resampler.temperature, "(0, inf]")
    check_interval("pseudo_fraction", resampler.pseudo_fraction, "(0, 1)")
    given = resampler.min_confidence
    for value in given if isinstance(given, Sequence) else () if given is None else (given,):
        check_fraction("min_confidence", value)
    if resampler.confidence_quantile is not None:
        check_interval("confidence_quantile", resampler.confidence_quantile, "[0, 1)")
    if resampler.ema_decay is not None:
        check_interval("ema_decay", resampler.ema_decay, "[0, 1)")
    for name, minimum in (("num_draws", 1), ("num_proposals", 1), ("batch_size", 1)):
        if vars(resampler)[name] is not None:
            check_integer(name, vars(resampler)[name], minimum)
    check_integer("every_n_epochs", resampler.every_n_epochs, 1)
    check_integer("warmup_epochs", resampler.warmup_epochs, 0)
    if not len(resampler.unlabelled_dataset) and not resampler.doubtful_rows:
        raise ValueError(
            "There is nothing to label. Give `unlabelled_dataset`, a data set with rows, or `doubtful_rows` of "
            "`train_dataset`."
        )
