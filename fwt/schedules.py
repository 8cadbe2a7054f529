"""Schedules: plain functions of the number of updates, as optax's are.

:func:`cubic` and :func:`lottery` say what share is pruned, :func:`cosine` what share is exchanged
in dynamic sparse training. Any other function of the count will do in their place.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fwt._types import FwtError

__all__ = ["cosine", "cubic", "lottery"]

Schedule = Callable[[Any], Any]


def cosine(share: Any, end: int) -> Schedule:
    """A share that falls along half a cosine and is 0 from update ``end`` on.

    For ``regrow_fraction`` of :func:`fwt.optim.sparsify`: exchange much at first, then less, and
    let the net settle. The paper ends at three quarters of the training and starts from 0.3.

    Args:
        share: the value at update 0: a number from 0 to 1, or a traced scalar.
        end: the update from which on the value is 0.

    Returns:
        A function of the number of updates: ``share / 2 * (1 + cos(pi * n / end))`` before
        ``end``.

    Raises:
        FwtError: for a share that is none, or an end before update 1.

    Source:
        Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, section 3.

    Example:
        >>> share = cosine(0.3, 1000)
        >>> [round(float(share(n)), 3) for n in (0, 250, 500, 1000, 2000)]
        [0.3, 0.256, 0.15, 0.0, 0.0]
    """
    _check_share("cosine", "share", share)
    _check_whole("cosine", "end", end, 1)

    def schedule(n: Any) -> Any:
        return jnp.where(n < end, share * (0.5 + 0.5 * jnp.cos(jnp.pi * n / end)), 0.0)

    return schedule


def cubic(sparsity: Any, begin: int, end: int, initial: Any = 0.0) -> Schedule:
    """Gradual pruning: fast at first, slower and slower towards the end.

    Args:
        sparsity: the value from update ``end`` on: a number from 0 to 1, or a traced scalar.
        begin: up to this update the value is ``initial``.
        end: the update from which on the value is ``sparsity``.
        initial: the value at the start, likewise.

    Returns:
        A function of the number of updates: ``sparsity + (initial - sparsity) * (1 - (n - begin)
        / (end - begin)) ** 3`` between ``begin`` and ``end``.

    Raises:
        FwtError: for a sparsity that is none, or an end that is not after the beginning.

    Source:
        Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model
        compression", 2017, section 3.

    Example:
        >>> sparsity = cubic(0.8, 100, 300)
        >>> [round(float(sparsity(n)), 3) for n in (0, 100, 200, 300, 400)]
        [0.0, 0.0, 0.7, 0.8, 0.8]
    """
    _check_share("cubic", "sparsity", sparsity)
    _check_share("cubic", "initial", initial)
    _check_whole("cubic", "begin", begin, 0)
    _check_whole("cubic", "end", end, begin + 1)

    def schedule(n: Any) -> Any:
        left = 1.0 - jnp.clip((n - begin) / (end - begin), 0.0, 1.0)
        return sparsity + (initial - sparsity) * left**3

    return schedule


def lottery(rounds: int, steps: int, share: Any = 0.2) -> Schedule:
    """Rounds of training, at the end of each of which a share of what is left is pruned.

    The first round trains the whole net, and nothing is pruned before its end; the last mask is
    that of the end of round ``rounds``, and the training that follows is that of the ticket. With
    ``rewind=0`` in :func:`fwt.optim.sparsify` the weights go back to the start each time; without
    it, this is iterative magnitude pruning.

    Args:
        rounds: how many times weights are pruned, 1 or more.
        steps: how many updates a round has, 1 or more.
        share: which share of the weights that are left goes at the end of a round: a number from
            0 to 1, or a traced scalar.

    Returns:
        A function of the number of updates: ``1 - (1 - share) ** r`` from the end of round r on.

    Raises:
        FwtError: for arguments outside these bounds.

    Source:
        Frankle and Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural
        Networks", 2019, section 1 (iterative pruning, 20 % a round in section 2).

    Example:
        >>> sparsity = lottery(3, 1000)
        >>> [round(float(sparsity(n)), 3) for n in (0, 999, 1000, 2000, 3000, 9000)]
        [0.0, 0.0, 0.2, 0.36, 0.488, 0.488]
    """
    _check_whole("lottery", "rounds", rounds, 1)
    _check_whole("lottery", "steps", steps, 1)
    _check_share("lottery", "share", share)
    values: Any = 1.0 - (1.0 - share) ** np.arange(rounds + 1)

    def schedule(n: Any) -> Any:
        done = jnp.clip(n // steps, 0, rounds)
        return jnp.asarray(values, jnp.float32)[jnp.asarray(done, jnp.int32)]

    return schedule


def _check_share(schedule: str, name: str, value: Any) -> None:
    if isinstance(value, jax.core.Tracer) and not value.ndim:
        return
    array = isinstance(value, jax.Array | np.ndarray | np.generic)
    found = value.item() if array and not value.ndim else value
    number = isinstance(found, int | float) and not isinstance(found, bool)
    if not (number and 0 <= found <= 1):
        raise FwtError(f"{schedule}: {name} must be a number from 0 to 1, found {value!r:.80}")


def _check_whole(schedule: str, name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise FwtError(
            f"{schedule}: {name} must be a whole number, {least} or more, found {value!r:.80}"
        )
