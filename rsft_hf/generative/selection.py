"""Filtering, scoring and selection of a round's candidates: from numbers to verdicts.

Verdicts depend on columns of the store without texts, and on seeded generators, so that the main process decides and
broadcasts.
"""

import functools
import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rsft_hf.acceptance import Acceptance, CandidateBatch, RandomLike, RandomPerPrompt
from rsft_hf.acceptance import Sequence as RuleSequence
from rsft_hf.engines.random_streams import candidate_seed, verdict_uniforms
from rsft_hf.generative.candidates import ACCEPTED, Candidate
from rsft_hf.generative.filters import Deduplicate, Filter
from rsft_hf.isolation import forked_rng
from rsft_hf.rewards.functions import RewardFunctions, Scores

COLUMNS = (
    "prompt_id", "attempt", "candidate", "reward", "log_q", "log_p", "num_tokens", "seed", "verdict", "duplicate_key",
    "finish_reason",
)  # fmt: skip

_NO_PROMPT = -1  # names the stream of the rules, which belong to no prompt


@dataclass(frozen=True)
class SelectionRules:
    """Options of the selection of a round.

    Attributes:
        acceptance: The rule, for this round.
        min_accepted: Accepted candidates below which a prompt is in need.
        takes_best: Whether a prompt without an accepted candidate gives its best one.
        run_seed: Seed of the run.
        round_number: Round, from 0.
    """

    acceptance: Acceptance
    min_accepted: int
    takes_best: bool
    run_seed: int
    round_number: int


@dataclass
class RoundTable:
    """The numbers of a round, one entry per candidate in the order of the store, and where each stands in (P, n).

    Attributes:
        columns: Columns by name, as `CandidateStore.columns(COLUMNS)` returns them; references are left out.
        prompt_ids: The prompts, sorted, P of them.
        places: Row and column of each candidate in (P, n), shape (C, 2).
    """

    columns: dict[str, list[Any]]
    prompt_ids: list[int]
    places: torch.Tensor

    @classmethod
    def of(cls, columns: dict[str, list[Any]], last_attempt: int | None = None) -> "RoundTable":
        """Returns the table of these columns, of all attempts or of those up to `last_attempt`."""
        kept = [
            row
            for row, (reason, attempt) in enumerate(zip(columns["finish_reason"], columns["attempt"], strict=True))
            if reason != "reference" and (last_attempt is None or attempt <= last_attempt)
        ]
        columns = {name: [values[row] for row in kept] for name, values in columns.items()}
        keys = [np.array(columns[name], dtype=np.int64) for name in ("candidate", "attempt", "prompt_id")]
        prompt_ids, first, rows = np.unique(np.sort(keys[-1]), return_index=True, return_inverse=True)
        order, places = np.lexsort(keys), np.empty((len(keys[0]), 2), dtype=np.int64)
        places[order, 0], places[order, 1] = rows, np.arange(len(rows)) - first[rows]
        return cls(columns, prompt_ids.tolist(), torch.from_numpy(places))

    def spread(self, values: Sequence[Any], dtype: torch.dtype, missing: Any) -> torch.Tensor:
        """Returns values of the candidates as (P, n), `missing` where there is no candidate or no value."""
        width = int(self.places[:, 1].max()) + 1 if len(self.places) else 0
        matrix = torch.full((len(self.prompt_ids), width), missing, dtype=dtype)
        numbers = [missing if value is None else value for value in values]
        matrix[self.places[:, 0], self.places[:, 1]] = torch.tensor(numbers, dtype=dtype)
        return matrix

    def gathered(self, matrix: torch.Tensor) -> torch.Tensor:
        """Returns the entries of (P, n) in the order of the store, shape (C,)."""
        return matrix[self.places[:, 0], self.places[:, 1]]

    @functools.cached_property
    def uniforms(self) -> list[float]:
        """Uniform number u of each candidate, in the order of the store; the slowest part of judging."""
        return verdict_uniforms(self.columns["seed"]).tolist()

    def batch(self, is_valid: Sequence[bool]) -> CandidateBatch:
        """Returns the batch for an acceptance rule; invalid candidates enter no maximum and no quantile."""
        columns = self.columns

        def log_probs(name: str) -> torch.Tensor | None:
            is_known = all(value is not None for value, valid in zip(columns[name], is_valid, strict=True) if valid)
            return self.spread(columns[name], torch.float64, 0.0) if is_known else None

        return CandidateBatch(
            rewards=self.spread(columns["reward"], torch.float64, math.nan),
            log_q=log_probs("log_q"),
            log_p=log_probs("log_p"),
            lengths=self.spread(columns["num_tokens"], torch.int64, 0),
            valid=self.spread(list(is_valid), torch.bool, False),
            # Each candidate's own: another attempt, or a larger M, tests it again with the same number.
            uniforms=self.spread(self.uniforms, torch.float64, 0.0),
        )


def duplicates(table: RoundTable, earlier: Collection[tuple[int, str]]) -> list[bool]:
    """Returns which candidates repeat another of their prompt: all but the best-rewarded, then the first.

    Args:
        table: The round.
        earlier: Prompt and key of what earlier rounds accepted, where these count too.
    """
    columns = table.columns
    if not any(columns["duplicate_key"]):
        return [False] * len(columns["prompt_id"])
    order = sorted(
        range(len(columns["prompt_id"])),
        key=lambda row: (-math.inf if columns["reward"][row] is None else -columns["reward"][row], row),
    )
    seen, repeats = set(earlier), [False] * len(order)
    for row in order:
        key = (columns["prompt_id"][row], columns["duplicate_key"][row])
        if key[1] is None or columns["verdict"][row] == "filtered" or columns["reward"][row] is None:
            continue
        repeats[row] = key in seen
        seen.add(key)
    return repeats


