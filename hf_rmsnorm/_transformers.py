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
from .plan import PatchPlan

_AUTO = "transformers.models.auto.configuration_auto"


def connect() -> None:
    """Register the `hf_rmsnorm` model type now, or as soon as transformers' Auto classes load."""
    on_patched.append(_mark)
    on_unpatched.append(_unmark)
    if _AUTO in sys.modules:
        _hub("configs")  # registers itself
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Imports `hub.configs` after the first import of `_AUTO`, then is gone."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_and_register(module: ModuleType) -> None:
            execute(module)
            _hub("configs")  # registers itself

        spec.loader.exec_module = exec_and_register  # type: ignore[method-assign]
        return spec


def _hub(module: str) -> Any:
    return importlib.import_module(f".hub.{module}", __package__)


def _mark(model: nn.Module, plan: PatchPlan) -> None:
    if "transformers" in sys.modules:
        _hub("marking").mark(model, plan)


def _unmark(model: nn.Module) -> None:
    if "transformers" in sys.modules:
        _hub("marking").unmark(model)
