"""Layers for which ONNX has operators of its own: better than what their parts would be."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import tensorflow as tf
from jax import lax

from fwt import layers as fl
from fwt._sequential import call
from fwt.converters.onnx.primitives import Weight, reversed_, transposed
from fwt.converters.onnx.primitives import windows as windows_of
from fwt.converters.onnx.trace import Tracer
from fwt.layers import recurrent

# A layer as a tensor, or None where ONNX's operator doesn't say what this one does.
Native = Callable[[Tracer, Any, Mapping[str, Any], Any, Any, Any], Any]


def _first(rank: int) -> tuple[int, ...]:
    """Channels from last to second."""
    return (0, rank - 1, *range(1, rank - 1))


def _last(rank: int) -> tuple[int, ...]:
    return (0, *range(2, rank), 1)


def _in_channels(t: Tracer, op: str, x: Any, more: list[Any], shape: Any, **attributes: Any) -> Any:
    """An operator that wants the channels second."""
    rank = len(shape)
    turned = [shape[a] for a in _first(rank)]
    (y,) = t.mark(op, [transposed(x, _first(rank)), *more], [turned], **attributes)
    return transposed(y, _last(rank))


def _floats(w: Mapping[str, Any], x: Any) -> bool:
    """Whether all is float32, so that no dtype has to be thought of."""
    return x.dtype == tf.float32 and all(
        leaf.value.dtype == np.float32 for leaf in jax.tree.leaves(dict(w))
    )


def _activation(op: str, **fields: str) -> Native:
    def native(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
        values = {k: getattr(layer, v) for k, v in fields.items()}
        if x.dtype != tf.float32 or any(not isinstance(v, int | float) for v in values.values()):
            return None
        (y,) = t.mark(op, [x], [aval.shape], **values)
        return y

    return native


def _mish(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    if x.dtype != tf.float32:
        return None
    return x * tf.tanh(t.mark("Softplus", [x], [aval.shape])[0])


def _silu(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    return x * t.op("Sigmoid", x) if x.dtype == tf.float32 else None


def _log_sigmoid(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    if x.dtype != tf.float32:
        return None
    return tf.negative(t.mark("Softplus", [tf.negative(x)], [aval.shape])[0])


def _softplus(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    plain = layer.beta == 1 and layer.threshold is None and x.dtype == tf.float32
    return t.mark("Softplus", [x], [aval.shape])[0] if plain else None


def _hard(op: str) -> Native:
    def native(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
        attributes = {"alpha": 1 / 6, "beta": 0.5} if op == "HardSigmoid" else {}
        return t.mark(op, [x], [aval.shape], **attributes)[0] if x.dtype == tf.float32 else None

    return native


def _gelu(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    if layer.approximate or x.dtype != tf.float32:
        return None
    # As others write it, so that runtimes fuse it.
    return tf.multiply(x * (tf.math.erf(x / np.float32(np.sqrt(2))) + 1.0), 0.5)


def _prelu(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    where = [a % len(aval.shape) for a in layer.axes]
    if 0 in where or not _floats(w, x):
        return None
    shape = [aval.shape[a] if a in where else 1 for a in range(1, len(aval.shape))]
    return t.mark("PRelu", [x, t.shaped(w["params"]["negative_slope"], shape)], [aval.shape])[0]


def _discretization(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    below = tf.less(x[..., tf.newaxis], tf.constant(layer.bin_boundaries, x.dtype))
    return tf.reduce_sum(tf.cast(tf.logical_not(below), tf.int32), -1)


def _conv(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    """The bias goes in with the convolution."""
    if not layer.use_bias or layer.dtype is not None or not _floats(w, x):
        return None
    if isinstance(layer, nn.ConvTranspose) and layer.padding == "CIRCULAR":
        return None  # what comes after it is not the bias
    bare = layer.clone(use_bias=False)
    t.bias = w["params"]["bias"]
    return t.apply(lambda v, y: call(bare, v, y), {"params": {"kernel": w["params"]["kernel"]}}, x,
                   aval)[0]  # fmt: skip


def _batch_norm(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    rank = len(aval.shape)
    if layer.axis not in (-1, rank - 1) or layer.use_running_average is False:
        return None
    if not _floats(w, x) or layer.dtype is not None or rank < 2:
        return None
    params, size = w.get("params", {}), aval.shape[-1]
    scale = params.get("scale", np.ones(size, np.float32))
    bias = params.get("bias", np.zeros(size, np.float32))
    stats = [w["batch_stats"][name] for name in ("mean", "var")]
    return _in_channels(
        t, "BatchNormalization", x, [scale, bias, *stats], aval.shape, epsilon=layer.epsilon
    )


def _layer_norm(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    rank = len(aval.shape)
    given = layer.reduction_axes
    axes = sorted(a % rank for a in ((given,) if isinstance(given, int) else given))
    features = layer.feature_axes
    own = sorted(a % rank for a in ((features,) if isinstance(features, int) else features))
    if t.opset < 17 or axes != list(range(axes[0], rank)) or not _floats(w, x):
        return None
    params = w.get("params", {})
    if layer.dtype is not None or (params and own != axes):
        return None
    shape = aval.shape[axes[0] :]
    scale = params.get("scale", np.ones(shape, np.float32))
    inputs = [x, scale, *([params["bias"]] if "bias" in params else [])]
    return t.mark(
        "LayerNormalization", inputs, [aval.shape], axis=axes[0] - rank, epsilon=layer.epsilon
    )[0]


def _group_norm(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    """ONNX normalises instances, of which a group is one; its own operator for groups is newer."""
    rank, size = len(aval.shape), aval.shape[-1]
    if getattr(layer, "reduction_axes", None) is not None or rank < 3 or not _floats(w, x):
        return None
    if layer.dtype is not None or any(not isinstance(d, int) for d in aval.shape[1:]):
        return None
    groups = layer.num_groups or size // layer.group_size
    turned = [aval.shape[a] for a in _first(rank)]
    inner = math.prod(aval.shape[1:]) // groups
    grouped = t.shaped(transposed(x, _first(rank)), (turned[0], groups, inner))
    ones, zeros = np.ones(groups, np.float32), np.zeros(groups, np.float32)
    (y,) = t.mark("InstanceNormalization", [grouped, ones, zeros],
                  [(turned[0], groups, inner)], epsilon=layer.epsilon)  # fmt: skip
    y = t.shaped(y, turned)
    params, last = w.get("params", {}), (size, *(1,) * (rank - 2))
    if "scale" in params:
        y = y * t.tensor(t.shaped(params["scale"], last))
    if "bias" in params:
        y = y + t.tensor(t.shaped(params["bias"], last))
    return transposed(y, _last(rank))


def _instance_norm(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    rank, size = len(aval.shape), aval.shape[-1]
    if rank < 3 or layer.feature_axes not in (-1, rank - 1, (-1,)) or not _floats(w, x):
        return None
    if layer.dtype is not None:
        return None
    params = w.get("params", {})
    scale = params.get("scale", np.ones(size, np.float32))
    bias = params.get("bias", np.zeros(size, np.float32))
    return _in_channels(
        t, "InstanceNormalization", x, [scale, bias], aval.shape, epsilon=layer.epsilon
    )


def _avg_pool(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    window = layer.window_shape
    strides = layer.strides or window
    pads = layer.padding
    sizes = aval.shape[1:-1]
    if layer.divisor is not None or len(sizes) != len(window) or x.dtype != tf.float32:
        return None
    if isinstance(pads, str):
        pads = lax.padtype_to_pads(sizes, window, strides, pads)
    if any(lo >= k or hi >= k for (lo, hi), k in zip(pads, window, strict=True)):
        return None
    attributes: dict[str, Any] = windows_of(window, strides, pads, window)
    del attributes["dilations"]
    attributes["count_include_pad"] = int(layer.count_include_pad)
    rank = len(aval.shape)
    turned = transposed(x, _first(rank))
    (y,) = t.mark("AveragePool", [turned], [[out.shape[a] for a in _first(rank)]], **attributes)
    return transposed(y, _last(rank))


def _global_pool(op: str) -> Native:
    def native(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
        rank = len(aval.shape)
        if rank not in (3, 4, 5) or x.dtype != tf.float32:
            return None
        shape = (aval.shape[0], aval.shape[-1], *(1,) * (rank - 2))
        (y,) = t.mark(op, [transposed(x, _first(rank))], [shape])
        return t.shaped(transposed(y, _last(rank)) if layer.keepdims else y, out.shape)

    return native


def _embed(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    if layer.dtype is not None or not x.dtype.is_integer:
        return None
    return tf.gather(t.tensor(w["params"]["embedding"]), x)


def _up_sample(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    rank = len(aval.shape)
    if rank not in (3, 4, 5) or len(layer.size) != rank - 2 or x.dtype != tf.float32:
        return None
    scales = np.array([1, 1, *layer.size], np.float32)
    shape = [out.shape[a] for a in _first(rank)]
    (y,) = t.mark(
        "Resize", [transposed(x, _first(rank)), None, scales], [shape], mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
    return transposed(y, _last(rank))


def _softmin(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    if x.dtype != tf.float32:
        return None
    return t.mark("Softmax", [tf.negative(x)], [aval.shape], axis=layer.axis)[0]


# -- recurrent layers ------------------------------------------------------------------------------

# ONNX's names, with alpha and beta where it has them.
_GATES: Mapping[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "tanh": ("Tanh", (), ()),
    "sigmoid": ("Sigmoid", (), ()),
    "relu": ("Relu", (), ()),
    "softsign": ("Softsign", (), ()),
    "softplus": ("Softplus", (), ()),
    "hard_sigmoid": ("HardSigmoid", (1 / 6,), (0.5,)),
    recurrent.HARD_SIGMOID: ("HardSigmoid", (0.2,), (0.5,)),
    "elu": ("Elu", (1.0,), ()),
    "leaky_relu": ("LeakyRelu", (0.2,), ()),
    "linear": ("Affine", (1.0,), (0.0,)),
}


def _recurrent_layer(t: Tracer, layer: Any, w: Any, x: Any, aval: Any, out: Any) -> Any:
    cls, h = type(layer), layer.features
    names = {1: "activation", 3: "recurrent_activation activation",
             4: "recurrent_activation activation activation"}[cls.gates].split()  # fmt: skip
    used = [getattr(layer, n) for n in names]
    if any(u not in _GATES for u in used) or getattr(layer, "projection", None) is not None:
        return None
    if not _floats(w, x):
        return None
    ends = ("", "_reverse") if layer.merge is not None else ("",)
    params = w["params"]
    # LSTM's gates are i, f, g, o here and i, o, f, g there.
    order = {1: (0,), 3: (0, 1, 2), 4: (0, 3, 1, 2)}[cls.gates]

    def gates(value: np.ndarray) -> np.ndarray:
        parts = np.split(value, cls.gates, axis=-1)
        return np.concatenate([parts[i] for i in order], axis=-1)

    back = [order.index(i) for i in range(cls.gates)]

    def stacked(name: str) -> Weight:
        value = np.stack([gates(params[name + end].value).T for end in ends])
        undo = {
            leaf: [["take", i], ["transpose", [1, 0]], ["blocks", cls.gates, back], *steps]
            for i, end in enumerate(ends)
            for leaf, steps in params[name + end].undo.items()
        }
        return Weight(params[name].name, value, undo)

    def biases() -> Weight:
        values, undo = [], {}
        for i, end in enumerate(ends):
            bias = params["bias" + end].value
            both = bias if bias.ndim == 2 else np.stack([bias, np.zeros_like(bias)])
            values.append(np.concatenate([gates(both[0]), gates(both[1])]))
            kept = [*back, *(b + cls.gates for b in back)] if bias.ndim == 2 else back
            for leaf, steps in params["bias" + end].undo.items():
                undo[leaf] = [["take", i], ["blocks", 2 * cls.gates, kept],
                              ["reshape", list(bias.shape)], *steps]  # fmt: skip
        return Weight(params["bias"].name, np.stack(values), undo)

    inputs = [None, stacked("kernel"), stacked("recurrent_kernel")]
    if layer.use_bias:
        inputs.append(biases())
    attributes: dict[str, Any] = {
        "hidden_size": h,
        "direction": "bidirectional" if len(ends) == 2 else "forward",
        "activations": [_GATES[u][0] for u in used] * len(ends),
    }
    for index, name in ((1, "activation_alpha"), (2, "activation_beta")):
        values = [v for u in used for v in _GATES[u][index]] * len(ends)
        if values:
            attributes[name] = values
    if cls is recurrent.GRU:
        attributes["linear_before_reset"] = int(layer.reset_after)
    if layer.reverse:
        x = reversed_(x, (1,))
    inputs[0] = transposed(x, (1, 0, 2))
    n, steps = aval.shape[:2]
    op = {1: "RNN", 3: "GRU", 4: "LSTM"}[cls.gates]
    merge = _MERGES[layer.merge] if layer.merge is not None else None
    if not layer.return_sequences:
        (y,) = t.mark(op, inputs, [(len(ends), n, h)], skip=1, **attributes)
        return y[0] if merge is None else merge(y[0], y[1])
    (y,) = t.mark(op, inputs, [(steps, len(ends), n, h)], **attributes)
    if layer.merge == "concat":
        return t.shaped(transposed(y, (2, 0, 1, 3)), (n, steps, 2 * h))
    y = y[:, 0] if merge is None else merge(y[:, 0], y[:, 1])
    return transposed(y, (1, 0, 2))


_MERGES: Mapping[str, Callable[[Any, Any], Any]] = {
    "concat": lambda a, b: tf.concat([a, b], -1),
    "sum": tf.add,
    "mul": tf.multiply,
    "ave": lambda a, b: (a + b) * 0.5,
}

NATIVE: Mapping[type, Native] = {
    nn.Conv: _conv,
    nn.ConvTranspose: _conv,
    fl.GroupedConvTranspose: _conv,
    nn.BatchNorm: _batch_norm,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.InstanceNorm: _instance_norm,
    fl.AvgPool: _avg_pool,
    fl.GlobalAvgPool: _global_pool("GlobalAveragePool"),
    fl.GlobalMaxPool: _global_pool("GlobalMaxPool"),
    fl.UpSample: _up_sample,
    nn.Embed: _embed,
    fl.Softmin: _softmin,
    fl.PReLU: _prelu,
    fl.Discretization: _discretization,
    fl.GELU: _gelu,
    fl.Softplus: _softplus,
    fl.Mish: _mish,
    fl.SiLU: _silu,
    fl.LogSigmoid: _log_sigmoid,
    fl.ReLU: _activation("Relu"),
    fl.LeakyReLU: _activation("LeakyRelu", alpha="negative_slope"),
    fl.ELU: _activation("Elu", alpha="alpha"),
    fl.CELU: _activation("Celu", alpha="alpha"),
    fl.SELU: _activation("Selu"),
    fl.Sigmoid: _activation("Sigmoid"),
    fl.Tanh: _activation("Tanh"),
    fl.Softsign: _activation("Softsign"),
    fl.Softmax: _activation("Softmax", axis="axis"),
    fl.LogSoftmax: _activation("LogSoftmax", axis="axis"),
    fl.HardSigmoid: _hard("HardSigmoid"),
    fl.HardSwish: _hard("HardSwish"),
    fl.SimpleRNN: _recurrent_layer,
    fl.LSTM: _recurrent_layer,
    fl.GRU: _recurrent_layer,
}
