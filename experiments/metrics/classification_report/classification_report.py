"""Accuracy, macro-F1 and the recall of one class, as a module for `evaluate.load(path)`.

In: predicted and true class ids, and which class counts as the minority. Out: three numbers in [0, 1]. It needs no
network.
"""

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score, recall_score


class ClassificationReportMetric(evaluate.Metric):
    """Computes `accuracy`, `macro_f1` and `minority_recall`; a class nobody predicts counts with F1 0."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, macro-F1 and the recall of the minority class.",
            citation="",
            inputs_description="`predictions`, `references`: class ids; `minority_label`: whose recall is reported.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int], minority_label: int) -> dict[str, float]:
        recalls = recall_score(references, predictions, labels=[minority_label], average=None, zero_division=0)
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0)),
            "minority_recall": float(recalls[0]),
        }
