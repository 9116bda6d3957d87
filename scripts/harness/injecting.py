"""Faults on purpose: an exception at any line of the package, and what must be as before then."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import hf_rmsnorm

PACKAGE = str(Path(hf_rmsnorm.__file__).parent)
_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks")


class Injected(BaseException):
    """As Ctrl-C: no `except Exception` may keep it."""


class InjectedError(Exception):
    """As an error that nobody expects there."""


class Lines:
    """A context in which the `at`-th line that runs in the package raises `error`.

    Without `at`, the lines are counted alone. A tracing function that raises is gone: what the
    package does about the exception runs undisturbed.
    """

    def __init__(self, at: int | None = None, error: Callable[[str], BaseException] = Injected):
        self.at, self.error, self.count, self.where = at, error, 0, ""

    def __enter__(self) -> Lines:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
        if event == "line":
            self.count += 1
            if self.count == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise self.error(f"injected at {self.where}")
        return self._line


def lines_of(action: Callable[..., object], *arguments: Any) -> int:
    """How many lines of the package `action` runs, from the second time on."""
    action(*arguments)
    with Lines() as lines:
        action(*arguments)
    return lines.count


def state(model: nn.Module) -> dict[str, Any]:
    """All of a model that a patch changes, and what is global: equal if and only if untouched."""
    settings = torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()
    found: dict[str, Any] = {"settings": (*settings, torch.is_autocast_enabled("cuda"))}
    for name, module in model.named_modules():
        ours = sorted(key for key in vars(module) if key.startswith("_hf_rmsnorm"))
        rest = {key: value for key, value in vars(module).items() if key not in ours}
        own = {k: v for k, v in rest.items() if isinstance(v, (str, int, float, tuple))}
        hooks = [list(getattr(module, table).values()) for table in _TABLES]
        parts = ours, list(module._parameters), list(module._buffers)
        found[name] = type(module), own, repr(hooks), parts
        config = vars(module).get("config")
        if config is not None:
            found[f"{name} config"] = type(config), repr(config)
    for name, tensor in model.state_dict(keep_vars=True).items():
        data = tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        found[f"{name} tensor"] = tensor.shape, hashlib.sha256(data).digest()
    return found


def difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The first thing that is not as it was; empty if all is."""
    if before.keys() != after.keys():
        return f"there or not: {sorted(before.keys() ^ after.keys())[0]}"
    return next((f"{key}" for key in before if before[key] != after[key]), "")
