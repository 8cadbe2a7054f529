"""What is written is tried before: onnxruntime must give the outputs of the module."""

import math
import mmap
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fwt._graph import Graph
from fwt._sequential import Sequential, call, flags
from fwt._types import ConversionError
from fwt.converters import judge
from fwt.converters.onnx import ends
from fwt.converters.onnx.ends import Input
from fwt.converters.onnx.layers import refused
from fwt.converters.tried import Tried, is_heavy, let_go
from fwt.converters.walk import policy

# Of onnxruntime's optimizations those that make one more copy of each kernel.
_COPIES = ["NchwcTransformer", "ConvMulFusion", "ConvAddFusion", "ConvBNFusion"]

# Loads a file as the process that writes it would.
_LOADS = """
import sys, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
onnxruntime.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"])
"""


def _check_loads(file: Path) -> None:
    """Raises where onnxruntime crashes on a graph, as 1.32 does in float16 on a product after a
    transposition: in a process of its own, since a crash takes its process along."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as there:
        if there.find(b"Transpose") < 0 or there.find(b"MatMul") < 0:
            return
    command = [sys.executable, "-c", _LOADS, str(file)]
    if subprocess.run(command, capture_output=True).returncode < 0:
        raise ConversionError(
            "to_onnx: onnxruntime crashes on this graph in float16; nothing is written. "
            f"{policy.WAY_OUT}"
        )


@judge.full_products()
def compare(file: Path, module: Any, variables: Any, inputs: Sequence[Input]) -> None:
    """Raises unless onnxruntime computes what the module does."""
    import onnxruntime

    heavy = is_heavy(jax.tree.leaves(variables))
    computed = _computed(module, variables, [np.zeros((1, *x.shape), x.dtype) for x in inputs])
    if np.float16 in computed:
        _check_loads(file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = not heavy
    left_out = _COPIES if heavy else None
    let_go(heavy)
    with refused("to_onnx: onnxruntime can't run it"):
        session = onnxruntime.InferenceSession(
            file, options, ["CPUExecutionProvider"], disabled_optimizers=left_out
        )
    names = [x.name for x in session.get_inputs()]
    gives = [y.name for y in session.get_outputs()]
    if any("bfloat16" in x.type for x in (*session.get_inputs(), *session.get_outputs())):
        return  # which NumPy can't hand over
    stored = [leaf.dtype for leaf in jax.tree.leaves(variables)]
    half = any(d.itemsize == 2 for d in (*(x.dtype for x in inputs), *stored, *computed))
    each = [_made(x, half, seed) for seed, x in enumerate(inputs)]
    count = max(map(len, each))
    large = sum(math.prod(x.shape) for x in inputs) > judge.LARGE
    rows = np.array(judge.FEW) if large else np.arange(count)
    xs = [x[rows % len(x)] for x in each]
    first = [x[:1] for x in xs]
    with refused("to_onnx: onnxruntime can't run it"):
        many, one = (
            session.run(None, dict(zip(names, given, strict=True))) for given in (xs, first)
        )
    del session  # which holds the weights twice more

    model = Tried(
        lambda variables, *given: ends.flat(module, call(module, variables, *given)),
        variables,
        large,
        compiled=False,
        alone=isinstance(module, Sequential | Graph),
    )

    def judged(given: Sequence[Any], theirs: Sequence[Any]) -> list[judge.Apart]:
        ours = model.outputs(given)
        which = [f" {name!r}" if len(gives) > 1 else "" for name in gives]
        for name, their, our in zip(which, theirs, ours, strict=True):
            if their.shape != our.shape:
                raise ConversionError(
                    f"to_onnx: onnxruntime gives the output{name} as {list(their.shape)}, "
                    f"expected {list(our.shape)}"
                )
        eps = judge.eps_of([*computed, *(y.dtype for y in theirs)])
        told = model.judged(given, ours, theirs, eps, _apart, one_by_one=True)
        for name, apart in zip(which, told, strict=True):
            if apart.excess > 1:
                raise ConversionError(
                    f"to_onnx: onnxruntime's output{name} differs by {apart.absolute:.3g}, "
                    f"which is {apart.relative:.2%} of the largest value in its row, and no "
                    "rounding explains it; nothing is written. verify(model, file) after "
                    "check=False says from which layer on"
                )
        return told

    judged(first, one)
    told = judged(xs, many)
    if not any(t.compared for t in told) and any(t.absolute for t in told):
        raise ConversionError(
            "to_onnx: nothing could be compared: rounding alone moves the outputs by more than "
            "their size; nothing is written. check=False writes the file unchecked"
        )


def _apart(their: np.ndarray, our: np.ndarray, *noise: Any, eps: float) -> judge.Apart:
    return judge.apart(our, their, *noise, eps=eps, clamps=True)


def _made(x: Input, half: bool, seed: int) -> np.ndarray:
    """A batch for an input, of other numbers than those of other inputs."""
    if np.issubdtype(x.dtype, np.integer):
        return judge.whole_numbers(max(x.below, 1), x.shape, seed=seed).astype(x.dtype)
    numbers = judge.numbers(x.shape, half, seed)
    return (numbers > 0 if x.dtype == bool else numbers).astype(x.dtype)


def _computed(module: Any, variables: Any, xs: Sequence[Any]) -> list[Any]:
    """The dtypes of what the layers of a module give."""

    def run(variables: Any, *xs: Any) -> Any:
        return module.apply(
            variables, *xs, **flags(module, False), capture_intermediates=True,
            mutable=["intermediates"],
        )  # fmt: skip

    return [y.dtype for y in jax.tree.leaves(jax.eval_shape(run, variables, *xs))]
