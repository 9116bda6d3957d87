"""What will be done to a model, decided before anything is touched: `plan_patch`."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import (
    TWINS,
    Inputs,
    check_arguments,
    check_choice,
    check_hold,
    check_post_norm,
    resolve_inputs,
    select,
    unwrap,
)
from .autocast import AUTOCAST_OUTPUTS, direct_sites
from .errors import PatchError
from .functional import statistic_size
from .optional_inputs import optional_inputs
from .plan import PatchPlan, Site, Verdict, site_table
from .probing import ProbeResult, probe
from .probing.copies import elements
from .probing.postnorm import improve
from .probing.twin import Twin, find_cuts, shorten_configs, thin_twin
from .recipes import NormSpec, Unreadable, find_norms

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
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    hold: str | Sequence[str] = (),
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
    return make_plan(
        model,
        norm,
        p=p,
        strategy=strategy,
        post_norm=post_norm,
        inputs=inputs,
        include=include,
        exclude=exclude,
        hold=hold,
        autocast_output=autocast_output,
        twin=twin,
    ).plan


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


def make_plan(
    model: nn.Module,
    norm: str,
    *,
    p: float | None,
    strategy: str,
    post_norm: str | None,
    inputs: Inputs,
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    hold: str | Sequence[str],
    autocast_output: str,
    twin: str,
) -> Planned:
    """`plan_patch`, with what the plan was found with."""
    model = unwrap(model)
    share = check_arguments(model, norm, p, strategy)
    check_post_norm(post_norm, strategy)
    check_choice("autocast_output", autocast_output, AUTOCAST_OUTPUTS)
    check_choice("twin", twin, TWINS)
    held = check_hold(hold, strategy)
    found = find_norms(model)
    chosen = select(found, include, exclude)
    sites = {
        name: judge(name, model.get_submodule(name), reading, share, name in chosen, strategy)
        for name, reading in found.items()
    }
    judged = tuple(sites.values())
    plan = PatchPlan(norm, share, strategy, judged, hold=held)  # type: ignore[arg-type]
    targets = layernorms(judged)
    kwargs = [] if inputs is None else resolve_inputs(model, inputs)
    planned = Planned(plan, kwargs, model, plan)
    if targets and strategy != "direct":
        require_plain_weights(model)
        more = None
        if not kwargs:
            kwargs = resolve_inputs(model, None, held)
            more = functools.partial(optional_inputs, model, dict(kwargs[0]))

        def search(subject: nn.Module, targets: Mapping[str, NormSpec]) -> ProbeResult:
            result = probe(subject, targets, kwargs, more, held)
            absorb, widen = strategy == "auto", post_norm == "extra_neuron"
            if result.kept.keys() & result.leftover.keys() and (absorb or widen):
                result = improve(
                    subject, targets, kwargs, result, absorb=absorb, widen=widen, hold=held
                )
            return result

        planned = plan_on_twin(model, plan, kwargs, search, twin) or plan_on_model(
            model, plan, kwargs, search
        )
    require_work(planned.plan)
    return with_autocast(planned, autocast_output)


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


def judge(
    name: str,
    module: nn.Module,
    reading: NormSpec | Unreadable,
    p: float,
    chosen: bool,
    strategy: str,
) -> Site:
    """The verdict on one site when no weight may be touched (the paper's drop-in)."""
    class_name = type(module).__name__
    if isinstance(reading, Unreadable):
        return Site(name, class_name, "kept", reading.reason)
    if not chosen:
        return Site(name, class_name, "kept", "left out by include/exclude", reading)
    if getattr(module, "is_hf_rmsnorm", False):
        before = getattr(module, "p", 1.0)
        if before == p:
            return Site(name, class_name, "kept", f"is hf_rmsnorm's {class_name} already", reading)
        reason = f"statistic from {p:.4g} of the features instead of {before:.4g}"
        verdict: Verdict = "kept" if strategy == "exact" else "approximate"
        return Site(name, class_name, verdict, reason, reading)
    partial = partial_statistic(reading, p)
    if reading.kind == "layernorm":
        reason = f"centring dropped{partial and '; ' + partial}"
        return Site(name, class_name, "approximate", reason, reading)
    if partial:
        return Site(name, class_name, "approximate", partial, reading)
    reason = "already RMSNorm: same formula, our kernel"
    return Site(name, class_name, "exact", reason, reading, mean_free=True)


def partial_statistic(spec: NormSpec, p: float) -> str:
    """How many features the statistic sees, in words; empty where it sees all."""
    if p == 1:
        return ""
    if not spec.normalized_shape:  # a norm without weights does not state its width
        return f"statistic from {p:.4g} of the features"
    hidden = math.prod(spec.normalized_shape)
    return f"statistic from {statistic_size(hidden, p)} of {hidden} features"


def with_probe(site: Site, result: ProbeResult, plan: PatchPlan) -> Site:
    """The verdict on a LayerNorm after the probe."""
    assert site.spec is not None
    name, partial = site.name, partial_statistic(site.spec, plan.p)
    leftover = result.leftover.get(name)
    if name in result.uncalled:
        reason = "never reached by the probe inputs: pass inputs= that reach it"
        return replace(site, verdict="kept", reason=reason)
    if name in result.exact:
        if partial:
            reason = f"{result.exact[name]}; {partial}"
            return replace(site, reason=reason, mean_free=True, leftover=leftover)
        reason = result.exact[name]
        if missing := result.unproven.get(name):
            reason = (
                f"exact on the paths probed; {missing} was never reached: pass inputs= that reach "
                f"it ({reason})"
            )
            if plan.strategy == "exact":
                return replace(site, verdict="kept", reason=reason, leftover=leftover)
        return replace(
            site,
            verdict="exact",
            reason=reason,
            mean_free=True,
            leftover=leftover,
            unproven=bool(missing),
        )
    reason = result.kept[name]
    if plan.strategy == "exact":
        return replace(site, verdict="kept", reason=reason, leftover=leftover)
    mean = "" if leftover is None else f", |mean|/rms up to {leftover:.2g}"
    reason = f"centring dropped{mean}: {reason}{partial and '; ' + partial}"
    return replace(site, reason=reason, leftover=leftover)


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
