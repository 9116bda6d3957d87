"""Plans from a shallow twin, for models too large to probe, and folding a checkpoint by shards."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import PatchError
from ..names import layer_pattern
from ..probing import Center, Fold, LayerScale
from ..probing.facts import Absorb, Widen, extended
from ..recipes import find_norms
from ..recipes.check import shape_of
from .apply import folded_weights
from .check import check_fits, fold_faults
from .plan import PatchPlan, Site, check_plan

Item = TypeVar("Item", Site, Fold, Center, LayerScale)
Tie = TypeVar("Tie", Absorb, Widen)


def fit_plan(plan: PatchPlan, model: nn.Module) -> PatchPlan:
    """`plan`, made on a twin of `model` with fewer layers, written out for all layers of `model`.

    The twin has the same config but for its depth, and must cover every type of layer the model
    has. What the probe finds depends on the structure, not on the weights, so random ones will do
    (norm weights and biases too); only which biases' means are worth absorbing is measured on the
    weights. `model` may be on the meta device: only its names are read.

    Raises:
        PatchError: the twin's layers disagree among themselves, or the names do not fit.

    Example:
        >>> twin = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))  # doctest: +SKIP
        >>> plan = fit_plan(plan_patch(twin, inputs=inputs), model)  # doctest: +SKIP
    """
    check_plan(plan)
    modules = dict(model.named_modules())
    tensors = [
        *dict(model.named_parameters(remove_duplicate=False)),
        *dict(model.named_buffers(remove_duplicate=False)),
    ]
    depth = _depth(site.name for site in plan.sites)
    sites = _spread(plan.sites, lambda site: site.name, modules, depth)
    missing = [name for name in find_norms(model) if name not in {site.name for site in sites}]
    if missing:
        raise PatchError(
            f"{missing[0]} is a norm site of the model that the plan does not know: plan on a twin "
            "that has every type of layer"
        )
    fitted = replace(
        plan,
        sites=sites,
        absorbs=_repeat(plan.absorbs, tensors, optional=True),
        widens=_repeat(plan.widens, modules),
        layerscales=_spread(plan.layerscales, lambda scale: scale.parameter, tensors, depth),
        folds=_spread(plan.folds, lambda fold: fold.parameter, tensors, depth),
        centers=_spread(plan.centers, lambda center: center.module, modules, depth),
    )
    check_fits(fitted, model)
    return fitted


def fold_shard(
    shard: Mapping[str, Tensor],
    plan: PatchPlan,
    read: Callable[[str], Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a checkpoint shard that `plan` changes, changed.

    Args:
        shard: name -> tensor, named as in the model's state dict.
        plan: of the whole model.
        read: finds a tensor of another shard by name; wanted where a change depends on other
            tensors: LayerScale's vector, a norm's weight and bias, the weights that read it.

    Raises:
        PatchError: such a tensor, and neither the shard nor `read` has it; a plan that is not
            valid, or gives axes and sizes that the shard's tensors do not have.
    """
    check_plan(plan)
    for fold in plan.folds:
        for name in (fold.parameter, *fold.aliases):
            if name in shard and (faults := list(fold_faults(fold, shape_of(shard[name])))):
                raise PatchError(f"the plan does not fit this shard: {faults[0]}")
    grown = {name: axis for widen in plan.widens for name, axis in widen.grown.items()}

    def find(name: str) -> Tensor | None:
        tensor = shard[name] if name in shard else read(name) if read else None
        return tensor if tensor is None or name not in grown else extended(tensor, grown[name])

    return {name: value for name, value in folded_weights(plan, find) if name in shard}


def _indices(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.split(".") if part.isdigit())


def _fill(pattern: str, indices: tuple[str, ...]) -> str:
    rest = iter(indices)
    return ".".join(next(rest) if part == "*" else part for part in pattern.split("."))


def _stem(pattern: str) -> str:
    """The pattern up to its last layer number: what must exist in every layer alike."""
    return pattern[: pattern.rindex("*") + 1] if "*" in pattern else ""


