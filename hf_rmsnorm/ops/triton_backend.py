"""The Triton backend: which kernels run, on which tiles.

Tiles follow from the hidden size, the dtypes and which gradients are wanted: the result of a row
never depends on how many rows there are, and nothing is tuned at run time. dw and db are summed in
a fixed order that depends on the number of rows and of the device's processors.
"""

from __future__ import annotations

import functools
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
# How much of a row is in registers at a time where it is looped over. One or two such programs fill
# a multiprocessor, so that all the rows being worked on are in the L2 cache for their second read.
_LOOP_BYTES = 65536
_DOT_COLUMNS = 4096
_SHARED_COLUMNS = 2048
_ROWS_PER_PARTIAL = 16
_REDUCE_COLUMNS = 16
# 1024 threads to a program; warps of AMD's data-centre GPUs have 64
_MOST_WARPS = 16 if torch.version.hip else 32


class Tile(NamedTuple):
    """A block of `rows x (tiles * columns)` values, held in the registers of `warps` warps."""

    rows: int
    columns: int
    tiles: int
    warps: int


class Limits(NamedTuple):
    """How many values of a row a thread may hold. From what tests/ops/aot_compile.py reports.

    Attributes:
        usual: up to 16 warps are taken to keep to it.
        exact: where fewer warps spare padding.
        most: wider rows need other kernels.
        warps: of the largest program.
    """

    usual: int
    exact: int
    most: int
    warps: int


def forward_limits(held: torch.dtype, compute: torch.dtype) -> Limits:
    if compute.itemsize == 8:
        return Limits(usual=8, exact=8, most=8, warps=_MOST_WARPS)
    exact = 56 if held.itemsize == 2 else 32
    return Limits(usual=24, exact=exact, most=32, warps=_MOST_WARPS)


def backward_limits(held: torch.dtype, compute: torch.dtype, sums: int) -> Limits:
    """`sums`: how many gradients add up over rows, each in registers of its own."""
    if compute.itemsize == 8:
        return Limits(usual=8, exact=8, most=8, warps=16)
    most = 24 if sums < 2 else 16
    if held.itemsize == 4:
        return Limits(usual=most, exact=24, most=most, warps=16)
    return Limits(usual=24, exact=24, most=most + 8, warps=16)


def resident_programs(tile: Tile, sums: int) -> int:
    """Programs of the backward that one multiprocessor has the registers for."""
    values = tile.rows * tile.columns * tile.tiles // (32 * tile.warps)
    warps = 32 if values <= 8 else 16 if values <= 16 or sums < 2 else 12
    return max(1, warps // tile.warps)


@functools.cache
def row_tile(hidden: int, itemsize: int, limits: Limits) -> Tile | None:
    """The tile that holds whole rows of `hidden` values of `itemsize` bytes; None: too wide.

    A thread reads 16 bytes at a time. Rows of at least a warp's width are cut into tiles of one
    such access each, narrower ones into three tiles where that is exact, or padded.
    """
    vector = 16 // itemsize
    warps = 1
    while hidden > 32 * warps * limits.usual and warps < 16:
        warps *= 2
    while hidden > 32 * warps * limits.most:
        warps *= 2
        if warps > limits.warps:
            return None
    for fewer in (warps, warps // 2, warps // 4):
        if fewer and hidden % (32 * fewer * vector) == 0 and hidden <= 32 * fewer * limits.exact:
            warps = fewer
            break
    columns = 32 * warps * vector
    if hidden < columns:
        columns = max(16, triton.next_power_of_2(hidden))
        if columns >= 64 and hidden == columns // 4 * 3:
            columns //= 4
    tiles = triton.cdiv(hidden, columns)
    rows = max(1, 128 * limits.usual // (columns * tiles))
    rows = 1 << (rows.bit_length() - 1)
    while rows == 1 and tiles % 2 == 0:
        columns, tiles = columns * 2, tiles // 2
    return Tile(rows, columns, tiles, max(4, warps))


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

    tile = row_tile(hidden, summed.dtype.itemsize, forward_limits(summed.dtype, compute))
    kernel = triton_forward.forward_tile if tile else triton_forward.forward_loop
    tile = tile or Tile(1, _LOOP_BYTES // compute.itemsize, 1, _MOST_WARPS)
    launch(
        kernel,
        (triton.cdiv(b_x.shape[0], tile.rows),),
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
        BM=tile.rows,
        BN=tile.columns,
        T=tile.tiles,
        num_warps=tile.warps,
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
    wanted = (weight_grad and weight is not None), bias_grad is not None

    # without `whole`, a program has a part of the columns
    whole = row_tile(hidden, x.dtype.itemsize, backward_limits(x.dtype, compute, sum(wanted)))
    tile = whole or Tile(1, _SHARED_COLUMNS, 1, 4)
    resident = resident_programs(tile, sum(wanted))
    streams = [t for t in (dy, dsummed, x) if t is not None]
    values = tile.rows * tile.columns * tile.tiles
    buffers = resident * (2 * values * sum(t.dtype.itemsize for t in streams) + 2048)
    parts = 1 if whole else triton.cdiv(hidden, _SHARED_COLUMNS)
    heads = parts if whole else triton.cdiv(formula.k, _SHARED_COLUMNS)
    at_once = min(heads, parts - heads) or parts  # enough for the smaller launch
    programs = max(1, resident * processors(x.device) // at_once)
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
            num_warps=tile.warps,
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
