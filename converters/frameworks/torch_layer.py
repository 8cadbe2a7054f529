"""One live layer of torch: its settings and its arrays."""

import functools
import inspect
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import torch
import torch.nn.utils.parametrize
from torch.nn.modules.dropout import _DropoutNd as _Dropout

from fwt.converters.frameworks import altered, torch_computed, torch_modules
from fwt.converters.rows import table
from fwt.converters.rows.row import TRAINING, Layer, refuse

# NumPy has no such dtypes: they cross as integers of the same width.
_AS_INTEGER = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    **{
        getattr(torch, f"float8_{kind}"): (torch.int8, getattr(ml_dtypes, f"float8_{kind}"))
        for kind in ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")
        if hasattr(torch, f"float8_{kind}")  # the last came with torch 2.7
    },
}


def class_of(kind: str) -> type | None:
    custom = table.CUSTOM["torch"].get(kind)
    return custom or torch_modules.OURS.get(kind) or getattr(torch.nn, kind, None)


@functools.cache
def defaults_of(cls: Any) -> dict[str, Any]:
    if issubclass(cls, torch.nn.RNNBase):  # whose signature tells nothing
        empty = inspect.Parameter.empty
        names: dict[str, Any] = {"input_size": empty, "hidden_size": empty, "num_layers": 1}
        names |= {"bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        if cls is torch.nn.LSTM:
            names["proj_size"] = 0
        return names | ({"nonlinearity": "tanh"} if cls is torch.nn.RNN else {})
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name: p.default for p in parameters}


def to_numpy(tensor: torch.Tensor, place: str) -> np.ndarray:
    """A tensor's values, whatever its dtype, device and layout in memory."""
    kinds = {
        "meta": (tensor.is_meta, "module.to_empty(device='cpu') and load_state_dict give it some"),
        "sparse": (tensor.layout != torch.strided, "to_dense() gives it some"),
        "quantised": (tensor.is_quantized, "dequantize() gives it some"),
    }
    for kind, (found, way) in kinds.items():
        if found:
            raise refuse(place, f"a {kind} tensor has no plain values: {way}")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()  # bits that NumPy has no place for
    if tensor.dtype in _AS_INTEGER:
        integer, dtype = _AS_INTEGER[tensor.dtype]
        return tensor.contiguous().view(integer).numpy().view(dtype)
    return tensor.numpy()


def to_tensor(value: Any) -> torch.Tensor:
    """An array as a tensor of its own memory."""
    value = np.array(value, order="C")
    for dtype, (integer, numpy_dtype) in _AS_INTEGER.items():
        if value.dtype == numpy_dtype:
            width = np.int16 if integer is torch.int16 else np.int8
            return torch.from_numpy(value.view(width)).view(dtype)
    return torch.from_numpy(value)


def layer_of(name: str, module: torch.nn.Module) -> Layer:
    parametrized = torch.nn.utils.parametrize.is_parametrized(module)
    cls: Any = type(module).__bases__[0] if parametrized else type(module)
    kind = cls.__name__
    place = f"{name} ({kind})"
    found: Any = class_of(kind)
    if cls is not found:
        raise refuse(
            place,
            f"{cls.__module__}.{kind} is a custom module, which can't be converted",
            "converters.register(row) makes it known",
        )
    for key, parameter in module.named_parameters():
        check_initialised(parameter, f"{name}.{key}")
    whole = is_composite(cls)
    parameters = dict(module.named_parameters(recurse=whole))
    buffers = dict(module.named_buffers(recurse=whole))
    arrays: dict[str, Any] = {
        **parameters,
        **buffers,
        **torch_computed.folded(module, place, strict=True),
    }
    arrays = {k: v for k, v in arrays.items() if v is not None}
    defaults = defaults_of(cls)
    settings = _composite(module, place)
    for key in defaults:
        if key in TRAINING["torch"] or key in settings:
            continue
        if key == "bias" and isinstance(getattr(module, key, None), torch.Tensor | None):
            settings[key] = module.bias is not None
        elif hasattr(module, key):
            settings[key] = getattr(module, key)
    if kind == "RMSNorm" and settings.get("eps", 0) is None:
        doubles = any(v.dtype == torch.float64 for v in module.parameters())
        settings["eps"] = torch.finfo(torch.float64 if doubles else torch.float32).eps
    arrays = {k: to_numpy(v, f"{name}.{k}") for k, v in arrays.items()}
    if table.CUSTOM["torch"].get(kind) is None:
        _check_as_new(module, cls, settings, place)
    known = {k: v for k, v in defaults.items() if v is not inspect.Parameter.empty}
    return Layer(name, kind, settings, arrays, known)


