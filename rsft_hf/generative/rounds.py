"""A round, shard by shard and process by process: the order of the stages, and what a kill leaves to go on from.

    prompts in shards, shared among the processes -> generate -> write -> filter, score -> write
    -> the main process judges the whole round -> prompts in need of another attempt? once more -> verdicts written

Every shard is the work of one process, and holds the same candidates whichever process that is.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from accelerate import Accelerator
from transformers.utils import logging

from rsft_hf.distributed import FailTogether, object_from_main
from rsft_hf.generative.candidates import CandidateStore
from rsft_hf.generative.effort import Effort
from rsft_hf.generative.emptiness import explain_empty_round
from rsft_hf.generative.facts import stable_repr
from rsft_hf.generative.reopening import open_round
from rsft_hf.generative.round_metrics import round_metrics
from rsft_hf.generative.selection import ACCEPTED, COLUMNS, RoundTable, SelectionRules, judge, prompts_in_need
from rsft_hf.generative.shards import mean_lengths, own_shards
from rsft_hf.generative.stages import (
    Generator,
    PromptSet,
    Sampling,
    filter_candidates,
    reference_candidate,
    score_candidates,
)

if TYPE_CHECKING:
    from rsft_hf.generative.resampler import CandidateResampler

logger = logging.get_logger(__name__)


@dataclass
class RoundRunner:
    """Runs the rounds of one training run.

    Attributes:
        options: The resampler, for its rules.
        accelerator: Knows the processes.
        generator: What generates candidates.
        prompts: The prompts.
        sampling: How candidates are drawn, but for round and attempt.
        directory: Folder of all rounds.
        is_conversational: Whether prompts are lists of messages.
    """

    options: "CandidateResampler"
    accelerator: Accelerator
    generator: Generator
    prompts: PromptSet
    sampling: Sampling
    directory: Path
    is_conversational: bool

    def store(self, round_number: int) -> CandidateStore:
        """Returns the store of a round."""
        folder = self.directory / f"round-{round_number:03d}"
        return CandidateStore(folder, self.options.functions.names, self.is_conversational)

    def run(
        self, round_number: int, facts: Mapping[str, Any], trainer_state: Any = None, may_be_empty: bool = False
    ) -> dict[str, float]:
        """Generates, scores and judges a round, or what is left of it to do, and returns its figures. Collective.

        Args:
            round_number: Round, from 0.
            facts: What the candidates depend on; shards made from other facts are put aside.
            trainer_state: Handed to the reward functions.
            may_be_empty: Whether there is anything else to train on.

        Raises:
            RuntimeError: If nothing was accepted, unless that may be; the candidates stay on disk.
        """
        began, store, effort = time.perf_counter(), self.store(round_number), Effort()
        rules = self._rules(round_number)
        with FailTogether(self.accelerator, f"preparing round {round_number}"):
            if self.accelerator.is_main_process:
                open_round(store, facts)
        with FailTogether(self.accelerator, f"looking for {store.directory}"):
            if not store.directory.is_dir():
                raise RuntimeError(
                    f"{store.directory} is not visible here: the processes must share `output_dir`. Put it on a file "
                    "system that all machines mount."
                )
        needy: Sequence[int] = range(len(self.prompts))
        verdicts: list[str] = []
        for attempt in range(self.options.max_attempts):
            lengths = self._lengths(round_number, attempt)
            sampling = replace(self.sampling, round_number=round_number, attempt=attempt, expected_lengths=lengths)
            with FailTogether(self.accelerator, f"generating and scoring round {round_number}"):
                for path, prompt_ids in self._own_shards(store, needy, sampling):
                    self._make_shard(store, path, prompt_ids, sampling, trainer_state, effort)
            is_last = attempt == self.options.max_attempts - 1
            takes_best = is_last and self.options.on_nothing_accepted == "best"
            verdicts, needy = self._judged(store, replace(rules, takes_best=takes_best), attempt)
            if not needy:
                break
        metrics = self._finish(store, rules, verdicts, needy)
        with FailTogether(self.accelerator, f"looking at round {round_number}"):
            if self.accelerator.is_main_process and not may_be_empty and next(store.accepted(), None) is None:
                table = RoundTable.of(store.columns(COLUMNS))
                raise RuntimeError(explain_empty_round(store, table, verdicts, rules.acceptance))
        self.accelerator.wait_for_everyone()
        return metrics | effort.metrics(self.accelerator) | {"round/seconds": time.perf_counter() - began}

    def _rules(self, round_number: int) -> SelectionRules:
        rule = self.options.acceptance.for_round(round_number)
        minimum, seed = self.options.min_accepted_per_prompt, self.sampling.run_seed
        return SelectionRules(rule, minimum, False, seed, round_number)

    def _lengths(self, round_number: int, attempt: int) -> dict[int, float]:
        """Tokens that candidates took the last time, by prompt, as the main process has them."""
        lengths: dict[int, float] = {}
        with FailTogether(self.accelerator, f"looking at the lengths before round {round_number}"):
            if self.accelerator.is_main_process and (attempt or round_number):
                lengths = mean_lengths(self.store(round_number if attempt else round_number - 1))
        return object_from_main(self.accelerator, lengths)

    def _own_shards(
        self, store: CandidateStore, prompt_ids: Sequence[int], sampling: Sampling
    ) -> Iterator[tuple[Path, Sequence[int]]]:
        """The shards of an attempt that are this process's work."""
        place = self.accelerator.num_processes, self.accelerator.process_index
        for number, own in own_shards(prompt_ids, len(self.prompts), sampling.expected_lengths, *place):
            yield store.path(sampling.attempt, number), own

    def _make_shard(
        self,
        store: CandidateStore,
        path: Path,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        trainer_state: Any,
        effort: Effort,
    ) -> None:
        stage = store.stage(path)
        if stage is None:
            began = time.perf_counter()
            candidates = self.generator(self.prompts, prompt_ids, sampling)
            effort.generate_seconds += time.perf_counter() - began
            effort.generate_tokens += sum(candidate.num_tokens for candidate in candidates)
            store.write(path, candidates, "generated")
        elif stage == "generated" or store.is_unjudged(path):
            candidates = store.read(path)
            for candidate in candidates:
                candidate.forget_scores()
                candidate.row = self.prompts.row(candidate.prompt_id)[1]
        else:
            return
        began = time.perf_counter()
        filter_candidates(candidates, self.options.filters, self.options.dedup)
        scores = score_candidates(candidates, self.options.functions, trainer_state, candidates[0].seed % 2**32)
        effort.logged.append(scores.metrics)
        effort.score_seconds += time.perf_counter() - began
        effort.score_tokens += sum(candidate.num_tokens for candidate in candidates if candidate.verdict != "filtered")
        store.write(path, candidates, "scored")

    def _judged(self, store: CandidateStore, rules: SelectionRules, attempt: int) -> tuple[list[str], list[int]]:
        """The verdict on every candidate so far, and the prompts in need, as the main process has them."""
        decided: tuple[list[str], list[int]] = ([], [])
        with FailTogether(self.accelerator, f"judging round {rules.round_number}"):
            if self.accelerator.is_main_process:
                # A killed run may have left shards of later attempts: who needs those was decided without them.
                table = RoundTable.of(store.columns(COLUMNS), attempt)
                verdicts = judge(table, rules, self._accepted_earlier(rules.round_number))
                minimum = rules.min_accepted
                decided = verdicts, prompts_in_need(range(len(self.prompts)), table, verdicts, minimum)
        return object_from_main(self.accelerator, decided)

    def _accepted_earlier(self, round_number: int) -> set[tuple[int, str]]:
        if self.options.dedup is None or not self.options.dedup.across_rounds:
            return set()
        keys = set()
        for number in range(round_number):
            columns = self.store(number).columns(("prompt_id", "duplicate_key", "is_accepted"))
            keys |= {
                (prompt, key)
                for prompt, key, is_accepted in zip(*columns.values(), strict=True)
                if is_accepted and key is not None
            }
        return keys

    def _finish(
        self, store: CandidateStore, rules: SelectionRules, verdicts: Sequence[str], needy: Sequence[int]
    ) -> dict[str, float]:
        with FailTogether(self.accelerator, f"writing the verdicts of round {rules.round_number}"):
            self._write_verdicts(store, rules, verdicts)
            if self.accelerator.is_main_process and needy and self.options.on_nothing_accepted == "reference":
                column, encoder = self.options.reference_column, self.generator.encoder
                references = [reference_candidate(self.prompts, prompt, column, encoder) for prompt in needy]
                store.write(store.directory / "references.parquet", references, "judged")
        metrics: dict[str, float] = {}
        with FailTogether(self.accelerator, f"describing round {rules.round_number}"):
            if self.accelerator.is_main_process:
                table = RoundTable.of(store.columns(COLUMNS))
                metrics = round_metrics(store, table, verdicts, rules.acceptance)
                store.write_manifest(store.manifest() | {"metrics": metrics})
        return object_from_main(self.accelerator, metrics)

    def _write_verdicts(self, store: CandidateStore, rules: SelectionRules, verdicts: Sequence[str]) -> None:
        reasons = {
            "accepted": stable_repr(rules.acceptance),
            "rejected": stable_repr(rules.acceptance),
            "duplicate": stable_repr(self.options.dedup),
            "unjudged": "no reward function answered",
            "fallback": f'on_nothing_accepted="{self.options.on_nothing_accepted}"',
        }
        start = 0
        for number, path in enumerate(store.shards()):
            if path.name == "references.parquet":
                continue
            size = pq.read_metadata(path).num_rows
            if number % self.accelerator.num_processes == self.accelerator.process_index:
                candidates = store.read(path)
                for candidate, verdict in zip(candidates, verdicts[start : start + size], strict=True):
                    candidate.verdict, candidate.is_accepted = verdict, verdict in ACCEPTED
                    candidate.rule = reasons.get(verdict, candidate.rule)
                store.write(path, candidates, "judged")
            start += size
