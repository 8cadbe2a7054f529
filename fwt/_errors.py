"""The errors that fwt raises. This module needs no JAX."""


class FwtError(ValueError):
    """Any error of ours: it names the place, what was expected, what was found, and a way out."""


class WhereError(FwtError):
    """A ``where`` that selects nothing, or that does not fit the tree."""


class AxesError(FwtError):
    """A leaf whose axes have no known meaning, for something that depends on them."""


class LeafError(FwtError):
    """A leaf (or a value for one) of the wrong path, shape or dtype."""


class ConversionError(FwtError):
    """A layer, setting or array that can't be converted exactly."""


def refuse(place: str, found: str, way_out: str = "") -> ConversionError:
    """The one form of a refusal."""
    return ConversionError(f"{place}: {found}" + (f"; {way_out}" if way_out else ""))


class FileFormatError(ConversionError):
    """A file that is not what it should be: truncated, malformed, hostile, or with something in it
    that can't be converted exactly. Nothing else escapes a reader."""


INJECTED = (
    "optax.inject_hyperparams makes an array of a number, and of what can be called a schedule, "
    "unless it is named: give it static_args, such as those of fwt.optim.sparsify.static_args but "
    "'sparsity', or inject into a factory of your own that takes the numbers that change"
)
