"""The backends. Each offers `forward` and `backward` with the signatures of `reference`."""

from __future__ import annotations

import functools
import importlib.util
import logging
from types import ModuleType

import torch
from torch import Tensor

from . import cpu_autograd, cpu_backend, cpu_build, reference, shortcut

logger = logging.getLogger(__name__)

__all__ = ["backend_for", "reference", "shortcut"]


def backend_for(x: Tensor) -> ModuleType:
    """The backend for x's device; `reference` where there is nothing faster, or nothing to do."""
    return _for_device(x.device) if x.numel() else reference


def status(device: torch.device | str) -> str:
    """The backend of a device after a norm on it, and what it could not build."""
    x = torch.ones(2, 8, device=device)
    backend = backend_for(x)
    backend.forward(x, None, None, None, reference.Formula(8, 1e-5, 0.0, False), save_rstd=False)
    reasons = dict.fromkeys(getattr(backend, "failed", {}).values())
    return "; ".join([backend.__name__, *(f"plain PyTorch for some: {r}" for r in reasons)])


@functools.cache
def _for_device(device: torch.device) -> ModuleType:
    return _for_device_type(device.type)


@functools.cache
def _for_device_type(device_type: str) -> ModuleType:
    if device_type in ("cuda", "xpu") and importlib.util.find_spec("triton"):
        try:
            from . import triton_fallback
        except Exception as error:  # a Triton that cannot be imported
            logger.warning("Triton cannot be used, plain PyTorch is used instead: %s", error)
            return reference
        return triton_fallback
    if device_type == "cpu":
        if cpu_build.library() is None:
            return reference
        cpu_autograd.start()
        return cpu_backend
    return reference
