"""Any torch module as a net of layers, by ``torch.export``.

The modules that have a row stay whole, as many calls as they have; what is computed between them
becomes layers by the rules of ``torch_operations``. Open ``net_of`` first.
"""

import contextlib
import inspect
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fwt._types import ConversionError
from fwt.converters import judge
from fwt.converters.frameworks import torch_calls, torch_operations, torch_sizes, torch_state
from fwt.converters.frameworks.torch_values import Reader
from fwt.converters.rows.row import Layer, refuse
from fwt.converters.walk.net import Net
from fwt.converters.walk.tensors import Value

_INPUTS = "the shape of its input without the batch axis, such as (3, 32, 48), or a list "


def example_inputs(model: torch.nn.Module, input_shape: Any) -> tuple[torch.Tensor, ...]:
    """Tensors for a batch of two, from the shapes of the inputs or from examples of them.

    What takes whole numbers, as an Embedding does, is found by trying.
    """
    given = input_shape if isinstance(input_shape, list | tuple) else (input_shape,)
    if given and all(isinstance(x, torch.Tensor | np.ndarray) for x in given):
        floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
        try:
            tensors = [torch.as_tensor(x) for x in given]
        except TypeError as error:
            raise ConversionError(f"an example of an input is no tensor ({error})") from error
        if any(x.is_complex() or x.layout != torch.strided for x in tensors):
            raise ConversionError("an example of an input is a dense tensor of real numbers")
        # NumPy's numbers are float64 unless told otherwise.
        tensors = [x.to(floats[0]) if floats and x.dtype == torch.float64 else x for x in tensors]
        if any(x.ndim < 1 or not len(x) for x in tensors):
            raise ConversionError("an example of an input has a batch axis, and at least one entry")
        return tuple(torch.cat([x, x])[:2] for x in tensors)
    shapes = given if given and isinstance(given[0], list | tuple) else (given,)
    if input_shape is None:
        raise ConversionError(
            f"{type(model).__name__} is no torch.nn.Sequential, so its forward is followed on an "
            f"example of its input: give input_shape=, {_INPUTS}of them, or one tensor each, batch "
            "first"
        )
    for shape in shapes:
        if not isinstance(shape, list | tuple) or not all(_is_size(s) for s in shape):
            raise ConversionError(f"input_shape={input_shape!r}: expected {_INPUTS}of them")
    failed: Exception | None = None
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    kinds = [floats[0] if floats else torch.float32, torch.int64]
    if any(isinstance(m, torch.nn.Embedding | torch.nn.EmbeddingBag) for m in model.modules()):
        kinds.reverse()
    for dtypes in itertools.product(kinds, repeat=len(shapes)):
        inputs = tuple(
            torch.zeros(2, *shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        try:
            with at_inference(model), torch.no_grad():
                model(*inputs)
            return inputs
        except Exception as error:  # noqa: BLE001 - a user's module may raise any class; the next may fit
            failed = failed or error
    raise ConversionError(
        f"the model can't be run on input_shape={input_shape!r}: {_first_line(failed)}"
    ) from failed


def _is_size(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def _first_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


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
        raise refuse(
            type(model).__name__,
            f"torch.export can't follow it ({_first_line(error)})",
            "what it does may not depend on the values of its input, nor on how many examples "
            "there are (x.shape[0] for len(x), which is a fixed number)",
        ) from error


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


def net_of(model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> Net:
    """The layers of a model in an order in which each follows what it takes.

    Args:
        model: any module, in eval mode.
        inputs: an example of each of its inputs, whose first axis is the batch.

    Returns:
        The net, whose outputs have the form that the model gives: one, several or by key.
    """
    for module in model.modules():
        torch_calls.check_hooks(module, model)
    net, by_sizes = _read(model, inputs, exported(model, inputs))

    def read(inputs: Sequence[torch.Tensor]) -> Net:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _read(model, inputs, exported(model, inputs))[0]

    if by_sizes or torch_sizes.asks(model):
        net.fixed = torch_sizes.fixed(model, inputs, net, read)
    return net


def _read(model: torch.nn.Module, inputs: Sequence[torch.Tensor], program: Any) -> tuple[Net, bool]:
    """The net of an exported program, and whether it may follow from the sizes of the example."""
    signature = program.graph_signature
    held = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**program.state_dict, **program.constants}
    nodes = list(program.graph.nodes)
    reader = Reader(model, {held[n.name]: tensors[held[n.name]] for n in nodes if n.name in held})
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
    _report_unused(model, reader, used)
    _check_ties(reader, used)
    return Net(used, dict(shapes), _form(outputs, type(model).__name__)), reader.by_sizes


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


def _check_ties(reader: Reader, layers: list[Layer]) -> None:
    """Raises for an array that two layers have, unless each has other entries of it; a second call
    of one layer has none of its own."""
    holders: dict[str, list[str]] = {}
    for layer in layers:
        for path in () if layer.of else sorted(reader.paths.get(layer.name, ())):
            for other in holders.setdefault(path, []):
                mine, theirs = (reader.parts.get((n, path)) for n in (layer.name, other))
                if mine is None or theirs is None or np.intersect1d(mine, theirs).size:
                    raise refuse(layer.name, f"it and {other} share the array {path}",
                                 "give each its own, parameter.clone()")  # fmt: skip
            holders[path].append(layer.name)