def judge(table: RoundTable, rules: SelectionRules, earlier: Collection[tuple[int, str]] = ()) -> list[str]:
    """Returns the verdict on every candidate, in the order of the store; see `VERDICTS`.

    Args:
        table: The round as far as it has been generated.
        rules: How to judge.
        earlier: As in `duplicates`.
    """
    columns, repeats = table.columns, duplicates(table, earlier)
    verdicts = [
        "filtered" if verdict == "filtered" else "unjudged" if reward is None else "duplicate" if repeat else "rejected"
        for verdict, reward, repeat in zip(columns["verdict"], columns["reward"], repeats)
    ]
    is_open = [verdict == "rejected" for verdict in verdicts]
    if not any(is_open):
        return verdicts
    generator = torch.Generator().manual_seed(
        candidate_seed(rules.run_seed, rules.round_number, _NO_PROMPT, 0, 0) % 2**62
    )
    accepted = table.gathered(rules.acceptance(table.batch(is_open), generator))
    for row in accepted.nonzero().flatten().tolist():
        verdicts[row] = "accepted"
    if rules.takes_best:
        for row in _fallback_rows(table, verdicts, rules):
            verdicts[row] = "fallback"
    return verdicts


def set_verdicts(candidates: Iterable[Candidate], verdicts: Sequence[str], rules: Mapping[str, str]) -> None:
    """Writes the verdicts into the candidates.

    Args:
        candidates: Candidates in the order of the verdicts, without references.
        verdicts: As `judge` returns them.
        rules: Rule to name for each verdict; the others keep the candidate's own, such as its filter.
    """
    for candidate, verdict in zip(candidates, verdicts, strict=True):
        candidate.verdict, candidate.is_accepted = verdict, verdict in ACCEPTED
        candidate.rule = rules.get(verdict, candidate.rule)


def prompts_below_minimum(
    prompt_ids: Sequence[int], table: RoundTable, verdicts: Sequence[str], minimum: int
) -> list[int]:
    """Returns the prompts with fewer than `minimum` accepted candidates, sorted."""
    counts = dict.fromkeys(prompt_ids, 0)
    for prompt, verdict in zip(table.columns["prompt_id"], verdicts, strict=True):
        counts[prompt] += verdict in ACCEPTED
    return sorted(prompt for prompt, count in counts.items() if count < minimum)


def _fallback_rows(table: RoundTable, verdicts: Sequence[str], rules: SelectionRules) -> list[int]:
    """The best-rewarded rejected candidates of prompts below the minimum; any for a random control."""
    missing = dict.fromkeys(table.prompt_ids, rules.min_accepted)
    is_control = _is_random(rules.acceptance)
    for prompt, verdict in zip(table.columns["prompt_id"], verdicts, strict=True):
        missing[prompt] -= verdict in ACCEPTED
    rewards, uniforms = table.columns["reward"], table.uniforms
    rejected = [row for row, verdict in enumerate(verdicts) if verdict == "rejected"]
    chosen = []
    # Ties by chance, not by index.
    for row in sorted(rejected, key=lambda row: (0.0 if is_control else -rewards[row], uniforms[row])):
        if missing[table.columns["prompt_id"][row]] > 0:
            missing[table.columns["prompt_id"][row]] -= 1
            chosen.append(row)
    return chosen


def _is_random(rule: Acceptance) -> bool:
    """Whether a rule accepts without regard to rewards: a control, whose fallback must not look at them either."""
    if isinstance(rule, RuleSequence):
        return any(_is_random(one) for one in rule.rules)
    return isinstance(rule, (RandomPerPrompt, RandomLike))


def filter_candidates(candidates: Sequence[Candidate], filters: Sequence[Filter], dedup: Deduplicate | None) -> None:
    """Marks the candidates that a filter refuses, and gives the others their key for deduplication."""
    for candidate in candidates:
        refusing = next((rule for rule in filters if not rule(candidate)), None)
        if refusing is not None:
            candidate.verdict, candidate.rule, candidate.is_accepted = "filtered", repr(refusing), False
        elif dedup is not None:
            key = dedup.key_of(candidate)
            candidate.duplicate_key = None if key is None else hashlib.blake2b(repr(key).encode()).hexdigest()[:32]


def score_candidates(
    candidates: Sequence[Candidate], functions: RewardFunctions, trainer_state: Any = None, seed: int = 0
) -> Scores:
    """Scores the candidates that no filter refused, in place, and returns what the functions said.

    Args:
        candidates: With the other columns of their prompts in `row`.
        functions: The reward functions.
        trainer_state: Handed to them.
        seed: Of the global generators while they run; those of training stay as they were.
    """
    kept = [candidate for candidate in candidates if candidate.verdict != "filtered"]
    names = dict.fromkeys(name for candidate in kept for name in candidate.row)
    columns = {name: [candidate.row.get(name) for candidate in kept] for name in names}
    with forked_rng(seed):
        scores = functions(
            [candidate.prompt for candidate in kept],
            [candidate.completion for candidate in kept],
            [candidate.token_ids for candidate in kept],
            columns,
            trainer_state,
        ) if kept else Scores(torch.zeros(0, dtype=torch.float64), {})  # fmt: skip
    for row, candidate in enumerate(kept):
        candidate.reward = _number(scores.rewards[row])
        candidate.rewards = {name: _number(values[row]) for name, values in scores.by_function.items()}
        candidate.extras = {name: values[row] for name, values in scores.extras.items()}
    return scores


def _number(value: torch.Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


def stable_repr(rule: Any) -> str:
    """Returns the repr of a rule without the addresses of functions in it, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(rule))
