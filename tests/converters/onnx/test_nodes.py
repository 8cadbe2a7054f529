"""ONNX's own node tests: each is read and right, or refused."""

import importlib
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from marks import thorough_but
from onnx.backend.test.case import node as nodes

from fwt import converters
from fwt._graph import nodes_of

# So many of each are read at least; among them those that were once read wrong.
FAMILIES = {
    "lppool": 4, "shrink": 2, "softplus": 2, "clip": 6, "softmax": 10, "selu": 2, "celu": 1,
    "hardsigmoid": 2, "spacetodepth": 2, "depthtospace": 2, "reduce_log_sum": 1, "reducel2": 6,
    "reducemin": 6, "resize": 3, "pow": 1, "round": 1, "elu": 3, "mish": 1, "rmsnormalization": 1,
}  # fmt: skip


def cases():
    """Those with one output and one input beside numbers: name, model, input, output."""
    for case in nodes._NodeTestCases:
        ((inputs, outputs),) = case.data_sets
        graph = case.model.graph
        if len(inputs) != len(graph.input) or len(graph.output) != 1 or not inputs:
            continue
        if not all(isinstance(a, np.ndarray | np.generic) for a in (*inputs, *outputs)):
            continue
        proto = onnx.ModelProto()
        proto.CopyFrom(case.model)
        for value, array in zip(graph.input[1:], inputs[1:], strict=True):
            try:
                held = onnx.numpy_helper.from_array(np.asarray(array), value.name)
            except (TypeError, NotImplementedError):
                break
            proto.graph.initializer.append(held)
            proto.graph.input.remove(value)
        else:
            yield case.name, proto, np.asarray(inputs[0]), np.asarray(outputs[0])


def counted(path):
    """How many are read, after a check of each."""
    total = 0
    for name, proto, x, wanted in cases():
        path.write_bytes(proto.SerializeToString())
        try:
            model = converters.from_onnx(path)
        except converters.FileFormatError:
            continue
        found = np.asarray(model(x))
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
        found, wanted = (a.astype(float) for a in (found, wanted))
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6, err_msg=name)
        total += 1
    return total


SLOW = ("lppool", "rmsnormalization", "spacetodepth", "resize", "softmax", "depthtospace",
        "reducel2", "celu", "hardsigmoid")  # fmt: skip


@pytest.mark.parametrize("family", thorough_but(lambda f: f not in SLOW, FAMILIES))
def test_some_families(tmp_path, monkeypatch, family):
    monkeypatch.setattr(nodes, "_NodeTestCases", [])
    monkeypatch.setattr(nodes, "_existing_names", {})
    module = importlib.import_module(f"{nodes.__name__}.{family}")
    if not nodes._NodeTestCases:
        importlib.reload(module)
    assert counted(tmp_path / "a.onnx") >= FAMILIES[family]


@pytest.mark.thorough
def test_all(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "_NodeTestCases", [])
    monkeypatch.setattr(nodes, "_existing_names", {})
    for name in [n for n in sys.modules if n.startswith(f"{nodes.__name__}.")]:
        monkeypatch.delitem(sys.modules, name)  # a module registers its cases where it is imported
    nodes.collect_testcases()
    assert counted(tmp_path / "a.onnx") >= 380


make = onnx.helper.make_node


def written(path, nodes, arrays, shape, *dtypes):
    kinds = [onnx.helper.np_dtype_to_tensor_dtype(np.dtype(d)) for d in dtypes or ("f", "f")]
    value = onnx.helper.make_tensor_value_info
    held = [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "g", [value("x", kinds[0], shape)],
                                   [value("y", kinds[1], None)], held)  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 17)]
    path.write_bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
                     .SerializeToString())  # fmt: skip
    return path


