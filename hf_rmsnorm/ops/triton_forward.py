"""The Triton kernels of the forward. Names and rules: triton_tiles.py."""
# mypy: disable-error-code="assignment"
# (tuples grow while Triton unrolls a loop)

import triton
import triton.language as tl

from .triton_tiles import (
    cast,
    in_statistic,
    load,
    load_vector,
    select_cols,
    select_rows,
    store,
    widen_again,
    zero_bits,
)


@triton.jit
def _load_summed(
    p_x, p_residual, p_summed, x_stride, residual_stride, rows, cols, mask, COMPUTE: tl.constexpr
):
    b_x = load(p_x, x_stride, rows, cols, mask)
    if p_residual is not None:
        b_residual = load(p_residual, residual_stride, rows, cols, mask)
        b_x = cast(cast(b_x, COMPUTE) + cast(b_residual, COMPUTE), p_summed.dtype.element_ty)
    return b_x


@triton.jit
def _affine(
    b_y,
    p_weight,
    p_bias,
    cols,
    N: tl.constexpr,
    OFFSET: tl.constexpr,
    LLAMA: tl.constexpr,
    NARROW: tl.constexpr,
    COMPUTE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    if LLAMA:
        b_y = cast(cast(b_y, NARROW), COMPUTE)
    if p_weight is not None:
        b_y *= load_vector(p_weight, cols, N, COMPUTE, BM, BN) + OFFSET
    if p_bias is not None:
        b_y += load_vector(p_bias, cols, N, COMPUTE, BM, BN)
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
    T: tl.constexpr,
):
    """Whole rows in registers, `BM` of them at a time: one read, one write."""
    rows, m_rows = select_rows(tl.program_id(0), n_rows, BM)
    b_zero = zero_bits(n_rows)
    held = ()
    b_square = tl.zeros([BM, BN], COMPUTE)
    for t in tl.static_range(T):
        cols, mask = select_cols(t * BN, m_rows, N, BN)
        b_x = _load_summed(
            p_x, p_residual, p_summed, x_stride, residual_stride, rows, cols, mask, COMPUTE
        )
        if p_residual is not None:
            store(p_summed, b_x, rows, cols, mask, N)
        held += (b_x,)
        b_x = cast(b_x, COMPUTE)
        b_square += in_statistic(b_x * b_x, cols, N, K)
    b_rstd = tl.rsqrt(tl.sum(b_square, 1) * (1.0 / K) + EPS)
    if p_rstd is not None:
        tl.store(p_rstd + rows, b_rstd, mask=m_rows)
    for t in tl.static_range(T):
        cols, mask = select_cols(t * BN, m_rows, N, BN)
        b_y = widen_again(held[t], b_zero, COMPUTE) * b_rstd[:, None]
        b_y = _affine(b_y, p_weight, p_bias, cols, N, OFFSET, LLAMA, NARROW, COMPUTE, BM, BN)
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
    T: tl.constexpr,
):
    """Rows wider than the registers: one pass over the statistic's features, one over all.

    So pRMSNorm reads its rows once, but for the share of them that is its statistic. Programs that
    share a row each go through the statistic, and then take turns.
    """
    rows, m_rows = select_rows(tl.program_id(0), n_rows, BM)
    b_square = tl.zeros([BM, BN], COMPUTE)
    for start in range(0, K, BN):
        cols, mask = select_cols(start, m_rows, K, BN)
        b_x = _load_summed(
            p_x, p_residual, p_summed, x_stride, residual_stride, rows, cols, mask, COMPUTE
        )
        b_x = cast(b_x, COMPUTE)
        b_square += b_x * b_x
    b_rstd = tl.rsqrt(tl.sum(b_square, 1) * (1.0 / K) + EPS)
    if p_rstd is not None:  # the same value from all that share the row
        tl.store(p_rstd + rows, b_rstd, mask=m_rows)
    for start in range(0, N, BN):
        if (start // BN) % tl.num_programs(1) == tl.program_id(1):
            cols, mask = select_cols(start, m_rows, N, BN)
            b_x = _load_summed(
                p_x, p_residual, p_summed, x_stride, residual_stride, rows, cols, mask, COMPUTE
            )
            if p_residual is not None:
                store(p_summed, b_x, rows, cols, mask, N)
            b_y = cast(b_x, COMPUTE) * b_rstd[:, None]
            b_y = _affine(b_y, p_weight, p_bias, cols, N, OFFSET, LLAMA, NARROW, COMPUTE, BM, BN)
            store(p_y, b_y, rows, cols, mask, N)