def _check_as_new(module: torch.nn.Module, cls: Any, settings: dict[str, Any], place: str) -> None:
    """Raises where a module, or one inside it, computes otherwise than its settings say."""
    but = {*settings, *TRAINING["torch"], "training", "head_dim"}
    if getattr(module, "padding_mode", "zeros") == "zeros":
        but.add("_reversed_padding_repeated_twice")
    for part in module.modules():
        altered.check_methods(part, place)
        if shadowed := sorted(set(part._parameters) & set(vars(part))):
            raise refuse(place, f"its {shadowed[0]} stands before the parameter of that name")
    everywhere: Any = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        raise refuse(place, "a forward hook of all modules can change what it does", "remove it")
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            new = cls(**settings)
    except (TypeError, ValueError, RuntimeError, AssertionError):
        return  # its settings are no arguments, which the walk refuses or knows
    parts = dict(module.named_modules())
    for inside, part in new.named_modules():
        live = parts.get(inside)
        if type(part) in (type(live), cls) and not isinstance(part, _Dropout):
            altered.check_as_new(live, part, place, but)


def is_composite(cls: type) -> bool:
    return issubclass(cls, torch.nn.MultiheadAttention | torch.nn.TransformerEncoderLayer)


def _composite(module: Any, place: str) -> dict[str, Any]:
    """The settings of a module that holds others, which it keeps under other names."""
    for name, part in module.named_modules() if is_composite(type(module)) else ():
        changed = part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
        if part is not module and (changed or torch.nn.utils.parametrize.is_parametrized(part)):
            raise refuse(place, f"a hook or parametrization of its {name!r} changes what it does",
                         "remove it")  # fmt: skip
    if isinstance(module, torch.nn.MultiheadAttention):
        return {
            "bias": module.in_proj_bias is not None,
            "add_bias_kv": module.bias_k is not None,
        }
    if isinstance(module, torch.nn.TransformerEncoderLayer):
        stock = {"self_attn": torch.nn.MultiheadAttention, "linear1": torch.nn.Linear,
                 "linear2": torch.nn.Linear, "norm1": torch.nn.LayerNorm,
                 "norm2": torch.nn.LayerNorm}  # fmt: skip
        for part, cls in stock.items():
            if type(getattr(module, part)) is not cls:
                raise refuse(place, f"its {part} is no {cls.__name__}")
        if module.norm1.eps != module.norm2.eps or module.self_attn.add_zero_attn:
            raise refuse(place, "its parts have settings that the layer can't say")
        names = {torch.nn.functional.relu: "relu", torch.nn.functional.gelu: "gelu"}
        act: Any = module.activation
        name = names.get(act)
        if isinstance(act, torch.nn.ReLU):
            name = "relu"
        elif isinstance(act, torch.nn.GELU) and act.approximate == "none":
            name = "gelu"
        if name is None:
            raise refuse(place, f"activation={act!r}: only relu and gelu")
        return {
            "d_model": module.linear1.in_features,
            "nhead": module.self_attn.num_heads,
            "dim_feedforward": module.linear1.out_features,
            "dropout": module.dropout.p,
            "activation": name,
            "layer_norm_eps": module.norm1.eps,
            "batch_first": module.self_attn.batch_first,
            "bias": module.linear1.bias is not None,
        }
    return {}


def check_initialised(parameter: Any, place: str) -> None:
    if isinstance(parameter, torch.nn.UninitializedParameter | torch.nn.UninitializedBuffer):
        raise refuse(place, "a lazy module has no weights yet", "call the model once")
