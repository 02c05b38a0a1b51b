"""Weighted half: resampling of a labelled training set by loss-derived weights."""

from rsft_hf.weighted.history_rules import ErrorSet, LeaveOutSuspects
from rsft_hf.weighted.label_report import LabelReport
from rsft_hf.weighted.measurement import Measurement, measure_losses
from rsft_hf.weighted.prediction_rules import Entropy, LeastConfidence, Margin
from rsft_hf.weighted.reading import NotPerExampleError
from rsft_hf.weighted.resampler import LossResampler
from rsft_hf.weighted.weightings import (
    Chain,
    ClassBalanced,
    Clipped,
    DropTop,
    ExampleStatistics,
    Floored,
    Learnability,
    Proportional,
    Softmax,
    Tempered,
    Weighting,
)

__all__ = [
    "Chain",
    "ClassBalanced",
    "Clipped",
    "DropTop",
    "Entropy",
    "ErrorSet",
    "ExampleStatistics",
    "Floored",
    "LabelReport",
    "Learnability",
    "LeastConfidence",
    "LeaveOutSuspects",
    "LossResampler",
    "Margin",
    "Measurement",
    "NotPerExampleError",
    "Proportional",
    "Softmax",
    "Tempered",
    "Weighting",
    "measure_losses",
]
