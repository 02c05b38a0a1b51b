"""Numbers that describe a round: what was generated, what was accepted, and how the rewards behave.

Tensors of rewards, lengths and log-weights enter, floats leave; NaN is what cannot be said. Models and texts are not
known here.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch

from rsft_hf.acceptance import CandidateBatch


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Returns the unbiased estimate of the probability that one of k samples is correct.

    Args:
        num_samples: n, samples drawn for the problem.
        num_correct: c, how many of them are correct, in [0, n].
        k: In [1, n].

    Returns:
        1 - C(n - c, k) / C(n, k), in [0, 1]. Chen et al. 2021, arXiv:2107.03374.

    Raises:
        ValueError: If `num_correct` is not in [0, num_samples] or `k` not in [1, num_samples].

    Example:
        >>> pass_at_k(4, 2, 2)  # 1 - C(2, 2) / C(4, 2) = 1 - 1/6
        0.8333333333333334
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"`num_correct`={num_correct} must lie between 0 and `num_samples`={num_samples}.")
    if not 1 <= k <= num_samples:
        raise ValueError(f"`k`={k} must lie between 1 and `num_samples`={num_samples}. Draw more samples or lower `k`.")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def distinct_n(sequences: Iterable[Sequence[Hashable]], n: int) -> float:
    """Returns the number of different n-grams over the number of n-grams, all sequences together.

    It falls when a model repeats itself; it also falls as more text is counted, so compare equal amounts.

    Args:
        sequences: Token ids or words of each text.
        n: Length of the n-grams, >= 1.

    Returns:
        A share in (0, 1]; NaN where no sequence has n items. Li et al. 2016, arXiv:1510.03055.

    Raises:
        ValueError: If `n` is below 1.

    Example:
        >>> distinct_n([["a", "b", "a", "b"]], 2)  # ab, ba, ab
        0.6666666666666666
    """
    if n < 1:
        raise ValueError(f"`n`={n} must be at least 1.")
    grams = [tuple(items[i : i + n]) for items in sequences for i in range(len(items) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def correlation(first: Iterable[float | None], second: Iterable[float | None]) -> float:
    """Returns Pearson's correlation over the pairs in which both are finite.

    Args:
        first: Numbers; None and NaN mean unknown.
        second: As many.

    Returns:
        In [-1, 1]; NaN with fewer than two such pairs, or where one side does not vary.

    Raises:
        ValueError: If their numbers differ.

    Example:
        >>> correlation([1, 2, None, 3], [2, 4, 0, 6])
        1.0
    """
    pairs = [(_number(a), _number(b)) for a, b in zip(first, second, strict=True)]
    values = torch.tensor([pair for pair in pairs if all(map(math.isfinite, pair))], dtype=torch.float64)
    if len(values) < 2 or bool((values == values[0]).all(dim=0).any()):
        return math.nan
    centred = values - values.mean(dim=0)
    centred = centred / centred.abs().amax(dim=0)  # no square overflows or vanishes
    product, squares = centred.prod(dim=1).sum(), (centred**2).sum(dim=0)
    return float((product / squares.prod().sqrt()).clamp(-1, 1))


def frac_reward_zero_std(batch: CandidateBatch) -> float:
    """Returns the share of prompts whose candidates all have one reward: nothing to choose between.

    Args:
        batch: Prompts without a candidate are left out, one with a single candidate has nothing to choose between.

    Returns:
        In [0, 1]; NaN where no prompt has a candidate.

    Example:
        >>> frac_reward_zero_std(CandidateBatch(torch.tensor([[1.0, 1.0], [0.0, 1.0]])))
        0.5
    """
    is_candidate = batch.is_candidate
    highest = batch.rewards.masked_fill(~is_candidate, -math.inf).amax(dim=1)
    lowest = batch.rewards.masked_fill(~is_candidate, math.inf).amin(dim=1)
    return _mean((highest == lowest)[is_candidate.any(dim=1)])


def candidate_metrics(
    batch: CandidateBatch,
    accepted: torch.Tensor,
    rewards_by_function: Mapping[str, torch.Tensor] | None = None,
    is_generated: torch.Tensor | None = None,
) -> dict[str, float]:
    """Returns what a round is described by in the logs.

    Args:
        batch: The round's candidates.
        accepted: Shape (P, n), bool: what is trained on, a reference answer nobody judged included.
        rewards_by_function: For each reward function its rewards, any shape, NaN where it could not judge.
        is_generated: Shape (P, n), bool: the cells that hold a candidate, valid or filtered out. None is every cell.

    Returns:
        `acceptance_rate` (accepted over all generated), `unjudged` (share of the valid ones), `frac_reward_zero_std`,
        `prompts_without_accepted` and `prompts_all_accepted` (shares of all prompts), `candidates/reward` and
        `accepted/reward` (means of what was judged), `rewards/<name>/mean` and `/std` (the sample's); with lengths also
        `candidates/length`, `accepted/length`, `length_reward_correlation`. NaN is a mean of nothing.

    Raises:
        ValueError: If a mask has another shape or kind, or they contradict each other or the batch.

    Example:
        >>> batch = CandidateBatch(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
        >>> candidate_metrics(batch, torch.tensor([[False, True], [False, False]]))["accepted/reward"]
        3.0
    """
    is_candidate = batch.is_candidate
    generated = torch.ones_like(is_candidate) if is_generated is None else is_generated
    _check_mask("is_generated", ~generated, ~batch.is_valid, "leaves out a candidate that is valid")
    _check_mask("accepted", accepted, generated, "accepts a cell that holds no candidate")
    is_judged = generated & ~batch.rewards.isnan()
    metrics = {
        "acceptance_rate": _mean(accepted[generated]),
        "unjudged": _mean(batch.rewards.isnan()[batch.is_valid]),
        "prompts_without_accepted": _mean(~accepted.any(dim=1)),
        "prompts_all_accepted": _mean(is_candidate.any(dim=1) & (accepted | ~is_candidate).all(dim=1)),
        "frac_reward_zero_std": frac_reward_zero_std(batch),
        "candidates/reward": _mean(batch.rewards[is_judged]),
        "accepted/reward": _mean(batch.rewards[accepted & is_judged]),
    }
    for name, rewards in (rewards_by_function or {}).items():
        metrics |= _moments(f"rewards/{name}", rewards)
    if batch.lengths is not None:
        metrics["candidates/length"] = _mean(batch.lengths[generated])
        metrics["accepted/length"] = _mean(batch.lengths[accepted])
        pairs = batch.lengths[is_judged].tolist(), batch.rewards[is_judged].tolist()
        metrics["length_reward_correlation"] = correlation(*pairs)
    return metrics


def _moments(name: str, rewards: torch.Tensor) -> dict[str, float]:
    judged = rewards[~rewards.isnan()].double()
    return {f"{name}/mean": _mean(judged), f"{name}/std": float(judged.std()) if len(judged) > 1 else math.nan}


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _mean(values: torch.Tensor) -> float:
    return float(values.double().mean()) if values.numel() else math.nan


def _check_mask(name: str, mask: torch.Tensor, allowed: torch.Tensor, fault: str) -> None:
    if mask.dtype != torch.bool or mask.shape != allowed.shape:
        raise ValueError(
            f"`{name}` must be bool of shape {tuple(allowed.shape)}, got {mask.dtype} {tuple(mask.shape)}."
        )
    wrong = mask & ~allowed
    if bool(wrong.any()):
        raise ValueError(
            f"`{name}` {fault}: prompt, candidate {wrong.nonzero()[0].tolist()} ({int(wrong.sum())} such)."
        )
