"""Metrics of a round: rewards, acceptance, lengths, diversity, throughput; and the explanation of an empty round.

Every value is a finite float; a mean of nothing is left out.
"""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
import torch
from accelerate import Accelerator

from rsft_hf.acceptance import RSO, Acceptance, CandidateBatch, DensityRatio
from rsft_hf.distributed import gather_lists
from rsft_hf.generative.candidates import CandidateStore
from rsft_hf.generative.selection import RoundTable
from rsft_hf.rejection import effective_sample_size_from_logs


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
    """Returns the logged metrics of a round.

    Args:
        batch: The round's candidates.
        accepted: Shape (P, n), bool: what is trained on, a reference answer nobody judged included.
        rewards_by_function: For each reward function its rewards, any shape, NaN where it could not judge.
        is_generated: Shape (P, n), bool: the cells that hold a candidate, valid or filtered out. None is every cell.

    Returns:
        `round/acceptance_rate` (accepted over all generated), `round/prompts_without_accepted` and
        `round/prompts_all_accepted` (shares of all prompts), `round/frac_reward_zero_std`, `candidates/unjudged` (share
        of the valid ones), `candidates/reward` and `accepted/reward` (means of the judged),
        `rewards/<name>/mean`, `/std` (sample); lengths: `candidates/length`, `accepted/length`, their correlation.

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
        "round/acceptance_rate": _mean(accepted[generated]),
        "candidates/unjudged": _mean(batch.rewards.isnan()[batch.is_valid]),
        "round/prompts_without_accepted": _mean(~accepted.any(dim=1)),
        "round/prompts_all_accepted": _mean(is_candidate.any(dim=1) & (accepted | ~is_candidate).all(dim=1)),
        "round/frac_reward_zero_std": frac_reward_zero_std(batch),
        "candidates/reward": _mean(batch.rewards[is_judged]),
        "accepted/reward": _mean(batch.rewards[accepted & is_judged]),
    }
    for name, rewards in (rewards_by_function or {}).items():
        metrics |= _moments(f"rewards/{name}", rewards)
    if batch.lengths is not None:
        metrics["candidates/length"] = _mean(batch.lengths[generated])
        metrics["accepted/length"] = _mean(batch.lengths[accepted])
        pairs = batch.lengths[is_judged].tolist(), batch.rewards[is_judged].tolist()
        metrics["candidates/length_reward_correlation"] = correlation(*pairs)
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


@dataclass
class Throughput:
    """Seconds and tokens that this process spent on a round."""

    generate_seconds: float = 0.0
    generate_tokens: int = 0
    score_seconds: float = 0.0
    score_tokens: int = 0
    num_candidates: int = 0

    def described(self) -> str:
        """Returns candidates and tokens per second of generation, for a progress bar.

        Example:
            >>> Throughput(generate_seconds=2.0, generate_tokens=3000, num_candidates=50).described()
            '25.0 candidates/s, 1500 tokens/s'
        """
        seconds = max(self.generate_seconds, 1e-9)
        return f"{self.num_candidates / seconds:.1f} candidates/s, {self.generate_tokens / seconds:.0f} tokens/s"

    def metrics(self, accelerator: Accelerator) -> dict[str, float]:
        """Returns tokens of all processes per second of the slowest's time, of what this run made itself."""
        efforts = gather_lists(accelerator, [self])
        metrics = {}
        for stage, past in (("generate", "generated"), ("score", "scored")):
            tokens = sum(vars(effort)[f"{stage}_tokens"] for effort in efforts)
            seconds = max(vars(effort)[f"{stage}_seconds"] for effort in efforts)
            if tokens:
                metrics[f"round/{past}_tokens_per_second"] = tokens / max(seconds, 1e-9)
        return metrics


_MAX_COUNTED = 5_000  # candidates whose tokens are looked at: enough for a trend, and soon done


def round_metrics(
    store: CandidateStore, table: RoundTable, verdicts: Sequence[str], rule: Acceptance
) -> dict[str, float]:
    """Returns rewards, acceptance, lengths and diversity of a round; what is not defined is left out.

    All of it comes from the store, so that a round that was interrupted has the same figures as one that was not.

    Args:
        store: For tokens, and rewards by function.
        table: The numbers of the round.
        verdicts: One per candidate, in the order of the table.
        rule: The rule of acceptance, for the effective sample size.
    """
    batch = table.batch([verdict not in ("filtered", "duplicate") for verdict in verdicts])
    # What came in by a fallback was not accepted by the rule: `fallback` counts it.
    accepted = table.spread([verdict == "accepted" for verdict in verdicts], torch.bool, False)
    is_generated = table.spread([True] * len(verdicts), torch.bool, False)
    metrics = candidate_metrics(batch, accepted, _rewards_by_function(store), is_generated)
    for name in ("filtered", "duplicate", "fallback"):
        metrics[f"candidates/{name}"] = sum(verdict == name for verdict in verdicts) / len(verdicts)
    reasons = table.columns["finish_reason"]
    metrics["candidates/truncated"] = sum(reason == "length" for reason in reasons) / len(reasons)
    if isinstance(rule, (DensityRatio, RSO)):
        metrics["round/effective_sample_size"] = _effective_sample_size(rule, batch)
    sizes = [pq.read_metadata(path).num_rows for path in store.shards()]
    metrics |= _pass_at(table) | _diversity(store) | weighted_means(store.logged(), sizes)
    lengths = table.columns["num_tokens"]
    scored = [length for length, verdict in zip(lengths, verdicts, strict=True) if verdict != "filtered"]
    metrics |= {"round/generated_tokens": float(sum(lengths)), "round/scored_tokens": float(sum(scored))}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def weighted_means(logged: Sequence[Mapping[str, float]], sizes: Sequence[int]) -> dict[str, float]:
    """Returns the mean of each value that reward functions logged, weighted by the candidates of each part.

    Args:
        logged: Values by name of each part.
        sizes: Candidates of each part, as many numbers.

    Example:
        >>> weighted_means([{"a": 1.0}, {"a": 4.0, "b": 2.0}], [2, 1])
        {'a': 2.0, 'b': 2.0}
    """
    metrics = {}
    for name in dict.fromkeys(name for values in logged for name in values):
        given = [(values[name], size) for values, size in zip(logged, sizes, strict=True) if name in values]
        metrics[name] = sum(value * size for value, size in given) / sum(size for _, size in given)
    return metrics


