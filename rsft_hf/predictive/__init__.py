"""Labels drawn from the model's own predictions: `PredictionResampler` and its targets."""

from rsft_hf.predictive.pool import load_pseudo_labels
from rsft_hf.predictive.resampler import PredictionResampler
from rsft_hf.predictive.targets import Agreement, Calibrated, ClassPrior, Proposals, Sharpened, Target, Teacher

__all__ = [
    "Agreement",
    "Calibrated",
    "ClassPrior",
    "PredictionResampler",
    "Proposals",
    "Sharpened",
    "Target",
    "Teacher",
    "load_pseudo_labels",
]
