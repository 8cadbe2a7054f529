"""An ONNX file as a side of ``verify``: onnxruntime runs it, each layer's output kept."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fwt._types import ConversionError, Model
from fwt.converters import io as _io
from fwt.converters import judge
from fwt.converters.onnx import graph as _graph
from fwt.converters.onnx import read
from fwt.converters.verification.sides import Side, Taps, layer_name, some_integers, takes_first

_KINDS = {"BatchNormalization": "BatchNorm2d", "PRelu": "BatchNorm2d",
          "InstanceNormalization": "BatchNorm2d", "GroupNormalization": "GroupNorm",
          "Resize": "Upsample"}  # fmt: skip


def _permutes(node: Any) -> tuple[int, ...] | None:
    return next((tuple(a.ints) for a in node.attribute if node.op_type == "Transpose"), None)


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
        if len(inputs) != 1 or len(graph.output) != 1:
            raise ConversionError("verify: only an ONNX graph of one input and one output")
        scopes: dict[str, str] = {}
        last = ""
        for node in graph.node:
            scope = node.name.strip("/").rpartition("/")[0]
            if scope and node.output and node.output[0]:
                name = layer_name(scope.split("/"))
                # tf2onnx moves the Transpose of a layer behind the layers that follow it.
                if node.op_type != "Transpose" or name not in scopes or name == last:
                    scopes[name], last = node.output[0], name
        for name in scopes.values():
            if name != graph.output[0].name:
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
    kind = inputs[0].type.tensor_type
    shape = tuple(d.dim_value or None for d in kind.shape.dim)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    stored = {n: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(t.data_type))
              for n, t in weights.items()}  # fmt: skip

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

    def run(x: np.ndarray, by: float = 0.0) -> tuple[np.ndarray, Taps]:
        if by not in sessions:
            sessions[by] = made(moved(by) if total < 2**30 else proto)
        session, size = sessions[by], (shape[0] if shape else None) or max(len(x), 1)
        parts = []
        for i in range(0, max(len(x), 1), size):  # as many at once as the graph takes
            some = x[i : i + size].astype(dtype)
            lacks = size - len(some) if len(x) > size or shape[0] else 0
            some = np.concatenate([some, np.repeat(some[-1:], lacks, 0)])
            values = session.run(None, {inputs[0].name: some})
            parts.append([v[: len(v) - lacks] if lacks else v for v in values])
        values = [np.concatenate(each) for each in zip(*parts, strict=True)]
        found = dict(zip([o.name for o in session.get_outputs()], values, strict=True))
        return values[0], {layer: found[name] for layer, name in scopes.items()}

    def model(*_: Any) -> Model:
        return read.from_onnx(path, external_data=external)

    kinds = [(_KINDS.get(n.op_type, n.op_type), _permutes(n), False) for n in graph.node]
    channels_first = takes_first(kinds, True)
    table: Any = next((weights[n.input[0]] for n in graph.node if n.op_type == "Gather"
                       and n.input[0] in weights), None)  # fmt: skip
    count, rows = some_integers(dtype), []
    if count is not None and table is not None:
        count, rows = int(table.dims[0]), [_graph.array_of(table, path, external)]
    return Side(run, shape[1:], channels_first, model, count, rows, True, list(stored.values()),
                model_first=channels_first)  # fmt: skip
