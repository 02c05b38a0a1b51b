"""Acceptance rules: from the rewards of candidates to a mask of the accepted ones."""

from rsft_hf.acceptance.batch import Acceptance, CandidateBatch, check_acceptance
from rsft_hf.acceptance.density import RSO, DensityRatio
from rsft_hf.acceptance.rules import (
    DifficultyRange,
    PerPromptCap,
    RandomLike,
    RandomPerPrompt,
    Sequence,
    Threshold,
    TopKOverall,
    TopKPerPrompt,
)

__all__ = [
    "RSO",
    "Acceptance",
    "CandidateBatch",
    "DensityRatio",
    "DifficultyRange",
    "PerPromptCap",
    "RandomLike",
    "RandomPerPrompt",
    "Sequence",
    "Threshold",
    "TopKOverall",
    "TopKPerPrompt",
    "check_acceptance",
]
