"""Cards for the Hugging Face hub: the part of a model card about the resampling, and a data set of candidates.

trainer -> method, options, figures by epoch, data, command, versions, sources -> section of README.md
folder of candidates -> Parquet files, one configuration each -> README.md of a data-set repository
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import inspect
import math
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard
from transformers import GenerationConfig

from rsft_hf.generative.candidates import CandidateStore
from rsft_hf.generative.exports import NoRowsError, export_dpo, export_kto, export_sft, load_candidates, round_folders
from rsft_hf.generative.resampler import CandidateResampler
from rsft_hf.markdown import markdown_table
from rsft_hf.predictive.resampler import PredictionResampler
from rsft_hf.report.rounds import RoundSummary, summarize_round
from rsft_hf.weighted.resampler import LossResampler

SECTION = "## Rejection sampling"
TAGS = ("rsft_hf", "rejection-sampling")

_WEIGHTED = (
    "Before each epoch every row of the training set got a weight w derived from its loss, and the rows of the epoch "
    "were drawn by rejection sampling: proposed uniformly, accepted with probability w / max w."
)
_GENERATIVE = (
    "In each round the model answered each prompt several times, reward functions scored the answers, an acceptance "
    "rule selected some, and the model was trained on these."
)
_PREDICTIVE = (
    "Before the later epochs the model drew a label for each unlabelled row from its own prediction q; a label was "
    "accepted with probability p / (M q) of a target p, and accepted ones were trained on beside the labelled rows."
)
_CANDIDATES = "Completions of prompts, scored by reward functions and judged by an acceptance rule."
_LAW = "rejection sampling, von Neumann 1951, Various techniques used in connection with random digits"
_ALWAYS = ("weighting", "target", "reward_funcs", "acceptance", "num_candidates", "generation_config")
_FIGURES = (
    "loss",
    "resampling/acceptance_rate",
    "resampling/effective_sample_size",
    "resampling/max_repeats",
    "candidates/reward",
    "accepted/reward",
    "round/acceptance_rate",
    "round/accepted_rows",
    "pseudo_labels/accepted_rows",
    "pseudo_labels/accuracy",
)
_FORMATS = ("csv", "json", "parquet", "text", "generator")  # builders of data sets without a name
_CONFIGS = {
    "sft": "accepted candidates, for TRL's SFTTrainer",
    "dpo": "best and worst of each prompt, for TRL's DPOTrainer",
    "kto": "accepted and rejected candidates, for TRL's KTOTrainer",
    "candidates": "all candidates with scores and verdicts, one file per round",
}
_FACTS = ("generation_config", "num_candidates", "seed", "reward_functions", "reward_weights", "acceptance",
          "filters", "dedup", "imported_from")  # fmt: skip
_MAX_EPOCHS = 20  # rows of a table
_MAX_EVALUATIONS = 4  # columns of it
_SECRET = re.compile(r"token|key|secret|password", re.IGNORECASE)
_CREDENTIAL = re.compile(r"(?<=://)[^/\s@]+@|\b(?:hf_|sk-)[A-Za-z0-9_-]{8,}")
_NAME = r"(?:[A-Z][\w&.'-]*|et al\.?|and|van|de|&)"
_SOURCE = re.compile(rf"({_NAME}(?: {_NAME})* \d{{4}}),\s+arXiv:(\d{{4}}\.\d{{4,5}})")


def extend_model_card(path: Path | str, trainer: Any) -> None:
    """Adds to a model card what the trainer's resampler did, or replaces it.

    Args:
        path: `README.md` that `Trainer.create_model_card` wrote.
        trainer: Trainer with a resampler.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    card = ModelCard.load(path)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *TAGS]))
    card.text = f"{card.text.split(SECTION)[0].rstrip()}\n\n{resampling_section(trainer)}"
    card.save(path)


def export_repository(directory: Path | str, destination: Path | str) -> Path:
    """Writes candidates as a data-set repository: Parquet files, and a card with one configuration for each use.

    `datasets.load_dataset(destination, "dpo")` loads the pairs, and so it does from the hub after
    `huggingface_hub.upload_folder(folder_path=destination, repo_type="dataset", ...)`. Configurations are "sft", "dpo",
    "kto" and "candidates", without those for which there are no rows.

    Args:
        directory: `<output_dir>`, its folder `candidates`, or one round of it.
        destination: Folder to write, absent or empty.

    Returns:
        The destination.

    Raises:
        FileExistsError: If the destination is not empty.
        FileNotFoundError: If there are no candidates.
    """
    folders, destination = round_folders(directory), Path(destination)
    if destination.exists() and any(destination.iterdir()):
        raise FileExistsError(f"{destination} is not empty. Give a new folder.")
    rounds = [summarize_round(folder) for folder in folders]
    files: dict[str, list[str]] = {}
    if any(one.is_accepted.any() for one in rounds):
        for name, export in (("sft", export_sft), ("dpo", export_dpo), ("kto", export_kto)):
            with contextlib.suppress(NoRowsError):  # such as no two candidates of a prompt
                files[name] = [_write_rows(export(directory), destination, name)]
    files["candidates"] = [
        _write_rows(load_candidates(folder), destination, f"candidates/{folder.name}") for folder in folders
    ]
    _write_dataset_card(destination, files, folders[-1], rounds)
    return destination


