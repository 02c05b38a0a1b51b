"""Error probabilities under the law that they assume, and the epochs of a run whose margins count."""

import math

import pytest
import torch

from rsft_hf.weighted.label_errors import error_probabilities, learning


def drawn_from_the_law(num_labels: int, rates: list[float], slope: float, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Margins, predicted classes and wrong labels of the model that `error_probabilities` assumes."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda: torch.rand(num_labels, generator=generator, dtype=torch.float64)  # noqa: E731
    sizes, groups = 0.2 + 2 * uniform(), (uniform() * len(rates)).long()
    is_wrong = uniform() < torch.tensor(rates, dtype=torch.float64)[groups]
    is_model_wrong = uniform() < torch.sigmoid(-slope * sizes)
    return torch.where(is_wrong ^ is_model_wrong, -sizes, sizes), groups, is_wrong


@pytest.mark.parametrize("rates", [[0.15, 0.15, 0.15], [0.3, 0.02, 0.1], [0.0, 0.0, 0.0]])
def test_probabilities_are_calibrated_under_their_law(rates):
    margins, groups, is_wrong = drawn_from_the_law(30_000, rates, slope=3.0)
    probabilities = error_probabilities(margins, groups)
    for group in range(3):  # the estimated number of errors of each class
        expected = int(is_wrong[groups == group].sum())
        assert float(probabilities[groups == group].sum()) == pytest.approx(expected, rel=0.1, abs=25)
    for low in (0.1, 0.3, 0.5, 0.7, 0.9):  # of the labels said to be wrong with p, the share p is
        bin_ = (probabilities > low - 0.1) & (probabilities <= low + 0.1)
        if int(bin_.sum()) > 300:
            assert float(is_wrong[bin_].double().mean()) == pytest.approx(float(probabilities[bin_].mean()), abs=0.06)


def test_probabilities_by_hand():
    """r = 1/10, k = 3: sigmoid(logit r - k m) is r / (r + (1 - r) e^(k m))."""
    margins, groups, _ = drawn_from_the_law(200_000, [0.1], slope=3.0)
    found = error_probabilities(torch.cat([margins, torch.tensor([-1.0, 1.0])]), torch.cat([groups, groups[:2]]))[-2:]
    assert found.tolist() == pytest.approx(
        [0.1 / (0.1 + 0.9 * math.exp(-3)), 0.1 / (0.1 + 0.9 * math.exp(3))], abs=0.03
    )


def test_a_contradiction_of_a_sure_model_is_an_error_and_agreement_is_none():
    sizes, is_tenth = torch.linspace(0.2, 3.0, 1000), torch.arange(1000) % 10 == 3
    assert float(error_probabilities(sizes, torch.zeros(1000, dtype=torch.int64)).sum()) < 1
    probabilities = error_probabilities(torch.where(is_tenth, -sizes, sizes), torch.arange(1000) % 2)
    assert probabilities[is_tenth & (sizes > 1)].min() > 0.9
    assert probabilities[~is_tenth & (sizes > 1)].max() < 0.05
    assert float(probabilities.sum()) == pytest.approx(100, abs=10)


def signs(agreed: list[range]) -> torch.Tensor:
    """Margins of ten labels by epoch: 1 for those in the range, -1 - epoch for the others."""
    return torch.tensor([[1.0 if row in rows else -1.0 - e for row in range(10)] for e, rows in enumerate(agreed)])


def test_epochs_before_the_task_is_learnt_are_left_out():
    """Epoch 0 is far from the best, epoch 1 forgets 1 of 6 labels, epoch 2 learns 2 more of 7, epoch 3 forgets none."""
    epochs = signs([range(2), range(6), range(1, 8), range(1, 10), range(1, 10), range(1, 10), range(10)])
    learnt = learning(epochs, torch.zeros(10))
    assert learnt.is_used.tolist() == [False] * 3 + [True] * 3 + [False]
    assert learnt.agreement == pytest.approx(0.9)
    assert learning(epochs[:3], torch.zeros(10)).is_used.tolist() == [False, True, True]  # none; 6 is above 4/5 of 7
    assert learning(epochs[:1], torch.zeros(10)).is_used.tolist() == [True]


@pytest.mark.parametrize(("first", "used"), [(0, [0, 1]), (1, [1, 2]), (2, [2, 3]), (3, [3, 4, 5]), (6, [6, 7])])
def test_epochs_that_learn_the_labels_by_heart_are_left_out(first, used):
    """Before the task is learnt the model contradicts what it agreed with; in the end it agrees with wrong labels."""
    history = torch.ones(8, 40)
    history[:first] = torch.where((torch.arange(40) + torch.arange(first).unsqueeze(1)) % 2 == 0, 1.0, -1.0)
    history[: 2 * first, 38:] = -1.0  # a twentieth is wrong
    assert learning(history, torch.zeros(40)).is_used.nonzero().flatten().tolist() == used


def test_classes_weigh_the_same_in_what_is_forgotten():
    """Both labels of class 1 are forgotten after epoch 1: half of what a class has, though 2 of 40 labels."""
    history, classes = torch.ones(4, 40), torch.tensor([0] * 38 + [1] * 2)
    history[1, 38:] = -1.0
    assert learning(history, classes).is_used.tolist() == [False, False, True, True]
    assert learning(history, torch.zeros(40)).is_used.tolist() == [True, True, False, False]
