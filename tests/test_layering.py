"""The import directions of the design, and what the packages must not contain, read from their syntax trees.

What ruff can hold it holds: pyproject.toml bans eval, pickles, relative imports and numpy's global random state.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"nas_kmix", "darts_space"}
LAYERS = ("engine", "method", "pipeline", "analysis", "commands")  # of nas_kmix; imports run to the left
DOORS = {"nas_kmix/__init__.py", "nas_kmix/__main__.py"}  # they load the commands when they are called
PREPARATION = {"darts_space/preparation.py": {"torchvision", "PIL"}}  # when `transforms()` is called
ON_TOP = {"search", "train_eval", "tests", "benchmarks", "studies"}
MODULES = sorted(path.relative_to(ROOT).as_posix() for package in OURS for path in (ROOT / package).rglob("*.py"))
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial"}
EVALUATORS = {"compile", "__import__"}


def tree_of(module):
    return ast.parse((ROOT / module).read_text(encoding="utf-8"))


def imports(tree):
    """Dotted names of all imports, inside functions too; `from a import b` is a.b, a relative one begins with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def name_of(node):
    """`a.b.c` of an attribute chain; only its last parts if it does not start with a name."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def inside(name, package):
    return name == package or name.startswith(package + ".")


def layer_of(name):
    """The position in LAYERS of a module of nas_kmix, by its dotted name; a module in none belongs to the method."""
    parts = [part for part in LAYERS if inside(name, f"nas_kmix.{part}")]
    return LAYERS.index(parts[0] if parts else "method")


def forbidden_imports(module, names):
    """Those of the imported names that the design does not allow in `module`."""
    layer = layer_of(module.removesuffix(".py").replace("/", "."))
    for name in names:
        top = name.split(".")[0]
        if module.startswith("darts_space/"):
            allowed = top in {"torch", "darts_space", *sys.stdlib_module_names, *PREPARATION.get(module, ())}
        elif top == "darts_space":
            allowed = layer >= LAYERS.index("pipeline")
        elif top == "nas_kmix":
            allowed = layer_of(name) <= layer or module in DOORS
        else:
            allowed = top not in ON_TOP
        if not allowed:
            yield name


def unsafe_calls(tree):
    """Calls that run code found in data."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = name_of(call.func)
        keywords = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
        if name in EVALUATORS:
            yield name
        if keywords.get("allow_pickle", False) is not False:
            yield f"{name}(allow_pickle=…)"
        if name == "torch.load" and keywords.get("weights_only") is not True:  # ruff sees this in its preview alone
            yield "torch.load(weights_only=…)"


def global_draws(tree):
    """Uses of torch's shared random state; inside these two context managers it is put back."""
    forked = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and any(
            name_of(getattr(item.context_expr, "func", item)).endswith(("fork_rng", "initialised_from"))
            for item in node.items
        )
    ]
    allowed = {id(inner) for block in forked for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in allowed:
            called = name_of(node.func)
            seeds = called.endswith("manual_seed") and called.split(".")[0] == "torch"
            draws = called.removeprefix("torch.") in TORCH_DRAWS and called.startswith("torch.")
            if seeds or (draws and "generator" not in {k.arg for k in node.keywords}):
                yield called


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    assert list(forbidden_imports(module, imports(tree_of(module)))) == []


@pytest.mark.parametrize("module", MODULES)
def test_nothing_read_can_run_code(module):
    assert list(unsafe_calls(tree_of(module))) == []


@pytest.mark.parametrize("module", MODULES)
def test_no_global_random_state(module):
    assert list(global_draws(tree_of(module))) == []


def test_all_modules_are_found():
    assert {"nas_kmix/engine/data.py", "nas_kmix/pipeline/stage.py", "darts_space/fast/supernet.py"} <= set(MODULES)


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("nas_kmix/engine/x.py", "from nas_kmix.mixing import paste"),
        ("nas_kmix/engine/x.py", "from nas_kmix import mixing"),
        ("nas_kmix/engine/x.py", "import darts_space"),
        ("nas_kmix/x.py", "def f():\n    from darts_space.genotype import Genotype"),
        ("nas_kmix/x.py", "from nas_kmix.analysis import report"),
        ("nas_kmix/x.py", "from nas_kmix.pipeline.stage import obtain"),
        ("nas_kmix/pipeline/x.py", "from nas_kmix.analysis import report"),
        ("nas_kmix/pipeline/x.py", "from nas_kmix import commands"),
        ("nas_kmix/analysis/x.py", "from nas_kmix.commands.search import run"),
        ("nas_kmix/commands/x.py", "import search"),
        ("nas_kmix/x.py", "import search"),
        ("darts_space/x.py", "import numpy as np"),
        ("darts_space/x.py", "from torchvision import ops"),
        ("darts_space/x.py", "from nas_kmix.engine import files"),
    ],
)
def test_forbidden_imports_are_seen(module, code):
    assert len(list(forbidden_imports(module, imports(ast.parse(code))))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "compile(text, path, 'exec')",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "torch.load(path, weights_only=False)",
        "torch.load(path)",
    ],
)
def test_unsafe_calls_are_seen(code):
    assert len(list(unsafe_calls(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "torch.manual_seed(0)",
        "torch.cuda.manual_seed(0)",
        "torch.default_generator.manual_seed(0)",
        "torch.randn(3)",
    ],
)
def test_global_draws_are_seen(code):
    assert len(set(global_draws(ast.parse(code)))) == 1


def test_what_is_allowed():
    code = """
from nas_kmix.engine import files
x = torch.randn(3, generator=generator)
torch.load(path, weights_only=True)
with torch.random.fork_rng(devices=[]):
    torch.default_generator.manual_seed(0)
"""
    tree = ast.parse(code)
    assert not [*forbidden_imports("nas_kmix/engine/x.py", imports(tree)), *unsafe_calls(tree), *global_draws(tree)]


def test_the_package_needs_no_more_than_requirements_txt_lists():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = (ROOT / "requirements.txt").read_text().split()
    assert tables["project"]["dependencies"] and set(tables["project"]["dependencies"]) <= set(listed)
