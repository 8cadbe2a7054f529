"""The package as a whole: docs, examples, command line, layout, laziness."""

import dataclasses
import doctest
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from command import cli

import fwt
from fwt import converters
from fwt.layers.base import Layer

ROOT = Path(__file__).resolve().parent.parent
# Under the name fwt.converters, for by its folder it would be imported a second time.
MODULES = ["fwt", "fwt.converters"] + [
    m.name
    for package in (fwt, converters)
    for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]


@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith("__main__")])
def test_docstring_examples_run(name):
    result = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


def test_every_public_name_has_a_docstring_with_an_example():
    inits = fwt.initializers
    modules = (fwt, converters, fwt.constraints, fwt.optim, fwt.patterns, fwt.schedules, fwt.scores)
    for module in (*modules, inits, inits.keras, inits.torch):
        for name in module.__all__:
            thing = getattr(module, name)
            assert getattr(thing, "__doc__", None), name
            function = callable(thing) and not isinstance(thing, type | type(fwt.kernels))
            if function and module in (fwt, converters):
                assert ">>>" in thing.__doc__, name
    for name in fwt.layers.__all__:
        layer = getattr(fwt.layers, name)
        assert ">>>" in layer.__doc__, name
        shared = {f.name for f in dataclasses.fields(Layer)}  # which it documents
        fields = {f.name for f in dataclasses.fields(layer)} - shared
        text = inspect.cleandoc(layer.__doc__)
        arguments = re.search(r"^Args:\n(.*?)^\w", text, re.M | re.S)
        named = re.findall(r"^    (\w+): ", arguments[1], re.M) if arguments else []
        assert sorted(named) == sorted(fields), name


def run(*arguments, cwd=None, code=0, **environment):
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", **environment},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(p, id=p.stem, marks=pytest.mark.thorough)
        for p in sorted((ROOT / "examples").glob("*.py"))
    ],
)
def test_examples_run(script, tmp_path):
    run(str(script), cwd=tmp_path, KERAS_BACKEND="jax")  # as they ask for where nobody does


