"""Tiles of values, and the names all Triton kernels use.

Names: `p_x` pointer, `b_x` block of values, `m_x` mask; `(rows, cols)` index a tile of `BM x BN`.
`N` is the hidden size, `K` the size of the statistic. A pointer that is None switches its part of
a kernel off. Rows are counted in 64 bits: `rows * stride` passes 2^31 on real inputs.

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
def load(p_x, stride, rows, cols, mask, COMPUTE: tl.constexpr):
    offsets = rows[:, None] * stride + cols[None, :]
    return cast(tl.load(p_x + offsets, mask=mask, other=0.0), COMPUTE)


@triton.jit
def store(p_x, b_x, rows, cols, mask, N: tl.constexpr):
    offsets = rows[:, None] * N + cols[None, :]
    tl.store(p_x + offsets, cast(b_x, p_x.dtype.element_ty), mask=mask)


@triton.jit
def load_scale(p_weight, cols, m_cols, OFFSET: tl.constexpr, COMPUTE: tl.constexpr):
    b_weight = cast(tl.load(p_weight + cols, mask=m_cols, other=0.0), COMPUTE)
    return (b_weight + OFFSET)[None, :]
