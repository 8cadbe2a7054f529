"""Where things live: imports point down, modules stay short, every room says what it is."""

import ast
import functools
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the top to the bottom. An import may name a line further down, or its own line, as long as
# no circle arises. A room stands for all its modules.
HOUSE = """
fwt.cli
fwt._options fwt._refused fwt._several
fwt._terminal
fwt._demo
fwt
fwt.converters
fwt.converters.verification fwt.converters.values
fwt.converters.files
fwt.converters.onnx
fwt.converters.frameworks
fwt.converters.walk
fwt.converters.rows
fwt.converters.tried
fwt.converters.io fwt.converters.judge
fwt._diff
fwt.optim fwt.schedules
fwt._again fwt._moments
fwt._initialize fwt._reset fwt._lsuv fwt._draw fwt._project
fwt._reset_values
fwt.pruning
fwt._own_names
fwt.initializers fwt.constraints fwt.scores fwt.patterns
fwt.selection
fwt._graph
fwt._sequential fwt._calls
fwt.layers
fwt._compose fwt._summary fwt._axes
fwt._live
fwt._rules fwt._modules fwt._masks
fwt._tree
fwt._nodes fwt._paths fwt._keys
fwt._apart fwt._equal fwt._states fwt._own_nodes fwt._stored
fwt._mesh
fwt._types
fwt._errors fwt._later
fwt._moved
"""
LEVEL = {name: i for i, line in enumerate(HOUSE.split("\n")) for name in line.split()}

# Imports that point up, and why: each stands inside a function, so that it runs only when asked.
UP = {
    ("fwt._sequential", "fwt.converters.rows.table"): (
        "the layer table says what the axes of a layer's leaves mean; fwt works without it"
    ),
    ("fwt._graph", "fwt.converters.rows.table"): "the same, for a Graph",
    ("fwt._axes", "fwt.converters.rows.table"): "the same, for a linen module that is traced",
    ("fwt._tree", "fwt.converters.values"): "reads a live Keras or torch model",
    ("fwt._tree", "fwt.converters.files.formats"): "reads files",
    ("fwt._diff", "fwt.converters.values"): "the same",
    ("fwt._diff", "fwt.converters.files.formats"): "reads files",
}
# Other imports inside functions, and why they may not stand at the top of their module.
TOP_LEVEL_IS_TOO_SLOW = "start-up: the command line and `import fwt` load only what a task needs"
LAZY = {
    "fwt.cli": TOP_LEVEL_IS_TOO_SLOW,
    "fwt._options": TOP_LEVEL_IS_TOO_SLOW,
    "fwt._refused": TOP_LEVEL_IS_TOO_SLOW,
    "fwt._several": TOP_LEVEL_IS_TOO_SLOW,
    "fwt._terminal": TOP_LEVEL_IS_TOO_SLOW,
    "fwt._demo": TOP_LEVEL_IS_TOO_SLOW,
    "fwt._calls": TOP_LEVEL_IS_TOO_SLOW,
    "fwt._nodes": TOP_LEVEL_IS_TOO_SLOW,
    "fwt._tree": TOP_LEVEL_IS_TOO_SLOW,
    "fwt.scores": TOP_LEVEL_IS_TOO_SLOW,
    "fwt._own_names": TOP_LEVEL_IS_TOO_SLOW,
    "fwt.converters.frameworks.beside": "imports Keras or torch, whichever the model is of",
    "fwt.converters.files.fill": "imports Keras or torch, for a live architecture only",
    "fwt.converters.files.format": "imports Flax and onnx, for files of models only",
    "fwt.converters.files.formats": "imports Flax, for files of models only",
    "fwt.converters.files.torch_file": "imports Flax, where a model is written",
    "fwt.converters.frameworks.description": "imports Flax, for models only",
    "fwt.converters.frameworks.given": "imports Flax NNX, for an nnx module only",
    "fwt.converters.frameworks.keras_training": "imports TensorFlow or torch on that backend alone",
    "fwt.converters.frameworks.live": "imports Keras or torch, whichever the model is of",
    "fwt.converters.onnx.layers": "imports TensorFlow, when a file is written",
    "fwt.converters.onnx.write": "imports TensorFlow, when a file is written",
    "fwt.converters.values": "imports the formats, for files only",
    "fwt.converters.verification.verify": "imports onnx, for ONNX files only",
    "fwt.converters.verification.keras_side": "imports Keras, for its models only",
    "fwt.converters.verification.torch_side": "imports torch, for its modules only",
    "fwt.converters.verification.sides": "imports Flax NNX, for an nnx module only",
}


# The modules that import by a name from a table: the lazy public names, what has moved, and JAX.
BY_NAME = ("fwt", "fwt.converters", "fwt._moved", "fwt._later")


def sources():
    """Dotted name -> path, of both packages."""
    found = {}
    for folder, name in (("fwt", "fwt"), ("converters", "fwt.converters")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([name, *(p for p in parts if p != "__init__")])] = path
    return found


MODULES = sources()


def home(name):
    """The entry of HOUSE that a module belongs to: itself, or its room."""
    room = name.rpartition(".")[0]
    return name if name in LEVEL or room in ("", "fwt", "fwt.converters") else home(room)