def _write_rows(rows: datasets.Dataset, destination: Path, name: str) -> str:
    """Writes a Parquet file and returns its name, with a digest: `datasets` caches by the names in a card."""
    path = destination / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(str(path))
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return path.rename(path.with_stem(f"{path.stem}-{digest.hexdigest()}")).relative_to(destination).as_posix()


def _write_dataset_card(
    destination: Path, files: Mapping[str, list[str]], last_round: Path, rounds: Sequence[RoundSummary]
) -> None:
    configs: list[dict[str, Any]] = [{"config_name": name, "data_files": paths} for name, paths in files.items()]
    data = DatasetCardData(configs=[configs[0] | {"default": True}, *configs[1:]], tags=list(TAGS))
    uses = pandas.DataFrame([(name, _CONFIGS[name]) for name in files], columns=["configuration", "rows"])
    figures = [
        (one.name, len(one.rewards), one.is_accepted.sum(), _mean(one.rewards), _mean(one.rewards[one.is_accepted]))
        for one in rounds
    ]
    columns = ["round", "candidates", "accepted", "mean reward", "of the accepted"]
    manifest = CandidateStore(last_round, (), is_conversational=False).manifest()
    facts = {"imported_from": manifest.get("imported_from")} | manifest.get("facts", {})
    known = [(name, shown(facts[name])) for name in _FACTS if facts.get(name) not in (None, [], "None")]
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# Candidates of a rejection-sampling fine-tuning",
        _CANDIDATES,
        markdown_table(uses),
        markdown_table(pandas.DataFrame(figures, columns=columns)),
    ]
    if known:
        parts += ["The last round:", markdown_table(pandas.DataFrame(known, columns=["option", "value"]))]
    parts.append(f"Written by rsft_hf {importlib.metadata.version('rsft-hf')}.")
    DatasetCard("\n\n".join(parts) + "\n").save(destination / "README.md")


def _mean(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return f"{known.mean():.4g}" if len(known) else "-"


def resampling_section(trainer: Any) -> str:
    """Returns the section of a model card about the resampling of a Trainer, in Markdown."""
    resampler = trainer.resampler
    parts = [SECTION]
    if isinstance(resampler, LossResampler):
        parts.append(_WEIGHTED)
    elif isinstance(resampler, CandidateResampler):
        parts.append(_GENERATIVE)
    elif isinstance(resampler, PredictionResampler):
        parts.append(_PREDICTIVE)
    parts.append(f"Trained with `{type(trainer).__name__}` of rsft_hf. {_data(trainer.train_dataset)}".rstrip())
    rows = [(name, shown(value)) for name, value in options(resampler).items()]
    parts.append(markdown_table(pandas.DataFrame(rows, columns=[type(resampler).__name__, "value"])))
    figures = by_epoch(trainer.state.log_history)
    if len(figures):
        parts += ["Logged by epoch:", markdown_table(figures)]
    if command := command_line(sys.argv):
        parts.append(f"Command:\n\n```bash\n{command}\n```")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("rsft-hf", "accelerate")]
    parts.append(f"Versions: {', '.join(versions)}, and those above.")
    parts.append(f"Sources: {'; '.join([_LAW, *map(_link, sources(resampler))])}.")
    return "\n\n".join(parts) + "\n"


def options(resampler: Any) -> dict[str, Any]:
    """Returns the options of a resampler that are not at their defaults, as it filled them in, and always its rule.

    Example:
        >>> from rsft_hf import Tempered
        >>> options(LossResampler(Tempered(0.5), losses="forward", warmup_epochs=1))["warmup_epochs"]
        1
    """
    owner = resampler.config if isinstance(resampler, CandidateResampler) else resampler
    found = {}
    for name, parameter in inspect.signature(type(resampler)).parameters.items():
        value = getattr(owner, name, parameter.default)
        if name in _ALWAYS or (value is not parameter.default and repr(value) != repr(parameter.default)):
            found[name] = value
    return found


def shown(value: Any) -> str:
    """Returns an option's value as a card shows it, on one line, without what belongs to one machine.

    Example:
        >>> shown([len, Path("some/folder/candidates")])
        'len, candidates'
    """
    if isinstance(value, GenerationConfig):
        return shown(value.to_diff_dict())
    if isinstance(value, Path):
        return value.name
    if isinstance(value, str) or not isinstance(value, Sized):
        name = getattr(value, "__name__", None)
        config = getattr(value, "config", None)
        if name is None and config is not None:
            name = getattr(config, "_name_or_path", "") or type(value).__name__
        return publishable(str(name or (value if isinstance(value, str) else repr(value))))
    if isinstance(value, Mapping):
        kept = {name: one for name, one in value.items() if not name.endswith(("_id", "_version"))}
        return ", ".join(f"{name}={shown(one)}" for name, one in kept.items())
    if isinstance(value, (list, tuple)) and not any(isinstance(one, Mapping) for one in value):
        return ", ".join(map(shown, value)) or "none"
    return f"{type(value).__name__} of {len(value)} rows"


