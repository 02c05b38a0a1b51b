"""Runs transformers' own Trainer tests twice, with its Trainer and with ours in its place, and lists what differs.

    python benchmarks/trainer_tests.py PATH_TO_TRANSFORMERS/tests/trainer    # a checkout of the installed version

Ours is `RejectionSamplingMixin` over the original class with `Tempered(0.0)`: equal weights, which read the rows as
plain Trainer does. Every test that passes with the original class must pass with ours, or is a difference by design:
what is refused with a reason is listed in docs/migrating.md. Writes a table, and exits with 1 if a test differs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from measures import build_parser, write_json

PLUGIN = """
import sys

from transformers import trainer, trainer_seq2seq

from rsft_hf import LossResampler, RejectionSamplingMixin, Tempered


def replaced(original):
    class Trainer(RejectionSamplingMixin, original):
        def __init__(self, *args, resampler=None, **kwargs):
            super().__init__(*args, resampler=resampler or LossResampler(Tempered(0.0)), **kwargs)

    Trainer.__name__ = Trainer.__qualname__ = original.__name__
    return Trainer


for name, module in {"Trainer": trainer, "Seq2SeqTrainer": trainer_seq2seq}.items():
    ours = replaced(getattr(module, name))
    setattr(module, name, ours)
    setattr(sys.modules["transformers"], name, ours)  # not the one imported first, which is replaced
"""


def outcomes(tests: Path, is_ours: bool, words: list[str]) -> dict[str, tuple[str, str]]:
    """The outcome of each test, and the last line of its error."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ours_in_place.py").write_text(PLUGIN, encoding="utf-8")
        report = Path(folder) / "report.xml"
        plugin = ["-p", "ours_in_place"] if is_ours else []
        path = os.pathsep.join([folder, str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", *plugin]
        command += [f"--junitxml={report}", *words, str(tests)]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=tests.parent, check=False)
        return dict(outcome_of(case) for case in ElementTree.parse(report).iter("testcase"))


def outcome_of(case: ElementTree.Element) -> tuple[str, tuple[str, str]]:
    name = f"{case.get('classname')}.{case.get('name')}"
    for kind in ("failure", "error", "skipped"):
        if (found := case.find(kind)) is not None:
            return name, (kind, (found.get("message") or "").splitlines()[0][:200] if found.get("message") else "")
    return name, ("passed", "")


def main() -> None:
    parser = build_parser(__doc__)
    parser.add_argument("tests", type=Path, help="folder or file of transformers' tests")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="handed to pytest, after --")
    options = parser.parse_args()
    words = [word for word in options.words if word != "--"]
    plain = outcomes(options.tests.resolve(), False, words)
    passing = [name for name, (kind, _) in plain.items() if kind == "passed"]
    if not passing:
        sys.exit(f"No test of {options.tests} passes with transformers' own Trainer: see pytest's output above.")
    ours = outcomes(options.tests.resolve(), True, words)
    differing = {name: ours.get(name, ("missing", "")) for name in passing if ours.get(name, ("", ""))[0] != "passed"}
    if options.json != "-":
        print(
            f"{len(passing)} tests pass with transformers' Trainer, {len(passing) - len(differing)} of them with ours"
        )
        for name, (kind, message) in differing.items():
            print(f"| {name} | {kind} | {message} |")
    write_json({"passing": len(passing), "differing": differing}, options.json)
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
