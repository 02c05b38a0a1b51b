"""Rejection-sampling fine-tuning inside the Hugging Face `Trainer`."""

from rsft_hf.acceptance import RSO, DensityRatio, Threshold, TopKOverall, TopKPerPrompt
from rsft_hf.callbacks import CandidateTableCallback
from rsft_hf.generative import (
    CandidateResampler,
    Deduplicate,
    export_dpo,
    export_kto,
    export_sft,
    import_candidates,
    load_candidates,
)
from rsft_hf.rejection import (
    accept_once,
    acceptance_probabilities,
    effective_sample_size,
    envelope_constant,
    rejection_sample,
)
from rsft_hf.resampler import Resampler
from rsft_hf.trainer import RejectionSamplingMixin, RejectionSamplingSeq2SeqTrainer, RejectionSamplingTrainer
from rsft_hf.weighted import (
    Chain,
    ClassBalanced,
    Clipped,
    DropTop,
    Floored,
    LossResampler,
    Proportional,
    Tempered,
    measure_losses,
)

__version__ = "0.1.0"

__all__ = [
    "RSO",
    "CandidateResampler",
    "CandidateTableCallback",
    "Chain",
    "ClassBalanced",
    "Clipped",
    "Deduplicate",
    "DensityRatio",
    "DropTop",
    "Floored",
    "LossResampler",
    "Proportional",
    "RejectionSamplingMixin",
    "RejectionSamplingSeq2SeqTrainer",
    "RejectionSamplingTrainer",
    "Resampler",
    "Tempered",
    "Threshold",
    "TopKOverall",
    "TopKPerPrompt",
    "accept_once",
    "acceptance_probabilities",
    "effective_sample_size",
    "envelope_constant",
    "export_dpo",
    "export_kto",
    "export_sft",
    "import_candidates",
    "load_candidates",
    "measure_losses",
    "rejection_sample",
]
