"""ONNX files edited in place: against onnxruntime on the same change by hand, and to the byte."""

import copy
import hashlib
import json

import fuzz
import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command import cli
from exporters import exported
from onnx import TensorProto, helper, numpy_helper

import fwt
from fwt import converters

FLOAT, BF16 = TensorProto.FLOAT, ml_dtypes.bfloat16
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("my.own", 1)]


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def tensor(value, name):
    return numpy_helper.from_array(value, name)


def spelled(value, name, kind):
    """A tensor whose entries stand in the field of their kind, as exporters of old write them."""
    return helper.make_tensor(name, kind, value.shape, value.astype(np.float32).reshape(-1))


def info(name, shape, kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def node(op, ins, outs="y", **attributes):
    return helper.make_node(op, ins.split(" "), outs.split(" "), **attributes)


def model(nodes, x, tensors, *, functions=(), opsets=OPSETS, kind=FLOAT, y="y"):
    graph = helper.make_graph(
        nodes,
        "g",
        [info("x", x, kind)],
        [onnx.ValueInfoProto(name=y)],
        tensors,
        doc_string="a graph",
    )
    made = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=9)
    helper.set_model_props(made, {"author": "someone"})
    return made


def one(op, x, *, ins=("x", "w"), w=(4, 3), more=(), **attributes):
    """A node with one kernel."""
    return model([node(op, " ".join(ins), **attributes)], x, [tensor(normal(*w), "w"), *more])


def of_if():
    def branch(name, seed):
        w = tensor(normal(3, 3, seed=seed), "w")
        nodes = [node("MatMul", "x w", "m"), node("MatMul", "m outer", name)]
        return helper.make_graph(nodes, name, [], [onnx.ValueInfoProto(name=name)], [w])

    nodes = [
        node("ReduceSum", "x", "s", keepdims=0),
        node("Greater", "s zero", "c"),
        node("If", "c", then_branch=branch("t", 1), else_branch=branch("e", 2)),
    ]
    zero = tensor(np.zeros((), np.float32), "zero")
    return model(nodes, (2, 3), [zero, tensor(normal(3, 3), "outer")])


def of_loop():
    """Through whose rounds its weights go as a state, as Keras's exporter writes a cell."""
    body = helper.make_graph(
        [
            node("Identity", "go", "goes"),
            node("MatMul", "h w_in", "h_out"),
            node("Identity", "w_in", "w_out"),
        ],
        "body",
        [info("i", (), TensorProto.INT64), info("go", (), TensorProto.BOOL),
         info("h", (2, 4)), info("w_in", (4, 4))],
        [onnx.ValueInfoProto(name=n) for n in ("goes", "h_out", "w_out")],
    )  # fmt: skip
    held = [tensor(np.array(2), "rounds"), tensor(np.array(True), "go"), tensor(normal(4, 4), "w")]
    return model([node("Loop", "rounds go x w", "y w_end", body=body)], (2, 4), held)


def of_scan():
    """Each round of which takes one of a stack of layers."""
    body = helper.make_graph(
        [node("MatMul", "h slice", "h_out")],
        "body",
        [info("h", (2, 4)), info("slice", (4, 4))],
        [onnx.ValueInfoProto(name="h_out")],
    )
    scan = node("Scan", "x w", body=body, num_scan_inputs=1)
    return model([scan], (2, 4), [tensor(normal(3, 4, 4), "w")])


def of_function():
    body = [
        node("MatMul", "a b", "p"),
        helper.make_node("LeakyRelu", ["p"], ["q"]),
    ]
    body[1].attribute.append(onnx.AttributeProto(name="alpha", type=1, ref_attr_name="slope"))
    linear = helper.make_function(
        "my.own", "Linear", ["a", "b"], ["q"], body, OPSETS[:1], ["slope"]
    )
    call = helper.make_node("Linear", ["x", "w"], ["y"], domain="my.own", slope=0.3)
    return model([call], (2, 4), [tensor(normal(4, 3), "w")], functions=[linear])


def of_constant():
    value = tensor(normal(4, 3), "inner name")
    return model(
        [helper.make_node("Constant", [], ["w"], value=value), node("MatMul", "x w")], (2, 4), []
    )


def of_half(name, dtype, kind):
    nodes = [node("Cast", "w", "wide", to=FLOAT), node("MatMul", "x wide")]
    w = normal(4, 3).astype(dtype)
    held = tensor(w, "w") if name == "raw" else spelled(w, "w", kind)
    return model(nodes, (2, 4), [held])


def of_quantised_later():
    nodes = [
        node("QuantizeLinear", "w scale", "q"),
        node("DequantizeLinear", "q scale", "d"),
        node("Gemm", "x d", transB=1),
    ]
    scale = tensor(np.float32(0.02), "scale")
    return model(nodes, (2, 4), [tensor(normal(3, 4), "w"), scale])


def lora():
    nodes = [
        node("MatMul", "a b", "ab"), node("Add", "w ab", "sum"), node("MatMul", "x sum")
    ]  # fmt: skip
    held = {"w": normal(4, 3), "a": normal(4, 2), "b": normal(2, 3)}
    return model(nodes, (2, 4), [tensor(v, n) for n, v in held.items()])


