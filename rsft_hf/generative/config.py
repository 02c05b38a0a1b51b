"""What can be said of a `CandidateResampler`'s arguments before there is a model or a data set."""

from typing import TYPE_CHECKING

from rsft_hf.acceptance import check_acceptance
from rsft_hf.engines.generation_config import check_generation_config
from rsft_hf.generative.filters import Deduplicate

if TYPE_CHECKING:
    from rsft_hf.generative.resampler import CandidateResampler

_CHOICES = {
    "on_nothing_accepted": ("raise", "skip", "best", "reference"),
    "round_start": ("last", "base", "best"),
}

_AT_LEAST = {
    "num_candidates": 1,
    "max_attempts": 1,
    "min_accepted_per_prompt": 1,
    "every_n_epochs": 1,
    "replay_rounds": 0,
}


def check_options(resampler: "CandidateResampler") -> None:
    """Raises if an argument is out of its range or contradicts another.

    Raises:
        TypeError: If a rule or filter is a class or no rule at all.
        ValueError: If a number or name is out of its range.
    """
    for name, choices in _CHOICES.items():
        if vars(resampler)[name] not in choices:
            raise ValueError(f"`{name}`={vars(resampler)[name]!r} must be one of {', '.join(map(repr, choices))}.")
    for name, least in _AT_LEAST.items():
        value = vars(resampler)[name]
        if type(value) is not int or value < least:
            raise ValueError(f"`{name}`={value!r} must be an integer of at least {least}.")
    if resampler.num_draws is not None and (type(resampler.num_draws) is not int or resampler.num_draws < 1):
        raise ValueError(
            f"`num_draws`={resampler.num_draws!r} must be an integer of at least 1, or None for the number of prompts."
        )
    if resampler.merge_adapter and isinstance(resampler.reference_model, str):
        raise ValueError(
            f"`reference_model`={resampler.reference_model!r} turns off the adapter that `merge_adapter=True` has "
            "merged. Leave one of them out."
        )
    _check_supervised(resampler)
    check_acceptance(resampler.acceptance, "`acceptance`")
    for rule in resampler.filters:
        if isinstance(rule, type) or not callable(rule):
            raise TypeError(
                f"`filters` holds {rule!r}; a filter is an object such as RejectTruncated(), called per candidate."
            )
    if resampler.dedup is not None and not isinstance(resampler.dedup, Deduplicate):
        raise TypeError(f"`dedup` must be Deduplicate(...) or None, got {resampler.dedup!r}.")
    check_generation_config(resampler.generation_config, resampler.num_candidates)
    if resampler.min_accepted_per_prompt > resampler.num_candidates * resampler.max_attempts:
        raise ValueError(
            f"`min_accepted_per_prompt`={resampler.min_accepted_per_prompt} can never be reached by "
            f"`num_candidates`={resampler.num_candidates} x `max_attempts`={resampler.max_attempts}."
        )


def _check_supervised(resampler: "CandidateResampler") -> None:
    fraction, dataset = resampler.supervised_fraction, resampler.supervised_dataset
    if not 0 <= fraction <= 1:
        raise ValueError(f"`supervised_fraction`={fraction} must lie in [0, 1]: the share of the rows trained on.")
    if (dataset is None) != (fraction == 0):
        raise ValueError(
            f"`supervised_fraction`={fraction} and `supervised_dataset`={'None' if dataset is None else 'given'} "
            "contradict each other. Give both, or neither."
        )
    if dataset is not None and len(dataset) == 0:
        raise ValueError("`supervised_dataset` has no rows.")
