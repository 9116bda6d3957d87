"""The `hf_rmsnorm` model type: configs that carry a patch, so that a patched checkpoint can never
load as the LayerNorm model in silence."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import PatchError
from ..plan import FORMAT_VERSION, PatchPlan, Site, layer_pattern, spec_from_dict
from ..probing import Center
from ..probing.facts import Widen

MODEL_TYPE = "hf_rmsnorm"
RECORD = "hf_rmsnorm"

_classes: dict[Any, type[PreTrainedConfig]] = {}


def config_class(base: Any) -> type[PreTrainedConfig]:
    """`base` under the `hf_rmsnorm` model type; everything else is inherited."""
    if base not in _classes:
        name = f"RMSNorm{base.__name__}"
        members = {"model_type": MODEL_TYPE, "__module__": __name__, "__qualname__": name}
        _classes[base] = type(name, (base,), members)
    return _classes[base]


def __getattr__(name: str) -> Any:
    """Lets pickle find the generated classes again."""
    import transformers

    base = getattr(transformers, name.removeprefix("RMSNorm"), None)
    if name.startswith("RMSNorm") and isinstance(base, type):
        return config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class RMSNormAutoConfig(PreTrainedConfig):
    """Reads the config of any patched checkpoint and returns its own class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from .loading import register_models

        base_type = str(config_dict.get("base_model_type"))
        if base_type not in CONFIG_MAPPING:
            raise PatchError(
                f"the config has model type {MODEL_TYPE!r} and base_model_type {base_type!r}, "
                "which this version of transformers does not know"
            )
        check_record(config_dict.get(RECORD))
        base = CONFIG_MAPPING[base_type]
        register_models(base)
        return config_class(base).from_dict(config_dict, **kwargs)


def register() -> None:
    """Teach the Auto classes the `hf_rmsnorm` model type."""
    AutoConfig.register(MODEL_TYPE, RMSNormAutoConfig, exist_ok=True)


def check_record(record: object) -> dict[str, Any]:
    keys = {"version", "norm", "p", "strategy", "sites", "centers", "widens"}
    if not isinstance(record, dict) or not keys <= record.keys():
        raise PatchError(
            f"the config has model type {MODEL_TYPE!r} but no usable {RECORD!r} record: it was not "
            "saved by hf_rmsnorm, or edited since"
        )
    if record["version"] > FORMAT_VERSION:
        raise PatchError(
            f"the checkpoint's patch record has version {record['version']}, this hf_rmsnorm reads "
            f"up to {FORMAT_VERSION}: update the package"
        )
    return record


def mark(model: nn.Module, plan: PatchPlan) -> None:
    """Give each pre-trained model inside `model` that the plan changes a config that says so.

    The config is copied first (other models may share it), and every module that held the old
    object gets the copy.
    """
    for prefix, part in _pretrained(model):
        inner = _below(plan, prefix)
        if not any(_changes_the_class(site, plan) for site in inner.sites):
            continue
        old = part.config
        if RECORD in old.__dict__:
            continue  # shares the config of an outer part that is marked already
        new = copy.deepcopy(old)
        new.base_model_type = type(old).model_type
        setattr(new, RECORD, to_record(part, inner))
        new.__class__ = config_class(type(old))
        _replace_config(model, old, new)


def _changes_the_class(site: Site, plan: PatchPlan) -> bool:
    """Whether the stock class would compute something else than the patched module.

    A norm that was RMSNorm already is the stock architecture with a faster kernel.
    """
    if site.verdict == "kept":
        return False
    return plan.p < 1 or site.spec is None or site.spec.kind != "rmsnorm"


def unmark(model: nn.Module) -> None:
    """Take `mark` back; what else was changed in the config since stays."""
    for _, part in _pretrained(model):
        config = part.config
        if config.__dict__.pop(RECORD, None) is not None:
            del config.base_model_type
            config.__class__ = type(config).__mro__[1]


