"""Weights that a torch module computes from others: seen as they are computed, and written back.

``torch.nn.utils.parametrize`` computes them when they are asked for. The older ``prune``,
``weight_norm`` and ``spectral_norm`` compute them in a hook before each forward.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fwt.converters.rows.row import refuse

# The class of a hook, the names of what it computes from, and what takes it away.
_KINDS: tuple[tuple[type, tuple[str, ...], str], ...] = (
    (torch.nn.utils.prune.BasePruningMethod, ("orig", "mask"), "torch.nn.utils.prune.remove"),
    (WeightNorm, ("g", "v"), "torch.nn.utils.remove_weight_norm"),
    (SpectralNorm, ("orig", "u", "v"), "torch.nn.utils.remove_spectral_norm"),
)
_REMOVE = "torch.nn.utils.parametrize.remove_parametrizations"


@dataclasses.dataclass(frozen=True)
class Hook:
    """One of torch's hooks that compute a weight before each forward."""

    hook: Any
    name: str
    parts: tuple[str, ...]
    remove: str

    def weight(self, module: torch.nn.Module) -> torch.Tensor:
        """The weight, as it is computed in eval mode."""
        if isinstance(self.hook, SpectralNorm):
            return self.hook.compute_weight(module, do_power_iteration=False)
        if isinstance(self.hook, WeightNorm):
            return self.hook.compute_weight(module)
        return self.hook.apply_mask(module)

    def refresh(self, module: torch.nn.Module) -> None:
        """Computes the attribute that the last forward left."""
        with torch.set_grad_enabled(getattr(module, self.name).requires_grad):
            setattr(module, self.name, self.weight(module))

    def inverse(
        self, value: torch.Tensor, before: torch.Tensor, saved: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The parts that give a value; of those of ``spectral_norm`` the only ones that may."""
        if isinstance(self.hook, SpectralNorm):
            return {self.parts[0]: value}
        old = [saved[p] for p in self.parts]
        if isinstance(self.hook, WeightNorm):
            made = _norm_and_direction(value, self.hook.dim, old[1])
        else:
            made = _unmasked(value, before, *old)
        return dict(zip(self.parts, made, strict=True))


def hooks(module: torch.nn.Module, place: str, strict: bool = False) -> Iterator[Hook]:
    """The hooks of a module that compute a weight.

    Args:
        module: the module; those inside it are not looked at.
        place: its name, for errors.
        strict: whether any other hook is refused.
    """
    seen: set[str] = set()
    for hook in module._forward_pre_hooks.values():
        known = next((kind for kind in _KINDS if isinstance(hook, kind[0])), None)
        if known is None:
            if strict:
                raise refuse(place, "a forward hook can change what it does", "remove it")
            continue
        name = str(getattr(hook, "name", None) or getattr(hook, "_tensor_name", ""))
        _, ends, remove = known
        parts = tuple(f"{name}_{end}" for end in ends)
        if seen & {name, *parts}:
            raise refuse(
                place,
                f"two hooks compute {name!r}, or one what the other computes with: the value "
                "depends on the forward before",
                f"{remove}(layer, {name!r}) first",
            )
        seen |= {name, *parts}
        yield Hook(hook, name, parts, remove)


def folded(module: torch.nn.Module, place: str, strict: bool = False) -> dict[str, Any]:
    """The weights that a module computes, and None for what its hooks compute them from.

    Args:
        module: the module; those inside it are not looked at.
        place: its name, for errors.
        strict: whether any other hook is refused, since it can change what the module does.
    """
    out: dict[str, Any] = {}
    with torch.no_grad():
        if torch.nn.utils.parametrize.is_parametrized(module):
            how: Any = module.parametrizations
            before = {m: m.training for m in how.modules()}
            how.eval()
            try:
                out |= {name: getattr(module, name) for name in how}
            finally:
                for part, training in before.items():
                    part.training = training
        for hook in hooks(module, place, strict):
            out |= {hook.name: hook.weight(module), **dict.fromkeys(hook.parts)}
    if strict and (module._forward_hooks or "forward" in vars(module)):
        raise refuse(place, "a forward hook or a forward of its own changes what it does")
    return out


def computed(
    module: torch.nn.Module, place: str
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """The weights that a module computes, and the tensors that each is made of, by name."""
    held = {
        n: v for n, v in [*module._parameters.items(), *module._buffers.items()] if v is not None
    }
    parts = {h.name: {p: held[p] for p in h.parts if p in held} for h in hooks(module, place)}
    if torch.nn.utils.parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        for name, how in lists.items():
            parts[name] = {f"parametrizations.{name}.{n}": p for n, p in how.named_parameters()}
    found = folded(module, place) if parts else {}
    return {name: found[name] for name in parts}, parts


def writer(
    module: torch.nn.Module, name: str, before: torch.Tensor, place: str
) -> Callable[[torch.Tensor], None]:
    """A function that writes a computed weight into its parts, and checks that it comes out."""
    hook = next((h for h in hooks(module, place) if h.name == name), None)
    lists: Any = getattr(module, "parametrizations", {})  # which torch types as a module or tensor
    how: Any = None if hook else lists[name]
    owner = module if hook else how
    state = owner.state_dict()
    saved = {n: state[n].clone() for n in (hook.parts if hook else state)}

    def put(values: Mapping[str, torch.Tensor]) -> None:
        now = owner.state_dict()
        for n, value in values.items():
            now[n].copy_(value)
        if hook:
            hook.refresh(module)

    def inverse(value: torch.Tensor) -> dict[str, torch.Tensor]:
        if hook:
            return hook.inverse(value, before, saved)
        names = [n for n in saved if n.startswith("original") and "." not in n]
        if len(how) == 1 and isinstance(how[0], _WeightNorm):
            made = _norm_and_direction(value, how[0].dim, saved[names[1]])
            return dict(zip(names, made, strict=True))
        for part in reversed(how):
            # One without an inverse may let the value through, as a mask does.
            value = part.right_inverse(value) if hasattr(part, "right_inverse") else value
        many = [value] if isinstance(value, torch.Tensor) else list(value)
        return dict(zip(names, many, strict=True))

    def write(value: torch.Tensor) -> None:
        with torch.no_grad():
            if _equal(value, before.cpu()):
                return put(saved)
            why = "it comes out of it as another"
            try:
                put(inverse(value.to(before.device)))
                found = folded(module, place)[name].cpu()
                tolerance = 16 * torch.finfo(value.dtype).eps
                if torch.equal(found == 0, value == 0) and torch.allclose(
                    found, value, rtol=tolerance, atol=0, equal_nan=True
                ):
                    return None
            except (NotImplementedError, RuntimeError, ValueError, AttributeError) as error:
                why = str(error) or type(error).__name__
            put(saved)
        raise refuse(
            place,
            f"what it is computed from can't hold this value ({why})",
            f"{hook.remove if hook else _REMOVE}(layer, {name!r}) first",
        )

    return write


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def _norm_and_direction(
    value: torch.Tensor, dim: int, old: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as its norms and directions. One of zeros has no length to divide by: it keeps the
    direction that it had."""
    size = torch.norm_except_dim(value, 2, dim)
    return size, torch.where(size == 0, old, value)


def _unmasked(
    value: torch.Tensor, before: torch.Tensor, orig: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and the mask that give a value. Where it is zero under the mask, both stay; the
    mask lets through what is not."""
    hidden = (mask == 0) & (value == 0)
    same = value == before
    kept = torch.where(orig.isfinite(), orig, 0)  # 0 times what is not finite is NaN
    return (
        torch.where(hidden, kept, torch.where(same, orig, value)),
        torch.where(hidden | same, mask, 1),
    )