def test_the_second_copy_is_refused():
    done = run("-c", "import converters", cwd=ROOT, code=1)
    assert "import this package as fwt.converters" in done.stderr
    for path in [*ROOT.glob("[cfe]*/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        assert not re.search(r"^\s*(import|from) converters\b", path.read_text(), re.M), path


def test_nothing_else_at_the_top_level():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    top = {p.split("/")[0] for p in tracked}
    allowed = {"pyproject.toml", "README.md", "fwt", "converters", "tests", "examples"}
    allowed |= {"LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert {t for t in top if not t.startswith(".")} <= allowed


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import fwt, fwt.converters", "jax flax keras torch tensorflow h5py safetensors orbax"),
        ("import fwt; fwt.prune(0.5)", "flax keras torch tensorflow optax jax.extend"),
        (
            "import fwt, numpy; fwt.project(fwt.constraints.max_norm(1.0))"
            "({'a': {'kernel': numpy.ones((2, 1), 'f4')}})",
            "flax keras torch tensorflow optax jax.extend",
        ),
        ("from fwt import converters; converters.load", "keras torch tensorflow orbax"),
        ("import fwt.cli", "jax flax keras torch tensorflow"),
        ("import fwt.cli; fwt.cli.app(['prune', '--help'], standalone_mode=False)", "jax"),
    ],
)
def test_imports_are_lazy(code, forbidden):
    check = f"import sys; bad = set('{forbidden}'.split()) & set(sys.modules); assert not bad, bad"
    run("-c", f"{code}; {check}")


def test_weights_are_read_without_jax(tmp_path, monkeypatch, capsys):
    """Whose names and shapes stand in the file; a model is made of Flax's layers, and Orbax itself
    imports JAX."""
    import flax.linen as nn
    import h5py
    import jax

    net = fwt.Sequential([("conv", nn.Conv(4, (3, 3))), ("bn", nn.BatchNorm(True))], (5, 4, 1))
    variables = net.init(jax.random.key(0), np.ones((1, 5, 4, 1), np.float32))
    names = ["a.safetensors", "a.npz", "a.msgpack", "a.pt", "a.weights.h5", "shards.safetensors",
             "shards.weights.h5"]  # fmt: skip
    for name in names:
        alone = name in ("a.safetensors", "a.npz", "a.msgpack", "shards.safetensors")
        converters.save(
            tmp_path / name,
            None if alone else net,
            jax.tree.map(np.asarray, variables),
            shard_bytes=50 if "shards" in name else None,
        )
    with h5py.File(tmp_path / "older.h5", "w") as file:
        file.attrs["layer_names"] = np.array([b"dense"])
        file.create_group("dense").attrs["weight_names"] = np.array([b"kernel:0"])
        file["dense/kernel:0"] = np.eye(3, 2)
    names += ["older.h5"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        fwt.cli.app(["inspect", *names])
    with_jax = capsys.readouterr().out
    assert all(f"{name}: " in with_jax for name in names), with_jax
    bad = "bad = {'jax', 'flax', 'torch', 'keras'} & set(sys.modules); assert not bad, bad"
    app = "fwt.cli.app(['inspect', *{}, *sys.argv[1:]], standalone_mode=False)"
    code = f"import sys, fwt.cli; {app.format([])}; {app.format(['--json'])}; {bad}"
    table = run("-c", code, *names, cwd=tmp_path).stdout
    assert table.startswith(with_jax)
    assert table.count('"leaves"') == len(names)


def test_jax_that_is_imported_later_knows_what_was_read(tmp_path):
    """What a file says beside its arrays is a part of the tree, and not a leaf of it."""
    np.savez(tmp_path / "w.npz", **{"d.b": np.ones(3), "d.a": np.ones((2, 3))})
    code = """
import pickle, sys, fwt
variables = fwt.converters.load("w.npz").variables
assert "jax" not in sys.modules and "flax" not in sys.modules
again = pickle.loads(pickle.dumps(variables))
import jax, flax.serialization
summed = jax.tree.map(lambda x, y: x + y, variables, again)
assert summed["params"]["d"]["a"].shape == (2, 3) and summed.told == variables.told != ""
assert len(jax.tree.leaves(fwt.Model(None, variables))) == 2
state = flax.serialization.to_state_dict(variables)
assert type(state) is type(state["params"]) is dict
assert type(flax.serialization.from_state_dict(variables, state)) is type(variables) is not dict
"""
    run("-c", code, cwd=tmp_path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    import flax.linen as nn
    import jax

    folder = tmp_path_factory.mktemp("files")
    net = fwt.Sequential([("conv", nn.Conv(4, (3, 3))), fwt.layers.Flatten(), ("d", nn.Dense(2))],
                         input_shape=(5, 4, 1))  # fmt: skip
    variables = net.init(jax.random.key(0), np.ones((1, 5, 4, 1), np.float32))
    converters.save(folder / "net.keras", net, variables)
    return folder


def test_the_command_line(files):
    out = cli("inspect", "net.keras", cwd=files).stdout
    assert "conv/kernel" in out
    assert "3 x 3 x 1 x 4" in out
    assert "input 5 x 4 x 1" in out
    cli("convert", "net.keras", "net.safetensors", cwd=files)
    cli("convert", "net.safetensors", "net.pt", cwd=files)
    first, second = (converters.load(files / f"net.{x}").module for x in ("keras", "safetensors"))
    assert second.clone(sidecar="") == first
    out = cli("prune", "net.pt", "sparse.pt", "--sparsity", "0.8", cwd=files).stdout
    assert "( 80.0%)" in out or "( 80.6%)" in out
    cli(
        "prune",
        "net.keras",
        "s.keras",
        "--threshold",
        "0.1",
        "-w",
        "d/*",
        "--scope",
        "global",
        cwd=files,
    )
    kernel = converters.load(files / "s.keras").variables["params"]["d"]["kernel"]
    assert ((kernel == 0) | (np.abs(kernel) > 0.1)).all()
    cli("initialize", "net.keras", "o.keras", "--initializer", "constant(0.5)", cwd=files)
    assert (converters.load(files / "o.keras").variables["params"]["d"]["kernel"] == 0.5).all()
    cli("initialize", "net.keras", "k.keras", "--initializer", "keras.he_normal", cwd=files)
    cli("initialize", "net.keras", "t.keras", "--like", "torch", cwd=files)
    assert converters.load(files / "t.keras").variables["params"]["d"]["bias"].any()
    cli(
        "project",
        "net.keras",
        "p.keras",
        "--constraint",
        "unit_norm",
        "--where",
        "d/kernel",
        cwd=files,
    )


def test_the_command_line_prunes_in_patterns(files):
    """files has a convolution of one channel, and a Dense behind a Flatten of 5 x 4 x 4."""
    where = ("--where", "d/kernel")
    out = cli("prune", "net.keras", "nm.keras", "--pattern", "n_m(2, 4)", *where, cwd=files)
    assert not out.stderr
    kernel = converters.load(files / "nm.keras").variables["params"]["d"]["kernel"]
    assert (np.count_nonzero(kernel.reshape(-1, 4, 2), axis=1) == 2).all()
    out = cli("prune", "net.keras", "nm.pt", "--pattern", "n_m(2, 4)", *where, cwd=files)
    assert out.stderr.startswith("warning: d (Dense): its kernel is 2:4 sparse, but no longer")
    assert len(out.stderr.splitlines()) == 1
    options = ("--sparsity", "0.5", "--score", "random", "--seed", "3", "--scope", "erk")
    cli("prune", "net.keras", "r.keras", *options, "--like", "jaxpruner", cwd=files)
    cli("prune", "net.keras", "r.keras", "--sparsity", "5", "--like", "torch", *where, cwd=files)
    kernel = converters.load(files / "r.keras").variables["params"]["d"]["kernel"]
    assert (kernel == 0).sum() == 5
    options = ("--sparsity", "0.5", "--score", "snip")
    assert (
        "no gradients" in cli("prune", "net.keras", "x.keras", *options, cwd=files, code=1).stderr
    )
    left = cli("prune", "net.keras", "x.keras", "--pattern", "n_m(2, 4)", cwd=files, code=1)
    assert "conv/kernel of shape (3, 3, 1, 4) has 1 inputs" in left.stderr
    assert "--where d/kernel" in left.stderr


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("inspect none.keras", 1, "no such file"),
        ("inspect net.h6", 1, "no such file"),
        ("prune net.keras out.keras", 1, "--sparsity 0.8 or --threshold"),
        ("prune net.keras out.keras --sparsity 80", 1, "0 to 1; found 80"),
        ("prune net.keras out.keras --sparsity 0.5 --where con/kernel", 1, "close: 'conv/kernel'"),
        ("prune net.keras out.keras --sparsity 0.5 --scope all", 1, "'layer', 'output', 'global'"),
        ("initialize net.keras out.keras --initializer zeroes", 1, "close: 'zeros'"),
        ("initialize net.keras out.keras --initializer keras.zeroes", 1, "close: 'zeros'"),
        ("initialize net.keras out.keras --initializer os.system", 1, "'keras' or 'torch'"),
        ("initialize net.keras out.keras --like jax", 1, "'keras', 'torch' or 'flax'"),
        ("initialize net.keras out.keras", 1, "--initializer or --like"),
        ("initialize net.keras out.keras --like keras --initializer zeros", 1, "or --like"),
        ("initialize net.keras out.keras --initializer constant", 1, "constant"),
        ("initialize net.keras out.keras --initializer __import__('os')", 1, "error"),
        ("project net.keras out.keras --constraint max_norm(x)", 1, "error"),
        ("convert net.keras out.h6", 1, "is not known"),
        ("convert net.keras net.keras/out.keras", 1, "can't write"),
        ("prune net.keras out.keras --sparsity 0.8 --where [z-a]", 1, "no glob"),
        ("initialize net.keras out.keras --initializer uniform('a')", 1, "error"),
        ("initialize net.keras out.keras --initializer zeros --seed 99999999999", 1, "32 bits"),
        ("project net.keras out.keras --constraint max_norm(-1)", 1, "at least 0"),
        ("convert net.keras out.keras --layout source", 1, "layout"),
        ("nonsense", 2, "No such command"),
    ],
)
def test_wrong_command_lines_are_one_line(files, line, code, said):
    done = cli(*line.split(), cwd=files, code=code)
    assert said in done.stderr
    assert not (files / "out.keras").exists()
    if code == 1:
        assert len(done.stderr.strip().splitlines()) == 1
        assert "Traceback" not in done.stderr


def test_a_truncated_file_is_one_line_and_leaves_the_output(files):
    (files / "cut.keras").write_bytes((files / "net.keras").read_bytes()[:900])
    (files / "old.pt").write_bytes(b"old")
    done = cli("convert", "cut.keras", "old.pt", cwd=files, code=1)
    assert "cut.keras" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (files / "old.pt").read_bytes() == b"old"


@pytest.mark.optimised
@pytest.mark.thorough
def test_the_demo(tmp_path):
    from fwt import _demo

    figures = _demo.run(tmp_path / "demo")
    assert figures["dense"] > 0.96
    assert figures["sparse"] > figures["dense"] - 0.02
    assert figures["difference"] < 1e-4
    assert {p.name for p in (tmp_path / "demo").iterdir()} == {
        "digits.keras", "digits.safetensors", "digits.pt", "weights.png",
    }  # fmt: skip
    kernels = fwt.select(converters.load(tmp_path / "demo" / "digits.safetensors"), fwt.kernels)
    total = sum(x.size for x in kernels.values())
    assert sum(int((x == 0).sum()) for x in kernels.values()) == round(0.9 * total)


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == fwt.__version__
    assert f"## {fwt.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    for extra in ("demo", "test"):
        wanted = project["optional-dependencies"][extra]
        pinned = "torch==2.13.0"
        assert pinned in wanted or "fwt[demo]" in wanted


def test_each_lower_bound_is_a_line_of_the_lowest_versions():
    """torch's is not: the tests pin it, see pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = (project["dependencies"], *project["optional-dependencies"].values())
    wanted = [name for names in lists for name in names]
    bounds = {w.replace(">=", "==") for w in wanted if ">=" in w and not w.startswith("torch>=")}
    lines = (ROOT / ".github" / "lowest.txt").read_text().splitlines()
    assert sorted(line for line in lines if not line.startswith("#")) == sorted(bounds)


def test_the_guides_table_of_nouns_is_that_of_the_code():
    import jax
    import keras
    import optax
    import tables
    import torch

    assert tables.stands("initializers.md"), "run python tests/helpers/tables.py"
    assert set(tables.CONSTRAINTS) == set(fwt.constraints.__all__)
    whats = [line.split(" | ")[0] for line in tables.table().splitlines()[2:]]
    assert len(set(whats)) == len(whats), "two rows say the same"
    homes = (keras.constraints, torch.nn.utils, optax.projections)
    since = {"projection_hyperplane", "projection_halfspace"}  # optax 0.2.6
    for elsewhere in tables.CONSTRAINTS.values():
        for home, name in zip(homes, elsewhere, strict=True):
            if name and (name not in since or hasattr(home, name)):
                for part in name.split("."):
                    home = getattr(home, part)
    inits = fwt.initializers
    columns = list(zip(*tables.INITIALIZERS, strict=True))
    for space, column in zip((inits, inits.keras, inits.torch), columns, strict=True):
        listed = [name for cell in column for name in cell.split()]
        assert sorted(listed) == sorted(set(space.__all__) - {"calculate_gain"})
    for names, home, theirs in (
        (inits.__all__, jax.nn.initializers, str),
        (inits.keras.__all__, keras.initializers, tables.camel),
        (set(inits.torch.__all__) - {"calculate_gain"}, torch.nn.init, "{}_".format),
    ):
        for name in names:
            assert hasattr(home, theirs(name)), name
