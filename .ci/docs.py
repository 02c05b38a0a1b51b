"""Copies what the site is made of to build/docs, in folders as they are, so that relative links hold: `make docs`."""

import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "build" / "docs"
SUFFIXES = (".md", ".ipynb", ".svg")


def main() -> None:
    """Copies documents, and the files that they link to."""
    shutil.rmtree(TARGET, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    documents = [Path(name) for name in listed.stdout.splitlines() if name.endswith(SUFFIXES)]
    for name in documents:
        copy(name)
        if name.suffix == ".md":
            text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
            for link in re.findall(r"\]\(([^)\s#:]+)[^):]*\)", text):
                linked = (ROOT / name).parent / link
                if linked.is_file():
                    copy(linked.resolve().relative_to(ROOT))


def copy(name: Path) -> None:
    """Copies a file of the repository to its place."""
    (TARGET / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / name, TARGET / name)


if __name__ == "__main__":
    main()
