"""What is written is tried before: onnxruntime must give the outputs of the module."""

import contextlib
import ctypes
import functools
import gc
import math
import mmap
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fwt._sequential import call, flags
from fwt._types import ConversionError
from fwt.converters import judge
from fwt.converters.onnx import ends
from fwt.converters.onnx.ends import Input
from fwt.converters.onnx.layers import refused
from fwt.converters.walk import policy

_HEAVY = 32 * 2**20  # bytes of weights whose copies are worth a collection

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

    heavy = sum(leaf.nbytes for leaf in jax.tree.leaves(variables)) > _HEAVY
    computed = _computed(module, variables, [np.zeros((1, *x.shape), x.dtype) for x in inputs])
    if np.float16 in computed:
        _check_loads(file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = not heavy
    blocked = ["NchwcTransformer"] if heavy else None  # of each kernel one more copy
    _let_go(heavy)
    with refused("to_onnx: onnxruntime can't run it"):
        session = onnxruntime.InferenceSession(
            file, options, ["CPUExecutionProvider"], disabled_optimizers=blocked
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

    def run(variables: Any, given: Sequence[Any], by: Any) -> list[Any]:
        with judge.between_layers(by):
            return ends.flat(module, call(module, variables, *given))

    once = jax.jit(run) if large else run

    def outputs(given: Sequence[Any], weights: bool = False, by: float = 0.0) -> list[np.ndarray]:
        """Those of the module, also as rounding between its layers and of weights moves them."""
        _let_go(heavy)
        moved = variables
        if weights:
            moved = jax.tree.map(lambda leaf: jnp.asarray(judge.nudged(leaf, by)), variables)
        return [np.asarray(y) for y in once(moved, [jnp.asarray(x) for x in given], by)]

    def judged(
        given: Sequence[Any], theirs: Sequence[Any], ours: Sequence[Any]
    ) -> list[judge.Apart]:
        noise: dict[bool, list[Any]] = {}
        told = []
        for at, (their, our) in enumerate(zip(theirs, ours, strict=True)):
            which = f" {gives[at]!r}" if len(gives) > 1 else ""
            if their.shape != our.shape:
                raise ConversionError(
                    f"to_onnx: onnxruntime gives the output{which} as {list(their.shape)}, "
                    f"expected {list(our.shape)}"
                )
            eps = judge.eps_of([*computed, their.dtype])
            told.append(judge.apart(our, their, eps=eps, clamps=True))
            for weights in (False, True):
                if told[-1].equal:
                    break
                if weights not in noise:
                    each_way = functools.partial(outputs, given, weights)
                    noise[weights] = judge.rounding(each_way, ours, eps)
                told[-1] = judge.apart(our, their, [noise[weights][at]], eps=eps, clamps=True)
            if told[-1].excess > 1:
                raise ConversionError(
                    f"to_onnx: onnxruntime's output{which} differs by {told[-1].absolute:.3g}, "
                    f"which is {told[-1].relative:.2%} of the largest value in its row, and no "
                    "rounding explains it; nothing is written. verify(model, file) after "
                    "check=False says from which layer on"
                )
        return told

    judged(first, one, outputs(first))
    told = judged(xs, many, outputs(xs))
    if not any(t.compared for t in told) and any(t.absolute for t in told):
        raise ConversionError(
            "to_onnx: nothing could be compared: rounding alone moves the outputs by more than "
            "their size; nothing is written. check=False writes the file unchecked"
        )


def _let_go(heavy: bool) -> None:
    """Gives memory back to the system before the next step needs its own: a process that has the
    copies of each step at once holds the weights of a large model many times."""
    if heavy:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


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
