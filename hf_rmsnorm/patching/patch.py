"""`patch_model`, and `apply_plan` which it ends in."""

from __future__ import annotations

import logging
import warnings

import torch
from torch import nn

from ..errors import PatchError
from ..names import pattern_list
from .apply import add_centers, fold_weights, swap_norms
from .check import check_fits
from .config import Inputs, PatchConfig, Patterns, check_model, unwrap
from .decide import make_plan
from .plan import PatchPlan
from .state import STATE, PatchState, on_patched, whole
from .undo import undo, unpatch_model
from .verify import Measurement, verify_in_place
from .verify import verify as verify_plan

logger = logging.getLogger(__name__)


def patch_model(
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
    keep_originals: bool = True,
) -> nn.Module:
    """Make the norm modules of `model` RMSNorm or pRMSNorm, in place, and return the model.

    The class of each existing norm module changes; parameters, hooks, devices and state-dict keys
    stay. Where LayerNorm's centring can be folded into the weights that write its input, it is,
    and the model's function stays the same. Norms that already are RMSNorm get our kernels.

    Args:
        model: any `nn.Module`; not yet wrapped in FSDP.
        norm: `"rmsnorm"`, or `"prmsnorm"` for the statistic from the first `p` of the features.
        p: that share, in (0, 1]; `None` is the paper's 0.0625. Only for `"prmsnorm"`.
        strategy: `"auto"` does exactly what can be exact, the rest approximately, with a warning.
            `"exact"` leaves that rest alone. `"direct"` is the paper's drop-in: every LayerNorm
            becomes RMSNorm and no weight is touched.
        post_norm: `"extra_neuron"` gives each feed-forward block between two norms (BERT, BART)
            one more hidden unit, which makes the norm after it exact: it computes the mean of the
            block's input, and subtracts it from the sum. The weights' shapes change (intermediate
            size + 1, not padded for tensor cores), so patch before building an optimizer. Only for
            plain blocks with GELU, ReLU or what else is the identity on [8, 24]; norms after
            attention stay approximate; in low precision the outputs' error grows somewhat.
        inputs: keyword arguments for the model's forward, one dict or several, to probe it with;
            made from the config for Transformers models, for its optional branches too. A verdict
            holds for the paths that they take: weights they do not reach are named. `"direct"`
            needs none.
        include: glob patterns over module names; only these sites are patched.
        exclude: glob patterns over module names to leave alone.
        hold: outputs that must not move beside the main ones, as glob patterns over their names:
            `["vision_model_output"]`, `["hidden_states"]`; or `"all"`. Outputs that show the inside
            of a model lose their mean over the features where folds change the stream, which a
            warning says.
        autocast_output: what the norms give under `torch.autocast` (see `RMSNorm`). `"float32"`:
            as nn.LayerNorm. `"input"`: x's dtype. `"auto"`: autocast's dtype, wherever running
            the model shows that its outputs stay the same to the bit; float32 elsewhere, and
            where the plan needs no run (`"direct"`, RMSNorm already) and `inputs` are not given.
        twin: probe a thin twin in place of the model, with a few of each kind of its repeated
            layers: `"auto"` does where that spares 20 million weights, `"always"` where layers
            repeat at all, `"never"` does not. The plan is the same; what does not run with fewer
            layers is probed whole.
        verify: run what is called exact on a copy, in float64 and in the model's dtype, first. Of
            a model whose twin was probed, on copies of the twin in float64, and then in place in
            the model's dtype: on failure everything is undone.
        keep_originals: keep the weights that were folded, on the CPU, for `unpatch_model`. Without
            them it is refused, and so is nothing when unpatched weights are loaded.

    Raises:
        PatchError: bad arguments, nothing to patch, a pattern that matches nothing, weights that
            cannot be folded, a model already patched in another way.
        VerificationError: what was found exact is not.
        Either way the model is bitwise as before.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from hf_rmsnorm import patch_report
        >>> net = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
        >>> patch_model(net, inputs={"input": torch.randn(3, 6)})[1]
        RMSNorm((4,), eps=1e-05, bias=True)
        >>> patch_report(net).sites[0].verdict
        'exact'
    """
    config = PatchConfig(
        norm,
        p,
        strategy,
        post_norm,
        include,
        exclude,
        hold,
        autocast_output,
        twin,
        verify,
        keep_originals,
    )
    target = unwrap(model) if isinstance(model, nn.Module) else check_model(model)
    if record := target.__dict__.get(STATE):
        whole(target, [("", target, record)])
        wanted = (norm, record.plan.p if p is None else p)
        if wanted != (record.plan.norm, record.plan.p):
            raise PatchError(
                f"the model is already patched ({record.plan.summary()}): call unpatch_model first"
            )
        warnings.warn(
            f"the model is already patched ({record.plan.summary()}), nothing done: for another "
            "strategy or other sites, call unpatch_model first",
            stacklevel=2,
        )
        return model
    measured = None
    with torch.inference_mode(False):
        planned = make_plan(target, config, inputs)
        plan = planned.plan
        if verify and plan.precision:
            measured = verify_plan(
                planned.subject, planned.subject_plan, planned.inputs, apply_plan
            )
        try:
            if measured is not None and planned.twin is not None:
                measured = verify_in_place(
                    target,
                    plan,
                    planned.inputs,
                    measured,
                    apply_plan,
                    unpatch_model,
                    planned.twin.depth,
                )
                target.__dict__[STATE].measured = measured
            else:
                apply_plan(target, plan, measured)
            _warn(plan, measured)
            if keep_originals:
                return model
        except BaseException:  # such as a warning that is made an error
            if STATE in target.__dict__:
                undo([(target, target.__dict__[STATE])])
            raise
        target.__dict__[STATE].changes.forget()
    return model


