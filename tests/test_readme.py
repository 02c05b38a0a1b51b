"""Documents: length of README.md, code blocks, links, make targets, and paths of files that they name."""

import ast
import re

import pytest

from documents import ROOT, code_blocks, read

MAX_README_LINES = 150
MAKEFILE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))

FOLDERS = ("", "docs", "rsft_hf", "recipes", "experiments", "benchmarks", "tests")
DOCUMENTS = sorted({path for folder in FOLDERS for path in (ROOT / folder).glob("**/*.md" if folder else "*.md")})
name_of = lambda path: path.relative_to(ROOT).as_posix()  # noqa: E731 - the id of a parametrised case


def after_patch(diff: str) -> str:
    """Returns the text after a diff is applied: added and kept lines without their first column."""
    return "".join(line[1:] or "\n" for line in diff.splitlines(keepends=True) if not line.startswith("-"))


def run_imports(code: str) -> int:
    """Runs the import statements of a code block; returns their number."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(ast.Module(nodes, type_ignores=[]), "README.md", "exec"), {})
    return len(nodes)


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= MAX_README_LINES


def test_snippets_of_the_readme_compile_and_their_imports_exist():
    text = read("README.md")
    snippets = [after_patch(block) for block in code_blocks(text, "diff")] + code_blocks(text, "python")
    assert [run_imports(snippet) for snippet in snippets] == [1, 3]  # the diff, and the generative example


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_relative_links_point_to_files(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\[[^\]]*\]\(([^)\s#]+)[^)]*\)", text)
    relative = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert not [target for target in relative if not (path.parent / target).exists()]


def test_documents_are_found():
    expected = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/benchmarks.md", "rsft_hf/weighted/README.md"}
    assert expected <= {name_of(path) for path in DOCUMENTS}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/benchmarks.md"])
def test_make_targets_exist(name):
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", read(name), re.MULTILINE))
    assert named
    assert not named - MAKEFILE_TARGETS


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/benchmarks.md"])
def test_named_files_exist(name):
    named = re.findall(r"`((?:rsft_hf|tests|recipes|experiments|benchmarks|docs)/[\w./-]*)`", read(name))
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]
