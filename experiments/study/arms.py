"""Arms of the weighted study: plain training, weightings of this package, and what a user would pick instead.

An arm is a function from a `Run` to the trained `Trainer`. All arms of a seed start from the same weights and take the
same number of steps in their last training, unless their name says otherwise (`plain_60` takes 60 % of them).
"""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import transformers as hf

from experiments.harness.arms import RandomAssignment
from experiments.study.cases import Case, predicted
from experiments.study.rules import LearningProgress, PredictionVariance, WithinClass, hump, infobatch
from rsft_hf import (
    Chain,
    ClassBalanced,
    Clipped,
    DropTop,
    Floored,
    LossResampler,
    Proportional,
    RejectionSamplingTrainer,
    Tempered,
)
from rsft_hf.weighted import ErrorSet, LeaveOutSuspects, Margin
from rsft_hf.weighted.losses import logits_of

BATCH_SIZE = 32
Loss = Callable[[Any, torch.Tensor, Any], torch.Tensor]


@dataclass
class Run:
    """One arm on one case, and what was found on the way.

    Attributes:
        case: The rows.
        found: Further figures of the run.
    """

    case: Case
    found: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @property
    def num_rows(self) -> int:
        return len(self.case.train)

    def train(
        self,
        resampler: LossResampler | None = None,
        *,
        case: Case | None = None,
        loss: Loss | None = None,
        weights: torch.Tensor | None = None,
        epochs: float | None = None,
        max_steps: int = -1,
    ) -> hf.Trainer:
        """Trains from the seed's initial weights.

        Args:
            resampler: Draws the rows.
            case: Other rows than the run's.
            loss: Loss of a batch from outputs and labels.
            weights: Shape (N,), drawn from with replacement.
            epochs: Other than the regime's.
            max_steps: Optimizer steps, which then go before epochs.
        """
        case = self.case if case is None else case
        with tempfile.TemporaryDirectory() as folder:
            arguments = training_arguments(folder, case, epochs, max_steps)
            common = {
                "model": case.build_model(), "args": arguments, "train_dataset": case.train,
                "data_collator": case.collate, "compute_loss_func": loss,
                "preprocess_logits_for_metrics": predicted,
            }  # fmt: skip
            if resampler is not None:
                trainer = RejectionSamplingTrainer(**common, resampler=resampler)
            else:
                trainer = WeightedSamplerTrainer(**common)
                trainer.row_weights = weights
            trainer.remove_callback(hf.PrinterCallback)
            trainer.train()
        return trainer

    def observer(self) -> LossResampler:
        """Returns a resampler that reads all epochs uniformly and records the losses of the steps."""
        return LossResampler(losses="training", warmup_epochs=self.case.regime.num_epochs)


def training_arguments(folder: str, case: Case, epochs: float | None, max_steps: int) -> hf.TrainingArguments:
    """Returns the arguments of all arms."""
    return hf.TrainingArguments(
        folder,
        num_train_epochs=case.regime.num_epochs if epochs is None else epochs,
        max_steps=max_steps,
        learning_rate=case.regime.learning_rate,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=256,
        warmup_steps=0.1,
        use_cpu=not torch.cuda.is_available(),
        seed=case.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="epoch",
        remove_unused_columns=False,
    )


class WeightedSamplerTrainer(hf.Trainer):
    """Plain Trainer, or rows drawn from constant weights by torch's `WeightedRandomSampler`."""

    row_weights: torch.Tensor | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.row_weights is None:
            return super()._get_train_sampler(train_dataset)
        generator = torch.Generator().manual_seed(self.args.seed)
        return torch.utils.data.WeightedRandomSampler(self.row_weights, len(self.row_weights), generator=generator)


@dataclass(frozen=True)
class Control:
    """The weights of a rule, given to rows chosen at random."""

    rule: Any


def resampled(weighting: Any = None, **options: Any) -> Callable[[Run], hf.Trainer]:
    """Returns the arm of a rule and the other options of its resampler."""

    def arm(run: Run) -> hf.Trainer:
        rule = RandomAssignment(weighting.rule, run.case.seed) if isinstance(weighting, Control) else weighting
        return run.train(LossResampler(rule, **options))

    return arm


def reweighted_loss(run: Run, change: str) -> Loss:
    """Returns cross entropy with inverse class frequencies, prior-adjusted logits, or focal weights of 2."""
    counts = torch.tensor(run.case.num_train_classes, dtype=torch.float32).clamp(min=1)
    class_weights, prior = counts.sum() / (len(counts) * counts), (counts / counts.sum()).log()

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = logits_of(outputs).float().flatten(0, -2)
        labels = labels.flatten()
        if change == "class_weighted":
            return torch.nn.functional.cross_entropy(logits, labels, class_weights.to(logits.device))
        if change == "logit_adjustment":  # Menon et al. 2021, arXiv:2007.07314
            return torch.nn.functional.cross_entropy(logits + prior.to(logits.device), labels)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return (losses * (1 - (-losses).exp()) ** 2)[labels != -100].mean()  # Lin et al. 2017, arXiv:1708.02002

    return loss


