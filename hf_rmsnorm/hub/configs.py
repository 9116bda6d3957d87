"""The `hf_rmsnorm` model type: configs that carry a patch, so that a patched checkpoint can never
load as the LayerNorm model in silence."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import PatchError
from ..planning import FORMAT_VERSION, PatchPlan, Site, spec_from_dict

MODEL_TYPE = "hf_rmsnorm"
RECORD = "hf_rmsnorm"


@functools.cache
def config_class(base: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """`base` under the `hf_rmsnorm` model type; everything else is inherited."""
    name = f"RMSNorm{base.__name__}"
    members = {"model_type": MODEL_TYPE, "__module__": __name__, "__qualname__": name}
    return type(name, (base,), members)


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

        base_type = config_dict.get("base_model_type")
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
    if not isinstance(record, dict) or not {"version", "norm", "p", "sites"} <= record.keys():
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
        sites = tuple(_below(plan.sites, prefix))
        if not any(_changes_the_class(site, plan) for site in sites):
            continue
        old = part.config
        if RECORD in old.__dict__:
            continue  # shares the config of an outer part that is marked already
        new = copy.deepcopy(old)
        new.base_model_type = type(old).model_type
        setattr(new, RECORD, to_record(part, plan, sites))
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


def _below(sites: tuple[Site, ...], prefix: str) -> Iterator[Site]:
    for site in sites:
        if not prefix:
            yield site
        elif site.name.startswith(prefix + "."):
            yield replace(site, name=site.name.removeprefix(prefix + "."))


def to_record(model: Any, plan: PatchPlan, sites: tuple[Site, ...]) -> dict[str, Any]:
    """The plan as JSON-able data whose names hold for every head on the same base model.

    Names are relative to the base model (`"base"` true) or to the model; layer numbers become `*`
    where all layers agree.
    """
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(re.sub(r"\d+", "*", site.name), []).append(site)
    rows: list[dict[str, Any]] = []
    for pattern, group in groups.items():
        agree = all((s.verdict, s.spec) == (group[0].verdict, group[0].spec) for s in group)
        for name, site in [(pattern, group[0])] if agree else [(s.name, s) for s in group]:
            relative = name.removeprefix(f"{model.base_model_prefix}.")
            has_base = model.base_model is not model
            rows.append(
                {**asdict(site), "name": relative, "base": not has_base or relative != name}
            )
    return {
        "version": FORMAT_VERSION,
        "norm": plan.norm,
        "p": plan.p,
        "strategy": plan.strategy,
        "sites": rows,
    }


def from_record(model: Any, record: dict[str, Any]) -> PatchPlan:
    """The plan of `to_record` for `model`, which may have another head or other depth."""
    base_prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    names = {name: re.sub(r"\d+", "*", name) for name, _ in model.named_modules()}
    sites: list[Site] = []
    for row in record["sites"]:
        wanted = (base_prefix if row["base"] else "") + row["name"]
        matches = [n for n, pattern in names.items() if wanted in (n, pattern)]
        if not matches and row["base"] and row["verdict"] != "kept":
            raise PatchError(
                f"the checkpoint's patch record names {wanted!r}, which this "
                f"{type(model).__name__} does not have: record and model do not belong together"
            )
        fields = {k: v for k, v in row.items() if k not in ("base", "name", "spec")}
        spec = spec_from_dict(row["spec"])
        sites += [Site(name=name, spec=spec, **fields) for name in matches]
    return PatchPlan(record["norm"], record["p"], record["strategy"], tuple(sites))
