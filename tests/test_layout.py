"""Layout of the repository: import layers, file sizes and docstrings, read from the source without importing it."""

import ast
import graphlib
import importlib
import re
import sys
from pathlib import Path

import pytest

import rsft_hf
from rsft_hf.upstream import PRIVATE

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rsft_hf"
MAX_LINES_PER_FILE = 500
MAX_LINES_PER_FUNCTION = 50
MAX_PARAMETERS = 8

PURE_IMPORTS = sys.stdlib_module_names | {"__future__", "torch", "numpy", "rsft_hf"}
RULES = tuple(f"weighted/{name}.py" for name in ("weightings", "history_rules", "prediction_rules"))
PURE_FILES = (
    "checks.py",
    "rejection.py",
    "acceptance/",
    *RULES,
    "engines/random_streams.py",
    "predictive/acceptance.py",
)
KNOWS_TRAINER = ("trainer.py", "callbacks.py", "checkpointing.py", "training_set.py")
HALVES = ("weighted", "generative")
PUBLIC = (
    "rsft_hf",
    *(
        f"rsft_hf.{name}"
        for name in ("acceptance", "engines", "generative", "predictive", "report", "rewards", "weighted")
    ),
)

# Files and folders of the package from the lowest layer to the highest: imports go to the same line or to one above.
LAYERS = (
    ("checks.py", "markdown.py"),
    ("rejection.py", "distributed.py", "isolation.py", "memory.py", "openai_client.py", "upstream.py"),
    ("training_set.py", "checkpointing.py"),
    ("resampler.py",),
    ("acceptance", "rewards", "engines"),
    HALVES,
    ("predictive",),
    ("presets.py", "report"),
    ("callbacks.py", "cards.py", "validation.py"),
    ("trainer.py",),
    ("__init__.py",),
    ("cli",),
    ("__main__.py",),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
layer_of = lambda file: LAYER_OF[file.split("/")[0]]  # noqa: E731 - the layer of a file is that of its folder

PACKAGE_FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
SOURCES = sorted(
    path
    for folder in (PACKAGE, *(ROOT / name for name in ("tests", "recipes", "experiments", "benchmarks")))
    for path in folder.rglob("*.py")
)
name_of = lambda path: path.relative_to(ROOT).as_posix()  # noqa: E731 - the id of a parametrised case


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_file(module: str) -> str | None:
    """The package's own file that a dotted name stands for, or None if it is no module of the package."""
    parts = module.split(".")[1:]
    for candidate in ("/".join([*parts, "__init__.py"]), "/".join(parts) + ".py"):
        if (PACKAGE / candidate).is_file():
            return candidate
    return None


def absolute_module(node: ast.ImportFrom, file: str) -> str:
    """The dotted name an import starts from; `from . import x` counts from the folder of `file`."""
    if node.level == 0:
        return node.module or ""
    package = ["rsft_hf", *Path(file).parent.parts]
    kept = package[: len(package) - node.level + 1]
    return ".".join([*kept, *([node.module] if node.module else [])])


def imported_modules(tree: ast.AST, file: str) -> set[str]:
    """Dotted names of all modules a file imports, at its top or inside a function."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = absolute_module(node, file)
            # `from rsft_hf.weighted import weights` means the file weights.py, not the folder's __init__.
            submodules = {f"{module}.{alias.name}" for alias in node.names}
            inside = {name for name in submodules if name.startswith("rsft_hf.") and module_file(name)}
            modules |= inside | ({module} if len(inside) < len(submodules) else set())
    return modules


def own_imports(file: str) -> set[str]:
    modules = imported_modules(parse(PACKAGE / file), file)
    return {found for module in modules if module.split(".")[0] == "rsft_hf" and (found := module_file(module))}


def test_every_file_and_folder_of_the_package_has_a_layer():
    assert {file.split("/")[0] for file in PACKAGE_FILES} == set(LAYER_OF), "give each new file or folder its layer"


@pytest.mark.parametrize("file", PACKAGE_FILES)
def test_imports_go_down_the_layers(file):
    above = {other for other in own_imports(file) if layer_of(other) > layer_of(file)}
    assert not above, f"{file} imports {sorted(above)} from a layer above"


def test_import_graph_has_no_cycle():
    """Imports under `TYPE_CHECKING` and inside functions count: two files that need each other are one subject."""
    graph = {file: own_imports(file) for file in PACKAGE_FILES}
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(f"files import each other: {' -> '.join(error.args[1])}")
    assert len(order) == len(PACKAGE_FILES)


@pytest.mark.parametrize("file", [file for file in PACKAGE_FILES if file.startswith(PURE_FILES)])
def test_formulas_import_torch_and_numpy_only(file):
    outside = {module.split(".")[0] for module in imported_modules(parse(PACKAGE / file), file)} - PURE_IMPORTS
    assert not outside, f"{file} is a formula and imports {sorted(outside)}"
    assert not [other for other in own_imports(file) if not other.startswith(PURE_FILES)]


def own_private_names() -> set[str]:
    """Private names that the package defines itself: functions, classes, attributes, imports."""
    names = set()
    for file in PACKAGE_FILES:
        for node in ast.walk(parse(PACKAGE / file)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
    return names


def test_private_names_of_other_libraries_are_listed_in_one_place():
    listed = {name for names in PRIVATE.values() for name in names}
    own = own_private_names() - {"_init_training_state", "_inner_training_loop", "_save_rng_state", "_prepare_dataset"}
    used = {
        node.attr
        for file in PACKAGE_FILES
        for node in ast.walk(parse(PACKAGE / file))
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr)
    }
    overridden = own_private_names() & listed
    assert used - own - {"_replace"} <= listed
    assert listed <= used | overridden


@pytest.mark.parametrize("file", [file for file in PACKAGE_FILES if file not in KNOWS_TRAINER])
def test_few_files_know_trainer(file):
    """Elsewhere a trainer is an argument with public methods: no base class, and none of its modules."""
    tree = parse(PACKAGE / file)
    internals = {module for module in imported_modules(tree, file) if module.startswith("transformers.trainer")}
    assert not internals, f"{file} imports {sorted(internals)}"
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    bases = {base.id for node in classes for base in node.bases if isinstance(base, ast.Name)}
    assert not bases & {"Trainer", "Seq2SeqTrainer", "TrainerCallback"}, f"{file} extends Trainer"


def test_the_two_halves_never_import_each_other():
    for half, other in (HALVES, HALVES[::-1]):
        for file in (file for file in PACKAGE_FILES if file.startswith(f"{half}/")):
            assert not [name for name in own_imports(file) if name.startswith(f"{other}/")], file


def test_the_readers_above_read_what_they_should():
    """The tests above pass on nothing at all unless the readers they trust see an import when there is one."""
    tree = ast.parse("from ..callbacks import X\nfrom . import losses\nimport transformers.trainer\n")
    assert absolute_module(tree.body[0], "weighted/weightings.py") == "rsft_hf.callbacks"
    assert absolute_module(tree.body[1], "weighted/weightings.py") == "rsft_hf.weighted"
    expected = {"rsft_hf.callbacks", "rsft_hf.weighted.losses", "transformers.trainer"}
    assert imported_modules(tree, "weighted/weightings.py") == expected
    assert "rejection.py" in own_imports("__init__.py")
    assert len(SOURCES) >= len(PACKAGE_FILES) + 4


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_short(path):
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES_PER_FILE, f"{num_lines} lines: one file, one subject"
    # A recipe is read from top to bottom: its `main` is the steps in their order, and its whole file has 150 lines.
    is_recipe = path.parent.name == "recipes" and path.parent.parent == ROOT
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef) and not (is_recipe and node.name == "main"):
            num_lines = node.end_lineno - node.lineno + 1
            assert num_lines <= MAX_LINES_PER_FUNCTION, f"{node.name} has {num_lines} lines: one function, one verb"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_script_begins_when_all_its_names_are_defined(path):
    """Names below `if __name__ == "__main__"` exist for an importing test, and not for the user who runs the script."""
    starts = [isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in parse(path).body]
    assert not any(starts[:-1]), "move the start of the script to the end of the file"


@pytest.mark.parametrize("file", PACKAGE_FILES)
def test_functions_take_few_parameters(file):
    """Constructors are exempt: their keywords are the published interface."""
    for node in ast.walk(parse(PACKAGE / file)):
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            own = {arg.arg for arg in node.args.posonlyargs + node.args.args + node.args.kwonlyargs} - {"self", "cls"}
            assert len(own) <= MAX_PARAMETERS, f"{node.name} takes {len(own)} parameters: an object is missing"


@pytest.mark.parametrize("file", PACKAGE_FILES)
def test_the_package_does_not_guess(file):
    calls = {node.func.id for node in ast.walk(parse(PACKAGE / file)) if isinstance(node, ast.Call) and is_named(node)}
    assert "hasattr" not in calls, "say what is expected, and raise where it is not met"


def is_named(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name)


def test_no_drawer_for_leftovers():
    assert not [name_of(path) for path in SOURCES if path.stem in {"utils", "helpers", "misc"}]


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_says_what_it_is(module):
    package = importlib.import_module(module)
    assert package.__all__, f"{module} publishes nothing"
    docstrings = {name: (getattr(package, name).__doc__ or "").strip() for name in package.__all__}
    # A dataclass without a docstring is given its own signature as one.
    assert not [name for name, text in docstrings.items() if not text or text.startswith(f"{name}(")]


def test_the_top_level_offers_what_most_scripts_need():
    assert len(rsft_hf.__all__) == 34, "about 30 names; the others are imported from their packages"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_knows_one_machine(path):
    """A path from the root of somebody's disk works for nobody else."""
    found = re.findall(r"(?<![\w.~])/(?:home|root|work|Users|mnt)/\w+", path.read_text(encoding="utf-8"))
    assert not found, f"give {found} as an argument or an environment variable"
