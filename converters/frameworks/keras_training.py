"""What trains in Keras itself: ``Callback``, ``keras_constraint``, ``keras_initializer``."""

import dataclasses
import functools
import json
import random
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax

from fwt import constraints, initializers
from fwt._project import project
from fwt._types import AxesError, ConversionError, resolve
from fwt.constraints import _matrices, _vectors
from fwt.converters.frameworks.keras import sync
from fwt.converters.frameworks.live import check
from fwt.converters.frameworks.repeated import Repeated

_FWT = keras.saving.register_keras_serializable(package="fwt")


class Callback(keras.callbacks.Callback):
    """A transform while ``model.fit`` runs, on any backend of Keras.

    Masks (:func:`fwt.apply_masks`) are applied in place, by Keras's backend. Other transforms run
    in JAX, as in :func:`fwt.converters.transform`.

    Args:
        t: any transform; or an optax transformation around ``optax.set_to_zero()`` that is made by
            ``fwt.optim.sparsify`` or ``constrain``, for schedules of sparsity: it counts its runs
            as updates, through all calls of ``fit``, and can't use gradients.
        every: "batch", "epoch", or a number of batches. It runs once more when training ends, after
            what writes other weights then: averages (``use_ema=True``), and callbacks that stand
            before it. With ``steps_per_execution`` it can run after an execution alone.

    Raises:
        FwtError: what the transform says of the weights, as training begins.

    Example:
        >>> import fwt, keras, numpy as np
        >>> layer = keras.layers.Dense(2, name="dense")
        >>> model = keras.Sequential([keras.Input((4,)), layer])
        >>> model.compile("sgd", "mse")
        >>> held = fwt.apply_masks(fwt.masks(0.5)(model))
        >>> history = model.fit(np.ones((8, 4)), np.ones((8, 2)), verbose=0,
        ...                     callbacks=[Callback(held)])
        >>> int((np.asarray(layer.kernel) == 0).sum())
        4
    """

    def __init__(self, t: Any, every: Literal["batch", "epoch"] | int = "batch") -> None:
        super().__init__()
        number = isinstance(every, int) and not isinstance(every, bool) and every > 0
        if every not in ("batch", "epoch") and not number:
            raise TypeError(
                f"Callback: every must be 'batch', 'epoch' or a number of batches, found {every!r}"
            )
        if not isinstance(t, optax.GradientTransformation):
            check(t, "Callback")
        self._t, self._every = t, every
        self._run: Repeated | None = None
        self._batches = 0  # before this epoch
        self._last = 0  # of this epoch
        self._given: Mapping[str, Any] | None = None  # a state to begin with

    def state_dict(self) -> dict[str, np.ndarray]:
        """How many batches there were, and the state of an optax transformation, for ``np.savez``
        beside the file of the model."""
        state = {} if self._run is None else self._run.state()
        return {"batches": np.asarray(self._batches + self._last), **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another was, which :meth:`state_dict` tells, as training begins.

        Raises:
            ConversionError: then, if it is that of another transformation, or of another model.
        """
        self._given = dict(state)

    def on_train_begin(self, logs: Any = None) -> None:
        """Tries the transform on the weights."""
        if self._run is None or self._run.model is not self.model:
            self._run = Repeated(
                self.model,
                self._t,
                "Callback",
                functools.partial(_zeroing, self.model),
                gradients=False,
            )
            self._batches = self._last = 0
        if self._given is not None:
            given, self._given = dict(self._given), None
            self._batches, self._last = int(given.pop("batches")), 0
            self._run.restore(given)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Counts the batches of the epoch before."""
        self._batches += self._last
        self._last = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Runs it, if it is due."""
        # A last execution of fewer batches counts as a whole one for Keras.
        end = min(batch + 1, (self.params or {}).get("steps") or batch + 1)
        before, self._last = self._batches + self._last, end
        every = 1 if self._every == "batch" else self._every
        if isinstance(every, int) and (self._batches + self._last) // every > before // every:
            self._now()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Runs it, if it is due."""
        if self._every == "epoch":
            self._now()

    def on_train_end(self, logs: Any = None) -> None:
        """Runs it once more."""
        self._now()

    def _now(self) -> None:
        assert self._run is not None
        self._run()


def _zeroing(model: Any, pairs: Sequence[tuple[Any, np.ndarray]]) -> Callable[[], None] | None:
    """Sets the entries of Keras's variables to zero whose mask is False, by its backend."""
    backend = keras.backend.backend()
    if backend == "torch":
        from fwt.converters.frameworks.torch_training import zeroing

        return zeroing(pairs)
    if backend == "tensorflow":
        import tensorflow as tf

        held = [(v.value, tf.constant(kept)) for v, kept in pairs]

        @tf.function(autograph=False)
        def in_graph() -> None:
            for v, kept in held:
                v.assign(tf.where(kept, v, tf.zeros((), v.dtype)))

        return in_graph
    if backend != "jax":
        return None
    masks = [jnp.asarray(kept) for _, kept in pairs]
    masked = jax.jit(lambda xs, masks: [jnp.where(m, x, 0) for x, m in zip(xs, masks, strict=True)])

    def in_jax() -> None:
        sync(model)
        for (v, _), new in zip(pairs, masked([v.value for v, _ in pairs], masks), strict=True):
            v.assign(new)

    return in_jax


# -- settings of layers -------------------------------------------------------------------------


def _config(given: Any, what: str) -> dict[str, Any]:
    """What a noun of fwt is, in words that JSON has."""
    config = {
        field.name: getattr(given, field.name)
        for field in dataclasses.fields(given)
        if field.name not in ("function", "settings", "axes")
    }
    settings = {name: _plain(value) for name, value in given.settings}
    module = given.function.__module__.removeprefix("fwt.")
    config |= {"function": f"{module}.{given.function.__name__}", "settings": settings}
    try:
        same = _made(type(given), json.loads(json.dumps(config)))
    except (TypeError, AttributeError):
        same = None
    if same is None or (same.name, same.function) != (given.name, given.function):
        raise ConversionError(f"{what} {given.name} can't be written into a file: {settings}")
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | jax.Array | np.generic):
        return np.asarray(value).tolist()
    return [_plain(x) for x in value] if isinstance(value, tuple | list) else value


