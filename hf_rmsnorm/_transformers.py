"""Ties the core, which knows no transformers, to `hub`, once transformers is in use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import nn

from .patching import on_patched, on_unpatched
from .patching.plan import PatchPlan

# What has something to do once another library's module is there, by that: a module of `hub`, and
# a function in it that takes the other module, if importing ours is not all.
_AFTER = {
    "transformers.models.auto.configuration_auto": ("register", ""),
    "transformers.integrations.peft": ("adapters", "watch"),
    "peft.peft_model": ("adapters", "watch"),
    "peft.mixed_model": ("adapters", "watch"),
}


def connect() -> None:
    """Register the `hf_rmsnorm` model type, and watch adapters: now, or as soon as transformers'
    Auto classes and peft load."""
    on_patched.append(_mark)
    on_unpatched.append(_unmark)
    for name in _AFTER:
        if name in sys.modules:
            _do(name)
        else:
            sys.meta_path.insert(0, _AfterImport(name))


class _AfterImport(MetaPathFinder):
    """Does what there is to do after the first import of a module, then is gone."""

    def __init__(self, name: str):
        self.name = name

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_and_do(module: ModuleType) -> None:
            execute(module)
            _do(name)

        spec.loader.exec_module = exec_and_do  # type: ignore[method-assign]
        return spec


def _do(name: str) -> None:
    module, function = _AFTER[name]
    ours = _hub(module)
    if function:
        getattr(ours, function)(sys.modules[name])


def _hub(module: str) -> Any:
    return importlib.import_module(f".hub.{module}", __package__)


def _mark(model: nn.Module, plan: PatchPlan) -> None:
    if "transformers" in sys.modules:
        _hub("marking").mark(model, plan)


def _unmark(model: nn.Module) -> None:
    if "transformers" in sys.modules:
        _hub("marking").unmark(model)
