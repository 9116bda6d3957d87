"""RMSNorm and pRMSNorm in plain torch, forward and backward written out.

This file is the definition of correct: every other backend is held against it. All of it is
differentiable any number of times, so it also serves double backward, `torch.func`, export and
compilation. Shapes: `x (..., hidden)`, `weight (hidden,)`, `bias (hidden,)`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Formula(NamedTuple):
    """What is computed, apart from the tensors.

    Attributes:
        k: the mean of squares is taken over the first `k` features.
        eps: added to that mean, inside the root.
        weight_offset: the scale is `weight_offset + weight`.
        llama: round the normalised value to x's dtype before the scale multiplies it.
        out: dtype of y, rounded to once, at the end; None is x's, or what `llama` promotes to.
    """

    k: int
    eps: float
    weight_offset: float
    llama: bool
    out: torch.dtype | None = None


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 as soon as one of the tensors is."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def default_eps(x: torch.dtype) -> float:
    """What PyTorch's RMSNorm takes for `eps=None`: of the dtype that x is computed in."""
    return torch.finfo(torch.float64 if x == torch.float64 else torch.float32).eps


def output_dtype(x: Tensor, weight: Tensor | None, formula: Formula) -> torch.dtype:
    if formula.out is not None:
        return formula.out
    if formula.llama and weight is not None:
        return torch.promote_types(x.dtype, weight.dtype)
    return x.dtype


def as_rows(x: Tensor) -> Tensor:
    """`(..., hidden)` as `(rows, hidden)` with unit stride along a row; copies only if it must."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, formula: Formula
) -> tuple[Tensor, Tensor]:
    """`y = x * rstd * (weight_offset + weight) + bias` and `rstd (..., 1)`."""
    compute = compute_dtype(x, weight, bias)
    values = x.to(compute)
    rstd = reciprocal_rms(values, formula)
    y = values * rstd
    if formula.llama:
        y = y.to(x.dtype).to(compute)
    if weight is not None:
        y = y * _scale(weight, compute, formula)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(output_dtype(x, weight, formula)).contiguous(), rstd


def reciprocal_rms(values: Tensor, formula: Formula) -> Tensor:
    head = values if formula.k == values.shape[-1] else values[..., : formula.k]
    mean_square = head.square().mean(-1, keepdim=True)
    return torch.rsqrt(mean_square + formula.eps)


def _scale(weight: Tensor, compute: torch.dtype, formula: Formula) -> Tensor:
    weight = weight.to(compute)
    return weight + formula.weight_offset if formula.weight_offset else weight


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    formula: Formula,
    *,
    save_rstd: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(y, summed, rstd)`, where `summed` is `x + residual`, or x itself without a residual."""
    summed = x if residual is None else (x + residual).contiguous()
    y, rstd = normalise(summed, weight, bias, formula)
    return y, summed, rstd if save_rstd else None


def backward(
    dy: Tensor,
    dsummed: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor | None,
    formula: Formula,
    *,
    weight_grad: bool,
    bias_grad: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    r"""Gradients of `forward` with respect to its sum, weight and bias.

    With $g = (o + w) \, dy$ and $\hat x = x \cdot r$, the features inside and outside the
    statistic have different gradients:

    $dx_i = r \, (g_i - [i < k] \, \hat x_i \, \tfrac{1}{k} \sum_j g_j \hat x_j)$, over all j,
    $dw_i = \sum_{rows} dy_i \hat x_i$, $db_i = \sum_{rows} dy_i$.

    Args:
        dsummed: gradient that reaches the sum from elsewhere, added to dx.
        x: what was normalised.
        rstd: as saved by `forward`; None recomputes it, differentiably.
        weight_grad: whether dw is wanted.
        bias_grad: dtype of db, None if it is not wanted.
    """
    compute = compute_dtype(x, weight, dy)
    values, dy = x.to(compute), dy.to(compute)
    if rstd is None:
        rstd = reciprocal_rms(values, formula)
    xhat = values * rstd
    g = dy if weight is None else dy * _scale(weight, compute, formula)
    pull = (g * xhat).sum(-1, keepdim=True) / formula.k
    if formula.k == x.shape[-1]:
        dx = (g - xhat * pull) * rstd
    else:
        head, tail = g[..., : formula.k], g[..., formula.k :]
        dx = torch.cat([head - xhat[..., : formula.k] * pull, tail], dim=-1) * rstd
    if dsummed is not None:
        dx = dx + dsummed.to(compute)

    dweight = dbias = None
    if weight_grad and weight is not None:
        rounded = xhat.to(x.dtype).to(compute) if formula.llama else xhat
        dweight = as_rows(dy * rounded).sum(0).to(weight.dtype)
    if bias_grad is not None:
        dbias = as_rows(dy).sum(0).to(bias_grad)
    return dx.to(x.dtype).contiguous(), dweight, dbias
