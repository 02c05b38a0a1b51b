"""Options of `LossResampler` that are wrong by themselves are refused when the object is made."""

from dataclasses import dataclass

import pytest
import torch

from rsft_hf import Chain, LossResampler, Proportional, Tempered
from rsft_hf.weighted import Entropy, Margin


class Silent:
    """Callable, but says nothing of what it reads."""

    def __call__(self, scores, statistics=None):
        return scores

    def __repr__(self):
        return "Silent()"  # names a case: it must be equal in every process


@dataclass(frozen=True)
class Softer(Tempered):
    """A user's rule that inherits everything."""

    alpha: float = 0.25


OPTIONS = [
    ({"num_draws": 0}, ValueError, r"`num_draws`=0 must lie between 1 and 2\*\*31"),
    ({"num_draws": -1}, ValueError, r"`num_draws`=-1 must lie between 1 and 2\*\*31"),
    ({"num_draws": 2**31 + 1}, ValueError, r"`num_draws`=2147483649 must lie between"),
    ({"num_draws": 5.0}, TypeError, r"`num_draws` must be an integer number of rows, got 5\.0"),
    ({"weighting": Proportional}, TypeError, r"`weighting` must be a rule such as Proportional\(\).*<class"),
    ({"weighting": "loss"}, TypeError, r"`weighting` must be a rule such as Proportional\(\).*'loss'"),
    ({"weighting": Silent()}, TypeError, r"does not say which statistics it reads.*`requires: ClassVar"),
    ({"losses": "both"}, ValueError, r"`losses`='both' must be \"forward\" or \"training\""),
    ({"weighting": Entropy(), "losses": "training"}, ValueError, r"Entropy\(\) reads \['entropies'\], which only"),
    ({"weighting": Chain(Margin(), Tempered()), "losses": "training"}, ValueError, r"reads \['margins'\]"),
    ({"importance_correction": 1.5}, ValueError, r"`importance_correction`=1\.5 must lie in \[0, 1\]"),
    ({"importance_correction": -0.1}, ValueError, r"`importance_correction`=-0\.1 must lie in \[0, 1\]"),
    ({"importance_correction": float("nan")}, ValueError, r"`importance_correction`=nan must lie in \[0, 1\]"),
    ({"ema_decay": 1.0}, ValueError, r"`ema_decay`=1\.0 must lie in \[0, 1\)"),
    ({"warmup_epochs": -1}, ValueError, r"`warmup_epochs`=-1 must be at least 0"),
    ({"uniform_final_epochs": 0.5}, TypeError, r"`uniform_final_epochs` must be an integer, got 0\.5"),
    ({"every_n_epochs": 0}, ValueError, r"`every_n_epochs`=0 must be at least 1"),
    ({"batch_size": 0}, ValueError, r"`batch_size`=0 must be at least 1"),
    ({"proposal": torch.tensor([1.0, 0.0])}, ValueError, r"`proposal` is 0 at index 1"),
    ({"proposal": torch.empty(0)}, ValueError, r"`proposal` must have shape \(N,\)"),
    ({"proposal": torch.tensor(1.0)}, ValueError, r"`proposal` must have shape \(N,\)"),
]


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS, ids=[str(options) for options, *_ in OPTIONS])
def test_options_out_of_range_are_refused_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        LossResampler(**options)


def test_a_rule_that_inherits_from_a_rule_is_a_rule():
    assert LossResampler(Softer()).weighting.requires == frozenset()
