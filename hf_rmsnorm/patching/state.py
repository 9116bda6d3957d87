"""What a patched model knows of its patch: one object, under one attribute of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import nn

from ..errors import PatchError
from .changes import Changes
from .plan import PatchPlan, Site
from .verify import Measurement

STATE = "_hf_rmsnorm_state"

# Called with the model after a patch and after an unpatch: how `hub` marks the config.
on_patched: list[Callable[[nn.Module, PatchPlan], None]] = []
on_unpatched: list[Callable[[nn.Module], None]] = []


@dataclass(frozen=True)
class PatchReport:
    """What was done to a model; printing it gives a table.

    Attributes:
        plan: the plan that was applied.
        measured: how far the outputs moved on the probe inputs; `None` where nothing was run
            (`strategy="direct"`, `verify=False`, a loaded checkpoint).
    """

    plan: PatchPlan
    measured: Measurement | None = None

    @property
    def sites(self) -> tuple[Site, ...]:
        """One entry per norm site: `.name .class_name .verdict .reason`."""
        return self.plan.sites

    def __str__(self) -> str:
        return str(self.plan) + (f"\n{self.measured}" if self.measured else "")


@dataclass
class PatchState:
    """The plan, what it moved, and how to take it back."""

    plan: PatchPlan
    measured: Measurement | None = None
    changes: Changes = field(default_factory=Changes)
    undoing: bool = False  # or half undone, if that did not end


def patch_report(model: nn.Module) -> PatchReport:
    """What `patch_model` did to `model`: printable, with one entry per norm site.

    Raises:
        PatchError: the model is not patched.
    """
    owners = require_states(model)
    sites = tuple(
        replace(site, name=f"{prefix}.{site.name}".strip("."))
        for prefix, _, record in owners
        for site in record.plan.sites
    )
    record = owners[0][2]
    return PatchReport(replace(record.plan, sites=sites), record.measured)


def patched_parts(model: nn.Module) -> list[tuple[str, PatchPlan]]:
    """Path in `model` and plan of all that was patched there, each relative to its own path."""
    return [(name, record.plan) for name, _, record in whole(model, states(model))]


def states(model: nn.Module) -> list[tuple[str, nn.Module, PatchState]]:
    """`(path, module, record)` of every patched module in `model`, outermost first."""
    return [
        (name, module, module.__dict__[STATE])
        for name, module in model.named_modules()
        if STATE in module.__dict__
    ]


def require_states(model: nn.Module) -> list[tuple[str, nn.Module, PatchState]]:
    if isinstance(model, nn.Module) and (found := states(model)):
        return whole(model, found)
    raise PatchError(
        f"this {type(model).__name__} was not patched by hf_rmsnorm: call patch_model first"
    )


def whole(
    model: nn.Module, found: list[tuple[str, nn.Module, PatchState]]
) -> list[tuple[str, nn.Module, PatchState]]:
    if any(record.undoing for _, _, record in found):
        raise PatchError(
            f"this {type(model).__name__} is half unpatched, since taking its patch back was "
            "interrupted: call unpatch_model, which finishes it"
        )
    return found
