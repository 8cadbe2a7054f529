"""An ONNX file as a side of ``verify``: onnxruntime runs it, each layer's output kept."""

import ast
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fwt._types import ConversionError, Model
from fwt.converters import io as _io
from fwt.converters import judge
from fwt.converters.onnx import graph as _graph
from fwt.converters.onnx import read
from fwt.converters.rows.row import joined, parts_of
from fwt.converters.verification.ends import Kind, channel_of, ends
from fwt.converters.verification.names import call_name, call_of, first_call, layer_name
from fwt.converters.verification.sides import PARTS, Side, Taps, Xs

_KINDS = {"BatchNormalization": "BatchNorm2d", "PRelu": "BatchNorm2d",
          "InstanceNormalization": "BatchNorm2d", "GroupNormalization": "GroupNorm",
          "Resize": "Upsample"}  # fmt: skip


def _kinds(graph: Any, start: str) -> Iterator[Kind]:
    """What each node behind the input tells of its axes."""
    reached = {start}
    for node in graph.node:
        if reached.isdisjoint(node.input) or node.op_type == "Shape":
            continue
        reached |= {name for name in node.output if name}
        yield _kind(node)


def _kind(node: Any) -> Kind:
    attributes = {a.name: a for a in node.attribute}
    kind = _KINDS.get(node.op_type, node.op_type)
    if node.op_type == "Transpose" and "perm" in attributes:
        return Kind(kind, tuple(attributes["perm"].ints))
    if node.op_type in ("RNN", "LSTM", "GRU"):
        layout = attributes["layout"].i if "layout" in attributes else 0
        return Kind(kind, batch=1 - layout)
    return Kind(kind)


