"""The kernels under PyTorch's autograd, in eager mode: plain functions cost half of what
`torch.library` ops with a registered backward do."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from .reference import Formula

PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether a kernel may see the raw memory: nothing is tracing, transforming or wrapping it."""
    if (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or torch.compiler.is_compiling()
    ):
        return False
    for t in tensors:
        if t is not None and not (
            type(t) in PLAIN_TYPES and torch._C._has_storage(t) and not t.is_neg()
        ):
            return False
    return True


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        formula: Formula,
        backend: ModuleType,
    ) -> Tensor:
        y, _, rstd = backend.forward(x, None, weight, bias, formula, save_rstd=True)
        ctx.save_for_backward(x, weight, rstd)
        ctx.formula, ctx.backend = formula, backend
        ctx.bias_grad = _dtype_if(ctx.needs_input_grad[2], bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_gradients(ctx, dy, None, weight_grad=ctx.needs_input_grad[1]), None, None


class AddRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        formula: Formula,
        backend: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        normed, summed, rstd = backend.forward(x, residual, weight, bias, formula, save_rstd=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(summed, weight, rstd)
        ctx.formula, ctx.backend = formula, backend
        ctx.dtypes = x.dtype, residual.dtype
        ctx.bias_grad = _dtype_if(ctx.needs_input_grad[3], bias)
        return normed, summed

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dnormed: Tensor | None, dsummed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dnormed is None:
            dsum, dweight, dbias = dsummed, None, None
        else:
            weight_grad = ctx.needs_input_grad[2]
            dsum, dweight, dbias = _gradients(ctx, dnormed, dsummed, weight_grad=weight_grad)
        if dsum is None:
            return (None,) * 6
        dx, dresidual = (dsum.to(dtype) for dtype in ctx.dtypes)
        return dx, dresidual, dweight, dbias, None, None


def _gradients(
    ctx: Any, dy: Tensor, dsummed: Tensor | None, *, weight_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, weight, rstd = ctx.saved_tensors
    backend = ctx.backend
    if torch.is_grad_enabled():  # create_graph=True: the gradient itself will be differentiated
        backend, rstd = reference, None
    elif not is_plain(dy, dsummed):
        backend = reference
    return backend.backward(
        dy,
        dsummed,
        x,
        weight,
        rstd,
        ctx.formula,
        weight_grad=weight_grad,
        bias_grad=ctx.bias_grad,
    )


def _dtype_if(wanted: bool, t: Tensor | None) -> torch.dtype | None:
    return t.dtype if wanted and t is not None else None
