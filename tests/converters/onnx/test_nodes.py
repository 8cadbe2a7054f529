"""ONNX's own node tests: each is read and right, or refused."""

import importlib

import numpy as np
import onnx
import pytest
from onnx.backend.test.case import node as nodes

from fwt import converters

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


@pytest.mark.parametrize("family", FAMILIES)
def test_some_families(tmp_path, monkeypatch, family):
    monkeypatch.setattr(nodes, "_NodeTestCases", [])
    monkeypatch.setattr(nodes, "_existing_names", {})
    module = importlib.import_module(f"{nodes.__name__}.{family}")
    if not nodes._NodeTestCases:
        importlib.reload(module)
    assert counted(tmp_path / "a.onnx") >= FAMILIES[family]


@pytest.mark.thorough
def test_all(tmp_path):
    nodes.collect_testcases()
    assert counted(tmp_path / "a.onnx") >= 280
