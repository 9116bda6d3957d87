"""The Triton kernels of the forward. Names and rules: triton_tiles.py."""

import triton
import triton.language as tl

from .triton_tiles import cast, load, load_scale, store


@triton.jit
def _load_summed(
    p_x, p_residual, p_summed, x_stride, residual_stride, rows, cols, mask, COMPUTE: tl.constexpr
):
    b_x = load(p_x, x_stride, rows, cols, mask, COMPUTE)
    if p_residual is not None:
        b_x += load(p_residual, residual_stride, rows, cols, mask, COMPUTE)
        b_x = cast(cast(b_x, p_summed.dtype.element_ty), COMPUTE)
    return b_x


@triton.jit
def _affine(
    b_y,
    p_weight,
    p_bias,
    cols,
    m_cols,
    OFFSET: tl.constexpr,
    LLAMA: tl.constexpr,
    NARROW: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    if LLAMA:
        b_y = cast(cast(b_y, NARROW), COMPUTE)
    if p_weight is not None:
        b_y *= load_scale(p_weight, cols, m_cols, OFFSET, COMPUTE)
    if p_bias is not None:
        b_y += cast(tl.load(p_bias + cols, mask=m_cols, other=0.0), COMPUTE)[None, :]
    return b_y


@triton.jit(do_not_specialize=["n_rows"])
def forward_tile(
    p_x,
    p_residual,
    p_weight,
    p_bias,
    p_y,
    p_summed,
    p_rstd,
    n_rows,
    x_stride,
    residual_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    LLAMA: tl.constexpr,
    NARROW: tl.constexpr,
    COMPUTE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Whole rows in registers, `BM` of them at a time: one read, one write."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    cols = tl.arange(0, BN)
    m_rows, m_cols = rows < n_rows, cols < N
    mask = m_rows[:, None] & m_cols[None, :]
    b_x = _load_summed(
        p_x, p_residual, p_summed, x_stride, residual_stride, rows, cols, mask, COMPUTE
    )
    if p_residual is not None:
        store(p_summed, b_x, rows, cols, mask, N)
    b_square = tl.where((cols < K)[None, :], b_x * b_x, 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_square, 1) / K + EPS)
    if p_rstd is not None:
        tl.store(p_rstd + rows, b_rstd, mask=m_rows)
    b_y = _affine(
        b_x * b_rstd[:, None], p_weight, p_bias, cols, m_cols, OFFSET, LLAMA, NARROW, COMPUTE
    )
    store(p_y, b_y, rows, cols, mask, N)


@triton.jit(do_not_specialize=["n_rows"])
def forward_loop(
    p_x,
    p_residual,
    p_weight,
    p_bias,
    p_y,
    p_summed,
    p_rstd,
    n_rows,
    x_stride,
    residual_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    LLAMA: tl.constexpr,
    NARROW: tl.constexpr,
    COMPUTE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Rows wider than the registers: one pass over the statistic's features, one over all."""
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    m_rows = rows < n_rows
    b_sum = tl.zeros([BM, BN], COMPUTE)
    for start in range(0, K, BN):
        cols = start + tl.arange(0, BN)
        mask = m_rows[:, None] & (cols < K)[None, :]
        b_x = _load_summed(
            p_x, p_residual, p_summed, x_stride, residual_stride, rows, cols, mask, COMPUTE
        )
        b_sum += b_x * b_x
    b_rstd = tl.rsqrt(tl.sum(b_sum, 1) / K + EPS)
    if p_rstd is not None:
        tl.store(p_rstd + rows, b_rstd, mask=m_rows)
    for start in range(0, N, BN):
        cols = start + tl.arange(0, BN)
        m_cols = cols < N
        mask = m_rows[:, None] & m_cols[None, :]
        b_x = _load_summed(
            p_x, p_residual, p_summed, x_stride, residual_stride, rows, cols, mask, COMPUTE
        )
        if p_residual is not None:
            store(p_summed, b_x, rows, cols, mask, N)
        b_y = _affine(
            b_x * b_rstd[:, None], p_weight, p_bias, cols, m_cols, OFFSET, LLAMA, NARROW, COMPUTE
        )
        store(p_y, b_y, rows, cols, mask, N)
