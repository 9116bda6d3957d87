"""A plan held against the model that it is for, before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from ..errors import PatchError
from ..probing import Fold
from ..recipes.check import shape_of
from .changes import get_tensor
from .plan import PatchPlan, check_plan

Shape = tuple[int, ...]


def check_fits(plan: PatchPlan, model: nn.Module, what: str = "the plan") -> None:
    """Nothing, where every name in `plan` is in `model`, with the axes and sizes that it gives.

    Raises:
        PatchError: naming `what` the plan is, the field, what was found and what is allowed.
    """
    check_plan(plan, what)
    modules = dict(model.named_modules(remove_duplicate=False))
    for fault in _faults(plan, modules, model):
        raise PatchError(
            f"{what} does not fit this {type(model).__name__}: {fault}. Plan again with plan_patch"
        )


def _faults(plan: PatchPlan, modules: dict[str, nn.Module], model: nn.Module) -> Iterator[str]:
    def shape(name: str) -> Shape | None:
        try:
            return shape_of(get_tensor(model, name))
        except AttributeError:
            return None

    for site in plan.sites:
        found = modules.get(site.name)
        if found is None:
            yield f"it has no module {site.name!r}"
            continue
        if site.verdict == "kept":
            continue
        name = type(found).__name__
        if name.removeprefix("FSDP") != site.class_name:
            yield f"{site.name} is a {name} there, not a {site.class_name}"
        wanted = site.spec.normalized_shape if site.spec else ()
        weight = shape(f"{site.name}.weight".lstrip("."))
        if weight is not None and wanted and weight[-len(wanted) :] != wanted:
            yield f"{site.name} has a weight of shape {list(weight)}, not {list(wanted)}"
    for center in plan.centers:
        if center.module not in modules:
            yield f"it has no module {center.module!r}, to subtract a mean at its {center.side}"
    for fold in plan.folds:
        yield from fold_faults(fold, shape(fold.parameter))
        yield from (f"it has no tensor {name!r}" for name in fold.aliases if shape(name) is None)
    for scale in plan.layerscales:
        length = _length(shape(scale.parameter))
        if length is None:
            yield f"{scale.parameter} is no vector there"
        for writer, axis in scale.writers:
            yield from _axis_faults(writer, shape(writer), axis, length)
    for absorb in plan.absorbs:
        if shape(absorb.bias) is None:
            yield f"it has no tensor {absorb.bias!r}"
        for weight_name, axis, bias in absorb.readers:
            length = _length(shape(bias))
            if length is None:
                yield f"{bias} is no vector there"
            yield from _axis_faults(weight_name, shape(weight_name), axis, length)
    for widen in plan.widens:
        hidden = _length(shape(f"{widen.up}.bias"))
        if hidden is None:
            yield f"{widen.up}.bias is no vector there"
        for side, axis in ((widen.up, widen.up_axis), (widen.down, widen.down_axis)):
            name = f"{side}.weight"
            yield from _axis_faults(name, shape(name), axis, hidden)
        for needed in (f"{widen.down}.bias", *(f"{widen.norm}.{n}" for n in ("weight", "bias"))):
            if shape(needed) is None and (widen.norm or needed == f"{widen.down}.bias"):
                yield f"it has no tensor {needed!r}"


def _length(shape: Shape | None) -> int | None:
    """Of a vector, which may have further axes of one."""
    size = math.prod(shape) if shape else 0
    return size if shape and size == max(shape) else None


def fold_faults(fold: Fold, shape: Shape | None) -> Iterator[str]:
    """Why a tensor of this shape cannot be folded so."""
    name, block = fold.parameter, fold.size * fold.inner
    yield from _axis_faults(name, shape, fold.axis)
    if shape is not None and fold.axis < len(shape):
        if not shape[fold.axis] or shape[fold.axis] % block:
            found = shape[fold.axis]
            yield f"axis {fold.axis} of {name} has {found} entries, no multiple of {block}"
        outer = shape[fold.axis] // block
        for i, j in fold.blocks or ():
            if i >= outer or j >= fold.inner:
                yield f"{name} has no block {(i, j)}, but {outer} times {fold.inner}"


def _axis_faults(
    name: str, shape: Shape | None, axis: int, length: int | None = None
) -> Iterator[str]:
    if shape is None:
        yield f"it has no tensor {name!r}"
    elif axis >= len(shape):
        yield f"{name} has {len(shape)} axes, not an axis {axis}"
    elif length is not None and shape[axis] != length:
        yield f"axis {axis} of {name} has {shape[axis]} entries, not {length}"