def _made(kind: Any, config: dict[str, Any]) -> Any:
    """The noun that was written; its function is one of fwt's own, whatever a file says."""
    room, _, name = config["function"].rpartition(".")
    if room not in _ROOMS:
        raise TypeError(f"no function of fwt.constraints or fwt.initializers: {room}.{name}")
    function = vars(_ROOMS[room]).get(name)
    if not isinstance(function, types.FunctionType) or function.__module__ != f"fwt.{room}":
        raise TypeError(
            f"fwt.{room} has no function {name!r}; was the file written by another fwt?"
        )
    settings = tuple((k, _tuples(v)) for k, v in config["settings"].items())
    return kind(**{**config, "function": function, "settings": settings})


_ROOMS: dict[str, Any] = {
    "constraints._vectors": _vectors,
    "constraints._matrices": _matrices,
    "initializers": initializers,
    "initializers.keras": initializers.keras,
    "initializers.torch": initializers.torch,
}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@_FWT
class FwtConstraint(keras.constraints.Constraint):
    """A constraint of fwt as Keras's layers take it; made by ``keras_constraint``."""

    def __init__(self, constraint: dict[str, Any], axes: str | None = None) -> None:
        self._given = {"constraint": constraint, "axes": axes}
        chosen = _made(constraints.Bound, constraint)
        self._on_host = chosen.function.__module__ == _matrices.__name__
        self._project = project(chosen, "**", axes=None if axes is None else {"**": axes})

    def get_config(self) -> dict[str, Any]:
        return dict(self._given)

    def __call__(self, w: Any) -> Any:
        """The weight within the set, of the same shape and dtype."""
        name = w.name if isinstance(w, keras.Variable) else "kernel"
        # The kernels of Keras's transposed convolutions have the outputs before the inputs.
        name = "weight" if name == "kernel" and len(w.shape) > 2 else name
        try:
            return _in_backend(lambda x: self._project({name: x})[name], w, self._on_host)
        except AxesError as error:
            raise AxesError(
                f"keras_constraint: what the axes of {getattr(w, 'path', name)} mean is not known "
                f"from its name and shape {tuple(w.shape)}: give "
                'keras_constraint(constraint, axes="h w in out"), as they are'
            ) from error


def _in_backend(function: Callable[[Any], Any], w: Any, on_host: bool) -> Any:
    """A function of JAX on a tensor of Keras's backend, also inside of a compiled step; TensorFlow
    has no kernels of LAPACK for JAX's programs, so these run outside of it."""
    w = keras.ops.convert_to_tensor(getattr(w, "value", w))
    backend = keras.backend.backend()
    if backend == "jax":
        return function(w)
    if backend == "tensorflow":
        import tensorflow as tf
        from jax.experimental import jax2tf

        if isinstance(w, tf.Tensor) and not tf.is_symbolic_tensor(w):
            return tf.convert_to_tensor(np.asarray(function(w.numpy())))
        if on_host:
            found = tf.numpy_function(lambda x: np.asarray(function(x)), [w], w.dtype)
            return tf.ensure_shape(found, w.shape)
        return tf.autograph.experimental.do_not_convert(jax2tf.convert(function))(w)
    found = np.asarray(function(np.asarray(keras.ops.convert_to_numpy(w))))
    return keras.ops.convert_to_tensor(found, dtype=keras.backend.standardize_dtype(w.dtype))


