"""Rejection-sampling fine-tuning inside the Hugging Face `Trainer`."""

from rsft_hf.callbacks import ResampleCallback
from rsft_hf.rejection import (
    accept_once,
    acceptance_probabilities,
    effective_sample_size,
    envelope_constant,
    rejection_sample,
)
from rsft_hf.resampling import EpochSampler, Resampler
from rsft_hf.trainer import RejectionSamplingMixin, RejectionSamplingSeq2SeqTrainer, RejectionSamplingTrainer
from rsft_hf.weighted.measure import Measurement, measure_losses
from rsft_hf.weighted.probe import NotPerExampleError
from rsft_hf.weighted.resampler import LossResampler
from rsft_hf.weighted.scores import Entropy, ExampleStatistics, Learnability, LeastConfidence, Margin
from rsft_hf.weighted.weights import (
    Chain,
    ClassBalanced,
    Clipped,
    DropTop,
    Floored,
    Proportional,
    Softmax,
    Tempered,
    Weighting,
)

__version__ = "0.1.0"

__all__ = [
    "Chain",
    "ClassBalanced",
    "Clipped",
    "DropTop",
    "Entropy",
    "EpochSampler",
    "ExampleStatistics",
    "Floored",
    "Learnability",
    "LeastConfidence",
    "LossResampler",
    "Margin",
    "Measurement",
    "NotPerExampleError",
    "Proportional",
    "RejectionSamplingMixin",
    "RejectionSamplingSeq2SeqTrainer",
    "RejectionSamplingTrainer",
    "ResampleCallback",
    "Resampler",
    "Softmax",
    "Tempered",
    "Weighting",
    "accept_once",
    "acceptance_probabilities",
    "effective_sample_size",
    "envelope_constant",
    "measure_losses",
    "rejection_sample",
]
