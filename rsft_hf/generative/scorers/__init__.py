"""Ready-made reward functions, each a few lines over a library that is kept up."""

from rsft_hf.generative.scorers.judge import JudgeReward
from rsft_hf.generative.scorers.models import ModelReward, RoundTripReward, SimilarityReward
from rsft_hf.generative.scorers.overlap import (
    BleuReward,
    ChrfReward,
    ExactMatch,
    MetricReward,
    ReferenceReward,
    RougeReward,
    TokenF1,
)
from rsft_hf.generative.scorers.texts import (
    CopyPenalty,
    DistinctReward,
    FormatReward,
    LengthWindow,
    RepetitionPenalty,
)

__all__ = [
    "BleuReward",
    "ChrfReward",
    "CopyPenalty",
    "DistinctReward",
    "ExactMatch",
    "FormatReward",
    "JudgeReward",
    "LengthWindow",
    "MetricReward",
    "ModelReward",
    "ReferenceReward",
    "RepetitionPenalty",
    "RougeReward",
    "RoundTripReward",
    "SimilarityReward",
    "TokenF1",
]