def _replace_config(model: nn.Module, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    for module in model.modules():
        if module.__dict__.get("config") is old:
            module.__dict__["config"] = new


def _pretrained(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            yield name, module


def _below(plan: PatchPlan, prefix: str) -> PatchPlan:
    """The part of `plan` that concerns the module at `prefix`, with names relative to it."""
    if not prefix:
        return plan
    start = prefix + "."
    sites = (
        replace(site, name=site.name.removeprefix(start))
        for site in plan.sites
        if site.name.startswith(start)
    )
    centers = (
        replace(center, module=center.module.removeprefix(start))
        for center in plan.centers
        if center.module.startswith(start)
    )
    widens = (
        replace(widen, up=widen.up.removeprefix(start), down=widen.down.removeprefix(start))
        for widen in plan.widens
        if widen.up.startswith(start) and widen.down.startswith(start)
    )
    return replace(plan, sites=tuple(sites), centers=tuple(centers), widens=tuple(widens))


def to_record(model: Any, plan: PatchPlan) -> dict[str, Any]:
    """What a reader of the checkpoint has to do again, as JSON-able data: the weights are folded
    already, the swaps and centres are not in them, and the config has the blocks' stock width.

    Names hold for every head on the same base model: relative to the base model where `"base"` is
    true, to the model otherwise. Layer numbers become `*` where all layers agree.
    """

    def relative(name: str) -> dict[str, Any]:
        if model.base_model is model:
            return {"name": name, "base": True}
        short = name.removeprefix(f"{model.base_model_prefix}.")
        return {"name": short, "base": short != name}

    groups: dict[str, list[Site]] = {}
    for site in plan.sites:
        groups.setdefault(layer_pattern(site.name), []).append(site)
    sites: list[dict[str, Any]] = []
    for pattern, group in groups.items():
        agree = all((s.verdict, s.spec) == (group[0].verdict, group[0].spec) for s in group)
        for name, site in [(pattern, group[0])] if agree else [(s.name, s) for s in group]:
            sites.append({**asdict(site), **relative(name)})
    centers = [{**asdict(c), "serves": (), **relative(c.module)} for c in plan.centers]
    for center in centers:
        del center["module"]
    widens = [
        {**asdict(w), "down": relative(w.down)["name"], **relative(w.up)} for w in plan.widens
    ]
    for widen in widens:
        del widen["up"], widen["norm"]
    return {
        "version": FORMAT_VERSION,
        "norm": plan.norm,
        "p": plan.p,
        "strategy": plan.strategy,
        "sites": sites,
        "centers": centers,
        "widens": widens,
    }


def from_record(model: Any, record: dict[str, Any]) -> PatchPlan:
    """The plan of `to_record` for `model`, which may have another head or other depth."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    patterns = {name: layer_pattern(name) for name, _ in model.named_modules()}

    def names(row: dict[str, Any]) -> list[str]:
        wanted = (prefix if row["base"] else "") + row["name"]
        found = [name for name, pattern in patterns.items() if wanted in (name, pattern)]
        if not found and row["base"] and row.get("verdict") != "kept":
            raise PatchError(
                f"the checkpoint's patch record names {wanted!r}, which this "
                f"{type(model).__name__} does not have: record and model do not belong together"
            )
        return found

    def rest(row: dict[str, Any], *left_out: str) -> dict[str, Any]:
        return {k: v for k, v in row.items() if k not in ("name", "base", *left_out)}

    sites = tuple(
        Site(name=name, spec=spec_from_dict(row["spec"]), **rest(row, "spec"))
        for row in record["sites"]
        for name in names(row)
    )
    centers = tuple(
        Center(module=name, **rest(row)) for row in record["centers"] for name in names(row)
    )
    widens = tuple(
        Widen("", name, down=(prefix if row["base"] else "") + row["down"], **rest(row, "down"))
        for row in record["widens"]
        for name in names(row)
    )
    return PatchPlan(
        record["norm"], record["p"], record["strategy"], sites, centers=centers, widens=widens
    )
