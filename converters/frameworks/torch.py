"""Live PyTorch models."""

import bisect
import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
import torch.nn.utils.parametrize

from fwt import _tree
from fwt._types import ConversionError, Model
from fwt.converters import io as _io
from fwt.converters.frameworks import (
    altered,
    beside,
    torch_check,
    torch_computed,
    torch_export,
    torch_graph,
    torch_inputs,
    torch_layers,
    torch_state,
    torch_wrappers,
)
from fwt.converters.frameworks import flax as _flax
from fwt.converters.frameworks import given as _given
from fwt.converters.frameworks import sidecar as _sidecar
from fwt.converters.frameworks.torch_layer import (
    check_initialised,
    class_of,
    defaults_of,
    layer_of,
    to_numpy,
    to_tensor,
)
from fwt.converters.frameworks.torch_wrappers import is_container, unwrapped
from fwt.converters.rows import grouped, table
from fwt.converters.rows.row import Layer, LiveLeaf, joined, order, own_names, parts_of, refuse
from fwt.converters.tried import is_heavy, let_go
from fwt.converters.walk import convert, policy
from fwt.converters.walk.convert import Layout
from fwt.converters.walk.net import Net, folded, nests


def _with_defaults(layer: Layer) -> Layer:
    cls = class_of(layer.kind)
    if cls is None:  # of an array or an operation between layers
        return layer
    defaults = defaults_of(cls)
    known = {k: v for k, v in defaults.items() if v is not inspect.Parameter.empty}
    return dataclasses.replace(layer, settings={**known, **layer.settings}, defaults=known)


def _check_holder(model: torch.nn.Module, where: str) -> None:
    if model._forward_hooks or model._forward_pre_hooks:
        raise ConversionError(f"{where} has forward hooks, which can change what it does")
    altered.check_methods(model, where)
    plain: Any = torch.nn.Module.__call__, torch.nn.Sequential.__iter__
    if type(model).__call__ is not plain[0] or (
        isinstance(model, torch.nn.Sequential) and type(model).__iter__ is not plain[1]
    ):
        raise ConversionError(f"{where}: {type(model).__name__} runs its layers in its own way")
    if own := [*model._parameters, *model._buffers]:
        raise ConversionError(f"{where} itself has an array {own[0]!r}; only layers may")


def _children(model: torch.nn.Module, inside: tuple[str, ...], seen: dict[int, str]) -> list[Layer]:
    _check_holder(model, "the model" if not inside else joined(inside))
    layers = []
    for name, module in model._modules.items():  # named_children skips one that stands there twice
        assert module is not None
        place = joined((*inside, name))
        module = unwrapped(module, place)
        if is_container(module):
            layers += _children(module, (*inside, name), seen)
            continue
        if type(module) is torch.nn.TransformerEncoder:  # its layers keep their paths in it
            _check_holder(module, joined((*inside, name)))
            if set(module._modules) - {"layers", "norm"}:
                raise refuse(joined((*inside, name)), "it has modules of the user's own")
            within = {"layers": module.layers, **({"norm": module.norm} if module.norm else {})}
            held = torch.nn.Sequential(OrderedDict(within))
            layers += _children(held, (*inside, name), seen)
            continue
        layers.append(layer_of(place, module))
        for parameter in module.parameters():
            if id(parameter) in seen:
                same = "are one module" if id(module) in seen else "share a parameter"
                raise ConversionError(
                    f"{place} and {seen[id(parameter)]} {same}; a Sequential keeps weights for "
                    "each: give them their own, copy.deepcopy(layer)"
                )
        seen |= {id(p): place for p in (module, *module.parameters())}
    return layers


