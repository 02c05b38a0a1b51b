"""Probability that a label is wrong, from the margins by which a model agreed with it while it learnt.

margins of all epochs (epochs, L) -> learning: the epochs that count -> evidence: mean margin -> error_probabilities
"""

from typing import NamedTuple

import torch

from rsft_hf.weighted.label_margins import LabelMargins

_MIN_GROUP = 10  # labels in a group for a scale of its own
_MIN_AGREEMENT = 0.5  # share of the labels of a class that a model agrees with after learning it
_MAX_FORGOTTEN = 0.05  # share of the labels agreed with that a model that has learnt contradicts in the next epoch
_MIN_OF_NEXT = 0.9  # share of the next epoch's agreement that it has reached
_MIN_OF_BEST = 0.8  # share of the best epoch's agreement, where labels are forgotten to the end
_MIN_EPOCHS = 2  # that count, where there are as many
_MIN_READ = 0.25  # of the labels that the fullest epoch read, for a last epoch that counts

# Weak normal priors, mean and deviation: log k, so that the model errs on 2 % at its median margin; log-odds of 2 r, so
# that r is 4 % (0.2 to 31 at two deviations); and those of a class against all, a factor of 4 at two deviations.
_PRIORS = ((1.4, 0.7), (-2.5, 1.5), (0.0, 0.7))


