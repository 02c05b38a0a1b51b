"""What of an earlier run's round can be used: all of it, its answers without their scores, or nothing.

The store of a round and its facts enter; the store is left ready to go on. Whatever is not used is put aside.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from rsft_hf.generative.candidates import CandidateStore

logger = logging.get_logger(__name__)

# What answers are scored and accepted by; all other facts are what they are generated from.
_JUDGING = {
    "reward_functions", "scoring", "reward_weights", "acceptance", "filters", "dedup", "attempts",
}  # fmt: skip


def open_round(store: CandidateStore, facts: Mapping[str, Any]) -> None:
    """Makes the folder of a round ready: what was made from the same facts stays, all else is put aside.

    Where only rewards and rules have changed, the answers of the first attempt stay, and are scored and judged anew;
    later attempts hang on what was accepted. A round that begins anew takes the rounds after it with it.
    """
    earlier = store.manifest().get("facts")
    changed = [name for name in facts if earlier is None or earlier.get(name) != facts[name]]
    if not changed:
        logger.info(f"Going on with the {len(store.shards())} shards in {store.directory}.")
        return
    if earlier is not None and set(changed) <= _JUDGING:
        _score_anew(store, changed)
    else:
        _begin_anew(store, changed)
    store.directory.mkdir(parents=True, exist_ok=True)
    store.write_manifest({"facts": dict(facts), "reward_names": list(store.reward_names)})


def keeps_answers(store: CandidateStore, facts: Mapping[str, Any]) -> bool:
    """Returns whether `open_round` would leave the answers of the first attempt where they are."""
    earlier = store.manifest().get("facts")
    return earlier is not None and {name for name in facts if earlier.get(name) != facts[name]} <= _JUDGING


def _score_anew(store: CandidateStore, changed: list[str]) -> None:
    aside = _place_aside(store.directory)
    shutil.copytree(store.directory, aside)
    for path in store.shards():
        if not path.name.startswith("attempt-00"):
            path.unlink()
            continue
        answers = store.read(path)
        for answer in answers:
            answer.forget_scores()
        store.write(path, answers, "generated")
    logger.warning(
        f"{store.directory} held candidates of another run (it differs in {', '.join(changed)}): the answers are "
        f"scored and judged anew. As they were, they are in {aside}."
    )


def _begin_anew(store: CandidateStore, changed: list[str]) -> None:
    stale = [folder for folder in store.directory.parent.glob("round-*") if folder.name >= store.directory.name]
    for folder in sorted(stale):
        aside = _place_aside(folder)
        folder.rename(aside)
        logger.warning(
            f"{folder} held candidates of another run ({store.directory.name} differs in {', '.join(changed)}); they "
            f"are in {aside.parent} now, and the round begins anew."
        )


def _place_aside(folder: Path) -> Path:
    """A path that is free, for what is put aside of a round."""
    aside = folder.parent / "replaced"
    aside.mkdir(exist_ok=True)
    return aside / f"{folder.name}-{sum(1 for _ in aside.glob(f'{folder.name}-*'))}"
