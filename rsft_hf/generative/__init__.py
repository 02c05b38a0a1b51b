"""Generative half: rounds of generating, scoring, accepting and training."""

from rsft_hf.generative.candidates import Candidate
from rsft_hf.generative.exports import export_dpo, export_kto, export_sft, load_candidates
from rsft_hf.generative.filters import (
    Deduplicate,
    LengthRange,
    MatchesPattern,
    RejectEmpty,
    RejectRepetition,
    RejectTruncated,
    Satisfies,
)
from rsft_hf.generative.imports import import_candidates, stored_prompts
from rsft_hf.generative.resampler import CandidateResampler
from rsft_hf.generative.rescoring import accept_again, score_again
from rsft_hf.generative.stored_generation import generate_candidates
from rsft_hf.generative.validation import drop_long_prompts

__all__ = [
    "Candidate",
    "CandidateResampler",
    "Deduplicate",
    "LengthRange",
    "MatchesPattern",
    "RejectEmpty",
    "RejectRepetition",
    "RejectTruncated",
    "Satisfies",
    "accept_again",
    "drop_long_prompts",
    "export_dpo",
    "export_kto",
    "export_sft",
    "generate_candidates",
    "import_candidates",
    "load_candidates",
    "score_again",
    "stored_prompts",
]