def keras_constraint(constraint: Any, axes: str | None = None) -> keras.constraints.Constraint:
    """A constraint of fwt for a layer of Keras, ``Dense(kernel_constraint=...)``.

    Keras applies it after each step, on any backend. ``.keras`` files store it; to load one, Keras
    must know the class: ``from fwt.converters import keras_constraint`` first.

    Args:
        constraint: one of ``fwt.constraints``, bare or called.
        axes: what the axes of the weight mean, as in :func:`fwt.project`, such as "h w in out" of
            a Conv2D. Of the kernel of a Dense and of recurrent layers they are known.

    Returns:
        A ``keras.constraints.Constraint``.

    Raises:
        TypeError: if it is no constraint of fwt.
        ConversionError: if it has settings that a file can't hold.
        AxesError: when it is applied, for axes that are not known.

    Example:
        >>> import fwt, keras
        >>> bound = keras_constraint(fwt.constraints.max_norm(1.0))
        >>> layer = keras.layers.Dense(3, kernel_constraint=bound)
        >>> bool(abs(bound(keras.ops.ones((4, 3)))[0, 0] - 0.5) < 1e-6)
        True
    """
    chosen = resolve(constraint)
    if not isinstance(chosen, constraints.Bound):
        raise TypeError(
            f"keras_constraint takes one of fwt.constraints, found {constraint!r}; Callback "
            "runs a transform such as fwt.prune(0.5) after each batch, and fwt.project(function) "
            "makes one of a function of a leaf and its axes"
        )
    return FwtConstraint(_config(chosen, "the constraint"), axes)


@_FWT
class FwtInitializer(keras.initializers.Initializer):
    """An initializer of fwt as Keras's layers take it; made by ``keras_initializer``."""

    def __init__(self, initializer: dict[str, Any], seed: int | None = None) -> None:
        self._given = {"initializer": initializer, "seed": seed}
        # What is made anew of this config without a seed, as Keras does for each part of a layer,
        # draws others.
        self._key = jax.random.key(random.randint(1, 10**9) if seed is None else seed)
        self._drawn = _made(initializers.Bound, initializer)

    def get_config(self) -> dict[str, Any]:
        return dict(self._given)

    def __call__(self, shape: Any, dtype: Any = None) -> Any:
        """New values of this shape, the same at each call, as with Keras's own."""
        dtype = keras.backend.standardize_dtype(dtype or keras.config.floatx())
        found = self._drawn(self._key, tuple(shape), jnp.dtype(dtype))
        if keras.backend.backend() != "jax":
            found = np.asarray(found)
        return keras.ops.convert_to_tensor(found, dtype=dtype)


def keras_initializer(initializer: Any, seed: int | None = None) -> keras.initializers.Initializer:
    """An initializer of fwt for a layer of Keras, ``Dense(kernel_initializer=...)``.

    A weight of any layer is read as (*spatial, in, out), as Keras's own initializers read it.

    Args:
        initializer: one of ``fwt.initializers``, ``.keras`` and ``.torch`` of it too, bare or
            called.
        seed: a whole number; None draws one from Python's ``random``, which
            ``keras.utils.set_random_seed`` seeds. As with Keras's own initializers, one object
            gives the same values at each call; a layer of several weights makes one for each.

    Returns:
        A ``keras.initializers.Initializer``, which ``.keras`` files store, as they do
        :func:`keras_constraint`.

    Raises:
        TypeError: if it is no initializer of fwt.
        ConversionError: if it has settings that a file can't hold.

    Example:
        >>> import fwt, keras, numpy as np
        >>> drawn = keras_initializer(fwt.initializers.orthogonal, seed=0)
        >>> layer = keras.layers.Dense(3, kernel_initializer=drawn)
        >>> w = np.asarray(drawn((3, 3)))
        >>> print((w @ w.T).round(4) + 0.0)
        [[1. 0. 0.]
         [0. 1. 0.]
         [0. 0. 1.]]
    """
    chosen = resolve(initializer)
    if not isinstance(chosen, initializers.Bound):
        raise TypeError(f"keras_initializer takes one of fwt.initializers, found {initializer!r}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"keras_initializer: seed must be a whole number or None, found {seed!r}")
    return FwtInitializer(_config(chosen, "the initializer"), seed)