def recurrent(op, gates):
    w, r, b = normal(2, gates * 3, 4), normal(2, gates * 3, 3), normal(2, 2 * gates * 3)
    made = node(op, "x W R B", "y h", direction="bidirectional", hidden_size=3)
    return model([made], (5, 2, 4), [tensor(w, "W"), tensor(r, "R"), tensor(b, "B")])


def made_of(op, behind, x=(2, 4), *, behind_of="x t", attributes=None, **held):
    """A kernel that a node makes of numbers, and the node that reads it."""
    made = node(op, " ".join(held), "t", **(attributes or {}))
    return model([made, node(behind, behind_of)], x, [tensor(v, n) for n, v in held.items()])


BIAS = tensor(normal(6), "bias")
# By name a file, and of its kernels the axes that a norm of an output unit sums over; None where
# nothing tells them.
NETS = {
    "conv in groups": (
        lambda: one(
            "Conv", (1, 4, 5, 5), w=(6, 2, 3, 3), ins=("x", "w", "bias"), more=[BIAS], group=2
        ),
        {"w": (1, 2, 3)},
    ),
    "depthwise": (lambda: one("Conv", (1, 4, 5), w=(8, 1, 3), group=4), {"w": (1, 2)}),
    "transposed": (lambda: one("ConvTranspose", (1, 4, 5), w=(4, 3, 2)), {"w": (0, 2)}),
    "transposed in groups": (
        lambda: one("ConvTranspose", (1, 4, 5), w=(4, 3, 2), group=2),
        {"w": None},
    ),
    "gemm": (lambda: one("Gemm", (2, 4)), {"w": (0,)}),
    "gemm, transB": (lambda: one("Gemm", (2, 4), w=(3, 4), transB=1), {"w": (1,)}),
    "gemm from the left": (lambda: one("Gemm", (4, 2), w=(3, 4), ins=("w", "x")), {"w": (1,)}),
    "gemm from the left, transA": (
        lambda: one("Gemm", (4, 2), w=(4, 3), ins=("w", "x"), transA=1),
        {"w": (0,)},
    ),
    "matmul": (lambda: one("MatMul", (2, 4)), {"w": (0,)}),
    "matmul from the left": (lambda: one("MatMul", (4, 2), w=(3, 4), ins=("w", "x")), {"w": (1,)}),
    "matmuls": (lambda: one("MatMul", (5, 2, 4), w=(5, 4, 3)), {"w": (1,)}),
    "einsum": (
        lambda: one("Einsum", (2, 4), w=(3, 5, 4), equation="bi,hoi->bho"),
        {"w": (2,)},
    ),
    "LSTM": (lambda: recurrent("LSTM", 4), {"W": (2,), "R": (2,)}),
    "GRU": (lambda: recurrent("GRU", 3), {"W": (2,), "R": (2,)}),
    "turned": (
        lambda: model(
            [node("Transpose", "w", "t"), node("MatMul", "x t")],
            (2, 4),
            [tensor(normal(3, 4), "w")],
        ),
        {"w": (1,)},
    ),
    "unsqueezed": (
        lambda: model(
            [node("Unsqueeze", "w axes", "u"), node("Conv", "x u")],
            (1, 4, 5),
            [tensor(normal(3, 4), "w"), tensor(np.array([2]), "axes")],
        ),
        {"w": (1,)},
    ),
    "squeezed": (
        lambda: made_of("Squeeze", "MatMul", w=normal(4, 1, 3), axes=np.array([1])),
        {"w": (0,)},
    ),
    "reshaped": (
        lambda: made_of("Reshape", "Conv", (1, 4, 5), w=normal(3, 4), to=np.array([3, -1, 1])),
        {"w": (1,)},
    ),
    "reshaped into others": (
        lambda: made_of("Reshape", "MatMul", w=normal(2, 6), to=np.array([4, 3])),
        {"w": None},
    ),
    "joined": (
        lambda: made_of("Concat", "MatMul", w=normal(4, 3), v=normal(4, 2), attributes={"axis": 1}),
        {"w": (0,), "v": (0,)},
    ),
    "sliced": (
        lambda: made_of("Slice", "MatMul", w=normal(6, 3), start=np.array([1]), end=np.array([5])),
        {"w": (0,)},
    ),
    "scaled": (lambda: made_of("Mul", "MatMul", w=normal(4, 3), scale=normal(3)), {"w": (0,)}),
    "read in two ways": (
        lambda: model(
            [node("MatMul", "x w", "m"), node("Transpose", "w", "t"), node("MatMul", "m t")],
            (2, 4),
            [tensor(normal(4, 4), "w")],
        ),
        {"w": None},
    ),
    "if": (of_if, {"outer": (0,), "y.then_branch/w": (0,), "y.else_branch/w": (0,)}),
    "loop": (of_loop, {"w": (0,)}),
    "scan": (of_scan, {"w": (1,)}),
    "function": (of_function, {"w": (0,)}),
    "constant": (of_constant, {"w": (0,)}),
    "float16": (lambda: of_half("raw", np.float16, TensorProto.FLOAT16), {"w": (0,)}),
    "float16, spelled": (lambda: of_half("", np.float16, TensorProto.FLOAT16), {"w": (0,)}),
    "bfloat16": (lambda: of_half("raw", ml_dtypes.bfloat16, TensorProto.BFLOAT16), {"w": (0,)}),
    "bfloat16, spelled": (
        lambda: of_half("", ml_dtypes.bfloat16, TensorProto.BFLOAT16),
        {"w": (0,)},
    ),
    "float32, spelled": (lambda: of_half("", np.float32, FLOAT), {"w": (0,)}),
    "quantised later": (of_quantised_later, {"w": (1,)}),
    "LoRA": (lora, {"w": (0,), "a": None, "b": None}),
}
STACKS = ("matmuls", "LSTM", "GRU", "scan")  # each slice of whose kernels is a layer of its own


