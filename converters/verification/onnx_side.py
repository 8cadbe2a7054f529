"""An ONNX file as a side of ``verify``: onnxruntime runs it, each layer's output kept."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from fwt._types import ConversionError, Model
from fwt.converters import io as _io
from fwt.converters.onnx import graph as _graph
from fwt.converters.onnx import read
from fwt.converters.verification.sides import Side, Taps, layer_name

_SPATIAL = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "BatchNormalization", "PRelu",
            "GlobalAveragePool", "GlobalMaxPool", "InstanceNormalization")  # fmt: skip


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
        for node in graph.node:
            scope = node.name.strip("/").rpartition("/")[0]
            if scope and node.output and node.output[0]:
                scopes[layer_name(scope.split("/"))] = node.output[0]
        for name in scopes.values():
            if name != graph.output[0].name:
                graph.output.add(name=name)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
        )
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, ["CPUExecutionProvider"]
        )
    kind = inputs[0].type.tensor_type
    shape = tuple(d.dim_value or None for d in kind.shape.dim)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)

    def run(x: np.ndarray) -> tuple[np.ndarray, Taps]:
        values = session.run(None, {inputs[0].name: x.astype(dtype)})
        found = dict(zip([o.name for o in session.get_outputs()], values, strict=True))
        return values[0], {layer: found[name] for layer, name in scopes.items()}

    def model() -> Model:
        return read.from_onnx(path, external_data=external)

    takers = (n for n in graph.node if inputs[0].name in n.input and n.op_type != "Shape")
    first = next(takers, None)
    channels_first = first is not None and first.op_type in _SPATIAL and len(shape) > 2
    table: Any = next((weights[n.input[0]] for n in graph.node if n.op_type == "Gather"
                       and n.input[0] in weights), None)  # fmt: skip
    count = int(table.dims[0]) if np.dtype(dtype).kind in "iu" and table is not None else None
    return Side(run, shape[1:], channels_first, model, count, turned=True)