def from_torch(
    model: torch.nn.Module,
    input_shape: Any = None,
    layout: Layout = "channels_last",
    *,
    sidecar: bool = False,
) -> Model:
    """A torch module as a Flax model with the same predictions (those in eval mode).

    A Sequential becomes a :class:`fwt.Sequential`, any other module a :class:`fwt.Graph`: it is
    followed by ``torch.export`` for any number of examples, its layers keep their paths, and what
    is computed between them becomes layers too. Both are then run on random inputs, and a model
    that does not agree is not given back.

    A Sequential inside another stays one, a ModuleList is used in order, and weights that
    ``torch.nn.utils.prune``, ``parametrize``, ``weight_norm`` or ``spectral_norm`` compute are
    taken as they are computed. Of DataParallel, DistributedDataParallel, a compiled module and an
    AveragedModel, as the model and as a layer of it, the module inside is taken under its name.

    Args:
        model: a ``torch.nn.Module``; the names of its layers are kept.
        input_shape: the shape of its input without the batch axis, such as (3, 32, 48), or a list
            of the shapes of several inputs; for a module that is no Sequential also a tensor for
            each input, batch first. None works for a Sequential where the rank follows from the
            first layers.
        layout: what the new model's input and output look like: "channels_last" or
            "channels_first" where a layer proves which axis holds the channels, or "source" to
            keep both ends exactly as the given model has them.
        sidecar: whether to keep what Flax has no place for (the second bias of an LSTM, counters,
            what matters in training only, the order of a state dict that is not that of the calls)
            in ``module.sidecar``, so that :func:`to_torch` gives it all back, bit for bit where the
            weights are the same; ``save`` writes it along.

    Returns:
        ``Model(module, variables)`` with NumPy leaves.

    Raises:
        ConversionError: for any layer, setting or array that can't be converted exactly, by name.

    Example:
        >>> import torch, numpy as np
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
        >>> model = from_torch(net)
        >>> x = np.ones((4, 3), np.float32)
        >>> bool(np.allclose(model(x), net(torch.from_numpy(x)).detach(), atol=1e-6))
        True
    """

    def written(net: Net) -> Net:
        return convert.convert(folded(net, torch_layers.with_selected), "torch", "flax", layout)

    def forth(net: Net) -> Model:
        net = written(net)
        return _sidecar.with_orders(_flax.write_flax(net), net.orders, _orders_of)

    model = unwrapped(model)
    if isinstance(model, torch.nn.Module):
        torch_inputs.check_kind(model, layout)
        for name, part in model.named_modules():
            _check_quantised(part, name, rounding=True)
    if is_container(model):
        net = Net.line(_children(model, (), {})).given(input_shape)
    elif isinstance(model, torch.nn.Module):
        inputs = torch_export.example_inputs(model, input_shape)
        with torch_export.at_inference(model):
            net = torch_export.net_of(model, inputs, written)
            tried = torch_check.tried(model, net, inputs)
        let_go(is_heavy([*model.parameters()]))  # the copy that a forward's changes are undone by
        input_shape = None
    else:
        raise ConversionError(f"from_torch takes a torch.nn.Module, found {type(model).__name__}")

    def again(net: Net) -> Model:
        layers = [_with_defaults(x) for x in net.layers]
        return forth(dataclasses.replace(net, layers=layers).given(input_shape))

    made = forth(net)
    if not is_container(model):
        torch_check.check(tried, made)
    if not sidecar:
        return made
    there = "source" if layout == "source" else "channels_first"
    return _sidecar.with_sidecar(
        made,
        net.layers,
        "torch",
        lambda m: _net_of(m.module, m.variables, None, there),
        again,
        None if is_container(model) else {"order": list(model.state_dict())},
    )


