"""What is written is tried before: onnxruntime must give the outputs of the module."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fwt import _graph
from fwt._sequential import call, flags
from fwt._types import ConversionError
from fwt.converters import judge
from fwt.converters.onnx.layers import refused
from fwt.converters.walk import policy

_FOLDER = "session.model_external_initializers_file_folder_path"
# Loads a message as the process that writes it would.
_LOADS = f"""
import sys, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
options.add_session_config_entry({_FOLDER!r}, sys.argv[1])
onnxruntime.InferenceSession(sys.stdin.buffer.read(), options, ["CPUExecutionProvider"])
"""


def _check_loads(message: bytes, folder: Path) -> None:
    """Raises where onnxruntime crashes on a graph, as 1.32 does in float16 on a product after a
    transposition: in a process of its own, since a crash takes its process along."""
    if b"Transpose" not in message or b"MatMul" not in message:
        return
    command = [sys.executable, "-c", _LOADS, str(folder.resolve())]
    if subprocess.run(command, input=message, capture_output=True).returncode < 0:
        raise ConversionError(
            "to_onnx: onnxruntime crashes on this graph in float16; nothing is written. "
            f"{policy.WAY_OUT}"
        )


@judge.full_products()
def compare(
    message: bytes, folder: Path, module: Any, variables: Any, shape: Any, dtype: np.dtype
) -> None:
    """Raises unless onnxruntime computes what the module does."""
    import onnxruntime

    floats = np.issubdtype(dtype, np.floating)
    computed = _computed(module, variables, np.zeros((1, *shape), dtype))
    if np.float16 in computed:
        _check_loads(message, folder)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(_FOLDER, str(folder.resolve()))
    with refused("to_onnx: onnxruntime can't run it"):
        session = onnxruntime.InferenceSession(message, options, ["CPUExecutionProvider"])
    kind = session.get_outputs()[0].type + session.get_inputs()[0].type
    if "bfloat16" in kind:
        return  # which NumPy can't hand over
    stored = [leaf.dtype for leaf in jax.tree.leaves(variables)]
    half = any(d.itemsize == 2 for d in (dtype, *stored, *computed))
    x = judge.numbers(shape, half) if floats else judge.whole_numbers(_count(module), shape)
    x = x.astype(dtype)
    for given in (x[:1], x):
        wanted = np.asarray(call(module, variables, jax.numpy.asarray(given)))
        with refused("to_onnx: onnxruntime can't run it"):
            (found,) = session.run(None, {"input": given})
        if found.shape != wanted.shape:
            raise ConversionError(
                f"to_onnx: onnxruntime gives {list(found.shape)}, expected {list(wanted.shape)}"
            )
        eps = judge.eps_of([*computed, found.dtype])
        told = judge.apart(wanted, found, eps=eps, clamps=True)
        if not told.equal:

            def run(by: float, given: Any = given) -> list[Any]:
                moved = jax.tree.map(lambda leaf: judge.nudged(leaf, by), variables)
                with judge.between_layers(by):
                    return [call(module, moved, given)]

            told = judge.apart(
                wanted, found, judge.rounding(run, [wanted], eps), eps=eps, clamps=True
            )
        if told.excess > 1:
            raise ConversionError(
                f"to_onnx: onnxruntime's output differs by {told.absolute:.3g}, which is "
                f"{told.relative:.2%} of the largest value in its row, and no rounding explains "
                "it; nothing is written. verify(model, file) after check=False says from which "
                "layer on"
            )
    if not told.compared and told.absolute:
        raise ConversionError(
            "to_onnx: nothing could be compared: rounding alone moves the outputs by more than "
            "their size; nothing is written. check=False writes the file unchecked"
        )


def _computed(module: Any, variables: Any, x: Any) -> list[Any]:
    """The dtypes of what the layers of a module give."""

    def run(variables: Any, x: Any) -> Any:
        return module.apply(
            variables, x, **flags(module, False), capture_intermediates=True,
            mutable=["intermediates"],
        )  # fmt: skip

    return [y.dtype for y in jax.tree.leaves(jax.eval_shape(run, variables, x))]


def _count(module: Any) -> int:
    return max([*map(_graph.count_of, _graph.first_layers(module)), 0]) or 2
