"""The calls users make: `patch_model`, `patch_report`, `unpatch_model`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .applying import add_centers, fold_weights, swap_norms
from .arguments import Inputs, unwrap
from .changes import Changes
from .checking import check_fits
from .errors import PatchError
from .plan import PatchPlan, Site, pattern_list
from .planning import make_plan
from .verification import Measurement, verify_in_place
from .verification import verify as verify_plan

_RECORD = "_hf_rmsnorm_record"

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
class _Record:
    plan: PatchPlan
    measured: Measurement | None = None
    changes: Changes = field(default_factory=Changes)
    undoing: bool = False  # or half undone, if that did not end


def patch_model(
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
        >>> net = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
        >>> patch_model(net, inputs={"input": torch.randn(3, 6)})[1]
        RMSNorm((4,), eps=1e-05, bias=True)
        >>> patch_report(net).sites[0].verdict
        'exact'
    """
    target = unwrap(model) if isinstance(model, nn.Module) else model
    if isinstance(target, nn.Module) and (record := target.__dict__.get(_RECORD)):
        _whole(target, [("", target, record)])
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
        planned = make_plan(
            target,
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
        )
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
                target.__dict__[_RECORD].measured = measured
            else:
                apply_plan(target, plan, measured)
            _warn(plan, measured)
            if keep_originals:
                return model
        except BaseException:  # such as a warning that is made an error
            if _RECORD in target.__dict__:
                _undo([(target, target.__dict__[_RECORD])])
            raise
        target.__dict__[_RECORD].changes.forget()
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
    if _RECORD in model.__dict__:
        raise PatchError(
            f"this {type(model).__name__} is already patched: call unpatch_model first"
        )
    check_fits(plan, model, what)
    record = _Record(plan, measured)
    try:
        model.__dict__[_RECORD] = record
        fold_weights(model, plan, record.changes)
        changed = [site for site in plan.sites if site.verdict != "kept"]
        swap_norms(model, plan, changed, record.changes)
        add_centers(model, plan, record.changes)
        for callback in on_patched:
            callback(model, plan)
        record.changes.settle()
    except BaseException:
        _undo([(model, record)])
        raise


def patch_report(model: nn.Module) -> PatchReport:
    """What `patch_model` did to `model`: printable, with one entry per norm site.

    Raises:
        PatchError: the model is not patched.
    """
    owners = _require_records(model)
    sites = tuple(
        replace(site, name=f"{prefix}.{site.name}".strip("."))
        for prefix, _, record in owners
        for site in record.plan.sites
    )
    record = owners[0][2]
    return PatchReport(replace(record.plan, sites=sites), record.measured)


def unpatch_model(model: nn.Module) -> nn.Module:
    """Take a patch back, in place: the original weights and classes, bitwise.

    Weights that the patch did not touch keep any training since, norm weights too.

    Raises:
        PatchError: the model is not patched; weights that the patch folded were trained since
            (their original values would throw that training away); a module that it changed was
            replaced since, by an adapter's wrapper say.
        Anything else, Ctrl-C or no memory say, is raised once the model is unpatched. Should that
        fail too, the model refuses to be saved or patched until another call has finished it.
    """
    found = _records(model) if isinstance(model, nn.Module) else []
    found = found or _require_records(model)
    for _, owner, record in found:
        _require_untrained(owner, record)
    _undo([(owner, record) for _, owner, record in found])
    return model


def _require_untrained(model: nn.Module, record: _Record) -> None:
    if record.changes.forgotten:
        raise PatchError(
            f"this {type(model).__name__} was patched with keep_originals=False: the weights that "
            "the patch folded are gone, so it cannot be unpatched. Load the model again"
        )
    if not record.undoing and (replaced := record.changes.replaced_since(model)):
        raise PatchError(
            f"{replaced[0]} was changed by the patch and is a "
            f"{type(model.get_submodule(replaced[0])).__name__} now: unload adapters, or take back "
            "what else has replaced it, first"
        )
    if touched := record.changes.touched_since(model):
        raise PatchError(
            f"{touched[0]} was folded by the patch and has changed since (trained, cast, sharded, "
            "quantised or offloaded): its original values would throw that away, so the patch stays"
        )


def _undo(patched: list[tuple[nn.Module, _Record]]) -> None:
    """Take patches back, to the end also if an exception comes in between."""
    for _, record in patched:
        record.undoing = True
    try:
        _undo_all(patched)
    except BaseException:
        _undo_all(patched)
        raise


def _undo_all(patched: list[tuple[nn.Module, _Record]]) -> None:
    for model, record in patched:
        for callback in on_unpatched:
            callback(model)
        record.changes.undo(model)
    for model, _ in patched:
        model.__dict__.pop(_RECORD, None)


def patched_parts(model: nn.Module) -> list[tuple[str, PatchPlan]]:
    """Path in `model` and plan of all that was patched there, each relative to its own path."""
    return [(name, record.plan) for name, _, record in _whole(model, _records(model))]


def _records(model: nn.Module) -> list[tuple[str, nn.Module, _Record]]:
    """`(path, module, record)` of every patched module in `model`, outermost first."""
    return [
        (name, module, module.__dict__[_RECORD])
        for name, module in model.named_modules()
        if _RECORD in module.__dict__
    ]


def _require_records(model: nn.Module) -> list[tuple[str, nn.Module, _Record]]:
    if isinstance(model, nn.Module) and (found := _records(model)):
        return _whole(model, found)
    raise PatchError(
        f"this {type(model).__name__} was not patched by hf_rmsnorm: call patch_model first"
    )


def _whole(
    model: nn.Module, found: list[tuple[str, nn.Module, _Record]]
) -> list[tuple[str, nn.Module, _Record]]:
    if any(record.undoing for _, _, record in found):
        raise PatchError(
            f"this {type(model).__name__} is half unpatched, since taking its patch back was "
            "interrupted: call unpatch_model, which finishes it"
        )
    return found