def _rewards_by_function(store: CandidateStore) -> dict[str, torch.Tensor]:
    columns = store.columns([f"rewards/{name}" for name in store.reward_names])
    return {
        name.removeprefix("rewards/"): torch.tensor(
            [math.nan if value is None else value for value in values], dtype=torch.float64
        )
        for name, values in columns.items()
    }


def _effective_sample_size(rule: Any, batch: Any) -> float:
    if isinstance(rule, DensityRatio):
        return rule.effective_sample_size(batch)
    log_weights = (batch.rewards / rule.beta).masked_fill(~batch.is_candidate, -math.inf)
    return sum(effective_sample_size_from_logs(row) for row in log_weights)


def _pass_at(table: RoundTable) -> dict[str, float]:
    """pass@k for k = 1, 2, 4, ..., where every reward is 0 or 1; what was filtered out has failed.

    Of the first attempt alone: later ones are made where nothing was solved yet, and would bias the estimate.
    """
    rewards = table.columns["reward"]
    is_first = [attempt == 0 for attempt in table.columns["attempt"]]
    if not {reward for reward in rewards if reward is not None} <= {0.0, 1.0}:
        return {}
    solved = (
        table.spread(
            [first and reward == 1.0 for first, reward in zip(is_first, rewards, strict=True)], torch.bool, False
        )
        .sum(1)
        .tolist()
    )
    counts = table.spread(is_first, torch.bool, False).sum(1).tolist()
    ks = itertools.takewhile(lambda k: k <= min(counts), (2**power for power in itertools.count()))
    return {
        f"round/pass@{k}": sum(pass_at_k(n, c, k) for n, c in zip(counts, solved, strict=True)) / len(counts)
        for k in ks
    }


def _diversity(store: CandidateStore) -> dict[str, float]:
    tokens: dict[str, list[list[int]]] = {"candidates": [], "accepted": []}
    texts: list[tuple[int, str]] = []
    for path in store.shards():
        if len(tokens["candidates"]) >= _MAX_COUNTED:
            break
        for candidate in store.read(path):
            if candidate.finish_reason == "reference":
                continue
            tokens["candidates"].append(candidate.token_ids)
            texts.append((candidate.prompt_id, candidate.text))
            if candidate.is_accepted:
                tokens["accepted"].append(candidate.token_ids)
    metrics = {f"{kind}/distinct_{n}": distinct_n(lists, n) for kind, lists in tokens.items() for n in (1, 2) if lists}
    return metrics | ({"candidates/unique": len(set(texts)) / len(texts)} if texts else {})


def explain_empty_round(
    store: CandidateStore, table: RoundTable, verdicts: Sequence[str], acceptance: Acceptance
) -> str:
    """Returns the message of a round in which no candidate was accepted: how many fell to what, and the remedy."""
    counts, remedies = Counter(verdicts), []
    parts = [f"{counts['rejected']} rejected by {acceptance!r}"] if counts["rejected"] else []
    rewards = [reward for reward in table.columns["reward"] if reward is not None]
    if rewards and counts["rejected"]:
        parts[-1] += f" (rewards {min(rewards):.4g} to {max(rewards):.4g})"
        remedies.append("loosen the rule, raise `num_candidates` or `max_attempts`, or use TopKPerPrompt")
    if counts["filtered"]:
        columns = store.columns(["rule", "verdict"])
        filtered = Counter(rule for rule, verdict in zip(*columns.values(), strict=True) if verdict == "filtered")
        parts.append(
            f"{counts['filtered']} filtered out ({', '.join(f'{n} by {rule}' for rule, n in filtered.items())})"
        )
        if any("Truncated" in rule for rule in filtered):
            remedies.append("raise `max_new_tokens`, or check that the model writes its `eos_token_id`")
    if counts["unjudged"]:
        parts.append(f"{counts['unjudged']} that no reward function could judge (all returned None)")
        remedies.append("look at the reward functions' inputs")
    if counts["duplicate"]:
        parts.append(f"{counts['duplicate']} duplicates")
    remedies.append('or set on_nothing_accepted="best", "reference" or "skip"')
    return (
        f"No candidate was accepted in {store.directory.name}: of {len(verdicts)}, {', '.join(parts)}. "
        f"Remedies: {'; '.join(remedies)}. The candidates are kept in {store.directory}, and can be judged again "
        "without being generated again."
    )
