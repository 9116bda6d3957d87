"""What will be done to a model, decided before anything is touched: `plan_patch`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..probing import ProbeResult, probe
from ..probing.autocast import direct_sites
from ..probing.copies import elements
from ..probing.optional_inputs import optional_inputs
from ..probing.postnorm import improve
from ..probing.twin import Twin, find_cuts, shorten_configs, thin_twin
from ..recipes import NormSpec, find_norms
from .config import Inputs, PatchConfig, Patterns, check_model, resolve_inputs, select
from .plan import PatchPlan, Site, site_table
from .verdicts import judge, with_probe

logger = logging.getLogger(__name__)

PRUNED = 0.2  # share of zeros from which a weight counts as pruned
TWIN_SPARES = 20e6  # weights: where a twin has so many less, it is probed in the model's place


@torch.inference_mode(False)  # probing needs gradients
def plan_patch(
    model: nn.Module,
    norm: str = "rmsnorm",
    *,
    p: float | None = None,
    strategy: str = "auto",
    post_norm: str | None = None,
    inputs: Inputs = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    hold: Patterns = (),
    autocast_output: str = "auto",
    twin: str = "auto",
    verify: bool = True,
) -> PatchPlan:
    """What `patch_model` would do with the same arguments. Changes nothing.

    Args and errors: as `patch_model`; `verify` has no part in planning.

    Example:
        >>> from torch import nn
        >>> plan = plan_patch(nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), strategy="direct")
        >>> plan.summary()
        '1 norm sites -> rmsnorm, strategy direct: 0 exact, 1 approximate, 0 kept'
    """
    config = PatchConfig(
        norm, p, strategy, post_norm, include, exclude, hold, autocast_output, twin, verify
    )
    return make_plan(model, config, inputs).plan


@dataclass
class Planned:
    """A plan, and what it was found with.

    Attributes:
        inputs: that the model was run on; none where nothing was run.
        subject: what was probed: the model itself, or a thin twin of it.
        subject_plan: the plan for that.
        twin: the twin, if there is one.
    """

    plan: PatchPlan
    inputs: list[Mapping[str, Any]]
    subject: nn.Module
    subject_plan: PatchPlan
    twin: Twin | None = None


def make_plan(model: nn.Module, config: PatchConfig, inputs: Inputs) -> Planned:
    """`plan_patch`, with what the plan was found with."""
    model = check_model(model)
    found = find_norms(model)
    chosen = select(found, config.include, config.exclude)
    judged = tuple(
        judge(name, model.get_submodule(name), reading, config, name in chosen)
        for name, reading in found.items()
    )
    plan = PatchPlan(
        config.norm,  # type: ignore[arg-type]
        float(config.share),
        config.strategy,  # type: ignore[arg-type]
        judged,
        hold=config.held,
    )
    targets = layernorms(judged)
    kwargs = [] if inputs is None else resolve_inputs(model, inputs)
    planned = Planned(plan, kwargs, model, plan)
    if targets and config.strategy != "direct":
        require_plain_weights(model)
        more = None
        if not kwargs:
            kwargs = resolve_inputs(model, None, config.held)
            more = functools.partial(optional_inputs, model, dict(kwargs[0]))

        def search(subject: nn.Module, targets: Mapping[str, NormSpec]) -> ProbeResult:
            result = probe(subject, targets, kwargs, more, config.held)
            how: Any = {
                "absorb": config.strategy == "auto",
                "widen": config.post_norm == "extra_neuron",
            }
            if result.kept.keys() & result.leftover.keys() and any(how.values()):
                result = improve(subject, targets, kwargs, result, **how, hold=config.held)
            return result

        planned = plan_on_twin(model, plan, kwargs, search, config.twin) or plan_on_model(
            model, plan, kwargs, search
        )
    require_work(planned.plan)
    return with_autocast(planned, config.autocast_output)


def layernorms(sites: Iterable[Site]) -> dict[str, NormSpec]:
    """What is to become RMSNorm."""
    return {
        site.name: site.spec
        for site in sites
        if site.verdict == "approximate" and site.spec and site.spec.kind == "layernorm"
    }


Search = Callable[[nn.Module, Mapping[str, NormSpec]], ProbeResult]


def plan_on_model(
    model: nn.Module, plan: PatchPlan, kwargs: list[Mapping[str, Any]], search: Search
) -> Planned:
    logger.info("probing the model: %.3g million weights", elements(model) / 1e6)
    result = search(model, layernorms(plan.sites))
    plan = with_result(plan, result, pruned(model, result))
    return Planned(plan, kwargs, model, plan)


def plan_on_twin(
    model: nn.Module,
    plan: PatchPlan,
    kwargs: list[Mapping[str, Any]],
    search: Search,
    wanted: str,
) -> Planned | None:
    """The plan by a thin twin; None where there is none, or it does not stand for the model."""
    sites = {site.name: site for site in plan.sites}
    targets = layernorms(plan.sites)
    cuts = () if wanted == "never" else find_cuts(model, targets)
    if not cuts:
        return None
    twin = thin_twin(model, cuts)
    if wanted == "auto" and elements(model) - elements(twin.model) < TWIN_SPARES:
        return None
    stood_for = {name: twin.names(name) for name in find_norms(twin.model)}
    if sorted(full for names in stood_for.values() for full in names) != sorted(sites):
        return None
    alike = all(len({n in targets for n in names}) == 1 for names in stood_for.values())
    if not alike:  # include or exclude tell layers apart
        return None
    small = replace(
        plan, sites=tuple(replace(sites[full[0]], name=n) for n, full in stood_for.items())
    )
    logger.info("probing a thin twin: %s", twin)
    try:
        result = _searched(twin, search, layernorms(small.sites), kwargs)
    except PatchError as error:
        logger.info("the model itself is probed, since its thin twin does not run: %s", error)
        return None
    if any(twin.stands_in(name) for name in result.uncalled):
        return None
    whole = twin.write_out(result)
    whole_plan = with_result(plan, whole, pruned(model, whole))
    return Planned(
        replace(whole_plan, twin=str(twin)), kwargs, twin.model, with_result(small, result), twin
    )


def _searched(
    twin: Twin,
    search: Search,
    targets: Mapping[str, NormSpec],
    kwargs: list[Mapping[str, Any]],
) -> ProbeResult:
    made = len(kwargs)
    try:
        return search(twin.model, targets)
    except PatchError:  # its code may count layers by its config
        del kwargs[made:]
        shorten_configs(twin)
        try:
            return search(twin.model, targets)
        except PatchError:
            del kwargs[made:]
            raise


def with_result(plan: PatchPlan, result: ProbeResult, filled: tuple[str, ...] = ()) -> PatchPlan:
    """`plan` with what the probe found."""
    targets = layernorms(plan.sites)
    sites = (with_probe(s, result, plan) if s.name in targets else s for s in plan.sites)
    return replace(
        plan,
        sites=tuple(sites),
        absorbs=result.absorbs,
        layerscales=result.layerscales,
        folds=result.folds,
        widens=result.widens,
        centers=result.centers,
        assumed=result.assumed,
        moved=result.moved,
        unreached=result.unreached,
        reached=result.reached,
        filled=filled,
        precision=result.dtype,
    )


def pruned(model: nn.Module, result: ProbeResult) -> tuple[str, ...]:
    """The folded weights that are sparse: folding fills their zeros."""
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    shares = {f.parameter: (tensors[f.parameter] == 0).double().mean() for f in result.folds}
    return tuple(name for name, share in shares.items() if PRUNED < share < 1)


def with_autocast(planned: Planned, output: str) -> Planned:
    """The plan with the dtype that each site's norm gives under autocast."""
    plan, twin = planned.plan, planned.twin
    chosen: dict[str, Any] = {}
    if output == "input":
        chosen = {site.name: "input" for site in plan.sites if site.verdict != "kept"}
    elif output == "auto" and planned.inputs:
        upcast = {
            site.name: site.spec.autocast_float32
            for site in planned.subject_plan.sites
            if site.verdict != "kept" and site.spec and not site.spec.returns_weight_dtype
        }
        logger.info("looking for norms that may write autocast's dtype")
        for name in direct_sites(planned.subject, upcast, planned.inputs):
            chosen |= dict.fromkeys(twin.names(name) if twin else [name], "autocast")
    sites = (replace(s, autocast_output=chosen.get(s.name, "float32")) for s in plan.sites)
    return replace(planned, plan=replace(plan, sites=tuple(sites)))


def require_plain_weights(model: nn.Module) -> None:
    """`PatchError` for weights that cannot be read and folded where they are."""
    way_out = 'patch before, or use strategy="direct", which touches no weight'
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise PatchError(
                f"{name} is on the meta device (not loaded, or offloaded), so it cannot be folded: "
                f'load the model in full first, or use strategy="direct"'
            )
        if not parameter.is_floating_point() or type(parameter.data) is not Tensor:
            kind = f"{type(parameter.data).__name__} of {parameter.dtype}"
            raise PatchError(
                f"{name} is quantised or sharded ({kind}), so it cannot be folded: {way_out}"
            )


def require_work(plan: PatchPlan) -> None:
    """`PatchError` where nothing would change."""
    if any(site.verdict != "kept" for site in plan.sites):
        return
    if not plan.sites:
        raise PatchError(
            "no LayerNorm or RMSNorm module found in the model: there is nothing to patch "
            "(functional calls of F.layer_norm are out of reach)"
        )
    what = "can be exact" if plan.strategy == "exact" else "can be patched"
    table = site_table(plan.sites)
    raise PatchError(f"none of the {len(plan.sites)} norm sites {what}:\n{table}")
