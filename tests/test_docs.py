"""The site: its pages are whole, its code runs, its warnings are those of the package, its launch files can be read."""

import ast
import contextlib
import io
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import rsft_hf
from documents import ROOT, code_blocks, read

EXECUTED = ("docs/quickstart.md", "docs/concepts.md", "docs/rewards.md")


def plain(text: str) -> str:
    """Text without emphasis, code marks and line breaks."""
    return re.sub(r"\s+", " ", re.sub(r"[*`]", "", text))


@pytest.mark.parametrize("name", EXECUTED)
def test_code_of_the_pages_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    blocks, names, shown = code_blocks(read(name), "python"), {"__name__": "docs"}, io.StringIO()
    assert len(blocks) == {"docs/quickstart.md": 3, "docs/concepts.md": 1, "docs/rewards.md": 3}[name]
    with contextlib.redirect_stdout(shown):
        for block in blocks:
            exec(compile(block, name, "exec"), names)
    expected = {
        "docs/quickstart.md": ["LabelReport(400 labels", "out/generative/report.html"],
        "docs/concepts.md": ["2.0", "tensor([0.2500, 0.2500, 0.5000, 1.0000]"],
        "docs/rewards.md": ["[1.0, 0.0]", "12 1.0 accepted", "75 0.0 rejected", "'is_right': 1.0"],
    }[name]
    assert not [text for text in expected if text not in shown.getvalue()], shown.getvalue()


@pytest.mark.parametrize("name", ["docs/migrating.md", "docs/scaling.md"])
def test_imports_of_the_other_pages_exist(name: str) -> None:
    lines = re.findall(r"^\+?((?:from|import) \w.*)$", read(name), re.MULTILINE)
    for line in lines:
        exec(line, {})
    assert bool(lines) == (name == "docs/migrating.md")


def warnings_of_the_package() -> list[str]:
    """The text of each warning that is logged, with {} for what is filled in."""
    found = []
    for path in sorted((ROOT / "rsft_hf").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            names = ("warning", "warning_once", "warn", "_warn")
            if is_call and node.func.attr in names and node.args and not isinstance(node.args[0], ast.Name):
                text = node.args[0]
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                found.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts))
    return found


def test_every_warning_is_explained() -> None:
    page = re.findall(r"\*\*(.+?)\*\*", read("docs/troubleshooting.md"))
    known = [plain(text) for text in page]
    warnings = [plain(text) for text in warnings_of_the_package() if text != "{}"]
    assert len(warnings) > 35
    assert not [text for text in warnings if not any(part in text for part in known)]


def test_every_page_is_in_the_navigation() -> None:
    text = read("mkdocs.yml")
    listed = re.findall(r": (\S+\.(?:md|ipynb))$", text, re.MULTILINE)
    assert not [name for name in listed if not (ROOT / name).is_file()]
    pages = {
        path.relative_to(ROOT).as_posix() for ending in ("md", "ipynb") for path in (ROOT / "docs").rglob(f"*.{ending}")
    }
    assert pages <= set(listed)


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_run_what_there_is(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    for job in content.get("jobs", {}).values():
        commands = " ".join(step.get("run", "") for step in job["steps"])
        variants = [one["target"] for one in job.get("strategy", {}).get("matrix", {}).get("include", [])]
        targets = [*variants, *re.findall(r"make ([a-z-]+)", commands)]
        assert not [target for target in targets if f"\n{target}:" not in read("Makefile")]
        assert not [name for name in re.findall(r"bash (\S+)", commands) if not (ROOT / name).is_file()]


def test_the_version_is_the_same_everywhere() -> None:
    assert yaml.safe_load(read("CITATION.cff"))["version"] == rsft_hf.__version__
    assert f'version = "{rsft_hf.__version__}"' in read("pyproject.toml")
    assert (ROOT / "rsft_hf" / "py.typed").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "launch").iterdir()), ids=lambda path: path.name)
def test_launch_files_can_be_read(path: Path) -> None:
    if path.suffix == ".sh":
        subprocess.run(["bash", "-n", path], check=True)
        return
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    found = load_config_from_file(str(path))
    assert isinstance(found, ClusterConfig)
    assert found.num_processes == yaml.safe_load(path.read_text())["num_processes"]
    assert f"`{path.name}`" in read("docs/scaling.md")
