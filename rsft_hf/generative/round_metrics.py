"""What a round is described by in the logs, from its store and its verdicts.

Columns and verdicts enter, a dict of finite floats leaves.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from rsft_hf.acceptance import RSO, Acceptance, DensityRatio
from rsft_hf.generative.candidates import CandidateStore
from rsft_hf.generative.selection import RoundTable
from rsft_hf.generative.statistics import candidate_metrics, distinct_n, pass_at_k
from rsft_hf.rejection import effective_sample_size_from_logs

_MAX_COUNTED = 5_000  # candidates whose tokens are looked at: enough for a trend, and soon done


def round_metrics(
    store: CandidateStore, table: RoundTable, verdicts: Sequence[str], rule: Acceptance
) -> dict[str, float]:
    """Returns rewards, acceptance, lengths and diversity of a round; what is not defined is left out.

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
        metrics[name] = sum(verdict == name for verdict in verdicts) / len(verdicts)
    reasons = table.columns["finish_reason"]
    metrics["truncated"] = sum(reason == "length" for reason in reasons) / len(reasons)
    if isinstance(rule, (DensityRatio, RSO)):
        metrics["effective_sample_size"] = _effective_sample_size(rule, batch)
    metrics |= _pass_at(table) | _diversity(store)
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


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
    return {f"pass@{k}": sum(pass_at_k(n, c, k) for n, c in zip(counts, solved, strict=True)) / len(counts) for k in ks}


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
