"""The Triton backend: which kernels run, on which tiles.

Tiles follow from the hidden size, the dtypes and which gradients are wanted: the result of a row
never depends on how many rows there are, and nothing is tuned at run time. dw and db are summed in
a fixed order that depends on the number of rows and of the device's processors.

HF_RMSNORM_CLUSTERS=1 in the environment lets the programs of a wide row form a cluster, which reads
the row once: see triton_clusters.py.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_backward, triton_forward
from .reference import Formula, as_rows, compute_dtype, output_dtype
from .triton_clusters import clusters_work
from .triton_launch import launch, processors
from .triton_layout import (
    BACKWARD_PART,
    FORWARD_PART,
    MOST_WARPS,
    Tile,
    backward_limits,
    forward_limits,
    resident_programs,
    row_tile,
)

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
# How much of a row is in registers at a time where it is looped over. One or two such programs fill
# a multiprocessor, so that all the rows being worked on are in the L2 cache for their second read.
_LOOP_BYTES = 65536
_DOT_COLUMNS = 4096
_SHARED_COLUMNS = 2048
_ROWS_PER_PARTIAL = 16
_REDUCE_COLUMNS = 16


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    formula: Formula,
    *,
    save_rstd: bool,
    clusters: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `reference.forward`. `clusters` says whether to use them, instead of the device."""
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

    if clusters is None:
        clusters = clusters_work(x.device)
    limits = forward_limits(summed.dtype, compute)
    tile = row_tile(hidden, summed.dtype.itemsize, limits, FORWARD_PART if clusters else None)
    n_rows, sharing = b_x.shape[0], 1
    if tile:
        kernel = triton_forward.forward_tile
    else:
        kernel = triton_forward.forward_loop
        tile = Tile(1, _LOOP_BYTES // compute.itemsize, 1, MOST_WARPS)
        idle = processors(x.device) // max(1, n_rows)
        sharing = max(1, min(idle, triton.cdiv(hidden, tile.columns)))
    launch(
        kernel,
        (triton.cdiv(n_rows, tile.rows), sharing),
        b_x,
        b_residual,
        _contiguous(weight),
        _contiguous(bias),
        y,
        None if residual is None else summed,
        rstd,
        n_rows,
        b_x.stride(0),
        0 if b_residual is None else b_residual.stride(0),
        N=hidden,
        K=formula.k,
        EPS=formula.eps,
        OFFSET=formula.weight_offset,
        LLAMA=formula.llama,
        NARROW=_TRITON_DTYPES[summed.dtype],
        COMPUTE=_TRITON_DTYPES[compute],
        BM=tile.rows,
        BN=tile.columns,
        T=tile.tiles,
        **tile.options,
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
    clusters: bool | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `reference.backward`. `clusters` says whether to use them, instead of the device."""
    hidden = x.shape[-1]
    compute = rstd.dtype
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, dy, weight = as_rows(x), as_rows(dy), _contiguous(weight)
    dsummed = None if dsummed is None else as_rows(dsummed)
    n_rows = x.shape[0]
    wanted = (weight_grad and weight is not None), bias_grad is not None

    # without `whole`, a program has a part of the columns
    if clusters is None:
        clusters = clusters_work(x.device)
    limits = backward_limits(x.dtype, compute, sum(wanted))
    whole = row_tile(hidden, x.dtype.itemsize, limits, BACKWARD_PART if clusters else None)
    tile = whole or Tile(1, _SHARED_COLUMNS, 1, 4)
    resident = resident_programs(tile, sum(wanted))
    streams = [t for t in (dy, dsummed, x) if t is not None]
    values = tile.rows * tile.columns * tile.tiles // tile.clusters
    buffers = resident * (2 * values * sum(t.dtype.itemsize for t in streams) + 2048)
    parts = 1 if whole else triton.cdiv(hidden, _SHARED_COLUMNS)
    heads = parts if whole else triton.cdiv(formula.k, _SHARED_COLUMNS)
    at_once = min(heads, parts - heads) or parts  # enough for the smaller launch
    programs = max(1, resident * processors(x.device) // (at_once * tile.clusters))
    programs = min(programs, triton.cdiv(n_rows, tile.rows))
    if any(wanted):  # for short inputs the partial sums would be as much to write as dx
        programs = min(programs, max(processors(x.device), n_rows // _ROWS_PER_PARTIAL))
    dweight_partials, dbias_partials = (
        x.new_empty((programs, hidden), dtype=compute) if want else None for want in wanted
    )
    constants = {
        "N": hidden,
        "K": formula.k,
        "OFFSET": formula.weight_offset,
        "COMPUTE": _TRITON_DTYPES[compute],
    }

    def rows(part: str, first: int, n_parts: int, dots: Tensor | None) -> None:
        launch(
            triton_backward.backward_rows,
            (programs, n_parts),
            *(dy, dsummed, x, weight, rstd, dots, dx, dweight_partials, dbias_partials),
            n_rows,
            *(dy.stride(0), 0 if dsummed is None else dsummed.stride(0), x.stride(0)),
            **constants,
            LLAMA=formula.llama,
            BM=tile.rows,
            BN=tile.columns,
            T=tile.tiles,
            STAGES=3 if buffers <= shared_memory(x.device) else 1,
            PART=part,
            FIRST=first,
            DOTS=1 if dots is None else dots.shape[1],
            **tile.options,
        )

    if whole:
        rows("row", 0, 1, None)
    else:
        dots = torch.empty((n_rows, 1 + parts - heads), dtype=compute, device=x.device)
        launch(
            triton_backward.backward_dots,
            (n_rows,),
            *(dy, x, weight, rstd, dots),
            *(dy.stride(0), x.stride(0)),
            N=min(hidden, heads * _SHARED_COLUMNS),
            OFFSET=formula.weight_offset,
            COMPUTE=_TRITON_DTYPES[compute],
            BN=_DOT_COLUMNS,
            DOTS=dots.shape[1],
            num_warps=8,
        )
        if parts > heads:
            rows("tail", heads, parts - heads, dots)
        rows("head", 0, heads, dots)
    if not any(wanted):
        return dx, None, None

    dweight = torch.empty_like(weight) if wanted[0] else None  # type: ignore[arg-type]
    dbias = None if bias_grad is None else x.new_empty(hidden, dtype=bias_grad)
    launch(
        triton_backward.reduce_partials,
        (triton.cdiv(hidden, _REDUCE_COLUMNS),),
        *(dweight_partials, dbias_partials, dweight, dbias),
        programs,
        N=hidden,
        BM=256,
        BN=_REDUCE_COLUMNS,
        num_warps=4,
    )
    return dx, dweight, dbias


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of a multiprocessor that programs may use to load ahead; 0 where that is not known."""
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return 0


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