def _depth(names: Iterable[str]) -> dict[str, set[tuple[str, ...]]]:
    """Which layers the twin has, by stem."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for name in names:
        found.setdefault(_stem(layer_pattern(name)), set()).add(_indices(name))
    return found


def _rename(item: Any, change: Callable[[str], str]) -> Any:
    if isinstance(item, Site):
        return replace(item, name=change(item.name), reason=_general(item), leftover=None)
    if isinstance(item, Absorb):
        readers = tuple((change(w), axis, change(bias)) for w, axis, bias in item.readers)
        return Absorb(change(item.bias), readers)
    if isinstance(item, Widen):
        norm, up, down = map(change, (item.norm, item.up, item.down))
        return replace(item, norm=norm, up=up, down=down)
    if isinstance(item, Center):
        serves = tuple(dict.fromkeys(layer_pattern(name) for name in item.serves))
        return replace(item, module=change(item.module), serves=serves)
    if isinstance(item, LayerScale):
        writers = tuple((change(name), axis) for name, axis in item.writers)
        return LayerScale(change(item.parameter), writers)
    aliases = tuple(change(name) for name in item.aliases)
    return replace(item, parameter=change(item.parameter), aliases=aliases)


def _general(site: Site) -> str:
    """The reason without the names and numbers of one layer."""
    if site.verdict == "exact":
        return site.reason
    return " ".join(map(layer_pattern, re.split("[,:]", site.reason)[0].split()))


def _repeat(
    items: Iterable[Tie], targets: Iterable[str], optional: bool = False
) -> tuple[Tie, ...]:
    """Items that tie several layers together, in every layer of the target; `optional` ones only
    where all the names they give exist."""
    known = set(targets)
    by_pattern: dict[str, list[str]] = {}
    for name in known:
        by_pattern.setdefault(layer_pattern(name), []).append(name)
    templates: dict[str, set[Tie]] = {}
    for item in items:
        base = item.bias if isinstance(item, Absorb) else item.up
        relative = _rename(item, functools.partial(_relative, base=base))
        templates.setdefault(layer_pattern(base), set()).add(relative)
    found: list[Tie] = []
    for pattern, alike in templates.items():
        if len(alike) > 1:
            raise PatchError(
                f"the layers of the twin disagree about {pattern}, so the plan does not carry over "
                "to another depth: plan on the model itself"
            )
        for target in sorted(by_pattern.get(pattern, ())):
            filled, missing = _in_layer(next(iter(alike)), _indices(target), known)
            if not missing:
                found.append(filled)
            elif not optional:
                raise PatchError(f"the plan names {missing[0]}, which the model does not have")
    return tuple(found)


def _in_layer(template: Tie, indices: tuple[str, ...], known: set[str]) -> tuple[Tie, list[str]]:
    """The template for the layer with these numbers, and the names it gives that do not exist."""
    missing: list[str] = []

    def fill(name: str) -> str:
        rest = iter(indices)
        filled = ".".join(
            str(int(next(rest)) + int(part[1:])) if part.startswith("*") else part
            for part in name.split(".")
        )
        if filled not in known:
            missing.append(filled)
        return filled

    return _rename(template, fill), missing


def _relative(name: str, base: str) -> str:
    """Layer numbers as `*+1`, counted from those of `base`, which has its own in that stack."""
    stack = _stem(layer_pattern(base))
    if not stack:
        return name
    if _stem(layer_pattern(name)) != stack:
        raise PatchError(
            f"the plan ties {base} to {name}, outside its layers, so it does not carry over to "
            "another depth: plan on the model itself"
        )
    offsets = iter(int(j) - int(i) for i, j in zip(_indices(base), _indices(name), strict=True))
    return ".".join(f"*{next(offsets):+d}" if p.isdigit() else p for p in name.split("."))


def _spread(
    items: Iterable[Item],
    name_of: Callable[[Item], str],
    targets: Iterable[str],
    depth: Mapping[str, set[tuple[str, ...]]],
) -> tuple[Item, ...]:
    """Each item for every layer of the target, in the order of the twin's patterns."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(layer_pattern(name_of(item)), []).append(item)
    by_pattern: dict[str, list[str]] = {}
    for name in targets:
        by_pattern.setdefault(layer_pattern(name), []).append(name)
    spread: list[Item] = []
    for pattern, group in groups.items():
        alike = list(dict.fromkeys(_rename(item, layer_pattern) for item in group))
        seen = {_indices(name_of(item)) for item in group}
        if len(group) != len(alike) * len(seen) or seen < depth.get(_stem(pattern), seen):
            raise PatchError(
                f"the layers of the twin disagree about {pattern}, so the plan does not carry over "
                "to another depth: plan on the model itself"
            )
        if pattern not in by_pattern:
            raise PatchError(f"the plan names {pattern}, which the model does not have")
        for name in by_pattern[pattern]:
            fill = functools.partial(_fill, indices=_indices(name))
            spread += [_rename(item, fill) for item in alike]
    return tuple(spread)
