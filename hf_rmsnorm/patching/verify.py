"""Running a plan on copies of the model before the model itself is touched."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from ..errors import VerificationError
from ..probing import plain_copy, relative_change, run_outputs
from ..probing.outputs import are_sound, in_mode, model_place
from ..probing.set_up import require_finite
from .plan import PatchPlan

logger = logging.getLogger(__name__)

Inputs = Sequence[Mapping[str, Any]]
Apply = Callable[[nn.Module, PatchPlan], None]

EXACT = 1e-9
EXACT_WITH_FLOAT32_INSIDE = 1e-6
ROUNDING_FACTOR = 5.0


@dataclass(frozen=True)
class Measurement:
    """How far outputs moved on the probe inputs, as largest difference over largest value.

    Attributes:
        exact_part: the exact part of the patch alone, in `precision`: what is left is rounding.
        precision: the dtype of that comparison, `"float64"` where the model runs in it.
        exact_part_own: the same in the model's own dtype, against the `precision` outputs.
        rounding: the unpatched model in its own dtype, against the same outputs.
        change: the whole patch, approximate sites included, in the model's own dtype.
    """

    exact_part: float
    precision: str
    exact_part_own: float
    rounding: float
    change: float

    def __str__(self) -> str:
        return (
            f"outputs on the probe inputs: exact part off by {self.exact_part:.1e} in "
            f"{self.precision}; by {self.exact_part_own:.1e} in the model's dtype (unpatched "
            f"{self.rounding:.1e}); whole patch moves them by {self.change:.1e}"
        )


def exact_part(plan: PatchPlan) -> PatchPlan:
    """What of `plan` keeps the function: folds, centres, and RMSNorm where the mean is zero."""
    sites = tuple(
        replace(site, verdict="exact" if site.mean_free and site.verdict != "kept" else "kept")
        for site in plan.sites
    )
    return replace(plan, norm="rmsnorm", p=1.0, sites=sites)


def verify(model: nn.Module, plan: PatchPlan, inputs: Inputs, apply: Apply) -> Measurement:
    """Measure `plan` on copies of `model`; the model is not touched.

    Raises:
        VerificationError: the exact part moves the outputs by more than rounding.
    """
    precise, (dtype, _) = getattr(torch, plan.precision), model_place(model)
    logger.info("verifying on copies, in %s and %s", plan.precision, str(dtype).split(".")[-1])

    def copied(dtype: torch.dtype) -> nn.Module:
        return plain_copy(model, dtype, every_adapter=True)

    def outputs(of: nn.Module) -> list[Tensor]:
        return run_outputs(of, inputs, plan.hold)

    original = copied(precise)
    try:
        with _float32_seen() as narrow:
            truth = outputs(original)
    except Exception:  # what casts to float32 by itself, such as open_clip's norms
        if precise != torch.float64:
            raise
        precise, original, narrow = torch.float32, copied(torch.float32), []
        truth = outputs(original)
    own = outputs(copied(dtype))
    rounding = relative_change(truth, own)
    if precise != torch.float64:
        tolerance = 20 * torch.finfo(precise).eps
    elif narrow:
        tolerance = max(EXACT_WITH_FLOAT32_INSIDE, ROUNDING_FACTOR * rounding)
    else:
        tolerance = EXACT

    exact = exact_part(plan)
    twin = copied(precise)
    apply(twin, exact)
    error = relative_change(truth, outputs(twin))
    if not error <= tolerance:
        where = _first_difference(original, twin, exact, inputs, tolerance)
        raise VerificationError(
            f"the exact part of the patch moves the outputs by {error:.1e} (allowed: "
            f"{tolerance:.0e}), first at {where}. The model is unchanged. Exclude that site, or "
            'use strategy="direct", and please report this model'
        )
    del original, twin

    twin = copied(dtype)
    apply(twin, exact)
    after = outputs(twin)
    own_error = relative_change(truth, after)
    # in the dtype of the comparison itself the unpatched model has no rounding to show
    allowed = tolerance if dtype == precise else ROUNDING_FACTOR * rounding
    allowed += 10 * torch.finfo(dtype).eps
    if not own_error <= allowed:
        raise VerificationError(
            f"the exact part of the patch is off by {own_error:.1e} in {dtype}, the unpatched "
            f"model by {rounding:.1e} (allowed: {allowed:.1e}). The model is unchanged"
        )
    if exact != plan:
        twin = copied(dtype)
        apply(twin, plan)
        after = outputs(twin)
    change = relative_change(own, after)
    name = str(precise).removeprefix("torch.")
    return Measurement(error, name, own_error, rounding, change)


def verify_in_place(
    model: nn.Module,
    plan: PatchPlan,
    inputs: Inputs,
    twin: Measurement,
    apply: Apply,
    undo: Callable[[nn.Module], object],
    depth: float,
) -> Measurement:
    """Apply `plan` to `model` itself, holding its outputs in its own dtype against those before.

    For models of which a thin twin was probed and verified in float64: this sees every layer, with
    its real weights, and makes no copy.

    Args:
        twin: what `verify` measured.
        undo: takes back what `apply` did.
        depth: how many times as many layers the model has; rounding grows no faster.

    Raises:
        PatchError: a weight of a layer that the twin has not is nan or inf.
        VerificationError: the exact part moves the outputs by more than rounding.
        Whatever is raised, the caller undoes what was applied.
    """
    dtype, _ = model_place(model)
    exact = exact_part(plan)
    logger.info("verifying the whole model in place, in %s", str(dtype).split(".")[-1])
    before = outputs_as_it_is(model, inputs, plan.hold)
    if not are_sound(before):
        require_finite(model)
    apply(model, exact)
    change = own_error = relative_change(before, outputs_as_it_is(model, inputs, plan.hold))
    # both sides are rounded, differently
    allowed = 2 * depth * (ROUNDING_FACTOR * twin.rounding + 10 * torch.finfo(dtype).eps)
    if not own_error <= allowed:
        raise VerificationError(
            f"the exact part of the patch moves the outputs by {own_error:.1e} in {dtype} "
            f"(allowed: {allowed:.1e}), though not those of a thin twin ({plan.twin}). The "
            'model is unchanged. Use twin="never", which probes every layer, and please '
            "report this model"
        )
    if exact != plan:
        undo(model)
        apply(model, plan)
        change = relative_change(before, outputs_as_it_is(model, inputs, plan.hold))
    return replace(twin, exact_part_own=own_error, change=change)


def outputs_as_it_is(model: nn.Module, inputs: Inputs, hold: Sequence[str]) -> list[Tensor]:
    """`run_outputs` of the model itself, in eval mode for as long, and not compiled."""
    with in_mode(model, lambda module: False), torch.compiler.set_stance("force_eager"):
        return run_outputs(model, inputs, hold)


def _first_difference(
    original: nn.Module, patched: nn.Module, plan: PatchPlan, inputs: Inputs, tolerance: float
) -> str:
    """The first norm site, in order of execution, whose output moved."""
    sites = [site.name for site in plan.sites if site.verdict == "exact"]
    before, after = (_site_outputs(model, sites, inputs) for model in (original, patched))
    for (name, x), (_, y) in zip(before, after, strict=False):
        if not relative_change([x], [y]) <= tolerance:
            return name or "the model itself"
    return "an output that no norm site feeds"


def _site_outputs(
    model: nn.Module, sites: Sequence[str], inputs: Inputs
) -> list[tuple[str, Tensor]]:
    seen: list[tuple[str, Tensor]] = []
    hooks: list[RemovableHandle] = []

    def note(module: nn.Module, args: Any, output: Tensor, name: str) -> None:
        seen.append((name, output.detach().clone()))

    try:
        for name in sites:
            noting = functools.partial(note, name=name)
            hooks.append(model.get_submodule(name).register_forward_hook(noting))
        run_outputs(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


class _Casts(TorchDispatchMode):
    """Notes whether float64 is ever rounded to float32: models that upcast "to float32" inside."""

    def __init__(self, seen: list[bool]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            func is torch.ops.aten._to_copy.default
            and result.dtype == torch.float32
            and args[0].dtype == torch.float64
        ):
            self.seen.append(True)
        return result


@contextmanager
def _float32_seen() -> Iterator[list[bool]]:
    seen: list[bool] = []
    with _Casts(seen):
        yield seen
