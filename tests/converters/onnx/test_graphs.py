"""ONNX graphs with branches: as exporters write them, and drawn, against onnxruntime."""

import flax.linen
import jax
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch_nets
from exporters import exported
from marks import thorough_but
from torch import nn

import fwt
from fwt import converters

make = onnx.helper.make_node


def run(path, xs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [v.name for v in session.get_inputs()]
    return session.run(None, dict(zip(names, xs, strict=True)))


def compared(path, xs, **more):
    """The model of a file, whose outputs are those of onnxruntime."""
    model = converters.from_onnx(path, **more)
    found = model(*xs)
    found = found if isinstance(found, tuple) else (found,)
    for y, wanted in zip(found, run(path, xs), strict=True):
        assert y.shape == wanted.shape
        scale = np.max(np.abs(wanted), where=np.isfinite(wanted), initial=0)
        np.testing.assert_allclose(np.asarray(y), wanted, rtol=0, atol=1e-5 * scale)
    return model


class Bert(nn.Module):
    """An encoder as HuggingFace writes BERT's, with a mask and a pooled output."""

    def __init__(self, d=12, heads=3):
        super().__init__()
        self.word, self.position = nn.Embedding(20, d), nn.Embedding(7, d)
        self.norm, self.heads = nn.LayerNorm(d, eps=1e-12), heads
        self.layer = nn.ModuleList(nn.ModuleDict({
            "query": nn.Linear(d, d), "key": nn.Linear(d, d), "value": nn.Linear(d, d),
            "output": nn.Linear(d, d), "norm": nn.LayerNorm(d), "inner": nn.Linear(d, 2 * d),
            "outer": nn.Linear(2 * d, d), "last": nn.LayerNorm(d)}) for _ in range(2))  # fmt: skip
        self.pooler = nn.Linear(d, d)

    def split(self, x):
        return x.view(x.size(0), -1, self.heads, x.size(2) // self.heads).permute(0, 2, 1, 3)

    def forward(self, ids, mask):
        x = self.norm(self.word(ids) + self.position(torch.arange(ids.size(1)))[None])
        hide = (1.0 - mask[:, None, None, :].float()) * -1e4
        for part in self.layer:
            q, k, v = (self.split(part[n](x)) for n in ("query", "key", "value"))
            scores = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5 + hide
            y = (scores.softmax(-1) @ v).permute(0, 2, 1, 3).contiguous()
            x = part["norm"](part["output"](y.view(y.size(0), -1, x.size(2))) + x)
            x = part["last"](part["outer"](nn.functional.gelu(part["inner"](x))) + x)
        return x, torch.tanh(self.pooler(x[:, 0]))


class Encoder(nn.Module):
    """torch's own encoder, in whose export the batch stands behind the time, and with the heads."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 24, activation="gelu", batch_first=True)
        self.embedding, self.place = nn.Embedding(20, 12), nn.Parameter(torch.randn(1, 7, 12))
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids):
        return self.encoder(self.embedding(ids) + self.place).mean(1)


OWN = {
    "BERT": (Bert, [lambda: torch.randint(0, 9, (3, 7)), lambda: torch.randint(0, 2, (3, 7))]),
    "encoder": (Encoder, [lambda: torch.randint(0, 9, (3, 7))]),
}
WAYS = [(False, n) for n in ("ResNet-50", "MobileNetV2", "U-Net", "BERT", "encoder", "ViT",
                             "ShuffleNet", "Siamese", "nanoGPT", "ConvNeXt")]  # fmt: skip
WAYS += [(True, n) for n in ("ResNet-50", "MobileNetV2", "U-Net", "BERT", "encoder", "ViT")]
QUICK = [(False, "U-Net"), (False, "Siamese")]


@pytest.mark.parametrize(("dynamo", "name"), thorough_but(lambda w: w in QUICK, WAYS, most=9))
def test_torchs_exporters(tmp_path, dynamo, name):
    if name in OWN:
        torch.manual_seed(0)
        cls, inputs = OWN[name]
        net, xs = cls().eval(), [draw() for draw in inputs]
    else:
        net, xs = torch_nets.made(name)
    path = tmp_path / "a.onnx"
    exported(net, xs, path, dynamo)
    model = compared(path, [x.numpy() for x in xs])
    assert isinstance(model.module, fwt.Graph)
    if name == "Siamese":  # each layer of the two towers is there once
        count = sum(p.numel() for p in net.parameters())
        leaves = jax_leaves(model.variables["params"])
        assert sum(np.size(x) for x in leaves) == count


def jax_leaves(tree):
    return [v for x in tree.values() for v in (jax_leaves(x) if isinstance(x, dict) else [x])]


def keras_nets():
    import keras

    k = keras.layers

    def residual():
        x = given = keras.Input((9, 8, 3))
        x = k.ReLU()(k.BatchNormalization()(k.Conv2D(4, 3, padding="same")(x)))
        y = k.DepthwiseConv2D(3, padding="same")(x)
        gate = k.Dense(4, activation="sigmoid")(k.GlobalAveragePooling2D()(y))
        y = k.Add()([k.Multiply()([y, k.Reshape((1, 1, 4))(gate)]), x])
        z = k.UpSampling2D()(k.MaxPooling2D((3, 2), padding="same")(y))
        z = k.Concatenate()([k.Cropping2D(((0, 0), (0, 0)))(z), k.ZeroPadding2D(((0, 0), (0, 0)))(
            k.Conv2D(2, 1)(k.AveragePooling2D((1, 1))(k.Resizing(6, 8)(y))))])  # fmt: skip
        return keras.Model(given, [k.Dense(3)(k.Flatten()(z)), gate])

    def attention():
        x = given = keras.Input((6, 5))
        y = k.MultiHeadAttention(2, 3)(x, x)
        y = k.LayerNormalization()(k.Add()([x, k.Dense(5)(y)]))
        return keras.Model(given, k.GlobalAveragePooling1D()(k.Add()([y, k.Dense(5, "swish")(y)])))

    def conv(x, n, size, stride=1, act=True):
        x = k.Conv2D(n, size, stride, "same", use_bias=False)(x)
        x = k.BatchNormalization()(x)
        return k.ReLU()(x) if act else x

    def resnet():
        x = given = keras.Input((33, 40, 3))
        x = k.MaxPooling2D(3, 2, "same")(conv(x, 4, 7, 2))
        for part, blocks in enumerate((1, 2)):
            for block in range(blocks):
                stride = 2 if part and not block else 1
                y = conv(conv(x, 2**part, 1, stride), 2**part, 3)
                y = conv(y, 4 * 2**part, 1, act=False)
                x = x if block else conv(x, 4 * 2**part, 1, stride, act=False)
                x = k.ReLU()(k.Add()([x, y]))
        return keras.Model(given, k.Dense(5)(k.GlobalAveragePooling2D()(x)))

    def mobilenet():
        x = given = keras.Input((17, 14, 3))
        for stride in (2, 1):  # as keras.applications has them
            y = k.ReLU(6.0)(k.BatchNormalization(momentum=0.999)(conv(x, 6, 1, act=False)))
            y = k.ZeroPadding2D(((0, 1), (1, 1)))(y) if stride == 2 else y
            padding = "valid" if stride == 2 else "same"
            y = k.DepthwiseConv2D(3, stride, padding, use_bias=False)(y)
            y = conv(k.ReLU(6.0)(k.BatchNormalization(epsilon=1e-3)(y)), 4, 1, act=False)
            x = y if stride == 2 else k.Add(name="sum")([x, y])
        return keras.Model(given, [k.Dense(5)(k.GlobalAveragePooling2D()(x)), x])

    def unet():
        x = given = keras.Input((16, 12, 3))
        a = conv(conv(x, 4, 3), 4, 3)
        b = conv(conv(k.MaxPooling2D()(a), 6, 3), 6, 3)
        c = k.Conv2DTranspose(6, 2, 2)(conv(k.MaxPooling2D()(b), 8, 3))
        y = k.UpSampling2D(interpolation="bilinear")(conv(k.Concatenate()([c, b]), 6, 3))
        return keras.Model(given, k.Conv2D(2, 1)(k.Concatenate()([y, a])))

    class Position(k.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=shape[1:])

        def call(self, x):
            return x + self.table

    def bert():
        ids = keras.Input((7,), dtype="int32")
        x = k.Embedding(20, 12)(ids)
        x = k.LayerNormalization()(Position()(x))
        for _ in range(2):
            y = k.MultiHeadAttention(3, 4)(x, x)
            x = k.LayerNormalization(epsilon=1e-6)(k.Add()([x, y]))
            y = k.Dense(12)(k.Dense(24, keras.activations.silu)(x))
            x = k.LayerNormalization(epsilon=1e-6)(k.Add()([x, y]))
        return keras.Model(ids, [x, k.Dense(12, "tanh")(x[:, 0])])

    return {"residual": residual, "attention": attention, "ResNet": resnet,
            "MobileNetV2": mobilenet, "U-Net": unet, "BERT": bert}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["residual", "attention", "ResNet", "MobileNetV2", "U-Net", "BERT"]
)
def test_tf2onnx(tmp_path, name):
    import keras
    import tensorflow as tf
    import tf2onnx

    keras.utils.set_random_seed(0)
    net = keras_nets()[name]()
    rng = np.random.default_rng(0)
    net.set_weights([w + rng.uniform(-0.2, 0.2, w.shape) for w in net.get_weights()])
    shape, whole = net.inputs[0].shape[1:], name == "BERT"
    function = tf.function(lambda x: net(x), autograph=False)
    signature = [tf.TensorSpec((None, *shape), tf.int32 if whole else tf.float32, name="x")]
    path = tmp_path / "a.onnx"
    tf2onnx.convert.from_function(function, signature, opset=17, output_path=str(path))
    x = rng.integers(0, 20, (3, *shape)) if whole else rng.normal(size=(3, *shape))
    compared(path, [x.astype(np.int32 if whole else np.float32)])


# -- by hand, and drawn ----------------------------------------------------------------------------


def written(path, nodes, arrays, inputs, outputs, opset=17, given=1, out=1):
    value = onnx.helper.make_tensor_value_info
    held = [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in arrays.items()]
    graph = onnx.helper.make_graph(
        nodes, "g", [value(n, given, ("n", *s)) for n, s in inputs.items()],
        [value(n, out, None) for n in outputs], held)  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", opset)]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    path.write_bytes(proto.SerializeToString())
    return path


class Draw:
    """A graph of operators, each of which takes some of the values before it."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.nodes, self.arrays, self.shapes = [], {}, {}
        self.inputs = {}
        for i in range(self.rng.integers(1, 4)):
            c, h, w = self.rng.integers(2, 5), 4, 6
            self.inputs[f"x{i}"] = self.shapes[f"x{i}"] = (int(c), h, w)
        for _ in range(self.rng.integers(4, 10)):
            self.step()
        left = [n for n in self.shapes if not any(n in x.input for x in self.nodes)]
        self.outputs = [n for n in left if n not in self.inputs][:3] or [self.nodes[-1].output[0]]

    def array(self, *shape):
        name = f"w{len(self.arrays)}"
        self.arrays[name] = self.rng.normal(size=shape).astype(np.float32)
        return name

    def numbers(self, *values):
        name = f"w{len(self.arrays)}"
        self.arrays[name] = np.array(values, np.int64)
        return name

    def add(self, op, inputs, shape, **more):
        name = f"v{len(self.nodes)}"
        self.nodes.append(make(op, inputs, [name], **more))
        self.shapes[name] = tuple(int(s) for s in shape)

    def step(self):
        rng, names = self.rng, list(self.shapes)
        x = names[rng.integers(len(names))]
        s = self.shapes[x]
        same = [n for n in names if self.shapes[n] == s and n != x]
        kind = rng.integers(13)
        if kind < 3 and same:
            other = same[rng.integers(len(same))]
            self.add(rng.choice(["Add", "Sub", "Mul", "Max", "Min"]), [x, other], s)
        elif kind == 3 and same:
            axis = int(rng.integers(1, len(s) + 1))
            parts = [x, *same[:2]]
            shape = [n * len(parts) if i + 1 == axis else n for i, n in enumerate(s)]
            self.add("Concat", parts, shape, axis=axis - (len(s) + 1) * int(rng.integers(2)))
        elif kind == 4 and len(s) == 3:
            o = int(rng.integers(2, 5))
            self.add("Conv", [x, self.array(o, s[0], 3, 3), self.array(o)], (o, *s[1:]),
                     pads=[1] * 4)  # fmt: skip
        elif kind == 5:
            o = int(rng.integers(2, 5))
            self.add("MatMul", [x, self.array(s[-1], o)], (*s[:-1], o))
        elif kind == 6 and len(s) == 3:
            order = [0, *(1 + rng.permutation(3)).tolist()]
            self.add("Transpose", [x], [s[a - 1] for a in order[1:]], perm=order)
        elif kind == 7:
            axis = int(rng.integers(1, len(s) + 1))
            shape = [1 if i + 1 == axis else n for i, n in enumerate(s)]
            self.add("ReduceMean", [x], shape, axes=[axis])
        elif kind == 8:
            shape = (1,) * int(rng.integers(len(s))) + s
            array = self.array(*shape[-len(s) :]) if rng.integers(2) else self.array(s[-1])
            pair = [x, array] if rng.integers(2) else [array, x]
            self.add(rng.choice(["Add", "Sub", "Mul"]), pair, s)
        elif kind == 9 and s[-1] > 2:
            inputs = [x, self.numbers(1), self.numbers(2**40), self.numbers(len(s))]
            self.add("Slice", inputs, (*s[:-1], s[-1] - 1))
        elif kind == 10 and len(s) == 3:
            self.add("Reshape", [x, self.numbers(0, s[0] * s[1], s[2])], (s[0] * s[1], s[2]))
        elif kind == 11:
            axis = int(rng.integers(1, len(s) + 1))
            self.add("Softmax", [x], s, axis=axis)
        else:
            self.add(rng.choice(["Relu", "Tanh", "Sigmoid", "Neg", "Abs", "Softplus"]), [x], s)


@pytest.mark.parametrize("first", [0, pytest.param(20, marks=pytest.mark.thorough)])
def test_drawn_graphs(tmp_path, first):
    read = 0
    for seed in range(first, first + (6 if first == 0 else 50)):
        draw = Draw(seed)
        path = written(tmp_path / "a.onnx", draw.nodes, draw.arrays, draw.inputs, draw.outputs)
        proto = onnx.load(path)
        used = {i for n in proto.graph.node for i in n.input}
        for value in [v for v in proto.graph.input if v.name not in used]:
            proto.graph.input.remove(value)
        path.write_bytes(proto.SerializeToString())
        xs = [draw.rng.normal(size=(2, *draw.inputs[v.name])).astype(np.float32)
              for v in proto.graph.input]  # fmt: skip
        try:
            compared(path, xs)
        except converters.FileFormatError:
            continue
        read += 1
    assert read >= (5 if first == 0 else 42)


def weights(**shapes):
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


# Nodes, arrays and inputs of graphs that are read, or what is said of those that aren't.
GRAPHS = {
    "a layer that is called twice": (
        [make("MatMul", ["x", "fc.weight"], ["a"]), make("Add", ["a", "fc.bias"], ["b"]),
         make("Tanh", ["b"], ["c"]), make("MatMul", ["c", "fc.weight"], ["d"]),
         make("Add", ["d", "fc.bias"], ["e"]), make("Add", ["e", "x"], ["y"])],
        weights(**{"fc.weight": (4, 4), "fc.bias": (4,)}), {"x": (3, 4)}, None),
    "a bias that only one of two readers takes": (
        [make("MatMul", ["x", "w"], ["a"]), make("Add", ["a", "b"], ["c"]),
         make("Mul", ["a", "c"], ["y"])], weights(w=(4, 4), b=(4,)), {"x": (3, 4)}, None),
    "a scale that only one of two readers takes": (
        [make("ReduceMean", ["x"], ["m"], axes=[2]), make("Sub", ["x", "m"], ["d"]),
         make("Mul", ["d", "d"], ["q"]), make("ReduceMean", ["q"], ["v"], axes=[2]),
         make("Add", ["v", "e"], ["s"]), make("Sqrt", ["s"], ["r"]), make("Div", ["d", "r"], ["z"]),
         make("Mul", ["z", "g"], ["u"]), make("Add", ["u", "z"], ["y"])],
        {**weights(g=(4,)), "e": np.float32(1e-5)}, {"x": (3, 4)}, None),
    "part of a gelu is used beside it": (
        [make("Div", ["x", "r"], ["a"]), make("Erf", ["a"], ["b"]), make("Add", ["b", "o"], ["c"]),
         make("Mul", ["x", "c"], ["d"]), make("Mul", ["d", "h"], ["e"]),
         make("Add", ["e", "c"], ["y"])],
        {"r": np.float32(2**0.5), "o": np.float32(1), "h": np.float32(0.5)}, {"x": (3, 4)}, None),
    "numbers less a value, and over it": (
        [make("Sub", ["w", "x"], ["a"]), make("Exp", ["a"], ["b"]), make("Div", ["w", "b"], ["y"])],
        weights(w=(3, 4)), {"x": (3, 4)}, None),
    "a product with a matrix on the left": (
        [make("MatMul", ["w", "x"], ["y"])], weights(w=(5, 3)), {"x": (3, 4)}, None),
    "a product with a vector": (
        [make("MatMul", ["x", "w"], ["a"]), make("Unsqueeze", ["a", "i"], ["b"]),
         make("Mul", ["b", "x"], ["y"])], {**weights(w=(4,)), "i": np.array([2])},
        {"x": (3, 4)}, None),
    "a product with a vector on the left": (
        [make("MatMul", ["w", "x"], ["y"])], weights(w=(3,)), {"x": (3, 4)}, None),
    "parts that are taken backwards": (
        [make("Slice", ["x", "s", "e", "a", "p"], ["y"])],
        {"s": np.array([-2, 4]), "e": np.array([-9, 0]), "a": np.array([1, 2]),
         "p": np.array([-1, -2])}, {"x": (3, 5)}, None),
    "sizes that are not known": (
        [make("Conv", ["x", "w"], ["a"], pads=[1] * 4), make("Add", ["a", "x"], ["b"]),
         make("ReduceMean", ["b"], ["m"], axes=[2, 3]), make("Mul", ["b", "m"], ["c"]),
         make("Split", ["c", "s"], ["d", "e"], axis=1), make("Concat", ["e", "x", "d"], ["f"],
         axis=1), make("Resize", ["f", "", "t"], ["y"], mode="linear")],
        {**weights(w=(3, 3, 3, 3)), "s": np.array([1, 2]),
         "t": np.array([1, 1, 2, 3], np.float32)}, {"x": (3, "h", "w")}, None),
    "sizes that are not known, flattened": (
        [make("Flatten", ["x"], ["a"]), make("MatMul", ["a", "w"], ["y"])], weights(w=(18, 2)),
        {"x": (3, "h")}, "export it with fixed sizes"),
    "a softmax of all that follows": (
        [make("Softmax", ["x"], ["a"]), make("LogSoftmax", ["a"], ["y"], axis=2)], {},
        {"x": (3, 4, 5)}, None),
    "a pad of every axis": (
        [make("Pad", ["x", "p"], ["a"], mode="edge"), make("Slice", ["a", "s", "e", "i"], ["y"])],
        {"p": np.array([0, 1, 2, 0, 2, 1]), "s": np.array([1, 2]), "e": np.array([4, 6]),
         "i": np.array([1, 2])}, {"x": (3, 4)}, None),
    "a mask of constants": (
        [make("Where", ["k", "x", "z"], ["y"])],
        {"k": np.tri(3, 4, dtype=bool), "z": np.float32(-2)}, {"x": (3, 4)}, None),
    "a row that is hidden, behind a softmax": (
        [make("Add", ["x", "m"], ["a"]), make("Softmax", ["a"], ["b"]),
         make("Where", ["k", "z", "b"], ["y"])],
        {"m": np.array([[-np.inf], [0], [0]], np.float32), "z": np.float32(0),
         "k": np.array([[True], [False], [False]])}, {"x": (3, 4)}, None),
    "a contraction": (
        [make("Einsum", ["x", "z"], ["y"], equation="nhtd,nshd->nhts")], {},
        {"x": (2, 3, 4), "z": (5, 2, 4)}, None),
    "a split into unequal parts": (
        [make("Split", ["x", "s"], ["a", "b"], axis=1), make("Concat", ["b", "a"], ["y"], axis=1)],
        {"s": np.array([1, 2])}, {"x": (3, 4)}, None),
    "a join along the batch": (
        [make("Concat", ["x", "x"], ["y"], axis=0)], {}, {"x": (3, 4)}, "batch"),
    "a condition that follows from the input": (
        [make("Greater", ["x", "z"], ["c"]), make("Where", ["c", "x", "z"], ["y"])], {},
        {"x": (3, 4), "z": (3, 4)}, "Greater"),
    "a first state from a table": (
        [make("Shape", ["x"], ["s"]), make("Slice", ["s", "zero", "one"], ["n"]),
         make("Concat", ["one", "n"], ["both"], axis=0), make("ConstantOfShape", ["both"], ["at"],
         value=onnx.helper.make_tensor("", onnx.TensorProto.INT64, [1], [0])),
         make("Gather", ["table", "at"], ["h"]), make("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
         make("RNN", ["t", "W", "R", "", "", "h"], ["a"], hidden_size=2),
         make("Squeeze", ["a", "one"], ["b"]), make("Transpose", ["b"], ["y"], perm=[1, 0, 2])],
        {**weights(table=(5, 2), W=(1, 2, 4), R=(1, 2, 2)), "zero": np.array([0]),
         "one": np.array([1])}, {"x": (3, 4)}, "Gather"),
    "an entry for each example": (
        [make("Add", ["x", "w"], ["y"])], weights(w=(2, 3, 4)), {"x": (3, 4)}, "each example"),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_by_hand(tmp_path, name):
    nodes, arrays, inputs, said = GRAPHS[name]
    opset = 11 if name == "a softmax of all that follows" else 17
    path = written(tmp_path / "a.onnx", nodes, arrays, inputs, ["y"], opset)
    if said is not None:
        with pytest.raises(converters.FileFormatError, match=said):
            converters.from_onnx(path)
        return
    rng = np.random.default_rng(1)
    shapes = [(2, *(6 if isinstance(n, str) else n for n in s)) for s in inputs.values()]
    model = compared(path, [rng.normal(size=s).astype(np.float32) for s in shapes])
    if name == "a layer that is called twice":
        assert list(model.variables["params"]) == ["fc"]
        assert [n.of for n in model.module.nodes if n.of] == ["fc"]


WHOLE = {
    "twice as much": ([make("Add", ["x", "x"], ["y"])], 7, "whole numbers"),
    "a square": ([make("Mul", ["x", "x"], ["y"])], 7, "whole numbers"),
    "a mean": ([make("ReduceMean", ["x"], ["a"], axes=[2]), make("Cast", ["a"], ["y"], to=1)], 1,
               "whole numbers of fractions"),
    "a table behind arithmetic": ([make("Max", ["x", "one"], ["a"]),
                                   make("Gather", ["w", "a"], ["y"])], 1, "whole numbers"),
    "two tables": ([make("Gather", ["w", "x"], ["a"]), make("Slice",
                   ["x", "s", "e", "t", "s"], ["b"]), make("Gather", ["w", "b"], ["c"]),
                   make("Concat", ["a", "c"], ["y"], axis=-1)], 1, None),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(tmp_path, name):
    nodes, out, said = WHOLE[name]
    arrays = {**weights(w=(6, 2)), "one": np.array(1), "s": np.array([-1]), "e": np.array([-9]),
              "t": np.array([1])}  # fmt: skip
    path = written(tmp_path / "a.onnx", nodes, arrays, {"x": (3, 4)}, ["y"], given=7, out=out)
    if said is None:
        compared(path, [np.arange(24).reshape(2, 3, 4) % 6])
        return
    with pytest.raises(converters.FileFormatError, match=said):
        converters.from_onnx(path)


@pytest.mark.parametrize("function", ["Log", "Exp", "Reciprocal"])
@pytest.mark.parametrize("fill", [0, -np.inf, np.inf, 2])
def test_what_is_hidden_does_not_count(tmp_path, function, fill):
    nodes = [make(function, ["x"], ["a"]), make("Where", ["keep", "a", "zero"], ["y"])]
    arrays = {"keep": np.array([True, False, True]), "zero": np.float32(fill)}
    path = written(tmp_path / "a.onnx", nodes, arrays, {"x": (3,)}, ["y"])
    compared(path, [np.array([[2, 0, 3], [1, 1000, -1]], np.float32)])


def test_repeats_are_held_to_the_size_of_the_file(tmp_path):
    arrays = {"times": np.array([1, 1 << 26])}
    nodes = [make("Tile", ["x", "times"], ["y"])]
    path = written(tmp_path / "a.onnx", nodes, arrays, {"x": (1,)}, ["y"])
    with pytest.raises(converters.FileFormatError, match="repeats an entry 67108864 times"):
        converters.from_onnx(path)


@pytest.mark.parametrize("kind", [fwt.layers.Parameter, fwt.layers.Buffer])
@pytest.mark.parametrize("shape", [(), (4, 1)])
def test_arrays_between_layers_keep_their_shape(tmp_path, kind, shape):
    net = fwt.Graph(
        [
            ("gain", kind(shape), ()),
            ("dense", flax.linen.Dense(3), ("input",)),
            ("product", fwt.layers.Multiply(), ("dense", "gain")),
        ],
        input_shape=(4, 3),
    )
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    held = jax.tree.map(lambda v: v + 0.7, net.init(jax.random.key(0), x))
    path = tmp_path / "net.onnx"
    converters.to_onnx(net, held, path)
    model = compared(path, [x])
    assert model.module == net
    assert jax.tree.map(np.array_equal, model.variables, held)
    assert converters.verify((net, held), path).ok


def test_a_graph_of_ours_comes_back_bit_for_bit(tmp_path):
    import flax.linen as linen
    import jax

    graph = fwt.Graph([
        ("stem", linen.Conv(4, (3, 3)), "image"), ("enc/0", linen.Conv(4, (3, 3)), "stem"),
        ("sum", fwt.layers.Add(), ("stem", "enc/0")), ("flat", fwt.layers.Flatten(), "sum"),
        ("head", linen.Dense(3), "flat"), ("side", linen.Dense(3), "flat"),
        ("end", fwt.layers.Multiply(), ("head", "side"))],
        inputs="image", outputs="end", input_shape=(5, 4, 2))  # fmt: skip
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 2)).astype(np.float32)
    variables = graph.init(jax.random.key(0), x)
    path = tmp_path / "a.onnx"
    converters.to_onnx(graph, variables, path)
    model = compared(path, [x])
    assert model.module == graph
    jax.tree.map(np.testing.assert_array_equal, dict(model.variables), dict(variables))
