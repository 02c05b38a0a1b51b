"""Rescoring: stored candidates scored or judged again, with other rewards or another rule, without generation.

The candidates are written to a new folder; the old one stays unchanged.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rsft_hf.acceptance import Acceptance, check_acceptance
from rsft_hf.generative.candidates import REFERENCES, VERDICTS, CandidateStore
from rsft_hf.generative.filters import Deduplicate, Filter
from rsft_hf.generative.imports import PROMPTS, stored_prompts
from rsft_hf.generative.prompts import PromptSet, column_names
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


def score_again(
    directory: Path | str,
    destination: Path | str,
    reward_funcs: Any,
    prompts: Any = None,
    *,
    reward_weights: Sequence[float] | None = None,
    filters: Sequence[Filter] = (),
    dedup: Deduplicate | None = None,
    prompt_column: str = "prompt",
) -> Path:
    """Returns the folder with the candidates of a round, filtered and scored by these functions, not yet judged.

    Args:
        directory: Folder of a round.
        destination: Folder to write, absent or empty.
        reward_funcs: As in `CandidateResampler`.
        prompts: The data set they were generated for, for the columns that rewards read; those of an imported round by
            default.
        reward_weights: As in `CandidateResampler`.
        filters: As in `CandidateResampler`; none by default.
        dedup: As in `CandidateResampler`.
        prompt_column: Column of the prompts.

    Raises:
        FileNotFoundError: If the folder holds no candidates.
        FileExistsError: If the destination is not empty.
        ValueError: If a function needs a column that is absent, or `prompts` are not given and not stored.
    """
    if prompts is None and (prompts := stored_prompts(directory)) is None:
        raise ValueError(f"{directory} was not imported, so it holds no `prompts`. Give the data set they come from.")
    functions, source = RewardFunctions(reward_funcs, reward_weights), _opened(directory)
    functions.check([name for name in column_names(prompts) if name != prompt_column])
    store = _created(destination, functions.names, source)
    rows = PromptSet(prompts, prompt_column)
    for path in source.shards():
        candidates = source.read_generated(path, rows)
        filter_candidates(candidates, filters, dedup)
        scores = score_candidates(candidates, functions)
        store.write(store.directory / path.name, candidates, "scored", scores.metrics)
    return store.directory


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
        ValueError: If the rule needs log probabilities that were not stored.
    """
    check_acceptance(acceptance, "`acceptance`")
    source = _opened(directory)
    rule = acceptance.for_round(round_number)
    table = RoundTable.of(source.columns(COLUMNS))
    verdicts = judge(table, SelectionRules(rule, 1, False, seed, round_number))
    rules = {verdict: stable_repr(rule) for verdict in VERDICTS if verdict != "filtered"}
    store, start = _created(destination, source.reward_names, source), 0
    for path in source.shards():
        if path.name != REFERENCES:
            size = pq.read_metadata(path).num_rows
            store.write_verdicts(store.directory / path.name, verdicts[start : start + size], rules, source=path)
            start += size
    return store.directory


def _opened(directory: Path | str) -> CandidateStore:
    shards = sorted(Path(directory).glob("*.parquet"))
    if not shards:
        raise FileNotFoundError(f"{directory} holds no candidates. Give the folder of one round, such as round-000.")
    schema = pq.read_schema(shards[0])
    names = [name.removeprefix("rewards/") for name in schema.names if name.startswith("rewards/")]
    return CandidateStore(Path(directory), names, is_conversational=str(schema.field("prompt").type) != "string")


def _created(destination: Path | str, reward_names: Sequence[str], source: CandidateStore) -> CandidateStore:
    folder = Path(destination)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty. Give a folder that does not exist yet.")
    folder.mkdir(parents=True, exist_ok=True)
    store = CandidateStore(folder, reward_names, source.is_conversational)
    if (source.directory / PROMPTS).is_file():
        shutil.copytree((source.directory / PROMPTS).parent, (folder / PROMPTS).parent)
    store.write_manifest(
        source.manifest() | {"reward_names": list(reward_names), "derived_from": str(source.directory)}
    )
    return store
