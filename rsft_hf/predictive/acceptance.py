"""Rejection sampling of labels: y ~ q(y|x) is accepted with probability p(y|x) / (M(x) q(y|x)).

Functions of log probabilities and a random generator. A unit is what one label belongs to: a row, a token of a row, or
one of the classes of a multi-label row. A decision accepts a unit, or all units of a row together.
"""

from typing import NamedTuple

import torch


class Decisions(NamedTuple):
    """Labels proposed for the units, and which of them are accepted together.

    Attributes:
        labels: y ~ q(y|x), shape (U,), int64.
        probabilities: Probability that the decision of each unit accepts, shape (U,), float64.
        is_accepted: Shape (U,), bool.
    """

    labels: torch.Tensor
    probabilities: torch.Tensor
    is_accepted: torch.Tensor


def propose_labels(log_q: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns one label per unit, drawn from the proposal, shape (U,), int64.

    Args:
        log_q: Log probabilities of the proposal, shape (U, C).
        generator: CPU generator, the only one that is advanced.

    Example:
        >>> propose_labels(torch.tensor([[0.0, -1e9], [-1e9, 0.0]]), torch.Generator().manual_seed(0)).tolist()
        [0, 1]
    """
    # By the inverse of the distribution function: one number per unit, whatever the number of classes.
    uniform = torch.rand(len(log_q), 1, dtype=torch.float64, generator=generator)
    cumulative = log_q.double().exp().cumsum(1)
    return (cumulative < uniform * cumulative[:, -1:]).sum(1).clamp(max=log_q.shape[1] - 1)


def acceptance_log_probabilities(log_q: torch.Tensor, log_p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns log p(y|x) / (M(x) q(y|x)) of each unit's label, with M(x) = max over y of p(y|x) / q(y|x).

    The envelope M(x) is exact, as the classes are few enough to try all. Accepted labels of x follow p(.|x), whatever
    factor p has, and a proposal is accepted with probability 1 / M(x): seldom where q and p disagree.

    Args:
        log_q: Log probabilities of the proposal, shape (U, C).
        log_p: Logarithm of the target up to a constant per unit, shape (U, C).
        labels: Shape (U,), int64.

    Returns:
        Shape (U,), float64, at most 0.

    Example:
        >>> q, p = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.8, 0.2]])
        >>> round(float(acceptance_log_probabilities(q.log(), p.log(), torch.tensor([1])).exp()), 3)  # .2 / (1.6 * .5)
        0.25
    """
    ratios = log_p.double() - log_q.double()
    ratios = torch.where(log_q > -torch.inf, ratios, -torch.inf)  # what is never proposed needs no envelope
    return ratios.gather(1, labels[:, None]).squeeze(1) - ratios.max(1).values


def decide(
    log_q: torch.Tensor, log_p: torch.Tensor, decision_of: torch.Tensor, generator: torch.Generator
) -> Decisions:
    """Draws a label for every unit and accepts or rejects it, together with the other units of its decision.

    Args:
        log_q: Log probabilities of the proposal, shape (U, C).
        log_p: Logarithm of the target up to a constant per unit, shape (U, C).
        decision_of: Decision of each unit, shape (U,), int64, from 0.
        generator: CPU generator, the only one that is advanced.
    """
    labels = propose_labels(log_q, generator)
    num_decisions = int(decision_of.max()) + 1 if len(decision_of) else 0
    # Independent units: the ratio of a row is the product of theirs, and so is its envelope.
    logs = torch.zeros(num_decisions, dtype=torch.float64)
    logs.index_add_(0, decision_of, acceptance_log_probabilities(log_q, log_p, labels))
    probabilities = logs.exp()
    accepts = torch.rand(num_decisions, dtype=torch.float64, generator=generator) < probabilities
    return Decisions(labels, probabilities[decision_of], accepts[decision_of])


def is_confident(
    confidences: torch.Tensor, classes: torch.Tensor, minimum: torch.Tensor | float | None, quantile: float | None
) -> torch.Tensor:
    """Returns which decisions are confident enough to be proposed a label, shape (D,), bool.

    Args:
        confidences: Largest probability of the prediction, shape (D,).
        classes: Predicted class of each decision, shape (D,), int64.
        minimum: Smallest confidence, one number or one per class, shape (C,); None for no limit.
        quantile: Share of each predicted class, in [0, 1), that is left out, the least confident first; None for none.

    Example:
        >>> confidences, classes = torch.tensor([0.9, 0.6, 0.7, 0.5]), torch.tensor([0, 0, 1, 1])
        >>> is_confident(confidences, classes, None, 0.5).tolist()
        [True, False, True, False]
        >>> is_confident(confidences, classes, torch.tensor([0.8, 0.4]), None).tolist()
        [True, False, True, True]
    """
    kept = torch.ones(len(confidences), dtype=torch.bool)
    if minimum is not None:
        kept &= confidences >= (minimum[classes] if isinstance(minimum, torch.Tensor) else minimum)
    if quantile is not None:
        for one in classes.unique():
            places = (classes == one).nonzero().squeeze(1)
            least_first = places[confidences[places].argsort(stable=True)]
            kept[least_first[: int(quantile * len(places))]] = False
    return kept


def expected_calibration_error(confidences: torch.Tensor, is_right: torch.Tensor, num_bins: int = 10) -> float:
    """Returns the mean difference of confidence and accuracy over bins. Guo et al. 2017, arXiv:1706.04599.

    Args:
        confidences: In [0, 1], shape (n,).
        is_right: Whether each prediction is right, shape (n,), bool.
        num_bins: Number of bins.

    Example:
        >>> expected_calibration_error(torch.tensor([0.75, 0.75]), torch.tensor([True, False]))
        0.25
    """
    bins = (confidences * num_bins).long().clamp(max=num_bins - 1)
    differences = torch.zeros(num_bins, dtype=torch.float64)
    differences.index_add_(0, bins, confidences.double() - is_right.double())
    return float(differences.abs().sum() / max(1, len(confidences)))
