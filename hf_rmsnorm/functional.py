"""RMSNorm and pRMSNorm as functions: the one door to the backends in `hf_rmsnorm.ops`.

Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (NeurIPS 2019, arXiv 1910.07467),
equation 4 (RMSNorm) and section 3.2 (pRMSNorm).
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor

from . import ops
from .ops import compiling, reference, shortcut
from .ops.autograd import AddRMSNormFunction, RMSNormFunction, is_plain
from .ops.reference import Formula

Casting = Literal["gemma", "llama"]
CompiledBody = Literal["torch", "kernel"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    eps: float | None = 1e-5,
    p: float = 1.0,
    weight_offset: float = 0.0,
    casting: Casting = "gemma",
    out_dtype: torch.dtype | None = None,
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
        eps: added to the mean of squares, inside the root. None, as in PyTorch, is the smallest
            step from 1 in the dtype of the computation: that of float64 for float64 x, else that
            of float32.
        p: share of the features that the mean of squares is taken over, in (0, 1].
        weight_offset: `o` above; 1.0 for models that store `w - 1`.
        casting: `"gemma"` rounds once, at the end, to x's dtype. `"llama"` rounds the normalised
            value to x's dtype before the weight multiplies it, and returns
            `torch.promote_types(x.dtype, weight.dtype)`.
        out_dtype: of the result, instead of what `casting` says; rounded to once, from float32.

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
    if eps is None:
        eps = _default_eps(x)
    if not torch.compiler.is_compiling():
        y = shortcut.call(
            x, None, weight, bias, _formula, eps, p, weight_offset, casting, out_dtype
        )
        if y is not None:
            return y
    formula = _checked(x, weight, bias, eps, p, weight_offset, casting, out_dtype)
    if torch.compiler.is_compiling():
        return compiling.rms_norm(x, weight, bias, formula)
    if not is_plain(x, weight, bias):
        return reference.normalise(x, weight, bias, formula)[0]
    backend = ops.backend_for(x)
    if torch.is_grad_enabled() and _any_requires_grad(x, weight, bias):
        return RMSNormFunction.apply(x, weight, bias, formula, backend)
    return backend.forward(x, None, weight, bias, formula, save_rstd=False)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float | None = 1e-5,
    p: float = 1.0,
    weight_offset: float = 0.0,
    casting: Casting = "gemma",
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`summed = x + residual` and `normed = rms_norm(summed, ...)`, in one pass over memory.

    Args:
        x, residual: `(..., hidden)`, of the same shape; `summed` has the dtype PyTorch promotes
            the two to, and is rounded to it before it is normalised.
        weight, bias, eps, p, weight_offset, casting: as in `rms_norm`.
        out_dtype: of `normed`, as in `rms_norm`.

    Returns:
        `(normed, summed)`, both `(..., hidden)` and contiguous.

    Raises:
        TypeError, ValueError: as `rms_norm`; also if `residual` differs in shape or device.
    """
    if eps is None:
        eps = _default_eps(x, residual)
    if not torch.compiler.is_compiling() and residual is not None:
        pair = shortcut.call(
            x, residual, weight, bias, _formula, eps, p, weight_offset, casting, out_dtype
        )
        if pair is not None:
            return pair
    formula = _checked(x, weight, bias, eps, p, weight_offset, casting, out_dtype)
    _check_residual(x, residual)
    if torch.compiler.is_compiling():
        return compiling.add_rms_norm(x, residual, weight, bias, formula)
    if not is_plain(x, residual, weight, bias):
        normed, summed, _ = reference.forward(x, residual, weight, bias, formula, save_rstd=False)
        return normed, summed
    backend = ops.backend_for(x)
    if torch.is_grad_enabled() and _any_requires_grad(x, residual, weight, bias):
        return AddRMSNormFunction.apply(x, residual, weight, bias, formula, backend)
    normed, summed, _ = backend.forward(x, residual, weight, bias, formula, save_rstd=False)
    return normed, summed


