"""What saving knows of a patched model, put together from the parts of it that were patched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import PatchError
from ..patching import patched_parts
from ..patching.plan import PatchPlan
from .exactness import Evidence
from .records import about_weights, gains, lifted, to_record

SAVED = "_hf_rmsnorm_saved"  # attribute of each model inside a patched model


@dataclass
class Saved:
    """What saving needs to know of a patched model.

    Attributes:
        plan: what was done to this model, names relative to it.
        record: the same for the config.
        evidence: what its exactness rests on; None where it cannot be stock: not exact, a part of
            what was patched, loaded from a checkpoint that was not, or with offloaded weights.
    """

    plan: PatchPlan
    record: dict[str, Any]
    evidence: Evidence | None
    stock: dict[Any, dict[str, Any]] = field(default_factory=dict)  # what `stock_record` found

    def stock_record(
        self, model: Any, state_dict: Mapping[str, Any] | None
    ) -> dict[str, Any] | None:
        """The record for the stock format, if the weights to save may be in that; else None."""
        dtypes = None if self.evidence is None else self.evidence.unchanged(model, state_dict)
        if self.evidence is None or dtypes is None:
            return None
        if len(dtypes) == 1 and dtypes in self.stock:  # of the same weights
            return self.stock[dtypes]
        sizes = gains(model, self.plan, state_dict)
        self.stock[dtypes] = about_weights(self.record, self.evidence.fold_rows, sizes)
        return self.stock[dtypes]


def changes_the_class(plan: PatchPlan) -> bool:
    """Whether the stock class would compute something else than the patched modules.

    A norm that was RMSNorm already is the stock architecture with a faster kernel.
    """
    return any(
        site.verdict != "kept" and (plan.p < 1 or site.spec is None or site.spec.kind != "rmsnorm")
        for site in plan.sites
    )


def what_to_save(model: Any) -> Saved | None:
    """What was patched in `model`: with it, or by itself, such as `model.transformer`. None where
    its class of transformers computes the same.

    Raises:
        PatchError: parts patched in ways that one checkpoint cannot have.
    """
    own: Saved | None = model.__dict__.get(SAVED)
    parts = [
        (name, lifted(plan, name))
        for name, plan in patched_parts(model)
        if name and changes_the_class(plan)
    ]
    if not parts:
        return own
    plans = [*([own.plan] if own else ()), *(plan for _, plan in parts)]
    first = plans[0]
    for name, plan in parts:
        if (plan.norm, plan.p) != (first.norm, first.p):
            raise PatchError(
                f"{name} in this {type(model).__name__} is patched by itself, with {plan.norm}, p "
                f"{plan.p:g}, the rest with {first.norm}, p {first.p:g}: one checkpoint cannot say "
                "that. Save the parts by themselves"
            )
    sites = {site.name: site for plan in plans for site in plan.sites}
    whole = replace(
        first,
        sites=tuple(sites.values()),
        centers=tuple(center for plan in plans for center in plan.centers),
        widens=tuple(widen for plan in plans for widen in plan.widens),
    )
    return Saved(whole, to_record(model, whole), None)
