"""Targets p(y|x) of the labels: from the model's own predictions, a teacher, several passes, or the classes' shares.

A target is a function of `Proposals` that returns log p up to a constant per unit, shape (U, C).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.utils import logging

from rsft_hf.checks import check_integer, check_interval

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Proposals:
    """What a target can read of the units of an epoch's proposals.

    Attributes:
        log_probs: The model's log probabilities, shape (U, C), float32: of the proposal at temperature 1.
        prior: Share of each class among the labelled units, shape (C,), float64.
        kind: "class", "token" or "multi_label".
        predict: Returns such log probabilities of the same units. Collective. Its keywords are `model`, another one
            than the one that proposes, `seed` of random transforms and collators, and `with_dropout`.
        held_out: Returns log probabilities of the labelled units of another data set, and their labels. Collective.
    """

    log_probs: torch.Tensor
    prior: torch.Tensor
    kind: str
    predict: Callable[..., torch.Tensor]
    held_out: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]


class Target(Protocol):
    """Rule that gives the target distribution of the labels."""

    def __call__(self, proposals: Proposals) -> torch.Tensor:
        """Returns log p up to a constant per unit, shape (U, C). Called on all processes."""
        ...


@dataclass(frozen=True)
class Sharpened:
    """p(y|x) proportional to q(y|x) ** (1 / temperature). Berthelot et al. 2019, arXiv:1905.02249 (MixMatch).

    Args:
        temperature: Above 0. 1 is the prediction itself, all of whose labels are accepted if the proposal is as warm;
            towards 0 only the most probable label is.
        of: Target to sharpen; the model's own prediction where None.

    Raises:
        ValueError: If the temperature is out of range.
    """

    temperature: float = 0.5
    of: Target | None = None

    def __post_init__(self) -> None:
        check_interval("temperature", self.temperature, "(0, inf]")

    def __call__(self, proposals: Proposals) -> torch.Tensor:
        """Returns the logarithm of the sharpened probabilities."""
        log_p = proposals.log_probs if self.of is None else self.of(proposals)
        return log_p.double() / self.temperature


@dataclass(frozen=True)
class Calibrated:
    """The prediction at the temperature that fits held-out labels best. Guo et al. 2017, arXiv:1706.04599.

    A model that was trained on few labels is too sure: its calibrated prediction is softer, and a proposal at
    temperature 1 then seldom meets it. Give the resampler a `temperature` as high as the one that the log tells.

    Args:
        dataset: Labelled rows that are not trained on.
    """

    dataset: Any

    def __call__(self, proposals: Proposals) -> torch.Tensor:
        """Returns log softmax(logits / T), with T in [1/16, 16] of the smallest mean -log p of the held-out labels."""
        log_probs, labels = proposals.held_out(self.dataset)
        if not len(labels):
            raise ValueError(
                f"None of {len(self.dataset)} held-out rows of Calibrated has a label: they have the columns "
                f"{list(self.dataset[0])}. Name the labels as those of `train_dataset` are."
            )
        temperatures = torch.logspace(-4, 4, 129, base=2, dtype=torch.float64).tolist()
        losses = [torch.nn.functional.cross_entropy(log_probs / one, labels).item() for one in temperatures]
        best = temperatures[losses.index(min(losses))]
        logger.info(f"Predictions are calibrated at temperature {best:.2f} on {len(labels)} held-out labels.")
        return proposals.log_probs.double() / best

    def __repr__(self) -> str:
        return f"Calibrated({len(self.dataset)} rows)"


class Teacher:
    """The prediction of another model, or the mean of several. Hinton et al. 2015, arXiv:1503.02531 (distillation).

    Args:
        models: One or several models over the same classes that read the same inputs. Classes of the same names (of
            `config.id2label`) in another order are put into that of the trained model.
    """

    def __init__(self, *models: torch.nn.Module) -> None:
        if not models or not all(isinstance(model, torch.nn.Module) for model in models):
            raise TypeError(f"Teacher needs one or several models, got {models!r}.")
        self.models = models

    def __call__(self, proposals: Proposals) -> torch.Tensor:
        """Returns the logarithm of the mean probabilities."""
        found = [proposals.predict(model=model) for model in self.models]
        for log_probs in found:
            if log_probs.shape != proposals.log_probs.shape:
                raise ValueError(
                    f"The teacher gives {log_probs.shape[1]} classes and the trained model "
                    f"{proposals.log_probs.shape[1]}. Take a teacher over the same labels."
                )
        return torch.stack(found).logsumexp(0) - math.log(len(found))

    def __repr__(self) -> str:
        return f"Teacher({', '.join(type(model).__name__ for model in self.models)})"


@dataclass(frozen=True)
class Agreement:
    """Product of several passes in training mode (dropout, masks), and other random transforms: high where all agree.

    p(y|x) = (prod over k of q_k(y|x)) ** (1 / K), normalised; the spread over passes is the model's uncertainty.
    Gal & Ghahramani 2016, arXiv:1506.02142; for pseudo-labels Rizve et al. 2021, arXiv:2101.06329.

    Args:
        num_passes: K, at least 2. Each costs a pass over the proposals.

    Raises:
        ValueError: If it is less.
    """

    num_passes: int = 4

    def __post_init__(self) -> None:
        check_integer("num_passes", self.num_passes, 2)

    def __call__(self, proposals: Proposals) -> torch.Tensor:
        """Returns the mean of the passes' log probabilities."""
        total = torch.zeros_like(proposals.log_probs, dtype=torch.float64)
        for seed in range(1, self.num_passes + 1):
            total += proposals.predict(seed=seed, with_dropout=True)
        return total / self.num_passes


@dataclass(frozen=True)
class ClassPrior:
    """p(y|x) proportional to q(y|x) prior(y) / mean of q(y|.). Berthelot et al. 2020, arXiv:1911.09785 (ReMixMatch).

    The accepted labels get about the shares of `prior`, where a model that was trained on few labels prefers a class.

    Args:
        prior: Share of each class, > 0; that of the labelled rows where None.
        of: Target to align; the model's own prediction where None.

    Raises:
        ValueError: If a share is not above 0.
    """

    prior: Sequence[float] | None = None
    of: Target | None = None

    def __post_init__(self) -> None:
        if self.prior is not None and not all(share > 0 for share in self.prior):
            raise ValueError(f"`prior`={self.prior} must hold the share of every class, above 0.")

    def __call__(self, proposals: Proposals) -> torch.Tensor:
        """Returns the logarithm of the aligned probabilities."""
        if proposals.kind == "multi_label":
            raise ValueError("ClassPrior goes with labels of which one is right; take another target for multi-label.")
        log_p = proposals.log_probs if self.of is None else self.of(proposals)
        log_p = log_p.double().log_softmax(1)
        prior = proposals.prior if self.prior is None else torch.tensor(self.prior, dtype=torch.float64)
        if len(prior) != log_p.shape[1]:
            raise ValueError(f"`prior` has {len(prior)} shares for {log_p.shape[1]} classes. Give one for each.")
        prior = prior.clamp(min=1e-6)  # a class without a labelled row can still be predicted
        return log_p + (prior / prior.sum()).log() - log_p.exp().mean(0).log()
