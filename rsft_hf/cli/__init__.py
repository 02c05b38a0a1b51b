"""Command line `rsft-hf`: stages over stored candidates, training from a YAML file, and what a run left.

Everything heavy is imported by the command that needs it, so that `--help` answers at once.
"""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsft_hf.cli.construct import construct, members, reward
from rsft_hf.cli.train import add_generate, add_train, generate, help_all, train

_PACKAGES = ("rsft-hf", "torch", "transformers", "accelerate", "datasets", "evaluate", "trl", "peft", "vllm", "openai")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, and returns its exit status: 0, or 2 after an error of the user's, which is printed."""
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        answer = options.run(options, rest) if options.command == "train" else options.run(options)
        if int(os.environ.get("RANK", 0)) == 0:
            print(answer)  # noqa: T201 - the answer of a command
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"rsft-hf {options.command}: {error}", file=sys.stderr)  # noqa: T201 - its error
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = argparse.ArgumentParser(prog="rsft-hf", description="Rejection-sampling fine-tuning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_import(commands)
    add_generate(_command(commands, "generate", generate, "generate candidates into a folder, without training"))
    _add_score(commands)
    accept = _command(commands, "accept", _accept, "judge a scored round by an acceptance rule")
    accept.add_argument("directory", type=Path, help="folder of a scored round")
    accept.add_argument("destination", type=Path, help="folder to write, absent or empty")
    accept.add_argument("--rule", required=True, help='such as "TopKPerPrompt(1)" or "Threshold(minimum=0.5)"')
    accept.add_argument("--seed", type=int, default=0, help="of rules that draw or break ties (default: 0)")
    export = _command(commands, "export", _export, "write accepted candidates for TRL's trainers")
    export.add_argument(
        "format", choices=("sft", "dpo", "kto", "all"), help="trainer that reads the file; all: a data-set repository"
    )
    export.add_argument("directory", type=Path, help="folder of a judged round, or of a run")
    export.add_argument(
        "output", type=Path, help="file to write: .jsonl, .csv or .parquet; all: folder to write, absent or empty"
    )
    export.add_argument("--as_messages", action="store_true", help="sft: one conversation per row")
    export.add_argument("--min_margin", type=float, default=0.0, help="dpo: difference of rewards that a pair exceeds")
    trained = _command(commands, "train", _train, "train a model by a resampler, with options by name or from YAML")
    add_train(trained)
    report = _command(commands, "report", _report, "write the report of a run, one HTML file")
    report.add_argument("output_dir", type=Path, help="output folder of a run, a checkpoint, or a folder of candidates")
    report.add_argument("--output", type=Path, help="file to write (default: report.html in the output folder)")
    report.add_argument("--data", type=Path, help="training set, for texts in tables: JSONL, JSON, CSV or Parquet")
    report.add_argument("--max_candidates", type=int, default=50_000, help="candidates in the browser (default: 50000)")
    suspects = _command(commands, "suspects", _suspects, "write the labels of a run, most probably wrong first")
    suspects.add_argument("output_dir", type=Path, help="output folder of a run, or a checkpoint")
    suspects.add_argument("output", type=Path, help="file to write: .jsonl, .csv or .parquet")
    suspects.add_argument("--data", type=Path, help="training set, whose columns are added")
    suspects.add_argument("--num_labels", type=int, help="number of labels; all by default")
    _command(commands, "env", _env, "print the versions that a bug report needs")
    return parser


def _command(commands: Any, name: str, run: Any, help_text: str) -> argparse.ArgumentParser:
    description = f"{help_text[0].upper()}{help_text[1:]}."
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help_text, description=description, allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def _add_import(commands: Any) -> None:
    parser = _command(commands, "import", _import, "store completions that were generated elsewhere")
    parser.add_argument("data", type=Path, help="JSONL, JSON, CSV or Parquet file")
    parser.add_argument("directory", type=Path, help="folder to write, absent or empty")
    parser.add_argument("--prompt", help="column of the prompts; found by its usual names")
    parser.add_argument("--completions", help="column of one completion or of a list; found by its usual names")
    parser.add_argument("--score", help="column of scores; found by its usual names")
    parser.add_argument("--requests", type=Path, help="file of the requests, of an OpenAI batch")
    parser.add_argument("--tokenizer", help="name or folder, to store tokens for filters that read lengths")
    parser.add_argument("--max_candidates", type=int, help="completions kept of a prompt")


def _add_score(commands: Any) -> None:
    parser = _command(commands, "score", _score, "score a stored round by reward functions or models")
    parser.add_argument("directory", type=Path, help="folder of a round")
    parser.add_argument("destination", type=Path, help="folder to write, absent or empty")
    parser.add_argument(
        "--reward",
        action="append",
        required=True,
        help='"file.py:function", "module:function", "ChrfReward()", or name of a reward model; may be repeated',
    )
    parser.add_argument("--reward_weights", type=float, nargs="+", help="one factor per reward")
    parser.add_argument(
        "--prompts", type=Path, help="JSONL, JSON, CSV or Parquet; those of an imported round by default"
    )
    parser.add_argument("--prompt_column", default="prompt", help="column of the prompts (default: prompt)")
    parser.add_argument(
        "--filters", nargs="*", default=["RejectTruncated()", "RejectEmpty()"],
        help="candidates that one of them refuses are not scored (default: RejectTruncated() RejectEmpty())",
    )  # fmt: skip


def _import(options: argparse.Namespace) -> str:
    from rsft_hf.generative import import_candidates, load_candidates

    tokenizer = None
    if options.tokenizer is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    names = ("prompt", "completions", "score", "requests", "max_candidates")
    arguments = {name: vars(options)[name] for name in names}
    folder = import_candidates(options.data, options.directory, tokenizer=tokenizer, **arguments)
    candidates = load_candidates(folder)
    num_prompts = len(set(candidates["prompt_id"]))
    return f"{len(candidates)} candidates of {num_prompts} prompts are in {folder}"


def _score(options: argparse.Namespace) -> str:
    from rsft_hf.generative import load_candidates, score_again
    from rsft_hf.generative.row_files import read_rows

    prompts = None if options.prompts is None else list(read_rows(options.prompts))
    folder = score_again(
        options.directory,
        options.destination,
        [reward(text) for text in options.reward],
        prompts,
        reward_weights=options.reward_weights,
        prompt_column=options.prompt_column,
        filters=[construct(text, members("generative"), "filter") for text in options.filters],
    )
    rewards = [value for value in load_candidates(folder)["reward"] if value is not None]
    if not rewards:
        raise RuntimeError(
            f"no candidate in {folder} was scored: a filter refused it, or no reward function answered. See `verdict`, "
            "or the log of the judge, and run the same command again."
        )
    mean = sum(rewards) / len(rewards)
    return f"{len(rewards)} candidates scored, {min(rewards):.4g} to {max(rewards):.4g}, mean {mean:.4g}, in {folder}"


def _accept(options: argparse.Namespace) -> str:
    from rsft_hf.generative import accept_again, load_candidates

    rule = construct(options.rule, members("acceptance"), "acceptance rule")
    folder = accept_again(options.directory, options.destination, rule, seed=options.seed)
    accepted = load_candidates(folder)["is_accepted"][:]
    return f"{sum(accepted)} of {len(accepted)} candidates accepted by {rule!r}, in {folder}"


def _export(options: argparse.Namespace) -> str:
    from rsft_hf.generative import export_dpo, export_kto, export_sft

    if options.format == "all":
        from rsft_hf.cards import export_repository

        folder = export_repository(options.directory, options.output)
        return f"{', '.join(path.name for path in sorted(folder.iterdir()))} are in {folder}"
    if options.format == "sft":
        rows = export_sft(options.directory, options.as_messages)
    elif options.format == "dpo":
        rows = export_dpo(options.directory, options.min_margin)
    else:
        rows = export_kto(options.directory)
    nested = [name for name, feature in rows.features.items() if getattr(feature, "dtype", None) is None]
    if options.output.suffix == ".csv" and nested:
        raise ValueError(f"A CSV file cannot hold the conversations of {nested}. Write .jsonl or .parquet.")
    _write(rows, options.output)
    return f"{len(rows)} rows with {', '.join(rows.column_names)} are in {options.output}"


def _write(rows: Any, path: Path) -> None:
    """Writes a data set in the format that the name of the file ends with."""
    writers = {".jsonl": rows.to_json, ".csv": rows.to_csv, ".parquet": rows.to_parquet}
    if path.suffix not in writers:
        raise ValueError(f"`output`={str(path)!r} is none of {', '.join(writers)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    writers[path.suffix](str(path))


def _train(options: argparse.Namespace, rest: Sequence[str]) -> str:
    if options.help_all:
        return help_all()
    return train(options, list(rest))


def _report(options: argparse.Namespace) -> str:
    from rsft_hf.report import write_report

    dataset, limit = _dataset(options.data), options.max_candidates
    path = write_report(options.output_dir, options.output, dataset=dataset, max_candidates=limit)
    return f"The report is in {path}"


def _suspects(options: argparse.Namespace) -> str:
    from rsft_hf.weighted import LabelReport

    report = LabelReport.from_checkpoint(options.output_dir)
    table = report.table(_dataset(options.data), options.num_labels)
    _write(table, options.output)
    return f"{len(report.labels)} labels, about {report.num_errors:.0f} wrong; {len(table)} are in {options.output}"


def _dataset(path: Path | None) -> Any:
    """The data set of a file; None without one."""
    if path is None:
        return None
    import datasets

    from rsft_hf.generative.row_files import read_rows

    if path.suffix == ".csv":  # whose numbers are to be compared with the labels that were trained on
        return datasets.Dataset.from_csv(str(path), keep_in_memory=True)
    return datasets.Dataset.from_list(list(read_rows(path)))


def _env(options: argparse.Namespace) -> str:
    lines = [f"{'python':14}{platform.python_version()}", f"{'platform':14}{platform.platform()}"]
    for name in _PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines.append(f"{name:14}{version}")
    import torch

    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return "\n".join([*lines, f"{'devices':14}{', '.join(devices) or 'CPU'}"])