def _warn(plan: PatchPlan, measured: Measurement | None) -> None:
    """What a user must know of a patch that was made."""
    approximate = plan.count("approximate")
    if plan.strategy == "auto" and approximate:
        moved = f" (outputs moved by {measured.change:.1e})" if measured else ""
        instead = "" if plan.p < 1 else ', or patch with strategy="exact" to leave those alone'
        warnings.warn(
            f"{approximate} of {len(plan.sites)} norm sites were changed approximately{moved}: "
            f"fine-tune the model before use{instead}; print(patch_report(model)) has the reason "
            "for each",
            stacklevel=3,
        )
    unproven = sum(site.unproven for site in plan.sites)
    if unproven and plan.strategy == "auto":
        names = pattern_list(plan.unreached)
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"{unproven} of {len(plan.sites)} norm sites are exact on the paths probed alone: the "
            f"inputs never reached {', '.join(names[:3])}{rest}. Pass inputs= that reach them, or "
            'patch with strategy="exact" to leave those sites alone',
            stacklevel=3,
        )
    if plan.moved and any(site.verdict == "exact" for site in plan.sites):
        warnings.warn(
            f"these outputs lose their mean over the features: {', '.join(plan.moved)}. If they "
            'are used, patch with hold=[...] of their names, or hold="all"',
            stacklevel=3,
        )


def apply_plan(
    model: nn.Module,
    plan: PatchPlan,
    measured: Measurement | None = None,
    *,
    what: str = "the plan",
) -> None:
    """Do what `plan` says to `model`, wholly or not at all.

    Args:
        what: to call the plan, in errors.

    Raises:
        PatchError: the plan is not valid, or not for this model, or that is patched already.
    """
    model = unwrap(model)
    if STATE in model.__dict__:
        raise PatchError(
            f"this {type(model).__name__} is already patched: call unpatch_model first"
        )
    check_fits(plan, model, what)
    record = PatchState(plan, measured)
    try:
        model.__dict__[STATE] = record
        logger.debug("folding %d weights", len(plan.folds))
        fold_weights(model, plan, record.changes)
        changed = [site for site in plan.sites if site.verdict != "kept"]
        swap_norms(model, plan, changed, record.changes)
        add_centers(model, plan, record.changes)
        for callback in on_patched:
            callback(model, plan)
        record.changes.settle()
    except BaseException:
        undo([(model, record)])
        raise
