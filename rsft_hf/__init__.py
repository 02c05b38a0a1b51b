"""Rejection-sampling fine-tuning inside the Hugging Face `Trainer`."""

from rsft_hf.acceptance import (
    RSO,
    Acceptance,
    CandidateBatch,
    DensityRatio,
    DifficultyRange,
    PerPromptCap,
    RandomLike,
    RandomPerPrompt,
    Sequence,
    Threshold,
    TopKOverall,
    TopKPerPrompt,
)
from rsft_hf.callbacks import CandidateTableCallback
from rsft_hf.engines.base import Engine, EngineWithWeights, GeneratedSequence, GenerationRequest
from rsft_hf.engines.continuous import ContinuousEngine
from rsft_hf.engines.endpoint.engine import EndpointEngine
from rsft_hf.engines.endpoint.weight_sync import SaveAndReload
from rsft_hf.engines.generate import GenerateEngine
from rsft_hf.engines.inflight.engine import InFlightEngine
from rsft_hf.engines.vllm import VLLMEngine
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
from rsft_hf.generative.resampler import CandidateResampler
from rsft_hf.generative.rescoring import accept_again, score_again
from rsft_hf.rejection import (
    accept_once,
    acceptance_probabilities,
    effective_sample_size,
    envelope_constant,
    rejection_sample,
)
from rsft_hf.resampler import EpochSampler, Resampler
from rsft_hf.rewards.functions import RewardFunctions, Scores
from rsft_hf.trainer import (
    RejectionSamplingMixin,
    RejectionSamplingSeq2SeqTrainer,
    RejectionSamplingTrainer,
    ResampleCallback,
)
from rsft_hf.weighted.measurement import Measurement, NotPerExampleError, measure_losses
from rsft_hf.weighted.resampler import LossResampler
from rsft_hf.weighted.weightings import (
    Chain,
    ClassBalanced,
    Clipped,
    DropTop,
    Entropy,
    ExampleStatistics,
    Floored,
    Learnability,
    LeastConfidence,
    Margin,
    Proportional,
    Softmax,
    Tempered,
    Weighting,
)

__version__ = "0.1.0"

__all__ = [
    "RSO",
    "Acceptance",
    "Candidate",
    "CandidateBatch",
    "CandidateResampler",
    "CandidateTableCallback",
    "Chain",
    "ClassBalanced",
    "Clipped",
    "ContinuousEngine",
    "Deduplicate",
    "DensityRatio",
    "DifficultyRange",
    "DropTop",
    "EndpointEngine",
    "Engine",
    "EngineWithWeights",
    "Entropy",
    "EpochSampler",
    "ExampleStatistics",
    "Floored",
    "GenerateEngine",
    "GeneratedSequence",
    "GenerationRequest",
    "InFlightEngine",
    "Learnability",
    "LeastConfidence",
    "LengthRange",
    "LossResampler",
    "Margin",
    "MatchesPattern",
    "Measurement",
    "NotPerExampleError",
    "PerPromptCap",
    "Proportional",
    "RandomLike",
    "RandomPerPrompt",
    "RejectEmpty",
    "RejectRepetition",
    "RejectTruncated",
    "RejectionSamplingMixin",
    "RejectionSamplingSeq2SeqTrainer",
    "RejectionSamplingTrainer",
    "ResampleCallback",
    "Resampler",
    "RewardFunctions",
    "Satisfies",
    "SaveAndReload",
    "Scores",
    "Sequence",
    "Softmax",
    "Tempered",
    "Threshold",
    "TopKOverall",
    "TopKPerPrompt",
    "VLLMEngine",
    "Weighting",
    "accept_again",
    "accept_once",
    "acceptance_probabilities",
    "effective_sample_size",
    "envelope_constant",
    "export_dpo",
    "export_kto",
    "export_sft",
    "load_candidates",
    "measure_losses",
    "rejection_sample",
    "score_again",
]