def arrays(proto):
    """By the names that fwt gives, the tensors of a model."""
    out = {t.name: t for t in proto.graph.initializer}
    for each in proto.graph.node:
        for a in each.attribute:
            if a.type == onnx.AttributeProto.GRAPH:
                out |= {f"{each.output[0]}.{a.name}/{t.name}": t for t in a.g.initializer}
            elif each.op_type == "Constant":
                out[each.output[0]] = a.t
    return out


def by_hand(proto, change):
    """The same model with other values of the arrays that are named."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    held = arrays(made)
    for name, value in change.items():
        name_inside = held[name].name
        held[name].CopyFrom(tensor(value, name_inside))
    return made


def runs(proto):
    session = onnxruntime.InferenceSession(
        proto if isinstance(proto, str) else proto.SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    x = session.get_inputs()[0]
    return session.run(None, {"x": normal(*x.shape)})[0]


def values(proto):
    return {n: numpy_helper.to_array(t) for n, t in arrays(proto).items()}


def without_values(proto):
    """The bytes of a model without those of its arrays."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    for held in arrays(made).values():
        for field in ("raw_data", "float_data", "int32_data"):
            held.ClearField(field)
    return made.SerializeToString()


def pruned(value):
    """The smaller half of the entries by magnitude set to zero."""
    flat = np.abs(value.astype(np.float64)).reshape(-1)
    out = value.copy().reshape(-1)
    out[np.argsort(flat, kind="stable")[: round(value.size / 2)]] = 0
    return out.reshape(value.shape)


@pytest.mark.parametrize("name", NETS)
def test_the_file_is_edited_as_by_hand(tmp_path, name):
    make, kernels = NETS[name]
    before = make()
    onnx.save(before, tmp_path / "a.onnx")
    converters.transform(tmp_path / "a.onnx", fwt.prune(0.5), out=tmp_path / "b.onnx")
    after = onnx.load(tmp_path / "b.onnx")
    expected = {n: pruned(values(before)[n]) for n in kernels}
    if name in STACKS:
        expected = {n: np.stack([pruned(x) for x in values(before)[n]]) for n in kernels}
    for n, value in values(after).items():
        np.testing.assert_array_equal(value, expected.get(n, values(before)[n]), n)
    assert without_values(after) == without_values(before)
    np.testing.assert_array_equal(runs(after), runs(by_hand(before, expected)))
    assert not np.array_equal(runs(after), runs(before))

    project = fwt.project(fwt.constraints.max_norm(0.5))
    if None in kernels.values():
        with pytest.raises(fwt.AxesError, match="nothing says which axis"):
            converters.transform(tmp_path / "a.onnx", project, out=tmp_path / "c.onnx")
        assert not (tmp_path / "c.onnx").exists()
        return
    converters.transform(tmp_path / "a.onnx", project, out=tmp_path / "c.onnx")
    after = values(onnx.load(tmp_path / "c.onnx"))
    for n, axes in kernels.items():
        wide = values(before)[n].astype(np.float64)
        norm = np.sqrt(np.sum(wide * wide, axis=axes, keepdims=True))
        assert np.any(norm > 0.5)
        eps = 4 * float(ml_dtypes.finfo(after[n].dtype).eps)
        np.testing.assert_allclose(
            after[n].astype(np.float64), wide * np.minimum(1, 0.5 / norm), rtol=eps, err_msg=n
        )


@pytest.mark.parametrize("name", ["conv in groups", "if", "bfloat16, spelled"])
def test_nothing_changed_is_the_same_file(tmp_path, name):
    onnx.save(NETS[name][0](), tmp_path / "a.onnx")
    converters.transform(tmp_path / "a.onnx", lambda m: m, out=tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "a.onnx").read_bytes()
    converters.transform(tmp_path / "a.onnx", fwt.prune(0.5), out=tmp_path / "a.onnx")
    converters.transform(tmp_path / "b.onnx", fwt.prune(0.5), out=tmp_path / "c.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()


# -- names and roles ----------------------------------------------------------------------------


def of_own_operators():
    """What nothing but its own runtime can run."""
    nodes = [
        node("Conv", "x conv.weight conv.bias", "c"),
        helper.make_node("Unheard", ["c", "secret"], ["u"], domain="my.own", how=3),
        node("GlobalAveragePool", "u", "p"),
        node("Flatten", "p", "f"),
        node("MatMul", "f fc/kernel", "m"),
        node("Add", "m fc/bias"),
    ]
    held = {
        "conv.weight": normal(6, 4, 3, 3),
        "conv.bias": normal(6),
        "secret": normal(6, 6),
        "fc/kernel": normal(6, 3),
        "fc/bias": normal(3),
    }
    made = model(nodes, (1, 4, 5, 5), [tensor(v, n) for n, v in held.items()])
    made.graph.value_info.append(info("c", (1, 6, 3, 3)))
    made.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            tensor(np.ones(1, np.float32), "sparse"), tensor(np.array([2]), ""), [9]
        )
    )
    made.graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [1], [b"t"]))
    four = np.arange(-4, 4).astype(ml_dtypes.int4)
    made.graph.initializer.append(helper.make_tensor("four", TensorProto.INT4, [8], four))
    made.training_info.add().algorithm.initializer.append(tensor(normal(2), "step"))
    return made


