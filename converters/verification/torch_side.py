"""A torch module as a side of ``verify``, each layer's output kept."""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fwt._graph import MOVES
from fwt._types import Model
from fwt.converters import judge
from fwt.converters.rows.row import joined
from fwt.converters.verification.ends import Kind, channel_of_chain, ends
from fwt.converters.verification.names import call_name, call_of, first_call
from fwt.converters.verification.sides import Side, Taps, Xs, numbers_of, permutes


def torch_side(model: Any) -> Side:
    import torch

    from fwt.converters.frameworks import torch as _torch
    from fwt.converters.frameworks import torch_state, torch_wrappers

    model = torch_wrappers.plain(model)
    counts: set[tuple[str, str]] = set()  # attributes that a forward changes
    weights = [w for w in (*model.parameters(), *model.buffers()) if w.is_floating_point()]

    def run(xs: Xs, by: float = 0.0) -> tuple[Any, Taps]:
        given = [tensor(x) for x in xs]
        if weights:
            like = weights[0]
            given = [x.to(like.device, like.dtype if x.is_floating_point() or numbers else None)
                     for x in given]  # fmt: skip
        if not by:
            return through(model, given)
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for w in itertools.chain(moved.parameters(), moved.buffers()):
                if w.is_floating_point():
                    w.copy_(tensor(judge.nudged(array(w), by)))
        return through(moved, given, by)

    def through(model: Any, given: Sequence[Any], by: float = 0.0) -> tuple[Any, Taps]:
        taps: Taps = {}
        hooks, held = [], [(m, torch_state.held(m)) for m in model.modules()]
        times: dict[str, int] = {}
        made: dict[int, tuple[str, Any]] = {}  # by id, the module that gave a tensor, and that

        def keep(name: str, again: bool) -> Callable[..., None]:
            def hook(_: Any, args: Any, y: Any) -> None:
                if isinstance(y, torch.Tensor):
                    takes = [made[id(x)][0] for x in args if id(x) in made]
                    times[name] = times.get(name, 0) + 1
                    made[id(y)] = name, y
                    said = call_name(joined(name.split(".")), takes, again)
                    taps[call_of(said, times[name])] = array(y)

            return hook

        def unsettled(_: Any, args: Any) -> Any:
            if len(args) != 1 or not isinstance(args[0], torch.Tensor):
                return None
            if any(args[0] is x for x in given):
                return None
            if not args[0].is_floating_point():
                return None
            return tensor(judge.nudged(array(args[0]), by)).to(args[0])

        kinds_at = {name: type(module) for name, module in model.named_modules()}
        for name, module in model.named_modules():
            if name and not isinstance(module, torch.nn.Sequential | torch.nn.ModuleList):
                if by and not list(module.children()):
                    hooks.append(module.register_forward_pre_hook(unsettled))
                hooks.append(module.register_forward_hook(
                    keep(name, kinds_at.get(first_call(name)) is type(module))
                ))  # fmt: skip
        try:
            with torch.no_grad(), torch_wrappers.quiet(model):
                model.eval()
                y = model(*given)
        finally:
            for hook in hooks:
                hook.remove()
            for module, before in held:
                changed = torch_state.put_back(module, before)
                counts.update((type(module).__name__, name) for name in changed)
            settings[:] = [each for each in settings if not counted(each[0])]
        return torch.utils._pytree.tree_map(array, y), taps

    def tensor(x: np.ndarray) -> Any:
        """A copy, for a layer may work in place."""
        return torch.tensor(x.astype(np.float32) if x.dtype == ml_dtypes.bfloat16 else x)

    def array(y: Any) -> np.ndarray:
        y = y.detach().cpu().clone().resolve_neg()  # the next layer may work in place
        if y.dtype == torch.bfloat16:
            return y.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return y.numpy()

    told = map(_torch_kind, model.modules())
    time_first, channels_first, told_batch, _ = ends("torch", told, True)
    # Only of a chain is it known what stands before a layer.
    chain = isinstance(model, torch.nn.Sequential | torch.nn.TransformerEncoder)
    leaves = [m for m in model.modules() if not list(m.children())]
    leaf: Any = next((m for m in leaves if type(m).__name__ not in MOVES), None)
    kinds = torch.nn.Embedding | torch.nn.EmbeddingBag
    count = leaf.num_embeddings if isinstance(leaf, kinds) else None
    numbers = chain and not isinstance(leaf, kinds)
    first: Any = model
    while isinstance(first, torch.nn.Sequential):
        first = next((m for m in first if isinstance(m, torch.nn.Sequential)
                      or type(m).__name__ not in MOVES), None)  # fmt: skip
    straight = first is leaf
    tabled = [m for m in leaves if isinstance(m, kinds) and (m is leaf or not straight)]
    rows = [array(m.weight) for m in tabled if count is not None]

    modules = [(name, type(module)) for name, module in model.named_modules()]
    names = modules, [(name, getattr(w, "shape", ())) for name, w in model.state_dict().items()]

    own = ((name or type(m).__name__, m, vars(m)) for name, m in model.named_modules())
    settings = numbers_of("torch", own)
    kind_of = {name or type(m).__name__: type(m).__name__ for name, m in model.named_modules()}

    def counted(place: str) -> bool:
        layer, _, name = place.partition(": ")
        return (kind_of[layer], name.split("/")[0]) in counts

    def converted(xs: Xs, source: bool = False) -> Model:
        how: dict[str, Any] = {"layout": "source"} if source else {}
        shape: Any = xs[0].shape[1:] if len(xs) == 1 else list(xs)
        return _torch.from_torch(model, input_shape=shape, **how)

    forward = [] if isinstance(model, torch.nn.Sequential) else _parameters(_forward(model))

    def held() -> list[tuple[str, np.ndarray]]:
        every = itertools.chain(model.named_parameters(), model.named_buffers())
        return [(name.rpartition(".")[0], array(w)) for name, w in every]

    last = channel_of_chain("torch", True, map(_torch_kind, _chained(model)))
    return Side(run, None, channels_first, converted, count, rows, True,
                [array(w.flatten()[:1]).dtype for w in weights], names=names, weights=held,
                settings=settings, time_first=time_first and chain, told=told_batch and chain,
                apart=bool(rows) and not straight,
                takes=array(weights[0].flatten()[:1]).dtype if weights else None,
                count=None if forward is None else len(forward) or 1,
                names_of=forward or None,
                own=any(_is_own(m) for m in model.modules()),
                ends_at={0: last})  # fmt: skip


