"""Making a patched model know what it is: its class, through which it saves, and its config."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel, modeling_utils

from ..patching.plan import PatchPlan
from .configs import is_marked, mark_config, stock_config, unmark_config
from .exactness import Evidence, may_be_stock
from .loading import base_class, model_class, register_models
from .parts import SAVED, Saved, changes_the_class
from .records import below, to_record


def mark(model: nn.Module, plan: PatchPlan) -> None:
    """Give each pre-trained model inside `model` that the plan changes the class it would load as,
    and the outermost ones a config that says so.

    The config is copied first (other models may share it), and every module that held the old
    object, or a part of it, gets the copy.
    """
    marked: list[str] = []
    for prefix, part in list(_pretrained(model)):
        inner = below(plan, prefix)
        if not changes_the_class(inner):
            continue
        base = base_class(type(part))
        fresh = base is type(part)  # else it is being loaded, as what a checkpoint says it is
        here = not any(parameter.is_meta for parameter in part.parameters())  # not offloaded
        exact = fresh and part is model and may_be_stock(plan) and here
        evidence = Evidence(part, plan.folds) if exact else None
        part.__dict__[SAVED] = Saved(inner, to_record(part, inner), evidence)
        _become(part, model_class(base, stock_config(part.config)))
        inside = any(not outer or prefix.startswith(outer + ".") for outer in marked)
        if inside or is_marked(part.config):
            continue
        marked.append(prefix)
        register_models(type(part.config))  # `from_config` of the marked one
        mark_config(_own_config(model, part), part.__dict__[SAVED].record)


def _become(part: Any, cls: Any) -> None:
    """Change the class, in the one table of transformers, too, that goes by it: which outputs
    beside the main one (hidden states, attentions) it can return."""
    table: dict[str, Any] = getattr(modeling_utils, "_CAN_RECORD_REGISTRY", {})
    dict.__setitem__(table, str(cls), dict.get(table, str(type(part))))
    part.__class__ = cls


def unmark(model: nn.Module) -> None:
    """Take `mark` back, however far it came; what else was changed in the config since stays."""
    for _, part in _pretrained(model):
        part.__class__ = base_class(type(part))
        part.__dict__.pop(SAVED, None)
        unmark_config(part.config)


def _own_config(model: nn.Module, part: Any) -> Any:
    """A copy of the config of `part`, which all its holders in `model` have instead from now on."""
    copies: dict[int, Any] = {}
    new = copy.deepcopy(part.config, copies)
    holders = [(m, m.__dict__["config"]) for m in model.modules() if "config" in m.__dict__]
    holders = [(module, held) for module, held in holders if id(held) in copies]
    try:
        for module, held in holders:
            module.__dict__["config"] = copies[id(held)]
    except BaseException:
        for module, held in holders:
            module.__dict__["config"] = held
        raise
    return new


def _pretrained(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            yield name, module
