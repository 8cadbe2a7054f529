"""The types that everything else speaks."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from fwt import _later
from fwt._errors import AxesError as AxesError
from fwt._errors import ConversionError as ConversionError
from fwt._errors import FileFormatError as FileFormatError
from fwt._errors import FwtError as FwtError
from fwt._errors import LeafError as LeafError
from fwt._errors import WhereError as WhereError

if TYPE_CHECKING:
    import jax

    Array: TypeAlias = jax.Array
else:
    from fwt._later import jax

    def __getattr__(name: str) -> Any:
        if name == "Array":  # which imports JAX
            return jax.Array
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


Params: TypeAlias = Any
"""Any pytree of arrays; leaves that are no arrays pass through every transform."""
Scores: TypeAlias = Any
"""The same tree of real numbers: higher = keep."""
Masks: TypeAlias = Any
"""The same tree of bool arrays: True = keep; an unselected leaf has a rank-0 True."""
Transform: TypeAlias = Callable[[Any], Any]
"""A pure, traceable function from params to params."""
Initializer: TypeAlias = Callable[..., Any]
"""JAX's protocol, ``(key, shape, dtype) -> array``."""
Score: TypeAlias = Callable[..., Any]
"""``(params, *, grads=None, key=None, ...) -> Scores``; it names the context that it needs."""
Constraint: TypeAlias = Callable[[Any, Any], Any]
"""``(leaf, axes) -> leaf``, with ``axes`` an :class:`fwt._axes.Axes`."""
Where: TypeAlias = (
    str | Sequence[str] | Callable[[str, "jax.ShapeDtypeStruct"], bool] | Mapping[str, Any] | Any
)
"""Which leaves: a glob on the path, a role, a list of these, a predicate, or a tree of bools."""


def noun(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a factory that needs no argument, so that a verb takes it bare or called."""
    factory.__dict__["__fwt_noun__"] = True  # an attribute that type checkers don't know
    return factory


def with_statistics(transform: Transform, of: Sequence[Any] | None = None) -> Transform:
    """Marks a transform that gives statistics new values too; one made of others, if one of them
    does. Who runs a transform hides statistics from those that are not marked."""
    if of is None or any(map(wants_statistics, of)):
        transform.__dict__["__fwt_statistics__"] = True
    return transform


def wants_statistics(transform: Any) -> bool:
    return getattr(transform, "__fwt_statistics__", False) is True


def with_masks(transform: Transform) -> Transform:
    """Marks a transform that sets the same weights to zero whatever their values are."""
    transform.__dict__["__fwt_masks__"] = True
    return transform


def streams(transform: Transform, of: Sequence[Any] | None = None) -> Transform:
    """Marks a transform that takes leaves larger than memory, of which it changes a piece at a
    time; one made of others, if all of them do."""
    if of is None or all(map(does_stream, of)):
        transform.__dict__["__fwt_streams__"] = True
    return transform


def does_stream(transform: Any) -> bool:
    return getattr(transform, "__fwt_streams__", False) is True


def with_inside(transform: Transform, inside: Callable[[Masks], Transform]) -> Transform:
    """Says what a transform is where these masks hold, for those who know them."""
    transform.__dict__["__fwt_inside__"] = inside
    return transform


def resolve(x: Any) -> Any:
    """A noun that was written bare, called."""
    return x() if getattr(x, "__fwt_noun__", False) else x


def check_takes(function: Callable[..., Any], what: str, names: str) -> None:
    """Raises for a function that can't be called with arguments of these names."""
    import inspect

    takes: Any = None  # a function may have no signature
    try:
        takes = inspect.signature(function, follow_wrapped=False)
        takes.bind(*names.split(", "))
    except (TypeError, ValueError) as error:
        if takes is not None:
            raise TypeError(
                f"{what} takes {names}; found one of {takes}: lambda {names}: ..."
            ) from error


def hashes(x: Any) -> bool:
    """Whether ``x`` can be a static argument of jit; one that holds a tracer can't."""
    try:
        hash(x)
    except TypeError:
        return False
    return True


class Model(NamedTuple):
    """A Flax module and its variables.

    It unpacks as Flax reads, ``module, variables = load(path)``, and is a pytree whose module
    is static: ``jit``, ``device_put`` and every transform take one and give one back.

    Attributes:
        module: a linen module, such as :class:`fwt.Sequential`; None for a file of weights only.
        variables: ``{"params": ..., "batch_stats": ...}``, NumPy leaves when they were loaded.

    Example:
        >>> import fwt, jax, flax.linen as nn
        >>> module = fwt.Sequential([("dense", nn.Dense(3))])
        >>> model = fwt.Model(module, module.init(jax.random.key(0), jax.numpy.ones((1, 2))))
        >>> fwt.paths(fwt.prune(0.5)(model))
        ['dense/bias', 'dense/kernel']
        >>> model(jax.numpy.ones((4, 2))).shape
        (4, 3)
    """

    module: Any
    variables: Any

    def __call__(self, *xs: Any, **kwargs: Any) -> Any:
        """The module's output at inference, ``module.apply(variables, x)``."""
        if self.module is None:
            raise FwtError(
                "this Model holds weights only (module=None), so it can't be called: "
                "give it a module, fwt.Model(module, model.variables)"
            )
        return self.module.apply(self.variables, *xs, **kwargs)


# Registered explicitly, because a NamedTuple's own flattening would make the module a leaf.
_later.once_imported(
    "jax",
    lambda: jax.tree_util.register_pytree_with_keys(
        Model,
        lambda m: (((jax.tree_util.GetAttrKey("variables"), m.variables),), m.module),
        lambda module, children: Model(module, *children),
        lambda m: ((m.variables,), m.module),
    ),
)
