"""Ready-made reward functions, each a few lines over a library that is kept up."""

from rsft_hf.rewards.functions import RewardFunctions, Scores
from rsft_hf.rewards.judge import JudgeReward
from rsft_hf.rewards.model_rewards import ModelReward, RoundTripReward, SimilarityReward
from rsft_hf.rewards.reference_rewards import (
    BleuReward,
    ChrfReward,
    ExactMatch,
    MetricReward,
    ReferenceReward,
    RougeReward,
    TokenF1,
)
from rsft_hf.rewards.text_rewards import CopyPenalty, DistinctReward, FormatReward, LengthWindow, RepetitionPenalty

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
    "RewardFunctions",
    "RougeReward",
    "RoundTripReward",
    "Scores",
    "SimilarityReward",
    "TokenF1",
]
