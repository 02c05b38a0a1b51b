"""Rescoring: stored candidates scored or judged again, with other rewards or another rule, without generation.

The candidates are written to a new folder; the old one stays unchanged.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from transformers.utils import logging

from rsft_hf.acceptance import Acceptance, check_acceptance
from rsft_hf.distributed import FailTogether, launched_processes
from rsft_hf.generative.candidates import ACCEPTED, REFERENCES, VERDICTS, Candidate, CandidateStore, prompt_key
from rsft_hf.generative.filters import Deduplicate, Filter, RejectEmpty, RejectTruncated
from rsft_hf.generative.imports import PROMPTS, stored_prompts
from rsft_hf.generative.prompts import Prompt, PromptSet, column_names
from rsft_hf.generative.round_cache import rule_digest, source_digest
from rsft_hf.generative.selection import (
    COLUMNS,
    RoundTable,
    SelectionRules,
    filter_candidates,
    judge,
    score_candidates,
    stable_repr,
)
from rsft_hf.rewards.functions import RewardFunctions
from rsft_hf.training_set import dataset_fingerprint

logger = logging.get_logger(__name__)


def score_again(
    directory: Path | str,
    destination: Path | str,
    reward_funcs: Any,
    prompts: Any = None,
    *,
    reward_weights: Sequence[float] | None = None,
    filters: Sequence[Filter] = (RejectTruncated(), RejectEmpty()),
    dedup: Deduplicate | None = None,
    prompt_column: str = "prompt",
) -> Path:
    """Returns the folder with the candidates of a round, filtered and scored by these functions, not yet judged.

    Collective. The same call goes on where it was killed, and where a function answered for no candidate of a shard.

    Args:
        directory: Folder of a round.
        destination: Folder to write, absent or empty, or of a call with the same arguments.
        reward_funcs: As in `CandidateResampler`.
        prompts: The data set they were generated for, for the columns that rewards read; those of an imported round by
            default. A candidate belongs to the row of its number, or else to the only row with its prompt.
        reward_weights: As in `CandidateResampler`.
        filters: As in `CandidateResampler`.
        dedup: As in `CandidateResampler`.
        prompt_column: Column of the prompts.

    Raises:
        FileNotFoundError: If the folder holds no candidates.
        FileExistsError: If the destination holds something else.
        ValueError: If a function needs a column that is absent, there are no `prompts`, or a candidate's is not one.
    """
    if prompts is None and (prompts := stored_prompts(directory)) is None:
        raise ValueError(f"{directory} was not imported, so it holds no `prompts`. Give the data set they come from.")
    functions, source = RewardFunctions(reward_funcs, reward_weights), _opened(directory)
    functions.check([name for name in column_names(prompts) if name != prompt_column])
    store = CandidateStore(Path(destination), functions.names, source.is_conversational)
    accelerator = launched_processes()
    with FailTogether(accelerator, f"opening {destination}"):
        if accelerator.is_main_process:
            facts = {"prompts": dataset_fingerprint(prompts, len(prompts)), "candidates": source.digest()}
            _create(store, source, {"scored_by": _scoring_facts(functions, filters, dedup) | facts})
    rows = _PromptRows(PromptSet(prompts, prompt_column))
    with FailTogether(accelerator, "scoring"):
        for path in source.shards()[accelerator.process_index :: accelerator.num_processes]:
            scored = store.directory / path.name
            if store.stage(scored) is None or store.is_unjudged(scored):
                candidates = source.read_generated(path, rows.of)
                filter_candidates(candidates, filters, dedup)
                store.write(scored, candidates, "scored", score_candidates(candidates, functions).metrics)
    return store.directory


class _PromptRows:
    """Rows of the prompts that candidates were generated for, by number or, where rows were dropped, by prompt."""

    def __init__(self, prompts: PromptSet) -> None:
        self._prompts = prompts
        self._by_prompt: dict[str, list[int]] = {}

    def of(self, candidate: Candidate) -> tuple[Prompt, dict[str, Any]]:
        """Returns the prompt of a candidate and the other columns of its row."""
        key = prompt_key(candidate.prompt)
        if candidate.prompt_id < len(self._prompts):
            prompt, columns = self._prompts.row(candidate.prompt_id)
            if prompt_key(prompt) == key:
                return prompt, columns
        if not self._by_prompt:
            logger.warning("The numbers of the candidates' prompts are not those of `prompts`: matched by prompt.")
            for number in range(len(self._prompts)):
                self._by_prompt.setdefault(prompt_key(self._prompts.row(number)[0]), []).append(number)
        found = self._by_prompt.get(key, [])
        if len(found) != 1:
            raise ValueError(
                f"{len(found)} rows of `prompts` have the prompt {str(candidate.prompt)[:60]!r} of the candidates with "
                f"number {candidate.prompt_id}. Give the data set that they were generated for."
            )
        return self._prompts.row(found[0])


def accept_again(
    directory: Path | str, destination: Path | str, acceptance: Acceptance, *, seed: int = 0, round_number: int = 0
) -> Path:
    """Returns the folder with the candidates of a round, judged by another rule.

    Args:
        directory: Folder of a round whose candidates are scored.
        destination: Folder to write, absent or empty.
        acceptance: The rule.
        seed: Of rules that draw or break ties.
        round_number: For rules that follow a schedule.

    Raises:
        FileNotFoundError: If the folder holds no candidates.
        FileExistsError: If the destination is not empty.
        TypeError: If `acceptance` is no rule.
        ValueError: If the candidates are not scored, or the rule needs log probabilities that were not stored.
    """
    check_acceptance(acceptance, "`acceptance`")
    source = _opened(directory)
    if all(source.stage(path) == "generated" for path in source.shards()):
        raise ValueError(f"The candidates in {directory} are not scored. Score them first: `score_again`.")
    rule = acceptance.for_round(round_number)
    table = RoundTable.of(source.columns(COLUMNS))
    verdicts = judge(table, SelectionRules(rule, 1, False, seed, round_number))
    rules = {verdict: stable_repr(rule) for verdict in VERDICTS if verdict != "filtered"}
    store, start = CandidateStore(Path(destination), source.reward_names, source.is_conversational), 0
    _create(store, source)
    for path in source.shards():
        if path.name != REFERENCES:
            size = pq.read_metadata(path).num_rows
            store.write_verdicts(store.directory / path.name, verdicts[start : start + size], rules, source=path)
            start += size
    reasons = zip(source.columns(["finish_reason"])["finish_reason"], verdicts, strict=False)
    accepted = [reason for reason, verdict in reasons if verdict in ACCEPTED]
    if num_cut_off := accepted.count("length"):
        logger.warning(
            f"{num_cut_off} of {len(accepted)} accepted candidates are cut off: they teach a model not to stop. "
            "`score_again` leaves them out."
        )
    return store.directory


def _opened(directory: Path | str) -> CandidateStore:
    shards = sorted(Path(directory).glob("*.parquet"))
    if not shards:
        raise FileNotFoundError(f"{directory} holds no candidates. Give the folder of one round, such as round-000.")
    schema = pq.read_schema(shards[0])
    names = [name.removeprefix("rewards/") for name in schema.names if name.startswith("rewards/")]
    return CandidateStore(Path(directory), names, is_conversational=str(schema.field("prompt").type) != "string")


def _scoring_facts(functions: RewardFunctions, filters: Sequence[Filter], dedup: Deduplicate | None) -> dict[str, Any]:
    return {
        "scoring": [source_digest(function) for function in functions.functions],
        "reward_weights": [float(weight) for weight in functions.weights],
        "filters": [rule_digest(rule) for rule in filters],
        "dedup": rule_digest(dedup),
    }


def _create(store: CandidateStore, source: CandidateStore, facts: dict[str, Any] | None = None) -> None:
    """Makes the folder of a store ready; one with the same facts goes on, any other is refused."""
    folder = store.directory
    manifest = source.manifest() | {"reward_names": list(store.reward_names), "derived_from": str(source.directory)}
    manifest |= facts or {}
    if folder.exists() and any(folder.iterdir()):
        if facts is None or store.manifest() != manifest:
            what = "other candidates, prompts or functions" if store.manifest() and facts else "something else"
            raise FileExistsError(f"{folder} is not empty: it holds {what}. Give a folder that does not exist yet.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    if (source.directory / PROMPTS).is_file():
        shutil.copytree((source.directory / PROMPTS).parent, (folder / PROMPTS).parent)
    store.write_manifest(manifest)
