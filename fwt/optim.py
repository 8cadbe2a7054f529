"""Optax wrappers: the weights satisfy what you say after every ``optax.apply_updates``."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fwt import constraints
from fwt._types import FwtError, Params, Transform

__all__ = ["constrain"]


def constrain(
    tx: optax.GradientTransformation, transform: Transform
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose step lands where a transform puts it.

    ``optax.apply_updates(params, updates)`` gives ``transform(params + step)``, where ``step`` is
    that of ``tx``. The state is that of ``tx``; leaves that the transform leaves alone get the
    step of ``tx`` to the bit. It works under ``jit``, ``scan`` and ``vmap``, and inside
    ``optax.multi_transform`` and ``optax.masked``, where the transform sees the leaves that are
    not masked.

    What ``apply_updates`` adds is a difference, so how near it lands depends on the dtype:

    - float16 and bfloat16 params get float32 updates and land on it to the bit, unless a weight
      is moved to less than 2**-12 of itself (bfloat16: 2**-15) without becoming 0.
    - float32 params land on it exactly at 0, and wherever the new weight is within a factor of 2
      of the old one; elsewhere they are off by at most an ULP of the larger of the two.

    It must be the last link, ``constrain(optax.chain(...), t)``: a later ``optax.scale`` moves
    the weights out of the set again, and an average of weights (``optax.lookahead``, an EMA of
    params) need not be in it. So too with gradient accumulation: ``constrain(optax.MultiSteps(tx,
    k), t)`` is in the set after every call, ``MultiSteps(constrain(tx, t), k)`` leaves weights
    that start outside where they are until its first step.

    ``optax.inject_hyperparams`` takes callables for schedules: give it
    ``static_args=fwt.optim.constrain.static_args``, or inject into a factory of your own, as in
    the second example.

    Args:
        tx: any optimizer.
        transform: any transform that keeps shapes and dtypes, such as :func:`fwt.project`,
            :func:`fwt.apply_masks` or a :func:`fwt.chain` of them.

    Returns:
        An optimizer; its ``update`` needs ``params``.

    Raises:
        FwtError: in ``update``, without ``params`` or if the transform changes the tree.

    Example:
        >>> import fwt, jax.numpy as jnp, optax
        >>> params = {"dense": {"kernel": jnp.array([[1.0], [1.0]])}}
        >>> tx = constrain(optax.sgd(1.0), fwt.project(fwt.constraints.non_negative))
        >>> grads = {"dense": {"kernel": jnp.array([[3.0], [0.5]])}}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["dense"]["kernel"].tolist()
        [[0.0], [0.5]]
        >>> @optax.inject_hyperparams
        ... def bounded(learning_rate, radius):
        ...     ball = fwt.project(fwt.constraints.max_norm(radius))
        ...     return constrain(optax.sgd(learning_rate), ball)
        >>> tx = bounded(learning_rate=0.1, radius=1.0)
        >>> updates, _ = tx.update(grads, tx.init(params), params)
        >>> new = optax.apply_updates(params, updates)["dense"]["kernel"]
        >>> round(float((new**2).sum()), 5)
        1.0
    """
    if not hasattr(tx, "update"):
        raise TypeError(f"constrain takes an optax optimizer, found {tx!r}")
    if isinstance(transform, constraints.Bound):
        raise TypeError(
            f"constrain takes a transform: fwt.project(fwt.constraints.{transform.name}(...))"
        )
    if not callable(transform):
        raise TypeError(
            f"constrain takes a transform, a function of the params; found {transform!r}"
        )
    inner = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Params = None, **extra: Any) -> tuple[Any, Any]:
        if params is None:
            raise FwtError("constrain needs the weights: call tx.update(grads, state, params)")
        steps, state = inner.update(updates, state, params, **extra)
        moved = optax.apply_updates(params, steps)
        wanted = transform(moved)
        found: Any = jax.tree.structure(wanted)
        expected: Any = jax.tree.structure(moved)
        if found != expected:
            raise FwtError(
                f"constrain: the transform must keep the tree, but gave {found} for {expected}"
            )
        return jax.tree.map(_difference, params, steps, moved, wanted), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


constrain.static_args = ("tx", "transform")  # type: ignore[attr-defined]  # functions carry attributes


def _difference(old: Any, step: Any, moved: Any, wanted: Any) -> Any:
    if wanted is moved:
        return step
    old, wanted = jnp.asarray(old), jnp.asarray(wanted)
    if wanted.shape != old.shape or wanted.dtype != old.dtype:
        raise FwtError(
            f"constrain: the transform must keep shape and dtype, expected "
            f"{old.dtype}{list(old.shape)}, found {wanted.dtype}{list(wanted.shape)}"
        )
    if not jnp.issubdtype(old.dtype, jnp.floating):
        return wanted - old
    wide = jnp.promote_types(old.dtype, jnp.float32)
    return wanted.astype(wide) - old.astype(wide)