def to_torch(
    module: Any,
    variables: Any = None,
    input_shape: Sequence[int | None] | None = None,
    layout: Layout = "channels_first",
) -> torch.nn.Module:
    """A Flax model as a torch module in eval mode, with the same predictions.

    Strided SAME padding becomes the padding that it is at ``input_shape``. What torch.nn lacks is
    a small module of ours (``Permute``), so that a pickle of the model needs fwt; its state dict
    does not.

    Args:
        module: a :class:`fwt.Sequential` or :class:`fwt.Graph`, a linen module, a ``Model`` of
            one, or an nnx module, which holds its variables. One that is no Sequential is traced.
        variables: its variables; a Model has its own.
        input_shape: the shape of its input without the batch axis, in Flax's order, of several
            inputs a tuple of shapes; None takes the module's own, or works where nothing depends
            on it. A module that is traced needs it, or an example of each input.
        layout: as in :func:`from_torch`.

    Returns:
        A ``torch.nn.Sequential`` whose layers keep their names, or, of a Graph, a
        ``torch.fx.GraphModule`` of torch.nn modules under the paths of their nodes, whose pickle
        needs no fwt.

    Raises:
        ConversionError: for any layer or setting that torch can't say exactly, by name.

    Example:
        >>> import fwt, jax, flax.linen as nn
        >>> net = fwt.Sequential([("dense", nn.Dense(2))])
        >>> variables = net.init(jax.random.key(0), jax.numpy.ones((1, 3)))
        >>> to_torch(net, variables)
        Sequential(
          (dense): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    call = "to_torch(model)"
    module, variables, input_shape = _given.given(module, variables, call, input_shape)
    module = _flax.sequential_of(module)

    def there() -> Net:
        net = _net_of(module, variables, input_shape, layout)
        return _sidecar.restored(net, module, "torch", state=True)

    net, wanted = there(), _sidecar.order(module)
    chain = net.is_line and nests(net.layers) and not net.fixed
    if chain and all(class_of(layer.kind) is not None for layer in net.layers):
        made = _sequential([(parts_of(layer.name), layer) for layer in net.layers]).eval()
        state, rank = list(made.state_dict()), {name: i for i, name in enumerate(wanted)}
        if not wanted or state == sorted(state, key=lambda name: rank.get(name, len(rank))):
            return made
        net = there()  # for the order of a Sequential would be that of its layers
    return torch_state.in_order(torch_graph.graph_module(net, _built, to_tensor).eval(), wanted)


def _orders_of(model: Model) -> list[Mapping[str, Any]]:
    """In which order the weights of the torch model count axes that is made of this one."""
    blank = jax.tree.map(lambda v: np.broadcast_to(v.dtype.type(0), v.shape), model.variables)
    out: list[Mapping[str, Any]] = []
    for layout in ("channels_first", "source"):
        with contextlib.suppress(ConversionError):  # then none is made
            out.append(torch_layers.torch_net(
                _flax.read_flax(model.module, blank), layout, dry=True).orders)  # fmt: skip
    return out


def _net_of(module: Any, variables: Any, input_shape: Any, layout: str) -> Net:
    net = _flax.read_flax(module, variables).given(input_shape)
    policy.check_asked(net.layers)
    return torch_layers.torch_net(net, layout)


def _sequential(entries: list[tuple[list[str], Layer]]) -> torch.nn.Sequential:
    modules: OrderedDict[str, torch.nn.Module] = OrderedDict()
    for first, together in itertools.groupby(entries, key=lambda e: e[0][0]):
        group = list(together)
        if not first or "." in first or first in dir(torch.nn.Sequential):
            raise ConversionError(
                f"{first!r} can't be the name of a torch module: give the layer another"
            )
        if len(group[0][0]) > 1:
            modules[first] = _sequential([(parts[1:], layer) for parts, layer in group])
            continue
        for _, layer in group:
            modules[first] = _built(layer)
    return torch.nn.Sequential(modules)


def _built(layer: Layer) -> torch.nn.Module:
    cls: Any = class_of(layer.kind)
    assert cls is not None
    state = {k: to_tensor(v) for k, v in torch_layers.torch_state(layer).items()}
    layer.arrays.clear()  # so that there is no second copy of all weights
    # Made without memory: the arrays become its parameters.
    built: torch.nn.Module = cls(**layer.settings, **({"device": "meta"} if state else {}))
    if state:
        built.load_state_dict(state, assign=True)
        for parameter in built.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    return built


def leaves(model: torch.nn.Module) -> list[LiveLeaf]:
    """The floating parameters and the running statistics in Flax's names and axes; a tied one under
    its first path.

    A weight that is computed from others stands as it is computed.
    """
    out: list[LiveLeaf] = []
    seen: dict[Any, LiveLeaf] = {}  # by id and by place
    spans: Spans = {}
    holders: dict[str, list[int]] = {}  # of some memory, the leaves that it is or that it makes
    inside: list[str] = []  # what parametrize computes with
    anew: list[str] = []  # whose matrices a module around them draws
    held: dict[int, list[tuple[LiveLeaf, str, str, Any]]] = {}  # the leaves of a module
    of_keras = beside.keras_in(model)
    wrapped = {inner: full for full, inner in torch_wrappers.names(model).items() if inner}

    def theirs(place: str) -> list[str]:  # with the names of what only runs a module, and without
        return own_names(place.split("."), wrapped.get(place, place).split("."))

    for prefix, module in _places(unwrapped(model)):
        if isinstance(module, torch.nn.utils.parametrize.ParametrizationList):
            inside.append(f"{prefix}.")
        if prefix.startswith(tuple(inside)) or f"{prefix}." in inside:
            continue
        if isinstance(module, torch.nn.Transformer):
            anew += [f"{prefix}.{n}.".lstrip(".") for n in ("encoder", "decoder")]
        above = [_tree.escape(p) for p in prefix.split(".") if p]
        if id(module) in held:  # one module in two places
            for leaf, name, flax_name, shape in held[id(module)]:
                leaf.also[path := "/".join([*above, _tree.escape(flax_name)])] = shape
                leaf.own[path] = theirs(f"{prefix}.{name}")
            continue
        own = held[id(module)] = []
        _check_quantised(module, prefix)
        kind = _public_name(module)
        groups = 1
        if kind.startswith("ConvTranspose") and (groups := module.groups) > 1:
            kind = f"Grouped{kind}"
        names = table.leaf_names("torch", kind)
        computed, parts = torch_computed.computed(module, prefix or kind)
        made_of = {id(v) for several in parts.values() for v in several.values()}
        plain_ones = module.named_parameters(recurse=False)
        statistics = _statistics(module)
        for name, parameter in itertools.chain(plain_ones, computed.items(), statistics.items()):
            place = f"{prefix}.{name}" if prefix else name
            check_initialised(parameter, place)
            if parameter.is_inference() and not torch.is_inference_mode_enabled():
                found = "it was made under torch.inference_mode(), and is written in it alone"
                raise refuse(place, found, "call transform under torch.inference_mode() too")
            if id(parameter) in made_of and name not in computed:
                continue
            if not parameter.is_floating_point() and name not in statistics:
                continue
            collection = "batch_stats" if name in statistics else "params"
            if not (collection := of_keras.get(id(parameter), collection)):
                continue
            memory = [
                _tied(part, f"{prefix}.{n}" if prefix else n, spans)
                for n, part in parts.get(name, {name: parameter}).items()
            ]
            first = seen.get(id(parameter))
            if first is None and name not in computed:
                first = seen.get(memory[0])
            value = to_numpy(parameter, place)
            flax_name, letters, flax_letters, _ = names.get(name, (name, [], [], "params"))
            there = order(letters, flax_letters, value.ndim) if letters else None
            share = groups if flax_name == "kernel" else 1
            value = _read(there, share, place, value)
            known = table.live("torch", module, kind, letters, flax_letters, value.ndim, share)
            known = dataclasses.replace(known, anew=f"{prefix}.".startswith(tuple(anew)))
            path = "/".join([*above, _tree.escape(flax_name)])
            if first is not None:
                first.also[path], first.own[path] = value.shape, theirs(place)
                own.append((first, name, flax_name, value.shape))
                continue
            write = (
                torch_computed.writer(module, name, parameter, place)
                if name in computed
                else functools.partial(_copy, parameter)
            )
            for part in memory:
                holders.setdefault(part, []).append(len(out))
            back = functools.partial(_write, write, there, share)
            read = None if name in computed else functools.partial(_read, there, share, place)
            leaf = LiveLeaf(
                path,
                value,
                known,
                back,
                collection,
                own={path: theirs(place)},
                source=parameter,
                read=read,
            )
            out.append(leaf)
            own.append((leaf, name, flax_name, value.shape))
            seen[id(parameter)] = seen[place] = leaf
    for several in holders.values():
        for index in several if len(several) > 1 else ():
            other = next(out[i].path for i in several if i != index)
            write = functools.partial(_refuse_shared, out[index].path, other)
            out[index] = dataclasses.replace(out[index], write=write)
    return out


TRAINED = "parameters()"


def trained(model: torch.nn.Module) -> tuple[list[tuple[str, Any]], list[Any]]:
    """The parameters with the names that torch has for them, and those that are trained."""
    named: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    inner = torch_wrappers.names(model)
    named |= {n: named[full] for full, n in inner.items() if n is not None and full in named}
    return list(named.items()), list(model.parameters())


def array_of(gradient: Any) -> np.ndarray:
    """A gradient as an array."""
    if isinstance(gradient, torch.Tensor):
        return to_numpy(gradient.to_dense() if gradient.is_sparse else gradient, "grads")
    return np.asarray(gradient)


def _statistics(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The running statistics of a norm; those of one that is frozen, whose weight is a buffer like
    them, are settings."""
    held = dict(module.named_buffers(recurse=False))
    return {} if "weight" in held else {n: held[n] for n in _io.TORCH_STATS if n in held}


