"""From a model to a patched model, in the order of the data.

`config` (what users ask for) -> `decide` (by probing; one norm's `verdicts`) -> `plan` (as data) ->
`check` (against the model) -> `verify` -> `apply`, noted in `changes`, kept in `state` -> `undo`.

`patch` is the call that does it all; `transfer` carries plans to other models and to shards.
"""

from .decide import plan_patch
from .patch import apply_plan, patch_model
from .plan import PatchPlan, Site
from .state import PatchReport, on_patched, on_unpatched, patch_report, patched_parts
from .transfer import fit_plan, fold_shard
from .undo import unpatch_model

__all__ = [
    "PatchPlan",
    "PatchReport",
    "Site",
    "apply_plan",
    "fit_plan",
    "fold_shard",
    "on_patched",
    "on_unpatched",
    "patch_model",
    "patch_report",
    "patched_parts",
    "plan_patch",
    "unpatch_model",
]