def test_operators_of_ones_own_and_all_else_stay(tmp_path):
    before = of_own_operators()
    # A field of a version of ONNX to come, in the model and in a tensor that changes.
    unknown = b"\xfa\x3f\x03new"
    held = before.graph.initializer[0]
    held.MergeFromString(unknown)
    (tmp_path / "a.onnx").write_bytes(before.SerializeToString() + unknown)
    with pytest.warns(UserWarning, match="left out, since they are no numbers.*: text, four"):
        found = converters.load(tmp_path / "a.onnx", module=False)
    assert fwt.paths(found) == [
        "conv.bias", "conv.weight", "fc\\/bias", "fc\\/kernel", "secret"
    ]  # fmt: skip
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.warns(UserWarning, match="secret: read by operators that are not known"),
    ):
        converters.transform(
            tmp_path / "a.onnx", fwt.prune(0.5, scope="global"), out=tmp_path / "b.onnx"
        )
    old, new = ((tmp_path / n).read_bytes() for n in ("a.onnx", "b.onnx"))
    assert len(old) == len(new)
    after = onnx.load_from_string(new)
    assert new.count(unknown) == 2
    both = [numpy_helper.to_array(t).reshape(-1) for t in before.graph.initializer[:4:3]]
    least = pruned(np.concatenate(both))
    for t, start, size in ((0, 0, both[0].size), (3, both[0].size, both[1].size)):
        value = numpy_helper.to_array(after.graph.initializer[t]).reshape(-1)
        np.testing.assert_array_equal(value, least[start : start + size])
        before.graph.initializer[t].raw_data = after.graph.initializer[t].raw_data
    assert new == before.SerializeToString() + unknown
    for line in ("inspect a.onnx", "diff a.onnx a.onnx", "prune a.onnx c.onnx --sparsity 0.5",
                 "project a.onnx c.onnx --constraint max_norm(1.0)",
                 "initialize a.onnx c.onnx --initializer he_normal"):  # fmt: skip
        cli(*line.split(), cwd=tmp_path)
    said = cli("project", "a.onnx", "d.onnx", "--constraint", "max_norm(1.0)", "-w", "secret",
               cwd=tmp_path, code=1).stderr  # fmt: skip
    assert "--axes 'secret=" in said
    assert "secret" in said
    cli("project", "a.onnx", "d.onnx", "--constraint", "max_norm(1.0)", "-w", "secret",
        "--axes", "secret=in out", cwd=tmp_path)  # fmt: skip


def test_the_initializer_counts_the_fans_of_its_node(tmp_path):
    """Those of (out, in / groups, *k), in which torch has the same kernel."""
    for name, fan in (("conv in groups", 18), ("gemm", 4), ("gemm, transB", 4), ("LSTM", 4)):
        onnx.save(NETS[name][0](), tmp_path / "a.onnx")
        t = fwt.initialize(fwt.initializers.torch.kaiming_uniform(a=5**0.5), 3)
        converters.transform(tmp_path / "a.onnx", t, out=tmp_path / "b.onnx")
        kernel = next(iter(NETS[name][1]))
        found = values(onnx.load(tmp_path / "b.onnx"))[kernel]
        assert 0.6 / fan**0.5 < np.max(np.abs(found)) <= 1 / fan**0.5, name
        assert np.all(np.isfinite(runs(str(tmp_path / "b.onnx"))))
    # Keras's layer of a depthwise convolution counts all its channels.
    onnx.save(NETS["depthwise"][0](), tmp_path / "a.onnx")
    t = fwt.initialize(fwt.initializers.keras.he_uniform, 3)
    converters.transform(tmp_path / "a.onnx", t, out=tmp_path / "b.onnx")
    found = values(onnx.load(tmp_path / "b.onnx"))["w"]
    assert 0.8 * (6 / 12) ** 0.5 < np.max(np.abs(found)) <= (6 / 12) ** 0.5


def test_transforms_one_after_the_other(tmp_path):
    before = NETS["conv in groups"][0]()
    onnx.save(before, tmp_path / "a.onnx")
    chain = fwt.chain(
        fwt.prune(threshold=0.7, where="w"),
        fwt.project(fwt.constraints.non_negative, where=["w", "bias"]),
    )
    converters.transform(tmp_path / "a.onnx", chain, out=tmp_path / "b.onnx")
    w, bias = values(before)["w"], values(before)["bias"]
    hand = by_hand(before, {"w": np.where(w > np.float32(0.7), w, 0), "bias": np.maximum(bias, 0)})
    np.testing.assert_array_equal(runs(str(tmp_path / "b.onnx")), runs(hand))


