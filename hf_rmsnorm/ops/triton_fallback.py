"""The Triton backend; the reference for what Triton cannot build here, said once.

Triton needs a C compiler and Python's headers, a folder to write to, and a driver that takes what
it makes. What fails is noted by what a kernel is made for, and not tried again.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from . import reference, triton_backend
from .reference import Formula

logger = logging.getLogger(__name__)

# What could not be built, and why
failed: dict[Hashable, str] = {}


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    formula: Formula,
    *,
    save_rstd: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `reference.forward`."""
    tensors = x, residual, weight, bias
    if not (failed and _kind(tensors, formula, save_rstd) in failed):
        try:
            return triton_backend.forward(*tensors, formula, save_rstd=save_rstd)
        except Exception as error:
            _note(error, _kind(tensors, formula, save_rstd))
    return reference.forward(x, residual, weight, bias, formula, save_rstd=save_rstd)


def backward(
    dy: Tensor,
    dsummed: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    formula: Formula,
    *,
    weight_grad: bool,
    bias_grad: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `reference.backward`."""
    wanted: dict[str, Any] = {"weight_grad": weight_grad, "bias_grad": bias_grad}
    tensors = dy, dsummed, x, weight
    if not (failed and _kind(tensors, formula, *wanted.values()) in failed):
        try:
            return triton_backend.backward(*tensors, rstd, formula, **wanted)
        except Exception as error:
            _note(error, _kind(tensors, formula, *wanted.values()))
    return reference.backward(dy, dsummed, x, weight, rstd, formula, **wanted)


def _kind(tensors: tuple[Tensor | None, ...], *others: Hashable) -> Hashable:
    """What a kernel is made for."""
    return *(t if t is None else (t.device, t.dtype, t.shape[-1]) for t in tensors), *others


def _note(error: Exception, kind: Hashable) -> None:
    """Raises what says nothing of a kernel: the next call may well succeed, or none will."""
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        raise error
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if "out of memory" in reason:
        raise error
    said = any(other.startswith(f"{type(error).__name__}: ") for other in failed.values())
    failed[kind] = reason
    logger.log(
        logging.INFO if said else logging.WARNING,
        "a Triton kernel cannot be built, plain PyTorch is used instead: %s",
        reason,
    )