def side(path: Path, external: bool) -> Side:
    """The file, run by onnxruntime. Its layers are the scopes of its nodes' names."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise ImportError("verify needs onnxruntime: pip install 'fwt[onnx]'", name="onnxruntime")
    import onnx
    import onnxruntime

    with _io.reading(path):
        proto = _graph.proto_of(path)
        graph = proto.graph
        weights = {t.name: t for t in graph.initializer}
        for tensor in weights.values():
            for entry in tensor.external_data:
                if entry.key == "location" and external:
                    _io.sibling(path, entry.value)
                elif entry.key == "location":
                    raise ConversionError(
                        f"{path}: its weights are in another file: give external_data=True"
                    )
        inputs = [v for v in graph.input if v.name not in weights]
        if not inputs or not graph.output:
            raise ConversionError(f"{path}: it has no inputs or no outputs")
        gives = [v.name for v in graph.output]
        scopes = _scopes(graph)
        for name in dict.fromkeys(scopes.values()):
            if name not in gives:
                graph.output.add(name=name)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
        )

        def made(proto: Any) -> Any:
            return onnxruntime.InferenceSession(
                proto.SerializeToString(), options, ["CPUExecutionProvider"]
            )

        sessions = {0.0: made(proto)}
    kinds = [v.type.tensor_type for v in inputs]
    shapes = [tuple(d.dim_value or None for d in kind.shape.dim) for kind in kinds]
    dtypes = [onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type) for kind in kinds]
    shape = shapes[0]
    stored = {n: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(t.data_type))
              for n, t in weights.items()}  # fmt: skip

    each = [ends("torch", _kinds(graph, v.name), True) for v in inputs]
    time_first, channels_first, told_batch, _ = each[0]
    total = sum(math.prod(t.dims) * stored[n].itemsize for n, t in weights.items())

    def moved(by: float) -> Any:
        """The model, each array of weights moved by a part of itself, and no single number: that
        may be an exponent."""
        other = onnx.ModelProto()
        other.CopyFrom(proto)
        for tensor in other.graph.initializer:
            if jnp.issubdtype(stored[tensor.name], jnp.floating) and math.prod(tensor.dims) > 1:
                value = _graph.array_of(tensor, path, external)
                new = judge.nudged(value, by).astype(value.dtype)
                tensor.CopyFrom(onnx.numpy_helper.from_array(new, tensor.name))
        return other

    def run(axis: int, xs: Xs, by: float = 0.0) -> tuple[Any, Taps]:
        if by not in sessions:
            sessions[by] = made(moved(by) if total < 2**30 else proto)
        session, fixed = sessions[by], shape[axis] if shape else None
        count = xs[0].shape[axis] if xs[0].ndim > axis else 1
        size = fixed or max(count, 1)
        names = [v.name for v in inputs]
        parts = []
        for i in range(0, max(count, 1), size):  # as many at once as the graph takes
            some = [x.take(range(i, min(i + size, count)), axis).astype(d)
                    for x, d in zip(xs, dtypes, strict=True)]  # fmt: skip
            lacks = size - some[0].shape[axis] if count > size or fixed else 0
            some = [np.concatenate([x, *[x.take([-1], axis)] * lacks], axis) for x in some]
            values = session.run(None, dict(zip(names, some, strict=True)))
            ats = [_batch(v, axis, size) for v in values]
            if axis and size == xs[0].shape[0] > 1:  # which of both axes of a length is the batch
                other = some[0].copy()
                other[:, -1] = np.where(other[:, -1] == 0, 1, 0)
                others = session.run(None, {names[0]: other})
                ats = [_changes(v, w, at) for v, w, at in zip(values, others, ats, strict=True)]
            parts.append([v.take(range(size - lacks), at) if lacks and v.ndim else v
                          for v, at in zip(values, ats, strict=True)])  # fmt: skip
        # A single number, such as the count of a loop, has no batch.
        values = [np.concatenate(each, at) if each[0].ndim else each[0]
                  for *each, at in zip(*parts, ats, strict=True)]  # fmt: skip
        found = dict(zip([o.name for o in session.get_outputs()], values, strict=True))
        first = values[0] if len(gives) == 1 else {name: found[name] for name in gives}
        return first, {layer: found[name] for layer, name in scopes.items()}

    def along(axis: int) -> tuple[Any, tuple[int | None, ...]]:
        return functools.partial(run, axis), shape[:axis] + shape[axis + 1 :]

    def model(*_: Any) -> Model:
        return read.from_onnx(path, external_data=external)

    makers = {name: n for n in graph.node for name in n.output}
    keys: list[Any] = gives if len(gives) > 1 else [0]
    found = [channel_of("torch", True, name, lambda v: (_kind(makers[v]), list(makers[v].input))
                        if v in makers else None) for name in gives]  # fmt: skip
    tables = {n.input[0]: None for n in graph.node if n.op_type == "Gather"
              and n.input[0] in weights and len(weights[n.input[0]].dims) > 1}  # fmt: skip
    rows = [_graph.array_of(weights[n], path, external) for n in tables]
    rows = rows if any(d.kind in "iu" for d in dtypes) else []
    several = len(inputs) > 1
    few = [n for n, t in weights.items() if math.prod(t.dims) <= 64 and not t.external_data]
    told = [(n, float(v), 0) for n in few for v in onnx.numpy_helper.to_array(weights[n]).ravel()
            if stored[n].kind in "iuf" and math.isfinite(v)]  # fmt: skip
    made_of = Side(*along(int(time_first)), channels_first, model, len(rows[0]) if rows else None,
                   rows, True, list(stored.values()), model_first=channels_first, settings=told,
                   apart=len(rows) > 1, clamps=any(n.op_type in _CLAMPED for n in graph.node),
                   time_first=time_first, takes=dtypes[0], told=told_batch, along=along,
                   count=len(inputs), names_of=[v.name for v in inputs], is_file=True,
                   gives=gives if len(gives) > 1 else None,
                   own=any(n.op_type in PARTS for n in graph.node),
                   ends_at=dict(zip(keys, found, strict=True)))  # fmt: skip
    if not several:
        return made_of
    return dataclasses.replace(
        made_of, run=functools.partial(run, 0), shape=None, shapes=[s[1:] for s in shapes],
        time_first=False, told=True, along=None, integers=None, takes=dtypes, apart=False,
        channels=[e.channels_first if e.has_channels else None for e in each],
        channels_first=any(e.channels_first for e in each),
    )  # fmt: skip


def _scopes(graph: Any) -> dict[str, str]:
    """By layer, the value that it gives: the last in the scope of its nodes' names."""
    scopes: dict[str, str] = {}
    last, times = "", dict[str, int]()
    names = {n.name.strip("/").rpartition("/")[0] for n in graph.node}
    maker: dict[str, str] = {}  # by value, the scope that it comes from
    for node in graph.node:
        scope = node.name.strip("/").rpartition("/")[0]
        told = next((p.value for p in node.metadata_props if p.key == _TOLD), None)
        if told is not None:  # torch's newer exporter tells the modules
            path = ast.literal_eval(told)
            scope = joined(path[-2].split(".")) if len(path) > 2 else ""
        if not scope or not node.output or not node.output[0]:
            last = ""
            continue
        takes = [maker[i] for i in node.input if maker.get(i, scope) != scope]
        maker |= dict.fromkeys(node.output, scope)
        again = first_call(scope) in names
        name = layer_name(parts_of(scope)) if told else call_name(scope, takes, again)
        if told is not None:
            times[name] = times.get(name, 0) + (name != last)
            last, name = name, call_of(name, times[name])
            scopes[name] = node.output[0]
            continue
        # tf2onnx moves the Transpose of a layer behind the layers that follow it.
        if node.op_type != "Transpose" or name not in scopes or name == last:
            scopes[name], last = node.output[0], name
    return scopes


_TOLD = "pkg.torch.onnx.name_scopes"


_CLAMPED = ("Sigmoid", "LSTM", "GRU", "RNN")  # whose functions end at some numbers in onnxruntime


def _batch(v: np.ndarray, axis: int, size: int) -> int:
    """The axis of an output that is the batch, if that of the input is ``axis``."""
    alike = v.ndim > axis and v.shape[axis] == size
    return axis if alike and (v.shape[0] != size or v.ndim > 2) else 0


def _changes(v: np.ndarray, w: np.ndarray, at: int) -> int:
    """The axis of two outputs whose last entry alone differs, as the inputs do along the batch."""
    if v.ndim < 2 or v.shape[0] != v.shape[1]:
        return at
    off = (v != w) & ~((v != v) & (w != w))
    for axis in (at, 1 - at):
        if not np.moveaxis(off, axis, 0)[:-1].any():
            return axis
    return at
