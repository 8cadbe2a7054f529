"""Any torch module as a net of layers, by ``torch.export``.

The modules that have a row stay whole, as many calls as they have; what is computed between them
becomes layers by the rules of ``torch_operations``. Open ``net_of`` first.
"""

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fwt.converters import judge
from fwt.converters.frameworks import (
    torch_calls,
    torch_inputs,
    torch_operations,
    torch_sizes,
    torch_state,
)
from fwt.converters.frameworks.torch_values import Reader, Shared
from fwt.converters.rows.row import Layer, refuse
from fwt.converters.walk.net import Net
from fwt.converters.walk.tensors import Value


def example_inputs(model: torch.nn.Module, input_shape: Any) -> tuple[torch.Tensor, ...]:
    """Tensors for a batch of two, from the shapes of the inputs or from examples of them."""
    return torch_inputs.example_inputs(model, input_shape, at_inference)


@contextlib.contextmanager
def at_inference(model: torch.nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards each module of it is as it was."""
    was = {m: torch_state.held(m) for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, before in was.items():
            torch_state.put_back(module, before)


# The identity at inference, of which torch.export tells nothing.
_SILENT: Any = (torch.nn.Identity, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d,
                torch.nn.AlphaDropout, torch.nn.FeatureAlphaDropout)  # fmt: skip


def _alias(input: Any) -> Any:
    return torch.ops.aten.alias(input) if isinstance(input, torch.Tensor) else input


@contextlib.contextmanager
def _traceable(model: torch.nn.Module) -> Iterator[None]:
    """Without what a TransformerEncoder does at inference for speed alone, and without looking
    whether the entries of a mask are those of a causal one, which changes no result either. What
    does nothing at inference leaves an operation, so that it stays a layer."""
    transformer: Any = torch.nn.modules.transformer
    look, fast = transformer._detect_is_causal_mask, torch.backends.mha.get_fastpath_enabled()
    logger = logging.getLogger("torch")
    level = logger.level
    silent = [m for m in model.modules() if type(m) in _SILENT and "forward" not in vars(m)]
    for module in silent:
        module.forward = _alias
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: False
    torch.backends.mha.set_fastpath_enabled(False)
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.no_grad(), judge.usual_products():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module in silent:
            vars(module).pop("forward", None)
        transformer._detect_is_causal_mask = look
        torch.backends.mha.set_fastpath_enabled(fast)
        logger.setLevel(level)


def exported(model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> Any:
    """The operations of a model, for any batch, without those in place."""
    batch = torch.export.Dim("batch")
    shapes: tuple[Any, ...] = tuple({0: batch} for _ in inputs)
    try:
        kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    except ValueError as error:
        raise refuse(type(model).__name__, f"its forward has no signature ({error})",
                     "give the module that it was made of") from error  # fmt: skip
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        first = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        shapes = (*shapes[:first], shapes[first:])
    try:
        with _traceable(model):
            program = torch.export.export(model, tuple(inputs), dynamic_shapes=shapes, strict=False)
            program = program.run_decompositions({})
            for _ in range(3):  # what one is made of may be made of others
                if parted := _parted(model, program):
                    program = program.run_decompositions(parted)
            return program
    except Exception as error:  # torch.export's share no class, and all mean that it can't
        raise refuse(type(model).__name__, *torch_inputs.explained(model, error)) from error


def _parted(model: torch.nn.Module, program: Any) -> dict[Any, Any]:
    """How torch computes with others each operation that no rule reads, where it says so: those of
    another name, such as torch.concat, and those made of several."""
    known: set[Any] = set()
    unknown: set[Any] = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and hasattr(node.target, "_schema"):
            inside = torch_calls.in_layer(model, node) or torch_operations.is_known(node)
            (known if inside else unknown).add(node.target)
    if not unknown - known:
        return {}
    table = torch.export.default_decompositions()
    return {target: table[target] for target in unknown - known if target in table}


def net_of(
    model: torch.nn.Module,
    inputs: Sequence[torch.Tensor],
    written: Callable[[Net], Net] = lambda net: net,
) -> Net:
    """The layers of a model in an order in which each follows what it takes.

    Args:
        model: any module, in eval mode.
        inputs: an example of each of its inputs, whose first axis is the batch.
        written: gives the net as the framework has it that it goes to.

    Returns:
        The net, whose outputs have the form that the model gives: one, several or by key.
    """
    for module in model.modules():
        torch_calls.check_hooks(module, model)
    net, by_sizes, rolls = _with_shared(model, inputs)

    def read(inputs: Sequence[torch.Tensor]) -> Net:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return written(_with_shared(model, inputs)[0])

    if by_sizes or torch_sizes.asks(model):
        net.fixed = torch_sizes.fixed(model, inputs, net, rolls, written, read)
    return net


def _with_shared(model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> tuple[Net, bool, bool]:
    """What ``_read`` gives, with the arrays between the layers that several of these take."""
    program, shared = exported(model, inputs), set[str]()
    while True:
        try:
            return _read(model, inputs, program, frozenset(shared))
        except Shared as found:
            shared.add(found.path)


def _read(
    model: torch.nn.Module, inputs: Sequence[torch.Tensor], program: Any, shared: frozenset[str]
) -> tuple[Net, bool, bool]:
    """The net of an exported program, whether it may follow from the sizes of the example, and
    whether it rolls."""
    signature = program.graph_signature
    held = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**program.state_dict, **program.constants}
    nodes = list(program.graph.nodes)
    own = {held[n.name]: tensors[held[n.name]] for n in nodes if n.name in held}
    reader = Reader(model, own, shared)
    given = iter(inputs)
    shapes: dict[str, tuple[int, ...]] = {}
    for node in nodes:
        if node.op != "placeholder":
            continue
        if node.name in held:
            reader.hold(node, held[node.name])
            continue
        shape = tuple(next(given).shape[1:])
        name = reader.unique(node.name)
        shapes[name] = shape
        reader.batch = reader.batch or node.meta["val"].shape[0].node.expr
        reader.env[node] = Value(name, (None, *shape), tuple((i,) for i in range(len(shape) + 1)))
    calls = torch_calls.Calls(reader, nodes)
    for node in nodes:
        if node.op == "call_function" and not calls.taken(node):
            torch_operations.read(reader, node)
    names = [s.arg.name for s in signature.output_specs if s.kind.name == "USER_OUTPUT"]
    if len(names) < len(signature.output_specs):
        kind = next(s.kind.name for s in signature.output_specs if s.kind.name != "USER_OUTPUT")
        raise refuse(type(model).__name__, f"it changes what it holds as it runs ({kind.lower()})")
    if "" in names or not all(n in {x.name for x in nodes} for n in names):
        raise refuse(type(model).__name__, "one of its outputs is no tensor", "leave it out")
    by_name = {n.name: n for n in nodes}
    ends = [reader.at_end(reader.dynamic(by_name[n], "the output"), "the output") for n in names]
    outputs = torch.utils._pytree.tree_unflatten([v.name for v in ends], program.call_spec.out_spec)
    used = _used(reader.layers, [v.name for v in ends])
    if ties := _ties(reader, used):
        path, (one, other) = next(iter(ties.items()))
        if path not in shared:
            raise Shared(path)
        way = (
            "give each its own, module.weight = torch.nn.Parameter(module.weight.detach().clone())"
        )
        if not {one, other} <= dict(model.named_modules()).keys():
            way += ", or let the first state of a loop follow from the input, h + 0 * x[:, 0, :1]"
        what = f"it and {other} share the array {path}, which linear layers and tables alone can"
        raise refuse(one, what, way)
    _report_unused(model, reader, used)
    net = Net(used, dict(shapes), _form(outputs, type(model).__name__))
    return net, reader.by_sizes, reader.rolls


def _form(outputs: Any, place: str) -> Any:
    """One name, a tuple of names or a dict of them."""
    if isinstance(outputs, Mapping) and all(isinstance(v, str) for v in outputs.values()):
        return dict(outputs)
    if isinstance(outputs, list | tuple) and all(isinstance(v, str) for v in outputs):
        return tuple(outputs)
    if isinstance(outputs, str):
        return outputs
    raise refuse(place, "its outputs are nested", "give one tensor, a tuple or a dict of them")


def _used(layers: list[Layer], ends: Sequence[str]) -> list[Layer]:
    needed = set(ends)
    for layer in reversed(layers):
        if layer.name in needed:
            needed |= {*layer.inputs, layer.of}
    return [x for x in layers if x.name in needed]


def _report_unused(model: torch.nn.Module, reader: Reader, layers: list[Layer]) -> None:
    """Warns of weights that no output follows from, which the new model lacks."""
    kept = {x.name for x in layers}
    arrays = {p for name, paths in reader.paths.items() if name in kept for p in paths}
    left = [n for n, _ in model.named_parameters() if n not in arrays]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        warnings.warn(
            f"{left[0]}{more} of {type(model).__name__} take no part in its output, so the new "
            "model has no such weights",
            stacklevel=4,
        )


def _ties(reader: Reader, layers: list[Layer]) -> dict[str, tuple[str, str]]:
    """By array, two layers that have it, unless each has other entries of it; a second call of one
    layer has none of its own."""
    holders: dict[str, list[str]] = {}
    found: dict[str, tuple[str, str]] = {}
    for layer in layers:
        for path in () if layer.of else sorted(reader.paths.get(layer.name, ())):
            for other in holders.setdefault(path, []):
                mine, theirs = (reader.parts.get((n, path)) for n in (layer.name, other))
                if mine is None or theirs is None or np.intersect1d(mine, theirs).size:
                    found.setdefault(path, (layer.name, other))
            holders[path].append(layer.name)
    return found