def _chained(module: Any) -> Iterator[Any]:
    """The modules that follow each other."""
    import torch

    if isinstance(module, torch.nn.Sequential):
        for part in module:
            yield from _chained(part)
    else:
        yield module


def _parameters(forward: Any) -> list[str] | None:
    """The names of what a forward must be given; None where it does not say."""
    try:
        found = list(inspect.signature(forward).parameters.values())[1:]
    except (ValueError, TypeError):
        return None
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in found):
        return None
    named = [p for p in found if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(named) > 1 and any(p.default is not inspect.Parameter.empty for p in named):
        return None  # it may take more
    return [p.name for p in named if p.default is inspect.Parameter.empty]


def _torch_kind(module: Any) -> Kind:
    # A layer of an encoder leaves it to its attention.
    first = getattr(getattr(module, "self_attn", module), "batch_first", None)
    batch = 1 - first if isinstance(first, bool) else None
    return Kind(type(module).__name__, permutes(module), batch=batch, turns=_is_own(module))


def _is_own(module: Any) -> bool:
    """Whether a forward is a user's own."""
    return not str(getattr(_forward(module), "__module__", "")).startswith(("torch.", "fwt."))


def _forward(module: Any) -> Any:
    """The forward of its class, which TorchScript has none of."""
    return getattr(type(module), "forward", None)
