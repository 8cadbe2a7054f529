"""Which cases of a table are for the thorough run, how many of those that are drawn, and how XLA
compiles in a process of several devices."""

import os

import jaxlib.version
import pytest

# How many times as many drawn cases, and combinations of settings, as CI has.
DRAWS = int(os.environ.get("FWT_DRAWS", "1"))

# XLA's older emitters of loops, where it has them (tests/conftest.py), for processes of several
# devices: they compile in half the time.
OLDER = "--xla_cpu_use_fusion_emitters=false"
if not (0, 9) <= jaxlib.version.__version_info__ < (0, 11):
    OLDER = ""


def thorough_but(keep, values, most=None):
    """All values; those for which ``keep`` (a number: the first ones; or a predicate) is not so
    run only with ``pytest -m thorough``: ``most`` times FWT_DRAWS of them, from first to last."""
    values = list(values)
    kept = (lambda i, v: i < keep) if isinstance(keep, int) else (lambda i, v: keep(v))
    others = [i for i, v in enumerate(values) if not kept(i, v)]
    count = len(others) if most is None else min(most * DRAWS, len(others))
    taken = {others[i * len(others) // count] for i in range(count)}
    return [
        v if kept(i, v) else pytest.param(*(v if isinstance(v, tuple) else (v,)),
                                          marks=pytest.mark.thorough)
        for i, v in enumerate(values)
        if kept(i, v) or i in taken
    ]  # fmt: skip
