"""The Triton kernels of the backward. Names and rules: triton_tiles.py."""
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


@triton.jit(do_not_specialize=["n_rows"])
def backward_rows(
    p_dy,
    p_dsummed,
    p_x,
    p_weight,
    p_rstd,
    p_dots,
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
    T: tl.constexpr,
    STAGES: tl.constexpr,
    PART: tl.constexpr,
    FIRST: tl.constexpr,
    DOTS: tl.constexpr,
):
    """`T` tiles of columns, down the rows: dx, and this program's row of the partial dw and db.

    dx needs each row's dot of g and xhat over all features. `PART` says where that is from:
    "row": the tiles are the whole row. Otherwise a program has one tile of a wide row, counted
    from tile `FIRST`. "head": the dot is the sum of the row's `DOTS` values in `p_dots`.
    "tail": features outside the statistic do not need it, but add to it: one value in `p_dots`.
    """
    first = 0 if PART == "row" else (tl.program_id(1) + FIRST) * BN
    b_zero = zero_bits(n_rows)
    scales, dweights, dbiases = (), (), ()
    for t in tl.static_range(T):
        if p_weight is not None:
            cols = first + t * BN + tl.arange(0, BN)
            scales += (load_vector(p_weight, cols, N, COMPUTE, BM, BN) + OFFSET,)
        if p_dweight is not None:
            dweights += (tl.zeros([BM, BN], COMPUTE),)
        if p_dbias is not None:
            dbiases += (tl.zeros([BM, BN], COMPUTE),)

    for block in tl.range(
        tl.program_id(0), tl.cdiv(n_rows, BM), tl.num_programs(0), num_stages=STAGES
    ):
        rows, m_rows = select_rows(block, n_rows, BM)
        b_rstd = tl.load(p_rstd + rows, mask=m_rows, other=0.0)[:, None]
        xs, dys, new_dweights, new_dbiases = (), (), (), ()
        b_dot = tl.zeros([BM, BN], COMPUTE)
        for t in tl.static_range(T):
            cols, mask = select_cols(first + t * BN, m_rows, N, BN)
            b_x = load(p_x, x_stride, rows, cols, mask)
            b_dy = load(p_dy, dy_stride, rows, cols, mask)
            xs += (b_x,)
            dys += (b_dy,)
            b_xhat = cast(b_x, COMPUTE) * b_rstd
            b_dy = cast(b_dy, COMPUTE)
            if PART != "head":
                b_g = b_dy
                if p_weight is not None:
                    b_g = b_dy * scales[t]
                b_dot += b_g * b_xhat
            if p_dweight is not None:
                if LLAMA:
                    b_xhat = cast(cast(b_xhat, p_x.dtype.element_ty), COMPUTE)
                new_dweights += (dweights[t] + b_dy * b_xhat,)
            if p_dbias is not None:
                new_dbiases += (dbiases[t] + b_dy,)
        dweights, dbiases = new_dweights, new_dbiases

        if PART == "row":
            b_pull = tl.sum(b_dot, 1)[:, None] * (1.0 / K)
        elif PART == "head":
            dots = tl.arange(0, triton.next_power_of_2(DOTS))
            b_dots = load(p_dots, DOTS, rows, dots, m_rows[:, None] & (dots < DOTS)[None, :])
            b_pull = tl.sum(b_dots, 1)[:, None] * (1.0 / K)
        else:
            tl.store(p_dots + rows * DOTS + 1 + tl.program_id(1), tl.sum(b_dot, 1), mask=m_rows)

        for t in tl.static_range(T):
            cols, mask = select_cols(first + t * BN, m_rows, N, BN)
            b_dx = widen_again(dys[t], b_zero, COMPUTE)
            if p_weight is not None:
                b_dx *= scales[t]
            if PART != "tail":
                b_xhat = widen_again(xs[t], b_zero, COMPUTE) * b_rstd
                b_dx -= in_statistic(b_xhat * b_pull, cols, N, K)
            b_dx *= b_rstd
            if p_dsummed is not None:
                b_dx += cast(load(p_dsummed, dsummed_stride, rows, cols, mask), COMPUTE)
            store(p_dx, b_dx, rows, cols, mask, N)

    row = tl.program_id(0) + tl.arange(0, 1)
    for t in tl.static_range(T):
        cols, mask = select_cols(first + t * BN, row >= 0, N, BN)
        if p_dweight is not None:
            store(p_dweight, tl.sum(dweights[t], 0)[None, :], row.to(tl.int64), cols, mask, N)
        if p_dbias is not None:
            store(p_dbias, tl.sum(dbiases[t], 0)[None, :], row.to(tl.int64), cols, mask, N)


@triton.jit
def backward_dots(
    p_dy,
    p_x,
    p_weight,
    p_rstd,
    p_dots,
    dy_stride,
    x_stride,
    N: tl.constexpr,
    OFFSET: tl.constexpr,
    COMPUTE: tl.constexpr,
    BN: tl.constexpr,
    DOTS: tl.constexpr,
):
    """For wide rows: the dot of g and xhat over the first `N` columns, first of `DOTS`."""
    rows, m_rows = select_rows(tl.program_id(0), tl.num_programs(0), 1)
    b_dot = tl.zeros([1, BN], COMPUTE)
    for start in range(0, N, BN):
        cols, mask = select_cols(start, m_rows, N, BN)
        b_g = cast(load(p_dy, dy_stride, rows, cols, mask), COMPUTE)
        if p_weight is not None:
            b_g *= load_vector(p_weight, cols, N, COMPUTE, 1, BN) + OFFSET
        b_dot += b_g * cast(load(p_x, x_stride, rows, cols, mask), COMPUTE)
    tl.store(p_dots + rows * DOTS, tl.sum(b_dot, 1) * tl.load(p_rstd + rows))


@triton.jit
def _sum_partials(
    p_partials, p_out, n_partials, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    b_sum = tl.zeros([BM, BN], p_partials.dtype.element_ty)
    for block in range(tl.cdiv(n_partials, BM)):
        rows, m_rows = select_rows(block, n_partials, BM)
        cols, mask = select_cols(tl.program_id(0) * BN, m_rows, N, BN)
        b_sum += load(p_partials, N, rows, cols, mask)
    row = tl.arange(0, 1)
    cols, mask = select_cols(tl.program_id(0) * BN, row == 0, N, BN)
    store(p_out, tl.sum(b_sum, 0)[None, :], row, cols, mask, N)


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
    if p_dweight is not None:
        _sum_partials(p_dweight_partials, p_dweight, n_partials, N, BM, BN)
    if p_dbias is not None:
        _sum_partials(p_dbias_partials, p_dbias, n_partials, N, BM, BN)
