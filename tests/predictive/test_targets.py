"""Targets: each against its formula, and refused where it does not fit."""

import pytest
import torch

from rsft_hf.predictive import Agreement, Calibrated, ClassPrior, Proposals, Sharpened, Teacher

PROBABILITIES = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.9, 0.1]])
PRIOR = torch.tensor([0.5, 0.5], dtype=torch.float64)


def proposals(predict=None, held_out=None, kind: str = "class") -> Proposals:
    return Proposals(PROBABILITIES.log(), PRIOR, kind, predict, held_out)


def normalised(log_p: torch.Tensor) -> torch.Tensor:
    return log_p.double().softmax(1)


def test_sharpened() -> None:
    found = normalised(Sharpened(0.5)(proposals()))
    squares = PROBABILITIES.double() ** 2
    assert torch.allclose(found, squares / squares.sum(1, keepdim=True))
    assert torch.allclose(normalised(Sharpened(1.0)(proposals())), PROBABILITIES.double())
    teacher = Teacher(torch.nn.Identity())
    other = torch.tensor([[0.5, 0.5], [0.6, 0.4], [0.1, 0.9]])
    found = normalised(Sharpened(0.5, of=teacher)(proposals(lambda model: other.log())))
    assert torch.allclose(found, (other.double() ** 2) / (other.double() ** 2).sum(1, keepdim=True))


def test_teacher_is_the_mean_of_its_models() -> None:
    first, second = torch.nn.Identity(), torch.nn.Flatten()
    answers = {first: torch.tensor([[0.5, 0.5]] * 3), second: torch.tensor([[0.9, 0.1]] * 3)}
    found = Teacher(first, second)(proposals(lambda model: answers[model].log()))
    assert torch.allclose(found.exp(), torch.tensor([[0.7, 0.3]] * 3))
    with pytest.raises(ValueError, match="The teacher gives 3 classes and the trained model 2"):
        Teacher(first)(proposals(lambda model: torch.zeros(3, 3)))
    with pytest.raises(TypeError, match="needs one or several models"):
        Teacher()


def test_agreement_is_the_geometric_mean_of_passes_of_other_seeds() -> None:
    seeds = []

    def predict(seed: int, with_dropout: bool) -> torch.Tensor:
        seeds.append(seed)
        assert with_dropout
        return (PROBABILITIES if seed % 2 else PROBABILITIES.flip(1)).log()

    found = Agreement(2)(proposals(predict))
    assert seeds == [1, 2]
    assert torch.allclose(found.exp().float(), (PROBABILITIES * PROBABILITIES.flip(1)).sqrt())


def test_class_prior_gives_the_labels_their_shares() -> None:
    found = normalised(ClassPrior()(proposals()))
    expected = PROBABILITIES.double() * 0.5 / PROBABILITIES.double().mean(0)
    assert torch.allclose(found, expected / expected.sum(1, keepdim=True))
    assert found.mean(0)[1] > PROBABILITIES.mean(0)[1]
    given = normalised(ClassPrior([0.2, 0.8])(proposals()))
    assert given.mean(0)[1] > found.mean(0)[1]
    with pytest.raises(ValueError, match="3 shares for 2 classes"):
        ClassPrior([0.2, 0.3, 0.5])(proposals())
    with pytest.raises(ValueError, match="multi-label"):
        ClassPrior()(proposals(kind="multi_label"))
    with pytest.raises(ValueError, match="above 0"):
        ClassPrior([0.0, 1.0])


def test_calibration_finds_the_temperature_of_the_labels() -> None:
    """Labels drawn at a known temperature: the fitted one is near it."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(4000, 3, generator=generator)
    labels = torch.multinomial((logits / 2.5).softmax(1), 1, generator=generator).squeeze(1)
    target = Calibrated([None] * 4000)
    found = target(proposals(held_out=lambda dataset: (logits.log_softmax(1), labels)))
    assert float((PROBABILITIES.log() / found).mean()) == pytest.approx(2.5, rel=0.1)
    assert repr(target) == "Calibrated(4000 rows)"


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: Sharpened(0.0), "`temperature`=0.0 must lie"), (lambda: Agreement(1), "`num_passes`=1 must be")],
)
def test_numbers_out_of_range(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