def tied():
    nodes = [
        node("Gather", "embedding ids", "e"),
        node("Add", "e x", "h"),
        node("Transpose", "embedding", "t"),
        node("MatMul", "h t"),
    ]
    held = [tensor(normal(7, 4), "embedding"), tensor(np.array([1, 2]), "ids")]
    return model(nodes, (2, 4), held)


def test_an_embedding_that_is_a_head_too_is_left_out_of_the_kernels(tmp_path):
    before = tied()
    before.graph.node.append(node("MatMul", "x w", "z"))
    before.graph.initializer.append(tensor(normal(4, 3), "w"))
    onnx.save(before, tmp_path / "a.onnx")
    with pytest.warns(UserWarning, match="embedding and embedding as kernels of y are one array"):
        converters.transform(tmp_path / "a.onnx", fwt.prune(0.5), out=tmp_path / "b.onnx")
    found = values(onnx.load(tmp_path / "b.onnx"))
    np.testing.assert_array_equal(found["embedding"], values(before)["embedding"])
    np.testing.assert_array_equal(found["w"], pruned(values(before)["w"]))
    t = fwt.prune(0.5, where="embedding")
    converters.transform(tmp_path / "a.onnx", t, out=tmp_path / "c.onnx")
    found = values(onnx.load(tmp_path / "c.onnx"))
    np.testing.assert_array_equal(found["embedding"], pruned(values(before)["embedding"]))


def of_integers(zero):
    nodes = [node("DequantizeLinear", "q scale zero", "w"), node("MatMul", "x w")]
    held = {
        "q": np.random.default_rng(0).integers(-9, 9, (4, 3)).astype(np.int8),
        "scale": np.float32(0.1),
        "zero": np.int8(zero),
    }
    return model(nodes, (2, 4), [tensor(v, n) for n, v in held.items()])


def of_eights():
    nodes = [node("DequantizeLinear", "q scale", "w"), node("MatMul", "x w")]
    q = normal(4, 3).astype(ml_dtypes.float8_e4m3fn)
    held = [tensor(q, "q"), tensor(np.float32(0.1), "scale")]
    return model(nodes, (2, 4), held, opsets=[helper.make_opsetid("", 19)])


def test_floats_of_8_bits_are_no_kernels_and_change_by_name(tmp_path):
    onnx.save(of_eights(), tmp_path / "a.onnx")
    with pytest.raises(fwt.WhereError, match="q is quantised"):
        converters.transform(tmp_path / "a.onnx", fwt.prune(0.5), out=tmp_path / "b.onnx")
    t = fwt.prune(0.5, where="q")
    converters.transform(tmp_path / "a.onnx", t, out=tmp_path / "b.onnx")
    after = values(onnx.load(tmp_path / "b.onnx"))["q"]
    np.testing.assert_array_equal(after, pruned(values(of_eights())["q"]))
    hand = by_hand(of_eights(), {"q": after})
    np.testing.assert_array_equal(runs(str(tmp_path / "b.onnx")), runs(hand))


def test_integers_are_no_kernels_and_change_only_where_0_is_0(tmp_path):
    before = of_integers(0)
    onnx.save(before, tmp_path / "a.onnx")
    onnx.save(of_integers(3), tmp_path / "b.onnx")
    for name in ("a.onnx", "b.onnx"):
        with pytest.raises(fwt.WhereError, match=r"fwt\.kernels"):
            converters.transform(tmp_path / name, fwt.prune(0.5), out=tmp_path / "c.onnx")
    t = fwt.prune(0.5, where="q")
    converters.transform(tmp_path / "a.onnx", t, out=tmp_path / "c.onnx")
    after = onnx.load(tmp_path / "c.onnx")
    hand = by_hand(before, {"q": pruned(values(before)["q"])})
    assert np.count_nonzero(values(after)["q"]) == 6
    assert np.count_nonzero(values(hand)["q"]) == 6
    with pytest.raises(fwt.ConversionError, match="q holds numbers of y of which 0 is not known"):
        converters.transform(tmp_path / "b.onnx", t, out=tmp_path / "d.onnx")
    assert not (tmp_path / "d.onnx").exists()


def test_another_shape_dtype_or_name_is_refused(tmp_path):
    onnx.save(NETS["gemm"][0](), tmp_path / "a.onnx")
    other = {"w": normal(2, 3)}, {"w": normal(4, 3).astype(np.float16)}, {"v": normal(4, 3)}
    for params, said in zip(other, ("found float32.2, 3", "found float16", "not in both")):
        with pytest.raises(fwt.ConversionError, match=said):
            converters.transform(
                tmp_path / "a.onnx",
                lambda m, p=params: fwt.Model(None, {"params": p}),
                out=tmp_path / "b.onnx",
            )
    assert not (tmp_path / "b.onnx").exists()
    changed = converters.load(tmp_path / "a.onnx", module=False)
    converters.save(
        tmp_path / "b.onnx", *fwt.prune(0.5, where="w")(changed), source=tmp_path / "a.onnx"
    )
    assert np.count_nonzero(values(onnx.load(tmp_path / "b.onnx"))["w"]) == 6
    with pytest.raises(fwt.ConversionError, match="or source="):
        converters.save(tmp_path / "c.onnx", None, changed.variables)


