"""Command line `rsft-hf`: candidates without a model (import, score, accept, export), and what a run left (report).

Everything heavy is imported by the command that needs it, so that `--help` answers at once.
"""

import argparse
import ast
import difflib
import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PACKAGES = ("rsft-hf", "torch", "transformers", "accelerate", "datasets", "evaluate", "trl", "peft", "vllm", "openai")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command, and returns its exit status: 0, or 2 after an error of the user's, which is printed."""
    options = build_parser().parse_args(argv)
    try:
        print(options.run(options))  # noqa: T201 - the answer of a command
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, ImportError, RuntimeError) as error:
        print(f"rsft-hf {options.command}: {error}", file=sys.stderr)  # noqa: T201 - its error
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = argparse.ArgumentParser(prog="rsft-hf", description="Rejection-sampling fine-tuning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_import(commands)
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
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help_text, description=help_text.capitalize() + "."
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
    from rsft_hf.generative.imports import read_rows

    prompts = None if options.prompts is None else list(read_rows(options.prompts))
    folder = score_again(
        options.directory,
        options.destination,
        [reward(text) for text in options.reward],
        prompts,
        reward_weights=options.reward_weights,
        prompt_column=options.prompt_column,
    )
    rewards = [value for value in load_candidates(folder)["reward"] if value is not None]
    if not rewards:
        return f"No candidate could be scored; they are in {folder}"
    mean = sum(rewards) / len(rewards)
    return f"{len(rewards)} candidates scored, {min(rewards):.4g} to {max(rewards):.4g}, mean {mean:.4g}, in {folder}"


def _accept(options: argparse.Namespace) -> str:
    from rsft_hf import acceptance
    from rsft_hf.generative import accept_again, load_candidates

    rule = construct(options.rule, {name: vars(acceptance)[name] for name in acceptance.__all__}, "acceptance rule")
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
    _write(rows, options.output)
    return f"{len(rows)} rows with {', '.join(rows.column_names)} are in {options.output}"


def _write(rows: Any, path: Path) -> None:
    """Writes a data set in the format that the name of the file ends with."""
    writers = {".jsonl": rows.to_json, ".csv": rows.to_csv, ".parquet": rows.to_parquet}
    if path.suffix not in writers:
        raise ValueError(f"`output`={str(path)!r} is none of {', '.join(writers)}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    writers[path.suffix](str(path))


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

    from rsft_hf.generative.imports import read_rows

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


def reward(text: str) -> Any:
    """Returns a reward function or model from the command line.

    Args:
        text: "file.py:name" or "module:name", a call of a class of `rsft_hf.rewards` with literals, or the name or
            folder of a reward model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such name, or a call is none of a ready-made reward.

    Example:
        >>> reward("math:sqrt")(9.0)
        3.0
    """
    place, colon, name = text.rpartition(":")
    if colon and name.isidentifier():
        return _member(_module(place), name, text)
    if "(" in text:
        from rsft_hf import rewards

        return construct(text, {name: vars(rewards)[name] for name in rewards.__all__}, "reward")
    return text


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # the source text of its functions is looked up by the module's name
    spec.loader.exec_module(module)
    return module


def _member(module: Any, name: str, text: str) -> Any:
    if name not in vars(module):
        raise ValueError(f"{text!r} names nothing.{nearest(name, vars(module))}")
    return vars(module)[name]


def construct(text: str, classes: Mapping[str, Any], what: str) -> Any:
    """Returns an object from a call with literal arguments, such as "TopKPerPrompt(k=2)"; nothing else is evaluated.

    Args:
        text: The call; a name alone is a call without arguments.
        classes: Classes by name.
        what: What they are, for the message.

    Raises:
        TypeError: If the class does not take such arguments.
        ValueError: If the text is no such call, or names no class.

    Example:
        >>> construct("Fraction(1, 2)", {"Fraction": __import__("fractions").Fraction}, "number")
        Fraction(1, 2)
    """
    try:
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("not a call")
        arguments = [ast.literal_eval(value) for value in call.args]
        keywords = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} is no {what} with literal arguments, such as {min(classes)}(...).") from error
    name = call.func.id
    if name not in classes:
        raise ValueError(f"{name!r} is no {what}.{nearest(name, classes)}")
    return classes[name](*arguments, **keywords)


def nearest(name: str, names: Mapping[str, Any]) -> str:
    """Returns the name that resembles one most, as a sentence; empty without any.

    Example:
        >>> nearest("TopKPerPromt", {"TopKPerPrompt": 1, "RSO": 2})
        ' Did you mean TopKPerPrompt?'
    """
    found = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {found[0]}?" if found else ""
