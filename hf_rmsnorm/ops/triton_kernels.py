"""The Triton kernels for RMSNorm and pRMSNorm, with an optional residual add.

Names: `p_x` pointer, `b_x` block of values, `m_x` mask; `(rows, cols)` index a tile of `BM x BN`.
`N` is the hidden size, `K` the size of the statistic. A pointer that is None switches its part of
a kernel off. Rows are counted in 64 bits: `rows * stride` passes 2^31 on real inputs.

All arithmetic is in `COMPUTE` (float32, or float64 where an input is), also because the
interpreter multiplies two bfloat16 values as if they were integers.
"""

import triton
import triton.language as tl


@triton.jit
def _cast(b_x, DTYPE: tl.constexpr):
    # the interpreter has no direct way between float64 and bfloat16
    double: tl.constexpr = b_x.dtype.is_fp64() or DTYPE.is_fp64()
    brain: tl.constexpr = b_x.dtype.is_bf16() or DTYPE.is_bf16()
    if double and brain:
        b_x = b_x.to(tl.float32)
    return b_x.to(DTYPE)


@triton.jit
def _load(p_x, stride, rows, cols, mask, COMPUTE: tl.constexpr):
    offsets = rows[:, None] * stride + cols[None, :]
    return _cast(tl.load(p_x + offsets, mask=mask, other=0.0), COMPUTE)


@triton.jit
def _store(p_x, b_x, rows, cols, mask, N: tl.constexpr):
    offsets = rows[:, None] * N + cols[None, :]
    tl.store(p_x + offsets, _cast(b_x, p_x.dtype.element_ty), mask=mask)


@triton.jit
def _load_summed(
    p_x, p_residual, p_summed, x_stride, residual_stride, rows, cols, mask, COMPUTE: tl.constexpr
):
    b_x = _load(p_x, x_stride, rows, cols, mask, COMPUTE)
    if p_residual is not None:
        b_x += _load(p_residual, residual_stride, rows, cols, mask, COMPUTE)
        b_x = _cast(_cast(b_x, p_summed.dtype.element_ty), COMPUTE)
    return b_x


@triton.jit
def _load_scale(p_weight, cols, m_cols, OFFSET: tl.constexpr, COMPUTE: tl.constexpr):
    b_weight = _cast(tl.load(p_weight + cols, mask=m_cols, other=0.0), COMPUTE)
    return (b_weight + OFFSET)[None, :]


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
        b_y = _cast(_cast(b_y, NARROW), COMPUTE)
    if p_weight is not None:
        b_y *= _load_scale(p_weight, cols, m_cols, OFFSET, COMPUTE)
    if p_bias is not None:
        b_y += _cast(tl.load(p_bias + cols, mask=m_cols, other=0.0), COMPUTE)[None, :]
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
        _store(p_summed, b_x, rows, cols, mask, N)
    b_square = tl.where((cols < K)[None, :], b_x * b_x, 0.0)
    b_rstd = tl.rsqrt(tl.sum(b_square, 1) / K + EPS)
    if p_rstd is not None:
        tl.store(p_rstd + rows, b_rstd, mask=m_rows)
    b_y = _affine(
        b_x * b_rstd[:, None], p_weight, p_bias, cols, m_cols, OFFSET, LLAMA, NARROW, COMPUTE
    )
    _store(p_y, b_y, rows, cols, mask, N)


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
            _store(p_summed, b_x, rows, cols, mask, N)
        b_y = _affine(
            b_x * b_rstd[:, None], p_weight, p_bias, cols, m_cols, OFFSET, LLAMA, NARROW, COMPUTE
        )
        _store(p_y, b_y, rows, cols, mask, N)


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
        b_dx += _load(p_dsummed, dsummed_stride, rows, cols, mask, COMPUTE)
    _store(p_dx, b_dx, rows, cols, mask, N)


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
        b_xhat = _load(p_x, x_stride, rows, cols, mask, COMPUTE) * b_rstd[:, None]
        b_g = _load(p_dy, dy_stride, rows, cols, mask, COMPUTE)
        if p_dbias is not None:
            b_dbias += b_g
        if p_dweight is not None:
            if LLAMA:
                b_dweight += b_g * _cast(_cast(b_xhat, p_x.dtype.element_ty), COMPUTE)
            else:
                b_dweight += b_g * b_xhat
        if p_weight is not None:
            b_g *= _load_scale(p_weight, cols, m_cols, OFFSET, COMPUTE)
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
        b_g = _load(p_dy, dy_stride, rows, cols, m_cols[None, :], COMPUTE)
        if p_weight is not None:
            b_g *= _load_scale(p_weight, cols, m_cols, OFFSET, COMPUTE)
        b_sum += b_g * _load(p_x, x_stride, rows, cols, m_cols[None, :], COMPUTE)
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
        b_xhat = _load(p_x, x_stride, rows, cols, mask, COMPUTE) * b_rstd[:, None]
        b_g = _load(p_dy, dy_stride, rows, cols, mask, COMPUTE)
        if p_dbias is not None:
            b_dbias += b_g
        if p_dweight is not None:
            if LLAMA:
                b_dweight += b_g * _cast(_cast(b_xhat, p_x.dtype.element_ty), COMPUTE)
            else:
                b_dweight += b_g * b_xhat
        if p_weight is not None:
            b_g *= _load_scale(p_weight, cols, m_cols, OFFSET, COMPUTE)
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
    tl.store(p_out + cols, _cast(tl.sum(b_sum, 0), p_out.dtype.element_ty), mask=m_cols)


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