def test_the_names_are_the_files_also_where_its_model_converts(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
    converters.save(tmp_path / "a.onnx", *converters.from_torch(net, (3, 5, 5)))
    own = [t.name for t in onnx.load(tmp_path / "a.onnx").graph.initializer]
    seen = []

    def look(m):
        seen.extend(fwt.paths(m))
        return fwt.prune(0.5)(m)

    converters.transform(tmp_path / "a.onnx", look, out=tmp_path / "b.onnx")
    assert {p.replace("\\", "") for p in seen} == set(own)
    # Another dtype is another graph, and is converted as before.
    converters.transform(tmp_path / "a.onnx", look, out=tmp_path / "c.onnx", dtype="float16")
    assert seen[len(own) :] == ["0/bias", "0/kernel"]
    assert converters.verify(tmp_path / "b.onnx", converters.load(tmp_path / "b.onnx")).ok


def test_what_looks_at_files_takes_those_that_do_not_convert(tmp_path):
    onnx.save(of_if(), tmp_path / "a.onnx")
    converters.transform(tmp_path / "a.onnx", fwt.prune(0.5), out=tmp_path / "b.onnx")
    names = ["outer", r"y.else_branch\/w", r"y.then_branch\/w", "zero"]
    with pytest.warns(UserWarning, match="it has a graph of its own; the names are those in the"):
        assert fwt.paths(tmp_path / "a.onnx") == names
    with pytest.warns(UserWarning, match="the names are those in the file"):
        assert fwt.summary(tmp_path / "b.onnx").zeros == 13
    with pytest.warns(UserWarning, match="the names are those in the file"):
        changes = fwt.diff(tmp_path / "a.onnx", tmp_path / "b.onnx").changes
    assert [c.path for c in changes] == [f"params/{n}" for n in names[:3]]
    # Where one of two is of layers, both have the names in their files.
    onnx.save(one("MatMul", (2, 4)), tmp_path / "c.onnx")
    with pytest.warns(UserWarning, match="the names are those in the file"):
        found = fwt.diff(tmp_path / "a.onnx", tmp_path / "c.onnx")
    assert "params/w" in [c.path for c in found.changes]


def test_inspect_lists_what_is_named(tmp_path):
    onnx.save(of_own_operators(), tmp_path / "a.onnx")
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    tied = {**net.state_dict(), "again": net[0].weight}
    torch.save(tied, tmp_path / "w.pt")
    converters.save(tmp_path / "n.onnx", *converters.from_torch(net, (3,)))
    own = [t.name for t in onnx.load(tmp_path / "n.onnx").graph.initializer]

    def listed(*words):
        lines = cli("inspect", *words, cwd=tmp_path).stdout.splitlines()
        return {line.split()[0] for line in lines[2:-1]}, lines[-1].split()

    names, total = listed("a.onnx", "-w", "kernels")
    assert names == {"conv.weight", "fc/kernel"}
    assert total[2:4] == ["234", "0"]
    assert listed("n.onnx", "-w", "kernels")[0] == {"0/kernel", "2/kernel"}
    assert listed("n.onnx", "-w", "**/bias", "-w", "2/kernel")[0] == {
        "0/bias", "1/bias", "2/bias", "2/kernel"
    }  # fmt: skip
    assert listed("n.onnx", "--weights-only")[0] == set(own)
    names, total = listed("w.pt", "-w", "0.weight", "-w", "again")
    assert total[2] == "12"
    assert listed("w.pt", "-w", "again")[1][2] == "12"
    found = json.loads(cli("inspect", "w.pt", "--json", "-w", "kernels", cwd=tmp_path).stdout)
    assert found["weights"] == 20
    assert [x["path"] for x in found["leaves"]] == ["0/weight", "2/weight"]
    said = cli("inspect", "w.pt", "-w", "3.weight", cwd=tmp_path, code=1).stderr
    assert "matches none" in said
    assert "2/weight" in said or "2.weight" in said


# -- files beside it ----------------------------------------------------------------------------


def with_data(path, location, **how):
    """A file with its arrays beside it, two of which are one."""
    nodes = [node("MatMul", "x w", "m"), node("MatMul", "m v", "n"), node("Add", "n bias")]
    held = {"w": normal(4, 40), "v": normal(40, 6), "bias": normal(6)}
    made = model(nodes, (2, 4), [tensor(v, n) for n, v in held.items()])
    kept = onnx.ModelProto()
    kept.CopyFrom(made)
    onnx.save(made, path, save_as_external_data=True, location=location, size_threshold=64, **how)
    return kept


@pytest.mark.parametrize(
    ("location", "new"),
    [("a.onnx.data", "b.onnx.data"), ("a.data", "b.data"), ("weights.bin", "b.onnx.weights.bin")],
)
def test_arrays_in_another_file_stay_in_one(tmp_path, location, new):
    before = with_data(tmp_path / "a.onnx", location)
    old = (tmp_path / location).read_bytes()
    with pytest.raises(fwt.FileFormatError, match="external_data=True"):
        converters.transform(tmp_path / "a.onnx", fwt.prune(0.5), out=tmp_path / "b.onnx")
    t, how = fwt.prune(0.5), {"external_data": True}
    converters.transform(tmp_path / "a.onnx", t, out=tmp_path / "b.onnx", **how)
    assert (tmp_path / location).read_bytes() == old
    assert len((tmp_path / new).read_bytes()) == len(old)
    hand = by_hand(before, {n: pruned(values(before)[n]) for n in ("w", "v")})
    np.testing.assert_array_equal(runs(str(tmp_path / "b.onnx")), runs(hand))
    layouts = []
    for name in ("a.onnx", "b.onnx"):
        proto = onnx.load(tmp_path / name, load_external_data=False)
        told = [{e.key: e.value for e in t.external_data} for t in proto.graph.initializer]
        layouts.append([{k: v for k, v in x.items() if k != "location"} for x in told])
    assert layouts[0] == layouts[1]
    # In the same folder over itself, and into another.
    written = (tmp_path / "b.onnx").read_bytes()
    (tmp_path / "there").mkdir()
    converters.transform(tmp_path / "a.onnx", t, out=tmp_path / "there" / "a.onnx", **how)
    converters.transform(tmp_path / "a.onnx", t, out=tmp_path / "a.onnx", **how)
    for folder in (tmp_path, tmp_path / "there"):
        assert (folder / location).read_bytes() == (tmp_path / new).read_bytes()
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == sorted(["a.onnx", location])
    assert (tmp_path / "b.onnx").read_bytes() == written
    converters.transform(tmp_path / "a.onnx", t, out=tmp_path / "b.onnx", **how)  # once more
    line = ("prune", "a.onnx", "a.onnx", "--sparsity", "0.8")
    assert "give --external-data" in cli(*line, cwd=tmp_path, code=1).stderr
    cli(*line, "--external-data", cwd=tmp_path)
    found = values(onnx.load(tmp_path / "a.onnx"))
    assert [np.count_nonzero(found[n]) for n in ("w", "v", "bias")] == [32, 48, 6]


def test_another_files_data_is_not_written_over(tmp_path):
    with_data(tmp_path / "a.onnx", "a.onnx.data")
    (tmp_path / "b.onnx.data").write_bytes(b"somebody's")
    with pytest.raises(fwt.ConversionError, match=r"b\.onnx\.data, which is another file's"):
        converters.transform(
            tmp_path / "a.onnx", fwt.prune(0.5), out=tmp_path / "b.onnx", external_data=True
        )
    assert (tmp_path / "b.onnx.data").read_bytes() == b"somebody's"
    assert not (tmp_path / "b.onnx").exists()


def test_arrays_at_one_place_outside_are_one(tmp_path):
    with_data(tmp_path / "a.onnx", "a.data")
    proto = onnx.load(tmp_path / "a.onnx", load_external_data=False)
    again = proto.graph.initializer.add()
    again.CopyFrom(proto.graph.initializer[0])
    again.name = "again"
    proto.graph.node.append(node("MatMul", "x again", "z"))
    check = hashlib.sha1((tmp_path / "a.data").read_bytes()).hexdigest()
    again.external_data.add(key="checksum", value=check)
    (tmp_path / "a.onnx").write_bytes(proto.SerializeToString())
    how = {"external_data": True}
    converters.transform(tmp_path / "a.onnx", fwt.prune(0.5), out=tmp_path / "b.onnx", **how)
    found = values(onnx.load(tmp_path / "b.onnx"))
    np.testing.assert_array_equal(found["w"], found["again"])
    assert np.count_nonzero(found["w"]) == 80
    proto = onnx.load(tmp_path / "b.onnx", load_external_data=False)
    told = {e.key: e.value for e in proto.graph.initializer[-1].external_data}
    assert told["checksum"] == hashlib.sha1((tmp_path / "b.data").read_bytes()).hexdigest()

    def other(m):
        return fwt.Model(None, {"params": {**m.variables["params"], "w": normal(4, 40, seed=5)}})

    with pytest.raises(fwt.ConversionError, match="w lies in its file where again does too"):
        converters.transform(tmp_path / "a.onnx", other, out=tmp_path / "c.onnx", **how)


def test_a_write_that_fails_leaves_both_files(tmp_path, monkeypatch):
    from fwt.converters.onnx import initializers

    with_data(tmp_path / "a.onnx", "a.data")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(initializers._Outside, "_into", fail)
    with pytest.raises(fwt.FileFormatError, match="no space left"):
        converters.transform(
            tmp_path / "a.onnx", fwt.prune(0.5), out=tmp_path / "a.onnx", external_data=True
        )
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["conv in groups", "if", "loop", "float16, spelled"])
def test_mutants_are_edited_or_refused(tmp_path, name):
    rng, data = np.random.default_rng(0), NETS[name][0]().SerializeToString()
    edited = 0
    for _ in range(200):
        (tmp_path / "a.onnx").write_bytes(fuzz.mutated(data, rng))
        t = fwt.prune(0.5, where="**") if rng.integers(2) else lambda m: m
        (tmp_path / "b.onnx").unlink(missing_ok=True)
        try:
            converters.transform(tmp_path / "a.onnx", t, out=tmp_path / "b.onnx")
        except fwt.FwtError:
            assert not (tmp_path / "b.onnx").exists()
            continue
        edited += 1
        files = [converters.load(tmp_path / n, module=False) for n in ("a.onnx", "b.onnx")]
        assert fwt.paths(files[0]) == fwt.paths(files[1])
    assert edited