def _default_eps(*terms: Tensor) -> float:
    """Of a sum that is normalised; what is no tensor is refused elsewhere."""
    wide = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in terms)
    return reference.default_eps(torch.float64 if wide else torch.float32)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def set_compiled_body(body: CompiledBody) -> None:
    """What the norms become under `torch.compile`; functions compiled before follow a change.

    `"torch"`, the default: plain PyTorch, which Inductor fuses with what stands before and after.
    On a CPU whole models were at least as fast with it as with the kernel. On GPUs neither was
    measured: it is the default there because Inductor's backward of this norm was the fastest of
    those published.
    `"kernel"`: an op that runs the same kernel as eager calls, which gives their very numbers. On a
    CPU it wins where a norm of 2048 rows or more trains by itself.

    Where there is no kernel, and for exports, `torch.func`, forward-mode derivatives and tensor
    subclasses, it is plain PyTorch in any case.

    Raises:
        ValueError: another word.
    """
    if body not in compiling.BODIES:
        raise ValueError(f"body must be one of {', '.join(compiling.BODIES)}; got {body!r}")
    compiling.body = body


def _checked(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    p: float,
    weight_offset: float,
    casting: str,
    out_dtype: torch.dtype | None,
) -> Formula:
    """On the path of every call but the shortcut's: what is wrong is worded elsewhere."""
    if not isinstance(x, Tensor) or x.dtype not in _FLOATS:
        _refuse("x", x)
    vector = x.shape[-1:]
    if not vector:
        raise ValueError("x must have at least one dimension, (..., hidden); got a scalar")
    if not vector[0]:
        raise ValueError(
            f"x has an empty last dimension, shape {tuple(x.shape)}; hidden must be >= 1"
        )
    for t in (weight, bias):
        if t is not None and not (
            isinstance(t, Tensor)
            and t.dtype in _FLOATS
            and t.shape == vector
            and t.device == x.device
        ):
            _refuse_vector("weight" if t is weight else "bias", t, x)
    make = _formula.__wrapped__ if torch.compiler.is_compiling() else _formula
    return make(vector[0], eps, p, weight_offset, casting, out_dtype)


@functools.lru_cache(1024)
def _formula(
    hidden: int,
    eps: float,
    p: float,
    weight_offset: float,
    casting: str,
    out_dtype: torch.dtype | None,
) -> Formula:
    if not eps >= 0.0:
        raise ValueError(f"eps must be >= 0, got {eps!r}")
    if casting not in ("gemma", "llama"):
        raise ValueError(f'casting must be "gemma" or "llama", got {casting!r}')
    if out_dtype is not None and out_dtype not in _FLOATS:
        raise TypeError(
            f"out_dtype must be float32, float64, float16, bfloat16 or None, got {out_dtype!r}"
        )
    return Formula(statistic_size(hidden, p), eps, weight_offset, casting == "llama", out_dtype)


def _refuse_vector(name: str, t: Tensor, x: Tensor) -> None:
    if not isinstance(t, Tensor) or t.dtype not in _FLOATS:
        _refuse(name, t)
    hidden = x.shape[-1]
    if t.shape != (hidden,):
        raise ValueError(
            f"{name} must have shape ({hidden},), the last dimension of x {tuple(x.shape)}; "
            f"got {tuple(t.shape)}"
        )
    raise ValueError(f"{name} is on {t.device} but x is on {x.device}; move one with .to(device)")


def _check_residual(x: Tensor, residual: Tensor) -> None:
    if not isinstance(residual, Tensor) or residual.dtype not in _FLOATS:
        _refuse("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}; "
            "expand it if broadcasting is meant"
        )
    if residual.device != x.device:
        raise ValueError(
            f"residual is on {residual.device} but x is on {x.device}; move one with .to(device)"
        )


def _refuse(name: str, t: object) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    raise TypeError(
        f"{name} must be float32, float64, float16 or bfloat16, got {t.dtype}; "
        "cast it with .float() or .to(dtype)"
    )
