"""Which cases of a table are for the thorough run."""

import pytest


def thorough_but(keep, values):
    """All values; those for which ``keep`` (a number: the first ones; or a predicate) is not so
    run only with ``pytest -m thorough``."""
    kept = (lambda i, v: i < keep) if isinstance(keep, int) else (lambda i, v: keep(v))
    return [
        v if kept(i, v) else pytest.param(*(v if isinstance(v, tuple) else (v,)),
                                          marks=pytest.mark.thorough)
        for i, v in enumerate(values)
    ]  # fmt: skip