def by_epoch(log_history: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    """Returns the chief figures of each epoch or round: loss, draws or candidates, and evaluations.

    Args:
        log_history: Lines of `TrainerState.log_history`; of an epoch the last value counts.

    Example:
        >>> by_epoch([{"epoch": 0.5, "loss": 3.0}, {"epoch": 1.0, "loss": 2.0}, {"epoch": 1.0, "eval_bleu": 7.0}])
           epoch loss eval_bleu
        0      1    2         7
    """
    lines: dict[int, dict[str, Any]] = {}
    for line in log_history:
        # What is logged at 1.0 belongs to the first epoch, what is logged just after it to the second.
        epoch = max(1, math.ceil(round(float(line.get("epoch") or 0.0), 6)))
        lines.setdefault(epoch, {}).update(line)
    names = dict.fromkeys(name for line in lines.values() for name in line)
    timed = ("_runtime", "_per_second", "_time")
    evaluations = [name for name in names if name.startswith("eval_") and not name.endswith(timed)][:_MAX_EVALUATIONS]
    columns = [name for name in (*_FIGURES, *evaluations) if name in names]
    rows = [
        [epoch, *(f"{line[name]:.4g}" if name in line else "-" for name in columns)]
        for epoch, line in sorted(lines.items())
        if any(name in line for name in columns)
    ]
    stride = max(1, -(-len(rows) // _MAX_EPOCHS))
    return pandas.DataFrame(rows[::-stride][::-1], columns=["epoch", *columns])


def command_line(argv: Sequence[str]) -> str:
    """Returns the command that started the program, without secrets; empty in a notebook and the like.

    Example:
        >>> command_line(["train.py", "--hub_token", "hf_abcdefghijk", "--base_url=http://me:pw@host/v1"])
        'python train.py --hub_token *** --base_url=http://***@host/v1'
    """
    if not argv or not (argv[0].endswith(".py") or Path(argv[0]).name == "rsft-hf"):
        return ""
    words, is_secret = [], False
    script = Path(argv[0])
    for word in (script.name if script.is_absolute() else str(script), *argv[1:]):
        name, equals, _ = word.partition("=")
        if is_secret and not word.startswith("--"):
            word = "***"
        elif word.startswith("--") and equals and _SECRET.search(name):
            word = f"{name}=***"
        is_secret = word.startswith("--") and not equals and bool(_SECRET.search(word))
        words.append(publishable(word))
    command = " ".join(word if re.fullmatch(r"[\w@%+=:,./*~-]+", word) else shlex.quote(word) for word in words)
    return f"python {command}" if argv[0].endswith(".py") else command


def publishable(text: str) -> str:
    """Returns text without credentials in URLs, without what looks like an access token, and without the home folder.

    Example:
        >>> publishable("http://me:secret@host:8000/v1")
        'http://***@host:8000/v1'
    """
    text = text.replace(str(Path.home()), "~")
    return _CREDENTIAL.sub(lambda found: "***@" if found[0].endswith("@") else "***", text)


def sources(value: Any) -> list[tuple[str, str]]:
    """Returns authors with year, and arXiv number, of what the docstrings of the rules in a value cite.

    Example:
        >>> from rsft_hf import TopKPerPrompt
        >>> sources(TopKPerPrompt(1))
        [('Dong et al. 2023', '2304.06767')]
    """
    found = {}
    for rule in _rules(value):
        for authors, number in _SOURCE.findall(inspect.getdoc(type(rule)) or ""):
            found[number] = authors
    return [(authors, number) for number, authors in found.items()]


def _link(source: tuple[str, str]) -> str:
    authors, number = source
    return f"{authors}, [arXiv:{number}](https://arxiv.org/abs/{number})"


def _rules(value: Any) -> Iterator[Any]:
    """Objects of this package in a value: itself, elements, options, fields."""
    if isinstance(value, (list, tuple)):
        parts: Iterable[Any] = value
    elif isinstance(value, (LossResampler, CandidateResampler, PredictionResampler)):
        parts = options(value).values()
    elif dataclasses.is_dataclass(value) and type(value).__module__.startswith("rsft_hf."):
        yield value
        parts = [getattr(value, one.name) for one in dataclasses.fields(value)]
    else:
        return
    for part in parts:
        yield from _rules(part)


def _data(dataset: Any) -> str:
    """What is known of a training set: its number of rows, name and columns."""
    if not isinstance(dataset, Sized):
        return ""
    facts = [f"{len(dataset):,} rows"]
    name = getattr(getattr(dataset, "info", None), "dataset_name", None)
    if name and name not in _FORMATS:
        facts.append(f"data set {name}")
    if columns := getattr(dataset, "column_names", None):
        facts.append(f"columns {', '.join(columns)}")
    return f"Training set: {', '.join(facts)}."
