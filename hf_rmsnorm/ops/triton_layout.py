"""How a row of a given width is laid out over threads: the tables of the Triton backend.

What they say was checked by compiling it, not by timing it: tests/ops/aot_compile.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

# 1024 threads to a program; warps of AMD's data-centre GPUs have 64
MOST_WARPS = 16 if torch.version.hip else 32
# With clusters: what one program takes of a row, where 8 programs, the most that every GPU with
# clusters can run, are enough.
FORWARD_PART = 16384
BACKWARD_PART = 4096


class Tile(NamedTuple):
    """A block of `rows x (tiles * columns)` values, held in the registers of `warps` warps.

    Every tile is shared by the programs of a cluster, each with so many warps.
    """

    rows: int
    columns: int
    tiles: int
    warps: int
    clusters: int = 1

    @property
    def options(self) -> dict[str, int]:
        """For the compiler."""
        options = {"num_warps": self.warps}
        return options if self.clusters == 1 else options | {"num_ctas": self.clusters}


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
        return Limits(usual=8, exact=8, most=8, warps=MOST_WARPS)
    exact = 56 if held.itemsize == 2 else 32
    return Limits(usual=24, exact=exact, most=32, warps=MOST_WARPS)


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
    values = tile.rows * tile.columns * tile.tiles // (32 * tile.warps * tile.clusters)
    warps = 32 if values <= 8 else 16 if values <= 16 or sums < 2 else 12
    return max(1, warps // tile.warps)


@functools.cache
def row_tile(hidden: int, itemsize: int, limits: Limits, part: int | None = None) -> Tile | None:
    """The tile that holds whole rows of `hidden` values of `itemsize` bytes; None: too wide.

    A thread reads 16 bytes at a time. Rows of at least a warp's width are cut into tiles of one
    such access each, narrower ones into three tiles where that is exact, or padded. Rows wider
    than `part` are for a cluster.
    """
    if part and hidden > part:
        clusters = min(8, triton.next_power_of_2(triton.cdiv(hidden, part)))
        tile = row_tile(triton.cdiv(hidden, clusters), itemsize, limits)
        if tile and tile.rows == 1:
            return tile._replace(columns=tile.columns * clusters, clusters=clusters)
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