def imports(name, nodes, inside=False):
    """(module, whether inside a function) of each import but those for types alone."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, inside
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: write the whole name of what is imported"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in MODULES else node.module), inside
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            assert name in BY_NAME, f"{name}: import_module hides what it imports"
            yield from imports(name, ast.iter_child_nodes(node), inside)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from imports(name, node.orelse, inside)
        else:
            deeper = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(name, ast.iter_child_nodes(node), inside or deeper)


@functools.cache
def read(name, path):
    """Once for each file, since each test asks for all of them."""
    return list(imports(name, ast.parse(path.read_text()).body))


def arrows(modules):
    """(from, to, inside a function) for each import between modules of ours."""
    for name, path in modules.items():
        for target, inside in read(name, path):
            assert target.partition(".")[0] != "converters", f"{name}: it is fwt.converters"
            if target == "fwt" or target.startswith("fwt."):
                yield name, target, inside


def upward(modules):
    """The imports that point up and are not on the list."""
    return [
        f"{name} imports {target}"
        for name, target, inside in arrows(modules)
        if LEVEL[home(target)] < LEVEL[home(name)] and not (inside and (name, target) in UP)
    ]


def circle(modules):
    """A circle among the imports, or None; what points up by the list is left out."""
    below = {}
    for name, target, _ in arrows(modules):
        if target != name and (name, target) not in UP:
            below.setdefault(name, set()).add(target)
    done = set()

    def visit(name, trail):
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        for target in sorted(below.get(name, ())):
            if found := visit(target, [*trail, name]):
                return found
        done.add(name)
        return None

    return next((c for name in sorted(below) if (c := visit(name, []))), None)


def test_every_module_has_a_place():
    for name in MODULES:
        assert home(name) in LEVEL, name
    packages = {n for n, p in MODULES.items() if p.name == "__init__.py"}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert packages == set(listed), "pyproject.toml lists the packages that are installed"


def test_imports_point_down():
    assert not upward(MODULES)
    assert circle(MODULES) is None


def test_fwt_works_without_its_converters():
    """Nothing of fwt imports them when it is imported, but for the demo."""
    for name, target, inside in arrows(MODULES):
        if not name.startswith("fwt.converters") and name != "fwt._demo" and not inside:
            assert not target.startswith("fwt.converters"), (name, target)


def test_exceptions_are_still_needed():
    found = {(name, target) for name, target, inside in arrows(MODULES) if inside}
    assert set(UP) <= found
    assert {name for name, _ in found - set(UP)} == set(LAZY), "each has its reason on the list"


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("fwt._tree", "from fwt.pruning import plan"),
        ("fwt._tree", "class A:\n    import fwt.optim as o"),
        ("fwt._tree", "if TYPE_CHECKING:\n    pass\nelse:\n    import fwt.pruning.plan"),
        ("fwt._tree", "if TYPE_CHECKING or True:\n    import fwt.pruning.plan"),
        ("fwt.converters.rows.row", "def f():\n    from fwt.converters import walk"),
        ("fwt.converters.io", "import fwt.converters.files.h5"),
        ("fwt.layers.base", "import fwt"),
    ],
)
def test_a_planted_import_is_found(tmp_path, room, line):
    planted = tmp_path / "planted.py"
    planted.write_text(f"{MODULES[room].read_text()}\n{line}\n")
    assert len(upward({**MODULES, room: planted})) == 1


@pytest.mark.parametrize(
    "line",
    [
        "from .pruning import plan",
        "from . import pruning",
        "import converters.io",
        'importlib.import_module("fwt.pruning.plan")',
    ],
)
def test_an_import_that_hides_what_it_imports_is_refused(tmp_path, line):
    planted = tmp_path / "planted.py"
    planted.write_text(line)
    with pytest.raises(AssertionError, match=r"fwt\._tree: "):
        upward({**MODULES, "fwt._tree": planted})


def test_a_new_module_needs_a_place(tmp_path):
    assert home("fwt._new") not in LEVEL
    assert home("fwt.converters.new") not in LEVEL
    assert home("fwt.pruning.new") in LEVEL


def test_a_planted_circle_is_found(tmp_path):
    planted = tmp_path / "planted.py"
    text = MODULES["fwt.converters.rows.row"].read_text()
    planted.write_text(f"{text}\ndef f():\n    from fwt.converters.rows import table\n")
    assert circle({**MODULES, "fwt.converters.rows.row": planted}) is not None


def test_modules_are_short():
    for path in [*MODULES.values(), *(ROOT / "examples").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 600, path


def test_every_room_says_what_it_is():
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name not in ("fwt", "fwt.converters"):
            lines = ast.get_docstring(ast.parse(path.read_text())).splitlines()
            assert len(lines) >= 3, name


# Where the tests of a room stand that has no folder of its own.
ELSEWHERE = {
    "fwt/constraints": "fwt/test_constraints.py",
    "fwt/initializers": "fwt/test_initializers.py",
    "fwt/layers": "converters/rows/test_layers.py",
}


def test_tests_mirror_the_rooms():
    rooms = {str(p.parent.relative_to(ROOT)) for p in MODULES.values() if p.parent.parent != ROOT}
    folders = {str(p.parent.relative_to(ROOT / "tests"))
               for p in (ROOT / "tests").glob("*/*/test_*.py")}  # fmt: skip
    assert rooms == folders | set(ELSEWHERE)
    assert all((ROOT / "tests" / path).exists() for path in ELSEWHERE.values())
