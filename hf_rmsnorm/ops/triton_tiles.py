"""Tiles of values, and the names all Triton kernels use.

Names: `p_x` pointer, `b_x` block of values, `m_x` mask; `(rows, cols)` index a tile of `BM x BN`.
`N` is the hidden size, `K` the size of the statistic. A row wider than a tile is a tuple of `T`
tiles side by side, so that 768 is three tiles of 256 and nothing is padded. A pointer that is None
switches its part of a kernel off. Rows are counted in 64 bits: `rows * stride` passes 2^31 on real
inputs.

All arithmetic is in `COMPUTE` (float32, or float64 where an input is), also because the
interpreter multiplies two bfloat16 values as if they were integers.
"""

import triton
import triton.language as tl


@triton.jit
def cast(b_x, DTYPE: tl.constexpr):
    # the interpreter has no direct way between float64 and bfloat16
    double: tl.constexpr = b_x.dtype.is_fp64() or DTYPE.is_fp64()
    brain: tl.constexpr = b_x.dtype.is_bf16() or DTYPE.is_bf16()
    if double and brain:
        b_x = b_x.to(tl.float32)
    return b_x.to(DTYPE)


@triton.jit
def select_rows(block, n_rows, BM: tl.constexpr):
    """The rows of one block, and which of them exist."""
    rows = block * tl.full([BM], BM, tl.int64) + tl.arange(0, BM)
    return rows, rows < n_rows


@triton.jit
def select_cols(start, m_rows, N: tl.constexpr, BN: tl.constexpr):
    """The columns of one tile, and its mask; none over columns where tiles divide the row."""
    cols = start + tl.arange(0, BN)
    mask = m_rows[:, None]
    if N % BN != 0:
        mask = mask & (cols < N)[None, :]
    return cols, mask


@triton.jit
def load(p_x, stride, rows, cols, mask):
    return tl.load(p_x + (rows[:, None] * stride + cols[None, :]), mask=mask, other=0.0)


@triton.jit
def store(p_x, b_x, rows, cols, mask, N: tl.constexpr):
    offsets = rows[:, None] * N + cols[None, :]
    tl.store(p_x + offsets, cast(b_x, p_x.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(
    p_x, cols, N: tl.constexpr, COMPUTE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Values that all rows share, as a tile: exchanging one row of it among warps costs more."""
    offsets = tl.broadcast_to(cols[None, :], [BM, BN])
    if N % BN != 0:
        b_x = tl.load(p_x + offsets, mask=offsets < N, other=0.0)
    else:
        b_x = tl.load(p_x + offsets)
    return cast(b_x, COMPUTE)


@triton.jit
def in_statistic(b_x, cols, N: tl.constexpr, K: tl.constexpr):
    """Zero where the statistic does not look."""
    if K < N:
        b_x = tl.where((cols < K)[None, :], b_x, 0.0)
    return b_x


@triton.jit
def zero_bits(n_rows):
    """A tile of one zero, which the compiler cannot know to be one."""
    return ((n_rows + tl.zeros([1], tl.int64)) >> 63).to(tl.int16)[:, None]


@triton.jit
def widen_again(b_x, b_zero, COMPUTE: tl.constexpr):
    """`cast(b_x, COMPUTE)` for a second use of 16-bit values.

    The compiler would keep the first result until then, in twice the registers.
    """
    if b_x.dtype.primitive_bitwidth == 16:
        b_x = (b_x.to(tl.int16, bitcast=True) ^ b_zero).to(b_x.dtype, bitcast=True)
    return cast(b_x, COMPUTE)
