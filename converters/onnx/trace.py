"""What a Flax module computes, as TensorFlow operations that tf2onnx can turn into ONNX.

A layer is traced to JAX's own primitives, and each primitive becomes an operation, so that any
layer goes out without code of its own. A *mark* in the TensorFlow graph becomes an ONNX operator
that TensorFlow and tf2onnx don't know: of each entry (Where), or of a whole layer (Conv, LSTM).
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import tensorflow as tf

from fwt.converters.onnx.pointwise import POINTWISE
from fwt.converters.onnx.primitives import OPS, Weight, shape_of
from fwt.converters.rows.row import refuse
from fwt.converters.walk import policy

MARK = "PyFunc"  # a TensorFlow operation with any inputs and a text
# What JAX calls by name: their jaxpr is run on their inputs. In other primitives a jaxpr is
# something else, such as what a reduction does with two numbers.
CALLS = ("pjit", "jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
         "custom_vjp_call_jaxpr", "checkpoint", "remat", "remat2")  # fmt: skip


class Tracer:
    """Interprets layers. ``take`` gives the tensor for a weight, each time that it is first met."""

    def __init__(self, batch: Any, take: Callable[[Weight], Any], opset: int):
        self.batch, self.take, self.opset = batch, take, opset
        self.place = ""
        self._taken: dict[int, tuple[Weight, Any]] = {}
        self.bias: Any = None  # of the next convolution

    # -- values: a number or array that is known, a Weight, or a tensor ---------------------------

    def tensor(self, value: Any) -> Any:
        """Any value as a tensor."""
        if isinstance(value, Weight):
            if id(value) not in self._taken:
                self._taken[id(value)] = value, self.take(value)
            return self._taken[id(value)][1]
        return value if isinstance(value, tf.Tensor) else tf.constant(value)

    def size(self, dimension: Any) -> Any:
        """One size of a shape, a number or a tensor."""
        if isinstance(dimension, int | np.integer):
            return int(dimension)
        times = _times(dimension)
        if times is None:
            raise refuse(self.place, f"the size {dimension} depends on the batch in a way of its "
                         "own")  # fmt: skip
        return self.batch * times

    def sizes(self, shape: Sequence[Any]) -> list[Any]:
        return [self.size(d) for d in shape]

    def shaped(self, value: Any, shape: Sequence[Any]) -> Any:
        """A value reshaped; one size may depend on the batch."""
        unknown = [d for d in shape if not isinstance(d, int | np.integer)]
        if isinstance(value, np.ndarray):
            return value.reshape(tuple(shape))
        if isinstance(value, Weight):
            old = list(value.value.shape)
            return value.moved(value.value.reshape(tuple(shape)), "reshape", old)
        if len(unknown) > 1:
            return tf.reshape(value, tf.stack(self.sizes(shape)))
        return tf.reshape(value, [-1 if d in unknown else int(d) for d in shape])

    def full(self, value: Any, aval: Any) -> Any:
        """A value in its whole shape: operations that broadcast are given less where they can."""
        shape = tuple(aval.shape)
        have = shape_of(value)
        if len(have) == len(shape) and all(
            h != 1 or (isinstance(d, int | np.integer) and d == 1) for h, d in zip(have, shape)
        ):
            return value
        if not any(not isinstance(d, int | np.integer) for d in shape):
            if isinstance(value, np.ndarray):
                return np.broadcast_to(value, shape)
            if isinstance(value, Weight) and math.prod(have) == math.prod(shape):
                return self.shaped(value, shape)
        return tf.broadcast_to(self.tensor(value), tf.stack(self.sizes(shape)))

    def mark(
        self,
        op: str,
        inputs: Sequence[Any],
        shapes: Sequence[Sequence[Any]],
        skip: Any = 0,
        dtype: Any = None,
        **attributes: Any,
    ) -> list[Any]:
        """An ONNX operator of its own: None for an input that is left out, ``skip`` for how many
        outputs are before those of ``shapes``, ``dtype`` of the outputs if not the first input's.
        """
        given = [self.tensor(v) for v in inputs if v is not None]
        order = iter(range(len(given)))
        known = [[d if isinstance(d, int | np.integer) else -1 for d in s] for s in shapes]
        told = {
            "op": op,
            "inputs": [None if v is None else next(order) for v in inputs],
            "shapes": [[int(d) for d in s] for s in known],
            "attributes": attributes,
            "skip": skip,
        }
        shapes = known
        dtype = dtype or given[0].dtype
        made = tf.raw_ops.PyFunc(input=given, token=json.dumps(told), Tout=[dtype] * len(shapes))
        return [
            tf.ensure_shape(y, [None if d == -1 else d for d in s])
            for y, s in zip(made, shapes, strict=True)
        ]

    def op(self, op: str, *inputs: Any, dtype: Any = None, **attributes: Any) -> Any:
        """An ONNX operator of one output, whose inputs are broadcast to one shape.

        TensorFlow and tf2onnx rewrite what they know, as Select into a sum of products: so they
        are not told.
        """
        given = [self.tensor(v) for v in inputs]
        shape = functools.reduce(tf.broadcast_static_shape, (v.shape for v in given))
        sizes = [-1 if d is None else d for d in shape]
        return self.mark(op, given, [sizes], dtype=dtype, **attributes)[0]

    # -- jaxprs ------------------------------------------------------------------------------------

    def apply(self, function: Callable[..., Any], variables: Any, x: Any, shape: Any) -> Any:
        """The tensor that ``function(variables, x)`` is, and what is known of it; ``variables`` is
        a tree of Weights."""
        (y,), (out,) = self.apply_all(function, variables, [x], [shape])
        return y, out

    def apply_all(
        self, function: Callable[..., Any], variables: Any, xs: Sequence[Any], shapes: Sequence[Any]
    ) -> tuple[list[Any], Sequence[Any]]:
        """The same of ``function(variables, *xs)``, and of all that it gives."""
        weights, tree = jax.tree.flatten(variables)
        structs = [jax.ShapeDtypeStruct(w.value.shape, w.value.dtype) for w in weights]
        closed = jax.make_jaxpr(lambda v, *ys: function(jax.tree.unflatten(tree, v), *ys))(
            structs, *shapes
        )
        outs = zip(self.run(closed, [*weights, *xs]), closed.out_avals, strict=True)
        return [self.tensor(self.full(out, aval)) for out, aval in outs], closed.out_avals

    def run(self, closed: Any, args: Sequence[Any]) -> list[Any]:
        """The values of a jaxpr's outputs."""
        jaxpr = closed.jaxpr if hasattr(closed, "jaxpr") else closed
        consts = [_plain(c) for c in getattr(closed, "consts", ())]
        known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        known |= dict(zip(jaxpr.invars, args, strict=True))

        def value(atom: Any) -> Any:
            if not isinstance(atom, jex.Literal):
                return known[atom]
            plain = _plain(atom.val)  # Python's own number may stand there
            aval: Any = atom.aval
            return plain if plain is None else plain.astype(aval.dtype)

        for eqn in _used(jaxpr):
            values = [value(a) for a in eqn.invars]
            for var, out in zip(eqn.outvars, self._equation(eqn, values), strict=True):
                known[var] = out
        return [value(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, values: list[Any]) -> Sequence[Any]:
        name, params = eqn.primitive.name, eqn.params
        if all(_is_key(v.aval) for v in eqn.outvars):
            return [None] * len(eqn.outvars)  # keys, which a start of zeros is given for nothing
        inner = next((params[k] for k in ("jaxpr", "call_jaxpr") if k in params), None)
        if inner is not None and name in CALLS:
            return self.run(inner, values)
        if all(isinstance(v, np.ndarray) for v in values) and all(
            all(isinstance(d, int | np.integer) for d in v.aval.shape) for v in eqn.outvars
        ):
            return self._folded(eqn, values)
        if any(v.aval.dtype == jnp.bfloat16 for v in eqn.outvars) and not all(
            isinstance(v, Weight) for v in values
        ):
            raise refuse(self.place, "it computes in bfloat16, which tf2onnx can't say",
                         f"{policy.WAY_OUT}; weights alone may be bfloat16")  # fmt: skip
        empty = [v.aval.shape for v in eqn.outvars if 0 in v.aval.shape]
        if empty:  # as JAX makes where it pads by nothing: what follows leaves them out
            return [np.zeros([d if isinstance(d, int) else 1 for d in s]) for s in empty]
        if name in POINTWISE:
            return [POINTWISE[name](self, *(self.tensor(v) for v in values))]
        if name not in OPS:
            raise refuse(self.place, f"it computes {name!r}, which fwt can't say in ONNX")
        out = OPS[name](self, eqn, *values)
        return out if isinstance(out, list) else [out]

    def _folded(self, eqn: Any, values: list[Any]) -> list[np.ndarray]:
        avals = [v.aval for v in eqn.invars]
        wide = [
            np.broadcast_to(v, a.shape).astype(a.dtype) for v, a in zip(values, avals, strict=True)
        ]
        out = eqn.primitive.bind(*(jnp.asarray(v) for v in wide), **eqn.params)
        return [np.asarray(v) for v in (out if eqn.primitive.multiple_results else [out])]


def _is_key(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)


def _plain(value: Any) -> Any:
    return None if hasattr(value, "dtype") and _is_key(value) else np.asarray(value)


def _used(jaxpr: Any) -> list[Any]:
    """The equations that the outputs hang on."""
    wanted = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if wanted.intersection(eqn.outvars):
            wanted.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
            kept.append(eqn)
    return kept[::-1]


def _times(dimension: Any) -> int | None:
    """How many times the batch a size is."""
    one, two, three = (dimension._evaluate({"batch": n}) for n in (1, 2, 3))
    return int(one) if two == 2 * one and three == 3 * one else None