def error_probabilities(margins: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Returns the probability that each label is wrong, from the margins by which the model agrees with it.

    A label contradicts the model because it is wrong and the model right, or because it is right and the model wrong:
    P(contradicts) = r (1 - e) + (1 - r) e, random classification noise (Angluin & Laird 1988). The error rate r of the
    labels, below 1/2, belongs to the predicted class; the model's error e = 1 / (1 + exp(k |m|)) falls with its margin.
    Labels that contradict the model where it is surest tell r from e; r and k are those of maximum posterior
    probability, and P(wrong | m) = sigmoid(logit r - k m).

    Args:
        margins: Mean margin of each label, shape (L,), > 0 where the model agrees; finite.
        groups: Class that the model predicts for each label, shape (L,), int64; k is in units of the median |m| of
            the class.

    Returns:
        Shape (L,), float64, in (0, 1).

    Example:
        >>> sizes, is_wrong = torch.linspace(0.1, 3, 100), torch.arange(100) % 10 == 3
        >>> margins = torch.where(is_wrong, -sizes, sizes)  # a tenth contradicts, however sure the model is
        >>> error_probabilities(margins, torch.zeros(100, dtype=torch.int64)).sum().round()
        tensor(9., dtype=torch.float64)
    """
    _, groups = groups.unique(return_inverse=True)
    scaled = margins.double() / _scales(margins.double().abs(), groups)
    contradicts = scaled < 0
    # Log of k, log-odds of r, and how far those of each class are from it.
    kinds = torch.tensor([0, 1, *[2] * (1 + int(groups.max()))])
    means, deviations = torch.tensor(_PRIORS, dtype=torch.float64)[kinds].unbind(1)
    parameters = means.clone().requires_grad_()

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        rate = torch.sigmoid(parameters[1] + parameters[2:])[groups] / 2
        model_error = torch.sigmoid(-parameters[0].exp() * scaled.abs())
        chance = (rate * (1 - model_error) + (1 - rate) * model_error).clamp(1e-12, 1 - 1e-12)
        likelihood = torch.where(contradicts, chance.log(), (1 - chance).log()).sum()
        value = ((parameters - means) / deviations).square().sum() / 2 - likelihood
        value.backward()
        return value

    optimizer = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")
    with torch.enable_grad():
        optimizer.step(loss)
    log_slope, log_odds, of_class = parameters.detach().split([1, 1, len(parameters) - 2])
    rates = torch.sigmoid(log_odds + of_class)[groups] / 2
    return torch.sigmoid(rates.logit() - log_slope.exp() * scaled)


def _scales(sizes: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Median of the sizes in the group of each label, shape (L,); of all labels for a group of a few."""
    medians = sizes.median().repeat(int(groups.max()) + 1)
    order = groups.argsort(stable=True)
    for group, of_group in enumerate(sizes[order].split(groups.bincount().tolist())):
        if len(of_group) >= _MIN_GROUP:
            medians[group] = of_group.median()
    return medians.clamp(min=1e-12)[groups]


class Learning(NamedTuple):
    """What a model has learnt of the labels.

    Attributes:
        is_used: Epochs that count, shape (epochs,), bool: from the first after which little changes, as many as there
            were before it, at least two. In the next epoch the model contradicts at most a twentieth of the labels of a
            class that it agreed with, and agrees with at most a ninth more; its agreement is at least half as far above
            chance as the best one's. Before, the model had not learnt the task; later, it learns the wrong labels by
            heart. If there is none, from the first whose agreement is four fifths of the best one's.
        is_learnt: Labels of a class that the model agreed with at least half of the time in one of them, shape (L,).
        agreement: Mean over the classes of the share of their labels that the model agreed with, in the best of them.
        is_trusted: Whether that is well above chance: half, and 5 of 8 for two classes.
    """

    is_used: torch.Tensor
    is_learnt: torch.Tensor
    agreement: float
    is_trusted: bool


def learning(history: torch.Tensor, classes: torch.Tensor, num_choices: int | None = None) -> Learning:
    """Returns what the model has learnt of the labels; a class counts as much as any other, however rare.

    Args:
        history: Margins, shape (epochs, L), NaN for a label that was not read.
        classes: Class of each label, shape (L,); of one that was never read it does not count.
        num_choices: Classes that the model chooses among; those that were read by default.

    Example:
        >>> history = torch.tensor([[1.0, 1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0]])  # class 1 is never learnt
        >>> learning(history, torch.tensor([0, 0, 0, 1])).is_learnt.tolist()
        [True, True, True, False]
    """
    _, classes = classes.unique(return_inverse=True)
    num_epochs, num_read = len(history), history.isfinite().sum(1)
    if num_read[-1] < _MIN_READ * num_read.max():
        history = history[:-1]  # interrupted after a few steps, it says little, and may lack a class
    is_read, agrees = history.isfinite(), history > 0
    rates = _class_shares(agrees, is_read, classes)
    agreements = rates.nanmean(1).nan_to_num(0.0)
    forgotten = _class_shares(~agrees[1:], is_read[1:] & agrees[:-1], classes).nanmean(1).nan_to_num(1.0)
    num_choices = num_choices or int(rates.isfinite().any(0).sum())
    chance = 1 / num_choices if num_choices > 1 else 0.0
    is_steady = (forgotten <= _MAX_FORGOTTEN) & (agreements[:-1] >= _MIN_OF_NEXT * agreements[1:])
    is_steady &= agreements[:-1] - chance >= (agreements.max() - chance) / 2
    if not bool(is_steady.any()):
        is_steady = agreements >= _MIN_OF_BEST * agreements.max()
    start = int(is_steady.int().argmax())
    used = slice(start, start + max(_MIN_EPOCHS, start))
    is_used = torch.zeros(num_epochs, dtype=torch.bool)
    is_used[: len(history)][used] = True
    is_learnt = rates[used].nan_to_num(0.0).amax(0) >= _MIN_AGREEMENT
    agreement = float(agreements[used].max())
    is_trusted = agreement >= max(_MIN_AGREEMENT, chance + (1 - chance) / 4)
    return Learning(is_used, is_learnt[classes], agreement, is_trusted)


def _class_shares(has: torch.Tensor, among: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Share of the labels `among` that also have something, by epoch and class, shape (epochs, classes).

    NaN for a class without such labels.
    """
    num_classes = int(classes.max()) + 1
    counted, found = torch.zeros(2, len(has), num_classes)
    for epoch, (chosen, own) in enumerate(zip(among, has, strict=True)):
        counted[epoch] = torch.bincount(classes[chosen], minlength=num_classes)
        found[epoch] = torch.bincount(classes[chosen & own], minlength=num_classes)
    return found / counted


def row_error_probabilities(history: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
    """Returns the probability that the label of each row is wrong, without the classes that the model prefers.

    Args:
        history: Margins, shape (epochs, N), NaN for a row that was not read.
        labels: Class of each row, shape (N,), which stands for the predicted one; None for one rate of errors.

    Returns:
        Shape (N,), float64, NaN for a row never read or of a class not learnt; None if the task is not learnt.
    """
    groups = torch.zeros(history.shape[1], dtype=torch.int64) if labels is None else labels
    learnt = learning(history, groups)
    margins = history[learnt.is_used].double().nanmean(0).masked_fill(~learnt.is_learnt, float("nan"))
    is_judged = margins.isfinite()
    if not learnt.is_trusted or not bool(is_judged.any()):
        return None
    margins[is_judged] = error_probabilities(margins[is_judged], groups[is_judged])
    return margins


def evidence(margins: LabelMargins, is_used: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean margins, and the classes that the model preferred at the lowest ones, of some of the epochs.

    Args:
        margins: Margins of all epochs.
        is_used: Shape (epochs,), bool.

    Returns:
        Shape (L,), float64, NaN for a label that was not read in them; shape (L,), int64.
    """
    history, rivals = (torch.stack(values)[is_used] for values in zip(*margins.epochs, strict=True))
    lowest = history.nan_to_num(float("inf")).argmin(0, keepdim=True)
    return history.double().nanmean(0), rivals.gather(0, lowest).squeeze(0).long()
