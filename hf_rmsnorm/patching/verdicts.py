"""The verdict on one norm site, and its reason."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from ..functional import statistic_size
from ..probing import ProbeResult
from ..recipes import NormSpec, Unreadable
from .config import PatchConfig
from .plan import PatchPlan, Site, Verdict


def judge(
    name: str,
    module: nn.Module,
    reading: NormSpec | Unreadable,
    config: PatchConfig,
    chosen: bool,
) -> Site:
    """The verdict on one site when no weight may be touched (the paper's drop-in)."""
    class_name, p = type(module).__name__, config.share
    if isinstance(reading, Unreadable):
        return Site(name, class_name, "kept", reading.reason)
    if not chosen:
        return Site(name, class_name, "kept", "left out by include/exclude", reading)
    if getattr(module, "is_hf_rmsnorm", False):
        before = getattr(module, "p", 1.0)
        if before == p:
            return Site(name, class_name, "kept", f"is hf_rmsnorm's {class_name} already", reading)
        reason = f"statistic from {p:.4g} of the features instead of {before:.4g}"
        verdict: Verdict = "kept" if config.strategy == "exact" else "approximate"
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