def balanced_weights(run: Run) -> torch.Tensor:
    labels = torch.tensor(run.case.train["labels"][:])
    return 1 / torch.tensor(run.case.num_train_classes, dtype=torch.float64)[labels]


def jtt(run: Run) -> hf.Trainer:
    """JTT: the rows that a model of one epoch gets wrong are drawn five times as often from the start."""
    first = run.train(epochs=1)
    found = first.predict(run.case.train)
    wrong = torch.tensor(found.predictions[..., 0] != found.label_ids)
    return run.train(weights=1 + 4 * wrong.double())


def retrained(run: Run, rows: np.ndarray) -> hf.Trainer:
    """Trains on the other rows for as many steps as on all."""
    run.found["left_out"] = len(rows)
    run.found["precision"] = float(run.case.is_flipped[rows].mean()) if len(rows) else None
    run.found["recall"] = float(run.case.is_flipped[rows].sum() / max(1, run.case.is_flipped.sum()))
    steps = math.ceil(run.num_rows / BATCH_SIZE) * run.case.regime.num_epochs
    return run.train(case=run.case.without(rows), max_steps=steps)


def suspects_left_out(share: float | None) -> Callable[[Run], hf.Trainer]:
    """Observes a plain run, leaves its suspects out (as many as labels were changed if `share` is None), retrains."""

    def arm(run: Run) -> hf.Trainer:
        observer = run.observer()
        run.train(observer)
        count = int(run.case.is_flipped.sum()) if share is None else round(share * run.num_rows)
        return retrained(run, np.array(observer.suspects(count)["row"][:]))

    return arm


def cleaned(method: str, threshold: float) -> Callable[[Run], hf.Trainer]:
    """Observes a plain run, drops or relabels what its label report says is wrong, retrains."""

    def arm(run: Run) -> hf.Trainer:
        observer = run.observer()
        run.train(observer)
        report = observer.label_report()
        rows = np.flatnonzero(report.probabilities > threshold)
        is_judged = report.probabilities.isfinite()  # classes that the model has not learnt are not
        judged = report.probabilities[is_judged]
        gaps = np.bincount((10 * judged).int().numpy(), judged.numpy() - run.case.is_flipped[is_judged.numpy()])
        run.found["report_ece"] = float(np.abs(gaps).sum() / run.num_rows)
        run.found["estimated_errors"], run.found["true_errors"] = report.num_errors, int(run.case.is_flipped.sum())
        if method == "drop":
            return retrained(run, rows)
        case = replace(run.case, train=report.relabel(run.case.train))
        run.found["relabelled"] = len(rows)
        return run.train(case=case)

    return arm


