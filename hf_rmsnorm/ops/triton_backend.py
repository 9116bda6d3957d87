"""The Triton backend: tiles chosen from the hidden size alone.

Results of a row never depend on how many rows there are, and nothing is tuned at run time. dw and
db are summed in a fixed order that depends on the number of rows and of the device's processors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_backward, triton_forward
from .reference import Formula, as_rows, compute_dtype, output_dtype
from .triton_launch import launch, processors

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
# Widest row, in bytes of the compute dtype, that is held in registers without spilling.
_FORWARD_ROW_BYTES = 65536
_BACKWARD_ROW_BYTES = 32768
# Warps of the persistent backward per multiprocessor: what fits at 128 registers a thread.
_RESIDENT_WARPS = 16
_LOOP_COLUMNS = 4096
_TILE_COLUMNS = 2048


class Tile(NamedTuple):
    rows: int
    columns: int
    warps: int


def row_tile(hidden: int, itemsize: int = 4, *, limit: int) -> Tile | None:
    """The tile that holds whole rows of `hidden`, or None where a row is above `limit` bytes."""
    columns = max(16, triton.next_power_of_2(hidden))
    if columns * itemsize > limit:
        return None
    if columns <= 512:
        return Tile(2048 // columns, columns, 4)
    return Tile(1, columns, min(16, max(2, columns * itemsize // 2048)))


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
    hidden = x.shape[-1]
    b_x = as_rows(x)
    b_residual = None if residual is None else as_rows(residual)
    if residual is None:
        summed = x
    else:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        summed = torch.empty(x.shape, dtype=dtype, device=x.device)
    compute = compute_dtype(summed, weight, bias)
    y = torch.empty(x.shape, dtype=output_dtype(summed, weight, formula), device=x.device)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=compute) if save_rstd else None

    tile = row_tile(hidden, compute.itemsize, limit=_FORWARD_ROW_BYTES)
    kernel = triton_forward.forward_tile if tile else triton_forward.forward_loop
    rows, columns, warps = tile or Tile(1, _LOOP_COLUMNS, 8)
    launch(
        kernel,
        (triton.cdiv(b_x.shape[0], rows),),
        b_x,
        b_residual,
        _contiguous(weight),
        _contiguous(bias),
        y,
        None if residual is None else summed,
        rstd,
        b_x.shape[0],
        b_x.stride(0),
        0 if b_residual is None else b_residual.stride(0),
        N=hidden,
        K=formula.k,
        EPS=formula.eps,
        OFFSET=formula.weight_offset,
        LLAMA=formula.llama,
        NARROW=_TRITON_DTYPES[summed.dtype],
        COMPUTE=_TRITON_DTYPES[compute],
        BM=rows,
        BN=columns,
        num_warps=warps,
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
    hidden = x.shape[-1]
    compute = rstd.dtype
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, dy, weight = as_rows(x), as_rows(dy), _contiguous(weight)
    dsummed = None if dsummed is None else as_rows(dsummed)
    n_rows = x.shape[0]
    wants_sums = (weight_grad and weight is not None), bias_grad is not None

    tile = row_tile(hidden, compute.itemsize, limit=_BACKWARD_ROW_BYTES)
    blocks = triton.cdiv(n_rows, tile.rows) if tile else n_rows
    programs = blocks
    if any(wants_sums):
        tiles = 1 if tile else triton.cdiv(hidden, _TILE_COLUMNS)
        resident = processors(x.device) * (_RESIDENT_WARPS // (tile.warps if tile else 4))
        programs = min(blocks, max(1, resident // tiles))
    dweight_partials, dbias_partials = (
        x.new_empty((programs, hidden), dtype=compute) if wanted else None for wanted in wants_sums
    )
    strides = dy.stride(0), 0 if dsummed is None else dsummed.stride(0), x.stride(0)
    shared = {
        "N": hidden,
        "K": formula.k,
        "OFFSET": formula.weight_offset,
        "COMPUTE": _TRITON_DTYPES[compute],
    }
    if tile:
        launch(
            triton_backward.backward_tile,
            (programs,),
            *(dy, dsummed, x, weight, rstd, dx, dweight_partials, dbias_partials),
            n_rows,
            *strides,
            **shared,
            LLAMA=formula.llama,
            BM=tile.rows,
            BN=tile.columns,
            num_warps=tile.warps,
        )
    else:
        pull = torch.empty_like(rstd)
        launch(
            triton_backward.backward_pull,
            (n_rows,),
            *(dy, x, weight, rstd, pull),
            *(dy.stride(0), x.stride(0)),
            **shared,
            BN=_LOOP_COLUMNS,
            num_warps=8,
        )
        launch(
            triton_backward.backward_columns,
            (programs, triton.cdiv(hidden, _TILE_COLUMNS)),
            *(dy, dsummed, x, weight, rstd, pull, dx, dweight_partials, dbias_partials),
            n_rows,
            *strides,
            **shared,
            LLAMA=formula.llama,
            BN=_TILE_COLUMNS,
            num_warps=4,
        )
    if not any(wants_sums):
        return dx, None, None

    dweight = torch.empty_like(weight) if wants_sums[0] else None  # type: ignore[arg-type]
    dbias = None if bias_grad is None else x.new_empty(hidden, dtype=bias_grad)
    launch(
        triton_backward.reduce_partials,
        (triton.cdiv(hidden, 64),),
        *(dweight_partials, dbias_partials, dweight, dbias),
        programs,
        N=hidden,
        BM=32,
        BN=64,
        num_warps=4,
    )
    return dx, dweight, dbias


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
