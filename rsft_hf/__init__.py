"""Rejection-sampling fine-tuning inside the Hugging Face `Trainer`.

The names are imported at their first use, so that the command line answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsft_hf.acceptance import RSO, DensityRatio, Threshold, TopKOverall, TopKPerPrompt
    from rsft_hf.callbacks import CandidateTableCallback, ReportCallback
    from rsft_hf.cards import export_repository
    from rsft_hf.generative import (
        CandidateResampler,
        Deduplicate,
        export_dpo,
        export_kto,
        export_sft,
        import_candidates,
        load_candidates,
    )
    from rsft_hf.predictive import PredictionResampler
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

_NAMES = {
    "acceptance": ("RSO", "DensityRatio", "Threshold", "TopKOverall", "TopKPerPrompt"),
    "callbacks": ("CandidateTableCallback", "ReportCallback"),
    "cards": ("export_repository",),
    "generative": (
        "CandidateResampler", "Deduplicate", "export_dpo", "export_kto", "export_sft", "import_candidates",
        "load_candidates",
    ),
    "predictive": ("PredictionResampler",),
    "rejection": (
        "accept_once", "acceptance_probabilities", "effective_sample_size", "envelope_constant", "rejection_sample",
    ),
    "resampler": ("Resampler",),
    "trainer": ("RejectionSamplingMixin", "RejectionSamplingSeq2SeqTrainer", "RejectionSamplingTrainer"),
    "weighted": (
        "Chain", "ClassBalanced", "Clipped", "DropTop", "Floored", "LossResampler", "Proportional", "Tempered",
        "measure_losses",
    ),
}  # fmt: skip
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

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
    "PredictionResampler",
    "Proportional",
    "RejectionSamplingMixin",
    "RejectionSamplingSeq2SeqTrainer",
    "RejectionSamplingTrainer",
    "ReportCallback",
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
    "export_repository",
    "export_sft",
    "import_candidates",
    "load_candidates",
    "measure_losses",
    "rejection_sample",
]


def __getattr__(name: str) -> Any:
    if name in {*_NAMES, "engines", "presets", "rewards"}:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = vars(importlib.import_module(f"{__name__}.{_MODULES[name]}"))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