def _refuse_shared(path: str, other: str, value: np.ndarray) -> None:
    raise refuse(path, f"it and {other} are computed from one parameter, so that a write would "
                 "change both", "give each its own, parameter.clone()")  # fmt: skip


def _places(
    module: torch.nn.Module, prefix: str = "", above: tuple[int, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """The modules in a module under every name that they have, but none inside itself."""
    yield prefix, module
    for name, child in module._modules.items():
        place = f"{prefix}.{name}" if prefix else name
        child = unwrapped(child, place)
        if child is not None and id(child) not in (*above, id(module)):
            yield from _places(child, place, (*above, id(module)))


# By device, in the order of memory: where each tensor starts and ends, its place and its view.
Spans = dict[Any, list[tuple[int, int, str, Any]]]


def _tied(parameter: Any, place: str, spans: Spans) -> str:
    """The first place of what is the same view of the same memory; a partial overlap raises."""
    plain = not parameter.is_meta and parameter.layout == torch.strided
    if not plain or not parameter.numel():
        return place
    strides = zip(parameter.shape, parameter.stride(), strict=True)
    start = parameter.data_ptr()
    end = start + (1 + sum((n - 1) * s for n, s in strides)) * parameter.element_size()
    view = (parameter.dtype, parameter.shape, parameter.stride(), parameter.is_neg())
    known = spans.setdefault(parameter.device, [])
    # None overlaps another, so that only the two neighbours of its start can be in the way.
    index = bisect.bisect_right(known, start, key=lambda span: span[0])
    for its_start, its_end, other, its_view in known[max(index - 1, 0) : index + 1]:
        if start < its_end and its_start < end:
            if start == its_start and view == its_view:
                return other
            raise ConversionError(
                f"{place} and {other} share memory without being the same weight: give each its "
                "own, parameter.clone()"
            )
    known.insert(index, (start, end, place, view))
    return place


_OBSERVERS = ("torch.ao.quantization.observer", "torch.ao.quantization.fake_quantize")


def _check_quantised(module: torch.nn.Module, place: str, rounding: bool = False) -> None:
    """Raises for a module whose weight is quantised; with ``rounding`` also for one that rounds
    what passes it, or that looks at it for the sake of that."""
    what = "computes with a quantised weight, which can't be seen or written here"
    packed = ("_packed_params", "_all_weight_values", "weight_fake_quant")
    if not any(hasattr(module, n) for n in packed):
        if not rounding or not any(c.__module__ in _OBSERVERS for c in type(module).__mro__):
            return
        what = "is there for quantisation, which is not converted"
    raise refuse(
        place or type(module).__name__,
        f"{type(module).__module__}.{type(module).__name__} {what}",
        f"{'give from_torch' if rounding else 'transform'} the model before it is prepared or "
        "converted for quantisation",
    )


def _public_name(module: torch.nn.Module) -> str:
    """The class in torch.nn that a module is or derives from."""
    if isinstance(module, torch.jit.ScriptModule):  # its class is torch.jit's
        return str(module.original_name)
    for cls in type(module).__mro__:
        if class_of(cls.__name__) is cls:
            return cls.__name__
    return type(module).__name__


def _read(there: tuple[int, ...] | None, groups: int, place: str, value: np.ndarray) -> np.ndarray:
    value = grouped.compact(value, groups, place) if groups > 1 else value
    return value if there is None else value.transpose(there)


def _write(
    put: Callable[[torch.Tensor], object],
    there: tuple[int, ...] | None,
    groups: int,
    value: np.ndarray,
) -> None:
    value = value if there is None else value.transpose(np.argsort(there))
    put(to_tensor(grouped.expanded(value, groups) if groups > 1 else value))


def _copy(parameter: Any, value: torch.Tensor) -> None:
    # In place: storage, device, requires_grad and every reference to it survive.
    with torch.no_grad():
        parameter.copy_(value)
