"""The CPU backend: calls the compiled kernel, or the reference for what that does not cover."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import cpu_build, reference
from .reference import Formula, as_rows, compute_dtype, output_dtype

# of a dtype in rms_norm.c
NAMES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}


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
    if residual is not None and residual.dtype != x.dtype:
        x, residual = (x + residual).contiguous(), None
    out = output_dtype(x, weight, formula)
    compute = compute_dtype(x, weight, bias)
    kernel = _kernel("forward", x.dtype, out, compute)
    if kernel is None:
        return reference.forward(x, residual, weight, bias, formula, save_rstd=save_rstd)
    hidden = x.shape[-1]
    n_rows = x.numel() // hidden
    rows, residual = _rows(x), None if residual is None else _rows(residual)
    weight, bias = _as(weight, compute), _as(bias, compute)
    y = torch.empty_like(x, dtype=out, memory_format=torch.contiguous_format)
    summed = x
    if residual is not None:
        summed = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=compute) if save_rstd else None
    kernel(
        rows.data_ptr(),
        _pointer(residual),
        _pointer(weight),
        _pointer(bias),
        y.data_ptr(),
        None if residual is None else summed.data_ptr(),
        _pointer(rstd),
        n_rows,
        hidden,
        formula.k,
        _row_stride(rows),
        _row_stride(residual),
        formula.eps,
        formula.weight_offset,
        formula.llama,
        _threads(n_rows * hidden),
    )
    return y, summed, rstd


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
    compute = rstd.dtype
    kernel = _kernel("backward", x.dtype, dy.dtype, compute)
    if kernel is None:
        wanted: dict[str, Any] = {"weight_grad": weight_grad, "bias_grad": bias_grad}
        return reference.backward(dy, dsummed, x, weight, rstd, formula, **wanted)
    hidden = x.shape[-1]
    n_rows = x.numel() // hidden
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, dy = _rows(x), _rows(dy)
    dsummed = None if dsummed is None else _rows(dsummed)
    scale = _as(weight, compute)
    blocks = min(cpu_build.MAX_BLOCKS, -(-n_rows // cpu_build.BLOCK_ROWS))
    wants_dweight = weight_grad and weight is not None
    dweight = torch.empty(hidden, dtype=compute) if wants_dweight else None
    dbias = None if bias_grad is None else torch.empty(hidden, dtype=compute)
    partials = torch.empty((wants_dweight + (dbias is not None), blocks, hidden), dtype=compute)
    start = partials.data_ptr()
    kernel(
        dy.data_ptr(),
        _pointer(dsummed),
        x.data_ptr(),
        _pointer(scale),
        rstd.data_ptr(),
        dx.data_ptr(),
        _pointer(dweight),
        _pointer(dbias),
        start,
        start + wants_dweight * blocks * hidden * compute.itemsize,
        n_rows,
        hidden,
        formula.k,
        _row_stride(dy),
        _row_stride(dsummed),
        _row_stride(x),
        formula.weight_offset,
        formula.llama,
        blocks,
        _threads(n_rows * hidden),
    )
    if dweight is not None and weight is not None:
        dweight = dweight.to(weight.dtype)
    return dx, dweight, None if dbias is None else dbias.to(bias_grad)


@functools.cache
def _kernel(name: str, x: torch.dtype, out: torch.dtype, compute: torch.dtype) -> Any:
    """None for a mixture with float64, and for float16 where the compiler knows none."""
    if (x == torch.float64) != (compute == torch.float64):
        return None
    return getattr(cpu_build.library(), f"{name}_{NAMES[x]}_{NAMES[out]}", None)


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= cpu_build.PARALLEL_ELEMENTS else 1


def _rows(x: Tensor) -> Tensor:
    """x itself if contiguous, else as `(rows, hidden)`."""
    return x if x.is_contiguous() else as_rows(x)


def _row_stride(x: Tensor | None) -> int:
    if x is None:
        return 0
    return x.shape[-1] if x.is_contiguous() else x.stride(0)


def _as(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if t is None or (t.dtype == dtype and t.is_contiguous()):
        return t
    return t.to(dtype).contiguous()


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
