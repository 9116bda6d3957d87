"""What the norms must compute, written independently of the package, and how close is close.

Truth is the formula in float64 under autograd. A result in a lower precision may be off by little
more than PyTorch's own expression, in the same dtypes, is off from the same truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor


def statistic_size(hidden: int, p: str) -> int:
    """ceil(hidden * p) in exact arithmetic; p as a decimal string."""
    return max(1, math.ceil(hidden * Fraction(p)))


def true_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    k: int,
    offset: float,
) -> Tensor:
    rms = torch.sqrt(torch.mean(x[..., :k] ** 2, dim=-1, keepdim=True) + eps)
    y = x / rms
    if weight is not None:
        y = y * (offset + weight)
    return y if bias is None else y + bias


def eager_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    k: int,
    offset: float,
    casting: str,
) -> Tensor:
    """As models write it: upcast, normalise, and round where `casting` says."""
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide * torch.rsqrt(wide[..., :k].pow(2).mean(-1, keepdim=True) + eps)
    out = x.dtype
    if casting == "llama":
        y = y.to(x.dtype)
        out = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    if weight is not None:
        y = y.to(wide.dtype) * (offset + weight.to(wide.dtype))
    if bias is not None:
        y = y.to(wide.dtype) + bias.to(wide.dtype)
    return y.to(out)


def run(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor],
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Outputs, then the gradient of every input, of `sum(output * cotangent)`.

    `inputs` become leaves (converted to `dtype` if given) that keep their strides.
    """
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs
    ]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
    wanted = [t for t in leaves if t is not None]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, wanted, weights)]


def sizes_of_terms(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dy: Tensor,
    *,
    eps: float,
    k: int,
    offset: float,
) -> dict[str, float]:
    """How large the terms are that y, dx, dweight and dbias are sums of: they may cancel."""
    x, dy = x.double(), dy.double()
    hidden = x.shape[-1]
    rstd = (x[..., :k].square().mean(-1, keepdim=True) + eps).rsqrt()
    xhat = (x * rstd).abs()
    scale = torch.ones(hidden, dtype=x.dtype) if weight is None else offset + weight.double().abs()
    shift = torch.zeros(hidden, dtype=x.dtype) if bias is None else bias.double().abs()
    g = scale.to(x.device) * dy.abs()
    sizes = {
        "y": xhat * scale.to(x.device) + shift.to(x.device),
        "summed": x.abs(),
        "dx": rstd * (g + xhat * (g * xhat).sum(-1, keepdim=True) / k),
        "dweight": (dy * xhat).abs().reshape(-1, hidden).sum(0),
        "dbias": dy.abs().reshape(-1, hidden).sum(0),
    }
    sizes["dresidual"] = sizes["dx"]
    return {name: t.max().item() if t.numel() else 0.0 for name, t in sizes.items()}


class Closeness(NamedTuple):
    """Largest errors against the truth, and how large `error` may be."""

    error: float
    eager: float
    limit: float


def closeness(
    got: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    terms: float,
    unit: float | None = None,
    factor: float = 1.5,
) -> Closeness:
    """Largest error of `got`; it may be factor * largest error of `eager` + a few roundings.

    Args:
        terms: size of what `truth` is the sum of.
        unit: relative size of a rounding inside the computation, if not float32's or float64's.
    """
    if not truth.numel():
        return Closeness(0.0, 0.0, 0.0)
    error, allowed = ((t.double() - truth).abs().max().item() for t in (got, eager))
    double = got.dtype == torch.float64
    unit = unit or torch.finfo(torch.float64 if double else torch.float32).eps
    # two roundings inside; the last one may fall to the other side of a tie
    floor = 2.0 * unit * terms + 0.5 * torch.finfo(got.dtype).eps * truth.abs().max().item()
    return Closeness(error, allowed, factor * allowed + floor)


def assert_as_close_as(got: Tensor, eager: Tensor, truth: Tensor, *, name: str, **how: Any) -> None:
    """Dtype and shape as they should be, and errors as `closeness` allows."""
    assert got.dtype == eager.dtype, f"{name}: {got.dtype}, expected {eager.dtype}"
    assert got.shape == truth.shape, f"{name}: {tuple(got.shape)}, expected {tuple(truth.shape)}"
    found = closeness(got, eager, truth, **how)
    assert found.error <= found.limit, (
        f"{name}: error {found.error:.3g}, PyTorch's own {found.eager:.3g}, limit {found.limit:.3g}"
    )
