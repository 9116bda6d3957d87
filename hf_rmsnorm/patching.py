"""Applying a plan to a model, and taking it back."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .errors import PatchError
from .modules import PartialRMSNorm, RMSNorm
from .planning import PatchPlan, Site, plan_patch, site_table
from .recipes import NormSpec

_RECORD = "_hf_rmsnorm_record"


class _Absent(enum.Enum):
    """Stands for an attribute that was not there; an enum so that it survives pickling."""

    ABSENT = enum.auto()


_MISSING = _Absent.ABSENT

# Called with the model after a patch and after an unpatch: how `hub` marks the config.
on_patched: list[Callable[[nn.Module, PatchPlan], None]] = []
on_unpatched: list[Callable[[nn.Module], None]] = []


@dataclass(frozen=True)
class PatchReport:
    """What was done to a model.

    Attributes:
        plan: the plan that was applied.
    """

    plan: PatchPlan

    @property
    def sites(self) -> tuple[Site, ...]:
        """One entry per norm site: `.name .class_name .verdict .reason`."""
        return self.plan.sites

    def __str__(self) -> str:
        return self.plan.summary() + "\n" + site_table(self.sites)


@dataclass
class _Change:
    """How to take the change of one module back."""

    name: str
    original_class: type
    attributes: dict[str, Any]  # the instance's own entries before, or _MISSING
    parameters: list[str] = field(default_factory=list)  # empty slots that were added
    hooks: list[RemovableHandle] = field(default_factory=list)


@dataclass
class _Record:
    plan: PatchPlan
    changes: list[_Change] = field(default_factory=list)


def patch_model(
    model: nn.Module,
    norm: str = "rmsnorm",
    *,
    p: float | None = None,
    strategy: str = "auto",
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    verify: bool = True,
) -> nn.Module:
    """Make the norm modules of `model` RMSNorm or pRMSNorm, in place, and return the model.

        Parameters, hooks, devices and state-dict keys stay as they are: the class of each existing
        norm module changes, nothing else. LayerNorms lose their centring; norms that already are
        RMSNorm keep their function and get our kernels.

        Args:
            model: any `nn.Module`; not yet wrapped in FSDP.
            norm: `"rmsnorm"`, or `"prmsnorm"` for the statistic from the first `p` of the features.
            p: that share, in (0, 1]; `None` is the paper's 0.0625. Only for `"prmsnorm"`.
            strategy: `"direct"` is the paper's drop-in: every LayerNorm becomes RMSNorm and no weight
                is touched. `"exact"` changes only what keeps the model's function. `"auto"` does what
                can be exact exactly, the rest approximately, with a warning.
            inputs: keyword arguments for the model's forward (one dict or several), for strategies
                that have to run the model.
            include: glob patterns over module names; only these sites are patched.
            exclude: glob patterns over module names to leave alone.
            verify: check that what is called exact is exact on the real modules.

        Raises:
            PatchError: bad arguments, nothing to patch, a pattern that matches nothing, a model
                already patched in another way. The model is bitwise as before.

        Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.

        Example:
            >>> from torch import nn
    from torch.utils.hooks import RemovableHandle
            >>> net = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
            >>> patch_model(net, strategy="direct")[1]
            RMSNorm((4,), eps=1e-05, bias=True)
    """
    target = unwrap(model)
    if isinstance(target, nn.Module) and (record := target.__dict__.get(_RECORD)):
        same = (norm, record.plan.p if p is None else p)
        if same != (record.plan.norm, record.plan.p):
            raise PatchError(
                f"the model is already patched ({record.plan.summary()}): call unpatch_model first"
            )
        warnings.warn(
            f"the model is already patched, nothing done ({record.plan.summary()})", stacklevel=2
        )
        return model
    arguments: dict[str, Any] = {
        "p": p,
        "strategy": strategy,
        "inputs": inputs,
        "include": include,
        "exclude": exclude,
        "verify": verify,
    }
    plan = plan_patch(target, norm, **arguments)
    apply_plan(target, plan)
    if strategy == "auto" and plan.count("approximate"):
        warnings.warn(
            f"{plan.count('approximate')} of {len(plan.sites)} norm sites were changed "
            "approximately: the model's function differs, so fine-tune it before use "
            "(patch_report(model) has the reason for each site)",
            stacklevel=2,
        )
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DistributedDataParallel` and `DataParallel` wrappers."""
    while True:
        if type(model).__name__ == "OptimizedModule":
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def apply_plan(model: nn.Module, plan: PatchPlan) -> None:
    """Do what `plan` says to `model`, wholly or not at all."""
    record = _Record(plan)
    try:
        for site in plan.sites:
            if site.verdict != "kept":
                _swap(model, site, plan, record)
        _leave_fast_path(model, record)
        model.__dict__[_RECORD] = record
        for callback in on_patched:
            callback(model, plan)
    except BaseException:
        _undo(model, record)
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
    return PatchReport(replace(owners[0][2].plan, sites=sites))


