"""The Triton kernels of the backward. Names and rules: triton_tiles.py."""

import triton
import triton.language as tl

from .triton_tiles import cast, load, load_scale, store


@triton.jit
def _store_dx(
    b_g,
    b_xhat,
    b_pull,
    b_rstd,
    p_dsummed,
    p_dx,
    dsummed_stride,
    rows,
    cols,
    mask,
    N: tl.constexpr,
    K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    b_pull = tl.where((cols < K)[None, :], b_xhat * b_pull[:, None], 0.0)
    b_dx = (b_g - b_pull) * b_rstd[:, None]
    if p_dsummed is not None:
        b_dx += load(p_dsummed, dsummed_stride, rows, cols, mask, COMPUTE)
    store(p_dx, b_dx, rows, cols, mask, N)


@triton.jit
def _store_partial(p_partials, b_sum, cols, m_cols, N: tl.constexpr):
    tl.store(p_partials + tl.program_id(0).to(tl.int64) * N + cols, tl.sum(b_sum, 0), mask=m_cols)


@triton.jit(do_not_specialize=["n_rows"])
def backward_tile(
    p_dy,
    p_dsummed,
    p_x,
    p_weight,
    p_rstd,
    p_dx,
    p_dweight,
    p_dbias,
    n_rows,
    dy_stride,
    dsummed_stride,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    OFFSET: tl.constexpr,
    LLAMA: tl.constexpr,
    COMPUTE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Whole rows in registers: dx, and this program's share of dw and db in its row of partials."""
    cols = tl.arange(0, BN)
    m_cols = cols < N
    if p_dweight is not None:
        b_dweight = tl.zeros([BM, BN], COMPUTE)
    if p_dbias is not None:
        b_dbias = tl.zeros([BM, BN], COMPUTE)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BM), tl.num_programs(0)):
        rows = (block * BM + tl.arange(0, BM)).to(tl.int64)
        m_rows = rows < n_rows
        mask = m_rows[:, None] & m_cols[None, :]
        b_rstd = tl.load(p_rstd + rows, mask=m_rows, other=0.0)
        b_xhat = load(p_x, x_stride, rows, cols, mask, COMPUTE) * b_rstd[:, None]
        b_g = load(p_dy, dy_stride, rows, cols, mask, COMPUTE)
        if p_dbias is not None:
            b_dbias += b_g
        if p_dweight is not None:
            if LLAMA:
                b_dweight += b_g * cast(cast(b_xhat, p_x.dtype.element_ty), COMPUTE)
            else:
                b_dweight += b_g * b_xhat
        if p_weight is not None:
            b_g *= load_scale(p_weight, cols, m_cols, OFFSET, COMPUTE)
        b_pull = tl.sum(b_g * b_xhat, 1) / K
        _store_dx(
            b_g,
            b_xhat,
            b_pull,
            b_rstd,
            p_dsummed,
            p_dx,
            dsummed_stride,
            rows,
            cols,
            mask,
            N,
            K,
            COMPUTE,
        )
    if p_dweight is not None:
        _store_partial(p_dweight, b_dweight, cols, m_cols, N)
    if p_dbias is not None:
        _store_partial(p_dbias, b_dbias, cols, m_cols, N)


@triton.jit
def backward_pull(
    p_dy,
    p_x,
    p_weight,
    p_rstd,
    p_pull,
    dy_stride,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    OFFSET: tl.constexpr,
    COMPUTE: tl.constexpr,
    BN: tl.constexpr,
):
    """First of two for wide rows: each row's mean of g * xhat, over all features, divided by K."""
    rows = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)
    b_sum = tl.zeros([1, BN], COMPUTE)
    for start in range(0, N, BN):
        cols = start + tl.arange(0, BN)
        m_cols = cols < N
        b_g = load(p_dy, dy_stride, rows, cols, m_cols[None, :], COMPUTE)
        if p_weight is not None:
            b_g *= load_scale(p_weight, cols, m_cols, OFFSET, COMPUTE)
        b_sum += b_g * load(p_x, x_stride, rows, cols, m_cols[None, :], COMPUTE)
    b_rstd = tl.load(p_rstd + rows)
    tl.store(p_pull + rows, tl.sum(b_sum, 1) * b_rstd / K)


@triton.jit(do_not_specialize=["n_rows"])
def backward_columns(
    p_dy,
    p_dsummed,
    p_x,
    p_weight,
    p_rstd,
    p_pull,
    p_dx,
    p_dweight,
    p_dbias,
    n_rows,
    dy_stride,
    dsummed_stride,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    OFFSET: tl.constexpr,
    LLAMA: tl.constexpr,
    COMPUTE: tl.constexpr,
    BN: tl.constexpr,
):
    """Second of two for wide rows: one tile of columns, down the rows."""
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    m_cols = cols < N
    mask = m_cols[None, :]
    if p_dweight is not None:
        b_dweight = tl.zeros([1, BN], COMPUTE)
    if p_dbias is not None:
        b_dbias = tl.zeros([1, BN], COMPUTE)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        rows = (row + tl.arange(0, 1)).to(tl.int64)
        b_rstd = tl.load(p_rstd + rows)
        b_pull = tl.load(p_pull + rows)
        b_xhat = load(p_x, x_stride, rows, cols, mask, COMPUTE) * b_rstd[:, None]
        b_g = load(p_dy, dy_stride, rows, cols, mask, COMPUTE)
        if p_dbias is not None:
            b_dbias += b_g
        if p_dweight is not None:
            if LLAMA:
                b_dweight += b_g * cast(cast(b_xhat, p_x.dtype.element_ty), COMPUTE)
            else:
                b_dweight += b_g * b_xhat
        if p_weight is not None:
            b_g *= load_scale(p_weight, cols, m_cols, OFFSET, COMPUTE)
        _store_dx(
            b_g,
            b_xhat,
            b_pull,
            b_rstd,
            p_dsummed,
            p_dx,
            dsummed_stride,
            rows,
            cols,
            mask,
            N,
            K,
            COMPUTE,
        )
    if p_dweight is not None:
        _store_partial(p_dweight, b_dweight, cols, m_cols, N)
    if p_dbias is not None:
        _store_partial(p_dbias, b_dbias, cols, m_cols, N)


@triton.jit
def _sum_partials(
    p_partials, p_out, n_partials, cols, m_cols, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    b_sum = tl.zeros([BM, BN], p_partials.dtype.element_ty)
    for start in range(0, n_partials, BM):
        rows = (start + tl.arange(0, BM)).to(tl.int64)
        mask = (rows < n_partials)[:, None] & m_cols[None, :]
        b_sum += tl.load(p_partials + rows[:, None] * N + cols[None, :], mask=mask, other=0.0)
    tl.store(p_out + cols, cast(tl.sum(b_sum, 0), p_out.dtype.element_ty), mask=m_cols)


@triton.jit(do_not_specialize=["n_partials"])
def reduce_partials(
    p_dweight_partials,
    p_dbias_partials,
    p_dweight,
    p_dbias,
    n_partials,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dw and db as the sum of the partials, always in the same order."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    m_cols = cols < N
    if p_dweight is not None:
        _sum_partials(p_dweight_partials, p_dweight, n_partials, cols, m_cols, N, BM, BN)
    if p_dbias is not None:
        _sum_partials(p_dbias_partials, p_dbias, n_partials, cols, m_cols, N, BM, BN)
