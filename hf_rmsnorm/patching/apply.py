"""Doing what a plan says: absorb, scale, fold, widen, swap, centre."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from ..errors import PatchError
from ..modules import PartialRMSNorm, RMSNorm, subtract_mean
from ..probing import Center, Fold, fold_tensor, scale_tensor
from ..probing.facts import shift_term, with_unit
from ..probing.postnorm import width_attributes
from .changes import Changes, add_empty_parameters, become, get_tensor, set_attribute
from .plan import PatchPlan, Site


def fold_weights(model: nn.Module, plan: PatchPlan, changes: Changes) -> None:
    """Write the folded weights into the model: in place, but for the few that get longer."""
    widen_blocks(model, plan, changes)
    for name, value in folded_weights(plan, lambda name: get_tensor(model, name)):
        changes.write(model, name, value)
    changes.watch_loading(model)


def widen_blocks(model: nn.Module, plan: PatchPlan, changes: Changes) -> None:
    """Make room for one more hidden unit in the blocks that the plan names."""
    for widen in plan.widens:
        for name, axis in widen.grown.items():
            changes.extend(model, name, axis)
        for name, attribute in width_attributes(model, widen):
            module, change = changes.open(model, name)
            set_attribute(module, change, attribute, getattr(module, attribute) + 1)


def folded_weights(
    plan: PatchPlan, find: Callable[[str], Tensor | None]
) -> Iterator[tuple[str, Tensor]]:
    """`(name, new value)` of each tensor that `plan` changes and `find` has, in its own dtype.

    Biases' means are absorbed first, then scales, then writers are centred, then blocks get their
    extra unit (for which `find` has made room): in float64, with one rounding at the end.
    """
    absorbs = {name: absorb for absorb in plan.absorbs for name in absorb.names}
    scales = {writer: (s.parameter, axis) for s in plan.layerscales for writer, axis in s.writers}
    widens = {name: widen for widen in plan.widens if widen.norm for name in widen.names}
    folds: dict[str, list[Fold]] = {name: [] for name in (*absorbs, *scales)}
    for fold in plan.folds:
        folds.setdefault(fold.parameter, []).append(fold)
    for name in widens:
        folds.setdefault(name, [])

    def need(name: str, wanted: str) -> Tensor:
        found = find(wanted)
        if found is None:
            raise PatchError(f"{wanted} is needed to fold {name}, and is not there")
        return found

    for name, chain in folds.items():
        names = (name, *(alias for fold in chain[:1] for alias in fold.aliases))
        found = next(((n, t) for n in names if (t := find(n)) is not None), None)
        if found is None:
            continue
        tensor = found[1]
        value = tensor.detach().double()
        from_shard = functools.partial(need, name)
        if name in absorbs:
            mean = from_shard(absorbs[name].bias).detach().double().mean()
            value = value + shift_term(absorbs[name], name, from_shard, -mean)
        if name in scales:
            vector, axis = scales[name]
            value = scale_tensor(value, from_shard(vector), axis)
        for fold in chain:
            value = fold_tensor(value, fold)
        if name in widens:
            value = with_unit(widens[name], name, value, from_shard)
        yield found[0], value.to(tensor.dtype)
    for layerscale in plan.layerscales:
        if (vector_now := find(layerscale.parameter)) is not None:
            yield layerscale.parameter, torch.ones_like(vector_now)


def swap_norms(model: nn.Module, plan: PatchPlan, sites: list[Site], changes: Changes) -> None:
    """Turn the existing modules of `sites` into ours; parameters, hooks and flags stay."""
    new_class = PartialRMSNorm if plan.norm == "prmsnorm" else RMSNorm
    for site in sites:
        assert site.spec is not None
        module, change = changes.open(model, site.name)
        become(module, new_class, change)
        add_empty_parameters(module, change, "weight", "bias")
        wanted: dict[str, Any] = {
            "normalized_shape": site.spec.normalized_shape,
            "eps": site.spec.eps,
            "elementwise_affine": module.weight is not None,
            "p": plan.p,
            "weight_offset": site.spec.weight_offset,
            "casting": site.spec.casting,
            "channels_first": site.spec.channels_first,
            "autocast_float32": site.spec.autocast_float32,
            "autocast_output": site.autocast_output,
            "returns_weight_dtype": site.spec.returns_weight_dtype,
            "marks_state": plan.p < 1 or site.spec.kind != "rmsnorm",
        }
        for name, value in wanted.items():
            if not hasattr(module, name) or getattr(module, name) != value:
                set_attribute(module, change, name, value)
    _leave_fast_path(model, {site.name for site in sites}, changes)


def add_centers(model: nn.Module, plan: PatchPlan, changes: Changes) -> None:
    """Put the plan's mean subtractions where it says: on the modules that are there now, and on
    what comes into their places, such as the wrappers of adapters."""
    for center in plan.centers:
        module, change = changes.open(model, center.module)
        handle = _hook(module, center, change.hooks)
        paths = [p for p, m in model.named_modules(remove_duplicate=False) if m is module and p]
        for path in paths:
            owner, _, name = path.rpartition(".")
            parent, change = changes.open(model, owner)
            place = Place(name, center, change.hooks, handle if len(paths) == 1 else None)
            places = (*parent.__dict__.get(PLACES, ()), place)
            set_attribute(parent, change, PLACES, places)


PLACES = "_hf_rmsnorm_places"  # attribute of the parent of a centred module


@dataclass
class Place:
    """A child, by name, whose input or output is centred, whichever module it is."""

    name: str
    center: Center
    hooks: list[Callable[..., Any]]  # all there were, for who takes the patch back
    handle: RemovableHandle | None  # that of the module now there, if it is nowhere else
    watching: ClassVar[list[RemovableHandle]] = []

    def __post_init__(self) -> None:
        if not self.watching:
            self.watching.append(register_module_module_registration_hook(_take_place))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()


def _take_place(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """A hook on every registration of a module in another. The mean is taken off once, by the
    newcomer: it may not call the old one, and what it adds to that is centred, too."""
    if module is None or module is parent._modules.get(name):
        return
    for place in parent.__dict__.get(PLACES, ()):
        if place.name == name:
            new = _hook(module, place.center, place.hooks)
            if place.handle is not None:
                place.handle.remove()
                place.handle = new


def _hook(module: nn.Module, center: Center, noted: list[Callable[..., Any]]) -> RemovableHandle:
    hook = _CenterOutput(center) if center.side == "output" else _CenterInput(center)
    noted.append(hook)
    if center.side == "output":
        return module.register_forward_hook(hook)
    return module.register_forward_pre_hook(hook, with_kwargs=True)


class _CenterOutput:
    """A forward hook; a class, so that a patched model can be pickled."""

    def __init__(self, center: Center):
        self.key, self.axis = center.key, center.axis

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.key is None:
            return subtract_mean(output, self.axis)
        if isinstance(output, tuple) and not hasattr(output, "_fields"):
            assert isinstance(self.key, int)
            items = list(output)
            items[self.key] = subtract_mean(items[self.key], self.axis)
            return tuple(items)
        output[self.key] = subtract_mean(output[self.key], self.axis)
        return output


class _CenterInput:
    """A forward pre-hook for a positional argument or a keyword."""

    def __init__(self, center: Center):
        self.key, self.axis = center.key, center.axis

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(self.key, str):
            return args, {**kwargs, self.key: subtract_mean(kwargs[self.key], self.axis)}
        assert isinstance(self.key, int)
        centered = subtract_mean(args[self.key], self.axis)
        return (*args[: self.key], centered, *args[self.key + 1 :]), kwargs


def _leave_fast_path(model: nn.Module, swapped: set[str], changes: Changes) -> None:
    """Make `nn.TransformerEncoderLayer` call its norms: its fused eval path reads their weights
    and computes LayerNorm; a hook on a child turns that path off."""
    for name, parent in list(model.named_modules()):
        if isinstance(parent, nn.TransformerEncoderLayer):
            for child in ("norm1", "norm2"):
                if (path := f"{name}.{child}".strip(".")) in swapped:
                    module, change = changes.open(model, path)
                    change.hooks.append(_call_me)
                    module.register_forward_pre_hook(_call_me)
        elif isinstance(parent, nn.TransformerEncoder) and parent.use_nested_tensor:
            _, change = changes.open(model, name)
            set_attribute(parent, change, "use_nested_tensor", False)


def _call_me(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing but be there."""
