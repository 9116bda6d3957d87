"""The backends. Each offers `forward` and `backward` with the signatures of `reference`."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from . import cpu_autograd, cpu_backend, cpu_build, reference, shortcut

__all__ = ["backend_for", "reference", "shortcut"]


def backend_for(x: Tensor) -> ModuleType:
    """The backend for x's device; `reference` where there is nothing faster, or nothing to do."""
    return _for_device(x.device) if x.numel() else reference


@functools.cache
def _for_device(device: torch.device) -> ModuleType:
    return _for_device_type(device.type)


@functools.cache
def _for_device_type(device_type: str) -> ModuleType:
    if device_type in ("cuda", "xpu") and importlib.util.find_spec("triton"):
        from . import triton_backend

        return triton_backend
    if device_type == "cpu":
        if cpu_build.library() is None:
            return reference
        cpu_autograd.start()
        return cpu_backend
    return reference