def run(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


ONE = {"one": np.float32(1)}
POINTS = np.array(
    [0, 1e-3, -1e-3, 0.3, -0.3, 1, -1, 2.5, -2.5, 4, -4, 8, -8, 25, -25, 60, -60, 88, -88, 95, -95,
     1e3, -1e3, 1e13, -1e13, 1e20, -1e20, 1e37, -1e37], np.float32)[:, None]  # fmt: skip


def line(*ops):
    """A chain of operators; one named "Add 1" and such takes a number."""
    nodes, arrays, at = [], {}, "x"
    for i, text in enumerate(ops):
        op, _, number = text.partition(" ")
        inputs = [at]
        if number:
            arrays[f"c{i}"] = np.float32(number)
            inputs.append(f"c{i}")
        at = "y" if i == len(ops) - 1 else f"v{i}"
        nodes.append(make(op, inputs, [at]))
    return nodes, arrays


# Formulas, and the layers that they are; where float32 ends they are what onnxruntime makes of
# them, be they recognised or not. None: they are refused.
FORMULAS = {
    "softplus that overflows": (line("Exp", "Add 1", "Log"),
                                ["Pointwise", "Rescaling", "Pointwise"]),
    "softplus that does not": (
        ([make("Max", ["x", "zero"], ["m"]), make("Abs", ["x"], ["a"]), make("Neg", ["a"], ["n"]),
          make("Exp", ["n"], ["e"]), make("Add", ["e", "one"], ["o"]), make("Log", ["o"], ["l"]),
          make("Add", ["l", "m"], ["y"])], {**ONE, "zero": np.float32(0)}), ["Softplus"]),
    "mish": (
        ([make("Exp", ["x"], ["e"]), make("Add", ["e", "one"], ["o"]), make("Log", ["o"], ["l"]),
          make("Tanh", ["l"], ["t"]), make("Mul", ["x", "t"], ["y"])], ONE), ["Mish"]),
    "softplus times x": (
        ([make("Exp", ["x"], ["e"]), make("Add", ["e", "one"], ["o"]), make("Log", ["o"], ["l"]),
          make("Mul", ["x", "l"], ["y"])], ONE),
        ["Pointwise", "Rescaling", "Pointwise", "Multiply"]),
    "silu": (
        ([make("Neg", ["x"], ["n"]), make("Exp", ["n"], ["e"]), make("Add", ["e", "one"], ["o"]),
          make("Div", ["x", "o"], ["y"])], ONE), ["SiLU"]),
    "elu": (
        ([make("Exp", ["x"], ["e"]), make("Sub", ["e", "one"], ["s"]),
          make("Greater", ["x", "zero"], ["g"]), make("Where", ["g", "x", "s"], ["y"])],
         {**ONE, "zero": np.float32(0)}), ["ELU"]),
    "elu that is poisoned": (
        ([make("Exp", ["x"], ["e"]), make("Sub", ["e", "one"], ["s"]),
          make("Greater", ["x", "zero"], ["g"]), make("Cast", ["g"], ["c"], to=1),
          make("Sub", ["one", "c"], ["d"]), make("Mul", ["c", "x"], ["p"]),
          make("Mul", ["d", "s"], ["q"]), make("Add", ["p", "q"], ["y"])],
         {**ONE, "zero": np.float32(0)}), None),
    "a clip from below": (line("Clip -1.5"), ["Threshold"]),
    "the smaller": (line("Min 2"), ["Rescaling", "Threshold", "Rescaling"]),
    "the larger": (line("Max -0.5"), ["Threshold"]),
    "squares": (line("Pow 2"), ["Pointwise"]),
    "a selu of its own": (([make("Selu", ["x"], ["y"], alpha=2.0, gamma=0.5)], {}),
                          ["ELU", "Rescaling"]),
    "a hard sigmoid of its own": (([make("HardSigmoid", ["x"], ["y"], alpha=0.4, beta=0.3)], {}),
                                  ["Rescaling", "HardTanh"]),
    "a shrink that grows": (([make("Shrink", ["x"], ["y"], lambd=-1.5)], {}), None),
    "a shrink that grows, biased": (
        ([make("Shrink", ["x"], ["y"], lambd=-1.5, bias=-1.5)], {}), None),
    "a quotient that float32 lacks": (line("Div 3e38"), None),
    "over zero": (line("Div 0"), None),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_is_a_layer_only_where_both_overflow_alike(tmp_path, name):
    (nodes, arrays), layers = FORMULAS[name]
    path = written(tmp_path / "a.onnx", nodes, arrays, ("n", 1))
    if layers is None:
        with pytest.raises(converters.FileFormatError):
            converters.from_onnx(path)
        return
    model = converters.from_onnx(path)
    assert [type(n.layer).__name__ for n in nodes_of(model.module)] == layers
    np.testing.assert_allclose(np.asarray(model(POINTS)), run(path, POINTS), rtol=2e-6, atol=1e-6)


def norm(*, inside, epsilon, mean):
    """The nodes of a norm, with its epsilon in the root or after it."""
    taken = [make("ReduceMean", ["x"], ["m"], axes=[2]), make("Sub", ["x", "m"], ["d"])]
    root = [make("Add", ["v", "e"], ["w"]), make("Sqrt", ["w"], ["r"])]
    after = [make("Sqrt", ["v"], ["w"]), make("Add", ["w", "e"], ["r"])]
    given = "d" if mean else "x"
    return [*(taken if mean else []), make("Mul", [given, given], ["s"]),
            make("ReduceMean", ["s"], ["v"], axes=[2]), *(root if inside else after),
            make("Div", [given, "r"], ["y"])], {"e": np.float32(epsilon)}  # fmt: skip


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("epsilon", [1e-3, 1e-6])
@pytest.mark.parametrize("inside", [True, False])
def test_a_norm_of_a_small_input(tmp_path, inside, epsilon, mean):
    """Is one layer's where its epsilon is in the root; else it stays several."""
    nodes, arrays = norm(inside=inside, epsilon=epsilon, mean=mean)
    path = written(tmp_path / "a.onnx", nodes, arrays, ("n", 4, 5))
    model = converters.from_onnx(path)
    assert (len(nodes_of(model.module)) == 1) == inside
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    for size in (1, 1e-2, 1e-3, 1e-5, 0):
        found, wanted = np.asarray(model(size * x)), run(path, size * x)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def casts(*dtypes):
    """Casts of "x", one after the other, of which the last is "v"."""
    kinds = [onnx.helper.np_dtype_to_tensor_dtype(np.dtype(d)) for d in dtypes]
    names = ["x", *(f"v{i}" for i in range(len(kinds) - 1)), "v"]
    return [make("Cast", [a], [b], to=k) for a, b, k in zip(names, names[1:], kinds, strict=False)]


TABLE = {"w": np.arange(1200, dtype=np.float32).reshape(400, 3)}
LOOKUP = make("Gather", ["w", "v"], ["y"])
# An input, and whether Casts of it are read: only where they change nothing that follows.
CASTS = {
    "to what holds less": (
        [*casts("int8", "int32"), make("Identity", ["v"], ["y"])], {},
        np.array([[300]], np.int32), False),
    "to what holds less, looked up": (
        [*casts("int8", "int32"), LOOKUP], TABLE, np.array([[257]], np.int32), False),
    "to unsigned": ([*casts("uint8"), LOOKUP], TABLE, np.array([[257]], np.int32), False),
    "from int64": ([*casts("int32"), LOOKUP], TABLE, np.array([[3, 300]], np.int64), True),
    "to int64": ([*casts("int64"), LOOKUP], TABLE, np.array([[3, 300]], np.int32), True),
    "from int8": ([*casts("int32"), LOOKUP], TABLE, np.array([[3, 127]], np.int8), True),
    "from int8, then squared": (
        [*casts("int32"), make("Mul", ["v", "v"], ["q"]), make("Gather", ["w", "q"], ["y"])],
        TABLE, np.array([[3, 17]], np.int8), False),
    "from half, times weights": (
        [*casts("float32"), make("MatMul", ["v", "k"], ["y"])], {"k": np.full((2, 3), 3e4, "f")},
        np.array([[3, 6e4]], np.float16), True),
    "from half, then exp": (
        [*casts("float32"), make("Exp", ["v"], ["e"]), make("MatMul", ["e", "k"], ["y"])],
        {"k": np.ones((2, 3), "f")}, np.array([[3, 20]], np.float16), False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_is_read_only_where_it_changes_nothing(tmp_path, name):
    nodes, arrays, x, read = CASTS[name]
    end = np.float32 if arrays else x.dtype
    path = written(tmp_path / "a.onnx", nodes, arrays, ("n", x.shape[1]), x.dtype, end)
    if not read:
        with pytest.raises(converters.FileFormatError, match=r"Cast|whole numbers"):
            converters.from_onnx(path)
        return
    np.testing.assert_allclose(np.asarray(converters.from_onnx(path)(x)), run(path, x), rtol=1e-6)
