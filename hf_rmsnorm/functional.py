"""RMSNorm and pRMSNorm as functions: the one door to the backends in `hf_rmsnorm.ops`.

Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (NeurIPS 2019, arXiv 1910.07467),
equation 4 (RMSNorm) and section 3.2 (pRMSNorm).
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops
from .ops import reference
from .ops.reference import Formula

Casting = Literal["gemma", "llama"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def statistic_size(hidden: int, p: float) -> int:
    """How many leading features the mean of squares covers: `ceil(hidden * p)`, at least 1.

    The product is taken as exact where float rounding alone lifts it above an integer, so
    `statistic_size(100, 0.07)` is 7 although `100 * 0.07` is `7.000000000000001`.

    Raises:
        ValueError: `p` is outside (0, 1].
    """
    if not 0.0 < p <= 1.0:
        raise ValueError(
            f"p must be in (0, 1], got {p!r}; p=1.0 is RMSNorm, the paper's pRMSNorm uses p=0.0625"
        )
    if p == 1.0:
        return hidden
    return max(1, math.ceil(hidden * p * (1.0 - 1e-12)))


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    p: float = 1.0,
    weight_offset: float = 0.0,
    casting: Casting = "gemma",
) -> Tensor:
    r"""Root mean square normalisation over the last dimension.

    $y = \frac{x}{\sqrt{\frac{1}{k} \sum_{i<k} x_i^2 + \epsilon}} \cdot (o + w) + b$,
    $k = \lceil hidden \cdot p \rceil$.

    Computed in float32 (float64 if any argument is float64). `p < 1` is pRMSNorm: the first k
    features give the statistic, all features are scaled.

    Args:
        x: `(..., hidden)`, any strides; float32, float64, float16 or bfloat16.
        weight: `(hidden,)`, or None for no scale (`weight_offset` is then not used).
        bias: `(hidden,)`, or None.
        eps: added to the mean of squares, inside the root.
        p: share of the features that the mean of squares is taken over, in (0, 1].
        weight_offset: `o` above; 1.0 for models that store `w - 1`.
        casting: `"gemma"` rounds once, at the end, to x's dtype. `"llama"` rounds the normalised
            value to x's dtype before the weight multiplies it, and returns
            `torch.promote_types(x.dtype, weight.dtype)`.

    Returns:
        `(..., hidden)`, contiguous. Differentiable any number of times.

    Raises:
        TypeError: a dtype that is not one of the four above, or something that is no tensor.
        ValueError: shapes or devices that do not fit, `hidden` of 0, `eps < 0`, `p` outside (0, 1],
            an unknown casting.

    Example:
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> rms_norm(x, eps=0.0) * (12.5 ** 0.5)
        tensor([[3., 4.]])
    """
    formula = _checked(x, weight, bias, eps, p, weight_offset, casting)
    if not _is_plain_eager(x, weight, bias):
        return reference.normalise(x, weight, bias, formula)[0]
    backend = ops.backend_for(x)
    if backend is ops.cpu_backend:
        y = backend.differentiable(x, None, weight, bias, formula)
        if y is not None:
            return y
    if torch.is_grad_enabled() and _any_requires_grad(x, weight, bias):
        return _RMSNorm.apply(x, weight, bias, formula, backend)
    return backend.forward(x, None, weight, bias, formula, save_rstd=False)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    p: float = 1.0,
    weight_offset: float = 0.0,
    casting: Casting = "gemma",
) -> tuple[Tensor, Tensor]:
    """`summed = x + residual` and `normed = rms_norm(summed, ...)`, in one pass over memory.

    Args:
        x, residual: `(..., hidden)`, of the same shape; `summed` has the dtype PyTorch promotes
            the two to, and is rounded to it before it is normalised.
        weight, bias, eps, p, weight_offset, casting: as in `rms_norm`.

    Returns:
        `(normed, summed)`, both `(..., hidden)` and contiguous.

    Raises:
        TypeError, ValueError: as `rms_norm`; also if `residual` differs in shape or device.
    """
    formula = _checked(x, weight, bias, eps, p, weight_offset, casting)
    _check_residual(x, residual)
    if not _is_plain_eager(x, residual, weight, bias):
        normed, summed, _ = reference.forward(x, residual, weight, bias, formula, save_rstd=False)
        return normed, summed
    backend = ops.backend_for(x)
    if backend is ops.cpu_backend:
        pair = backend.differentiable(x, residual, weight, bias, formula)
        if pair is not None:
            return pair
    if torch.is_grad_enabled() and _any_requires_grad(x, residual, weight, bias):
        return _AddRMSNorm.apply(x, residual, weight, bias, formula, backend)
    normed, summed, _ = backend.forward(x, residual, weight, bias, formula, save_rstd=False)
    return normed, summed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        formula: Formula,
        backend: ModuleType,
    ) -> Tensor:
        y, _, rstd = backend.forward(x, None, weight, bias, formula, save_rstd=True)
        ctx.save_for_backward(x, weight, rstd)
        ctx.formula, ctx.backend = formula, backend
        ctx.bias_grad = _dtype_if(ctx.needs_input_grad[2], bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_gradients(ctx, dy, None, weight_grad=ctx.needs_input_grad[1]), None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        formula: Formula,
        backend: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        normed, summed, rstd = backend.forward(x, residual, weight, bias, formula, save_rstd=True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(summed, weight, rstd)
        ctx.formula, ctx.backend = formula, backend
        ctx.dtypes = x.dtype, residual.dtype
        ctx.bias_grad = _dtype_if(ctx.needs_input_grad[3], bias)
        return normed, summed

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dnormed: Tensor | None, dsummed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dnormed is None:
            dsum, dweight, dbias = dsummed, None, None
        else:
            weight_grad = ctx.needs_input_grad[2]
            dsum, dweight, dbias = _gradients(ctx, dnormed, dsummed, weight_grad=weight_grad)
        if dsum is None:
            return (None,) * 6
        dx, dresidual = (dsum.to(dtype) for dtype in ctx.dtypes)
        return dx, dresidual, dweight, dbias, None, None


def _gradients(
    ctx: Any, dy: Tensor, dsummed: Tensor | None, *, weight_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, weight, rstd = ctx.saved_tensors
    backend = ctx.backend
    if torch.is_grad_enabled():  # create_graph=True: the gradient itself will be differentiated
        backend, rstd = reference, None
    elif not _is_plain_eager(dy, dsummed):
        backend = reference
    return backend.backward(
        dy,
        dsummed,
        x,
        weight,
        rstd,
        ctx.formula,
        weight_grad=weight_grad,
        bias_grad=ctx.bias_grad,
    )


def _dtype_if(wanted: bool, t: Tensor | None) -> torch.dtype | None:
    return t.dtype if wanted and t is not None else None


def _is_plain_eager(*tensors: Tensor | None) -> bool:
    """Whether a kernel may see the raw memory: nothing is tracing, transforming or wrapping it."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    ):
        return False
    for t in tensors:
        if t is not None and not (type(t) in _PLAIN_TYPES and torch._C._has_storage(t)):
            return False
    return True


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _checked(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    p: float,
    weight_offset: float,
    casting: str,
) -> Formula:
    _check_floats("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, (..., hidden); got a scalar")
    hidden = x.shape[-1]
    if hidden == 0:
        raise ValueError(
            f"x has an empty last dimension, shape {tuple(x.shape)}; hidden must be >= 1"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        _check_floats(name, t)
        if t.dim() != 1 or t.shape[0] != hidden:
            raise ValueError(
                f"{name} must have shape ({hidden},), the last dimension of x {tuple(x.shape)}; "
                f"got {tuple(t.shape)}"
            )
        if t.device != x.device:
            raise ValueError(
                f"{name} is on {t.device} but x is on {x.device}; move one with .to(device)"
            )
    if not eps >= 0.0:
        raise ValueError(f"eps must be >= 0, got {eps!r}")
    if casting not in ("gemma", "llama"):
        raise ValueError(f'casting must be "gemma" or "llama", got {casting!r}')
    return Formula(statistic_size(hidden, p), eps, weight_offset, casting == "llama")


def _check_residual(x: Tensor, residual: Tensor) -> None:
    _check_floats("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}; "
            "expand it if broadcasting is meant"
        )
    if residual.device != x.device:
        raise ValueError(
            f"residual is on {residual.device} but x is on {x.device}; move one with .to(device)"
        )


def _check_floats(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in _FLOATS:
        raise TypeError(
            f"{name} must be float32, float64, float16 or bfloat16, got {t.dtype}; "
            "cast it with .float() or .to(dtype)"
        )
