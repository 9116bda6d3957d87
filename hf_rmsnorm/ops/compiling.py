"""What `torch.compile` gets to see: the op of `library.py`, or the plain body for it to fuse."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _for_device_type, library, reference
from .autograd import PLAIN_TYPES
from .reference import Formula

BODIES = ("torch", "kernel")

body = "torch"  # set by functional.set_compiled_body


def rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, formula: Formula) -> Tensor:
    if _takes_op(x, weight, bias):
        save = _wants_gradient(x, weight, bias)
        return library.rms_norm(x, weight, bias, formula, save_rstd=save)
    return reference.normalise(x, weight, bias, formula)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, formula: Formula
) -> tuple[Tensor, Tensor]:
    if _takes_op(x, residual, weight, bias):
        save = _wants_gradient(x, residual, weight, bias)
        return library.add_rms_norm(x, residual, weight, bias, formula, save_rstd=save)
    y, summed, _ = reference.forward(x, residual, weight, bias, formula, save_rstd=False)
    return y, summed


def _takes_op(x: Tensor, *others: Tensor | None) -> bool:
    """Exports, function transforms, forward-mode derivatives and tensor subclasses have no rule for
    the op, but one for everything the plain body is made of."""
    if body == "torch" or not _has_kernel(x.device.type):
        return False
    if (
        torch.compiler.is_exporting()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return False
    return all(t is None or type(t) in PLAIN_TYPES for t in (x, *others))


def _has_kernel(device_type: str) -> bool:
    return _for_device_type(device_type) is not reference


# What torch.compiler.assume_constant_result does, which would import the compiler right away.
_has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
