"""Patterns: which weights stand or fall together."""

import dataclasses

__all__ = ["unstructured"]


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A pattern by name, written bare or called."""

    name: str

    def __call__(self) -> "Pattern":
        return self


unstructured = Pattern("unstructured")
"""Each weight for itself."""