def cleanlab_left_out(run: Run) -> hf.Trainer:
    """cleanlab's label issues from probabilities of the same model, cross-validated in five parts, left out."""
    from cleanlab.filter import find_label_issues  # an optional dependency

    order = np.random.default_rng(run.case.seed).permutation(run.num_rows)
    probabilities = np.zeros((run.num_rows, run.case.num_classes))
    for part in np.array_split(order, 5):
        trainer = run.train(case=run.case.without(part))
        trainer.preprocess_logits_for_metrics = lambda logits, _: logits.float().softmax(-1)
        probabilities[part] = trainer.predict(run.case.train.select(part)).predictions
    labels = np.array(run.case.train["labels"][:])
    rows = find_label_issues(labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
    count = int(run.case.is_flipped.sum())
    ranked = np.argsort(probabilities[np.arange(run.num_rows), labels])[:count]
    run.found["precision_at_k"] = float(run.case.is_flipped[ranked].mean()) if count else None
    return retrained(run, np.asarray(rows))


def oracle(run: Run) -> hf.Trainer:
    return retrained(run, np.flatnonzero(run.case.is_flipped))


def observed(run: Run) -> hf.Trainer:
    """A plain run with recorded losses: how many of its suspects are changed labels."""
    observer, count = run.observer(), int(run.case.is_flipped.sum())
    trainer = run.train(observer)
    for name, size in (("precision_at_k", count), ("precision_at_half_k", count // 2)):
        rows = np.array(observer.suspects(max(size, 1))["row"][:])
        run.found[name] = float(run.case.is_flipped[rows].mean())
    return trainer


CAPPED = Chain(Clipped(0.9), Floored(0.5))
SOFT = Chain(Tempered(0.5), Floored(0.5))
SOFTER = Chain(Tempered(0.5), Floored(0.8))
GENTLE = Chain(Tempered(0.5), Clipped(0.9), Floored(0.9))

ARMS: dict[str, Callable[[Run], hf.Trainer]] = {
    "plain": lambda run: run.train(),
    # w = L and its variants
    "proportional": resampled(Proportional()),
    "proportional_warm": resampled(Proportional(), warmup_epochs=1),
    "proportional_training": resampled(Proportional(), losses="training"),
    "tempered_warm": resampled(Tempered(0.5), warmup_epochs=1),
    # candidates for the default
    "soft": resampled(SOFT, losses="training"),
    "capped": resampled(CAPPED, losses="training"),
    "hump": resampled(hump(), losses="training"),
    "within_class": resampled(WithinClass(SOFT), losses="training"),
    "within_class_hump": resampled(WithinClass(hump()), losses="training"),
    "corrected": resampled(SOFT, importance_correction=1.0),
    "corrected_training": resampled(SOFT, losses="training", importance_correction=1.0),
    "corrected_final": resampled(SOFT, losses="training", importance_correction=1.0, uniform_final_epochs=1),
    "corrected_softer": resampled(SOFTER, losses="training", importance_correction=1.0),
    "corrected_gentle": resampled(GENTLE, losses="training", importance_correction=1.0),
    "control": resampled(Control(CAPPED), losses="training"),
    # rules from history and robust ones
    "leave_out_10": resampled(Chain(Tempered(0.0), LeaveOutSuspects(0.1)), losses="training"),
    "soft_leave_out_10": resampled(Chain(SOFT, LeaveOutSuspects(0.1)), losses="training"),
    "variance": resampled(PredictionVariance(), losses="training"),
    "progress": resampled(LearningProgress(), losses="training"),
    "error_set": resampled(ErrorSet(), losses="training"),
    "drop_top": resampled(DropTop(0.15), warmup_epochs=1),
    "margin": resampled(Margin(), warmup_epochs=1),
    "class_balanced": resampled(ClassBalanced()),
    "class_balanced_capped": resampled(Chain(CAPPED, ClassBalanced()), losses="training"),
    # what a user would pick instead
    "class_weighted_loss": lambda run: run.train(loss=reweighted_loss(run, "class_weighted")),
    "logit_adjustment": lambda run: run.train(loss=reweighted_loss(run, "logit_adjustment")),
    "focal_loss": lambda run: run.train(loss=reweighted_loss(run, "focal")),
    "weighted_sampler": lambda run: run.train(weights=balanced_weights(run)),
    "jtt": jtt,
    # label cleaning
    "observed": observed,
    "suspects_out": suspects_left_out(None),
    "suspects_out_10": suspects_left_out(0.1),
    "report_dropped": cleaned("drop", threshold=0.3),
    "report_dropped_50": cleaned("drop", threshold=0.5),
    "report_relabelled": cleaned("relabel", threshold=0.5),
    "cleanlab_out": cleanlab_left_out,
    "oracle_out": oracle,
    # less compute
    **{
        f"{name}_{share}": arm
        for share in (60, 40)
        for name, arm in {
            "plain": lambda run, share=share: run.train(epochs=run.case.regime.num_epochs * share / 100),
            "corrected": resampled(SOFT, importance_correction=1.0, num_draws=share / 100),
            "corrected_training": resampled(SOFT, losses="training", importance_correction=1.0, num_draws=share / 100),
            "infobatch": resampled(infobatch, losses="training", importance_correction=1.0, num_draws=share / 100),
            "capped": resampled(CAPPED, losses="training", num_draws=share / 100),
        }.items()
    },
}

EVERYWHERE = (
    "plain", "proportional", "proportional_warm", "proportional_training", "tempered_warm", "soft", "capped", "hump",
    "within_class", "within_class_hump", "corrected", "corrected_training", "corrected_final", "corrected_softer",
    "corrected_gentle", "control", "variance", "progress",
)  # fmt: skip
NOISE = ("leave_out_10", "soft_leave_out_10", "drop_top", "margin", "observed", "suspects_out", "suspects_out_10",
         "report_dropped", "report_dropped_50", "report_relabelled", "cleanlab_out", "oracle_out")  # fmt: skip
IMBALANCE = ("class_balanced", "class_balanced_capped", "class_weighted_loss", "logit_adjustment", "focal_loss",
             "weighted_sampler")  # fmt: skip
COMPUTE = tuple(name for name in ARMS if name.endswith(("_60", "_40")))
SUBJECTS = {
    "few": ("leave_out_10", "focal_loss"),
    "imbalance": (*IMBALANCE, "jtt", "error_set"),
    "noise": NOISE,
    "class": NOISE,
    "groups": ("jtt", "error_set", "focal_loss", "class_balanced"),
    "full": (*COMPUTE, "leave_out_10"),
    "tokens": ("class_weighted_loss", "logit_adjustment", "focal_loss"),
    "digits": IMBALANCE,
    "captions": ("plain_60", "capped_60"),
}
CLASS_RULES = {"within_class", "within_class_hump"}


def arms_of(regime: str) -> tuple[str, ...]:
    """Returns the arms that are run in a regime."""
    subject = regime.split("_")[0]
    names = (*EVERYWHERE, *SUBJECTS[subject])
    return tuple(name for name in names if subject not in ("tokens", "captions") or name not in CLASS_RULES)