# -- exporters ----------------------------------------------------------------------------------


class OfTokens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 8)
        self.block = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.block(self.embedding(x)))


class OfSteps(torch.nn.Module):
    def __init__(self, kind, directions):
        super().__init__()
        both = directions == 2
        self.cell = getattr(torch.nn, kind)(4, 6, batch_first=True, bidirectional=both)
        self.head = torch.nn.Linear(6 * directions, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0])


def of_images():
    layer = torch.nn
    return layer.Sequential(
        layer.Conv2d(3, 6, 3, groups=3),
        layer.ReLU(),
        layer.Conv2d(6, 6, 3, groups=6),
        layer.ConvTranspose2d(6, 4, 2),
        layer.Flatten(),
        layer.Linear(100, 5),
    )


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (of_images, normal(2, 3, 8, 8)),
        (
            lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)),
            normal(2, 7, 4),
        ),
        (OfTokens, np.arange(12).reshape(2, 6) % 11),
        (lambda: OfSteps("LSTM", 2), normal(2, 5, 4)),
        (lambda: OfSteps("GRU", 1), normal(2, 5, 4)),
    ],
    ids=["images", "linear", "tokens", "LSTM", "GRU"],
)
def test_a_transform_of_an_exported_file_is_that_of_the_torch_module(tmp_path, make, x, dynamo):
    torch.manual_seed(0)
    net, x = make().eval(), torch.from_numpy(x)
    exported(net, (x,), tmp_path / "a.onnx", dynamo)
    plain = net(x).detach().numpy()
    for t in (
        fwt.prune(0.5),
        fwt.prune(0.6, scope="global"),
        fwt.project(fwt.constraints.max_norm(0.4)),
    ):
        expected = converters.transform(copy.deepcopy(net), t)(x).detach().numpy()
        converters.transform(tmp_path / "a.onnx", t, out=tmp_path / "b.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "b.onnx")
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        np.testing.assert_allclose(found, expected, atol=2e-6)
        assert np.max(np.abs(expected - plain)) > 1e-2


def test_biases_are_told_by_what_they_are_added_to(tmp_path):
    nodes = [
        node("MatMul", "x w", "m"),
        node("Unsqueeze", "m axis", "u"),
        node("Add", "u bias", "a"),
        node("Add", "a position"),
    ]
    held = {"w": normal(4, 3), "bias": normal(3), "axis": np.array([1]), "position": normal(3)}
    onnx.save(model(nodes, (2, 4), [tensor(v, n) for n, v in held.items()]), tmp_path / "a.onnx")
    t = fwt.initialize(fwt.initializers.zeros, 0, where=fwt.biases)
    converters.transform(tmp_path / "a.onnx", t, out=tmp_path / "b.onnx")
    found = values(onnx.load(tmp_path / "b.onnx"))
    assert not found["bias"].any()
    np.testing.assert_array_equal(found["position"], held["position"])


def test_a_graph_that_onnxruntime_optimised_is_edited(tmp_path):
    """With its own operators: the convolutions are fused with what comes behind them."""
    net, x = of_images().eval(), torch.from_numpy(normal(2, 3, 8, 8))
    exported(net, (x,), tmp_path / "a.onnx", False)
    how = onnxruntime.SessionOptions()
    how.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    how.optimized_model_filepath = str(tmp_path / "o.onnx")
    onnxruntime.InferenceSession(tmp_path / "a.onnx", how)
    assert "FusedConv" in {n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node}
    t = fwt.project(fwt.constraints.max_norm(0.4))
    expected = converters.transform(copy.deepcopy(net), t)(x).detach().numpy()
    converters.transform(tmp_path / "o.onnx", t, out=tmp_path / "b.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "b.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_flat_kernel_has_no_axes(tmp_path):
    """One that a Reshape makes a matrix is no bias, whose numbers are outputs."""
    weight = np.random.default_rng(0).normal(size=12).astype(np.float32)
    nodes = [
        helper.make_node("Reshape", ["w", "s"], ["k"]),
        helper.make_node("MatMul", ["x", "k"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, 1, ("n", k)) for n, k in (("x", 4), ("y", 3))]
    arrays = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.array([4, 3]), "s"),
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], arrays)
    opset = [helper.make_opsetid("", 17)]
    path, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    for t in (
        fwt.project(fwt.constraints.max_norm(0.5)),
        fwt.prune(0.5, pattern=fwt.patterns.channel),
    ):
        with pytest.raises(fwt.AxesError, match=r"w of shape .12,.: nothing says which axis"):
            converters.transform(path, t, out=target)
    converters.transform(path, fwt.prune(0.5), out=target)
    assert int((converters.load(target, module=False).variables["params"]["w"] == 0).sum()) == 6