def unpatch_model(model: nn.Module) -> nn.Module:
    """Take a patch back, in place: the original classes and attributes, bitwise.

    Norm weights trained since the patch keep their training.

    Raises:
        PatchError: the model is not patched.
    """
    for _, owner, record in _require_records(model):
        _undo(owner, record)
    return model


def _require_records(model: nn.Module) -> list[tuple[str, nn.Module, _Record]]:
    """`(path, module, record)` of every patched module in `model`, outermost first."""
    if isinstance(model, nn.Module):
        found = [
            (name, module, module.__dict__[_RECORD])
            for name, module in model.named_modules()
            if _RECORD in module.__dict__
        ]
        if found:
            return found
    raise PatchError(
        f"this {type(model).__name__} was not patched by hf_rmsnorm: call patch_model first"
    )


def _swap(model: nn.Module, site: Site, plan: PatchPlan, record: _Record) -> None:
    """Turn the existing module of `site` into ours, keeping its parameters, hooks and flags."""
    assert site.spec is not None
    module = model.get_submodule(site.name)
    change = _Change(site.name, type(module), {})
    record.changes.append(change)
    new_class = PartialRMSNorm if plan.norm == "prmsnorm" else RMSNorm
    own = module.__dict__
    if "forward" in own and "_hf_hook" not in own:
        # left by another library; it would hide ours
        change.attributes["forward"] = own.pop("forward")
    module.__class__ = new_class
    if "_old_forward" in own:  # accelerate's hook calls this one
        _set(module, change, "_old_forward", MethodType(new_class.forward, module))
    for name in ("weight", "bias"):
        if not hasattr(module, name):
            module.register_parameter(name, None)
            change.parameters.append(name)
    for name, value in _attributes(site.spec, plan, module).items():
        if getattr(module, name, _MISSING) != value:
            _set(module, change, name, value)


def _attributes(spec: NormSpec, plan: PatchPlan, module: nn.Module) -> dict[str, Any]:
    return {
        "normalized_shape": spec.normalized_shape,
        "eps": spec.eps,
        "elementwise_affine": module.weight is not None,
        "p": plan.p,
        "weight_offset": spec.weight_offset,
        "casting": spec.casting,
        "channels_first": spec.channels_first,
        "autocast_float32": spec.autocast_float32,
    }


def _set(module: nn.Module, change: _Change, name: str, value: object) -> None:
    """Set an attribute past `nn.Module.__setattr__`, remembering what was there."""
    change.attributes.setdefault(name, module.__dict__.get(name, _MISSING))
    module.__dict__[name] = value


def _leave_fast_path(model: nn.Module, record: _Record) -> None:
    """Make `nn.TransformerEncoderLayer` call its norms: its fused eval path reads their weights
    and computes LayerNorm; a hook on a child turns that path off."""
    changed = {change.name: change for change in record.changes}
    for name, parent in list(model.named_modules()):
        if isinstance(parent, nn.TransformerEncoderLayer):
            for child in ("norm1", "norm2"):
                if change := changed.get(f"{name}.{child}".strip(".")):
                    hook = parent.get_submodule(child).register_forward_pre_hook(_call_me)
                    change.hooks.append(hook)
        elif isinstance(parent, nn.TransformerEncoder) and parent.use_nested_tensor:
            change = _Change(name, type(parent), {})
            record.changes.append(change)
            _set(parent, change, "use_nested_tensor", False)


def _call_me(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that does nothing but be there."""


def _undo(model: nn.Module, record: _Record) -> None:
    for change in reversed(record.changes):
        module = model.get_submodule(change.name)
        module.__class__ = change.original_class
        for name, value in change.attributes.items():
            if value is _MISSING:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value
        for name in change.parameters:
            module._parameters.pop(name, None)
        for hook in change.hooks:
            hook.remove()
    if model.__dict__.pop(_RECORD, None) is not None:
        for callback in on_unpatched:
            callback(model)
