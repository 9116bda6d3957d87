"""The norms as `torch.library` ops: what `torch.compile` sees instead of their bodies.

An op keeps its kernel under a compiler, which cannot see inside: no graph break, the same numbers
as in eager, but nothing is fused with what stands before and after. What is computed: reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import Formula, compute_dtype, output_dtype

# Of its own in every copy of this package that a process may hold.
NAMESPACE = __name__.removesuffix(".ops.library").replace(".", "_")
_FORMULA = "SymInt k, float eps, float offset, bool llama"
_OPS = {
    "rms_norm": f"(Tensor x, Tensor? weight, Tensor? bias, {_FORMULA}, ScalarType? out, "
    "bool save_rstd) -> (Tensor y, Tensor rstd)",
    "add_rms_norm": f"(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, {_FORMULA}, "
    "ScalarType? out, bool save_rstd) -> (Tensor y, Tensor summed, Tensor rstd)",
    "backward": f"(Tensor dy, Tensor? dsummed, Tensor x, Tensor? weight, Tensor rstd, {_FORMULA}, "
    "bool weight_grad, ScalarType? bias_grad) -> (Tensor dsum, Tensor dweight, Tensor dbias)",
}
_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in _OPS.items():
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
_found = getattr(torch.ops, NAMESPACE)
_rms_norm_op, _add_rms_norm_op = _found.rms_norm.default, _found.add_rms_norm.default
_backward_op = _found.backward.default


def rms_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, formula: Formula, *, save_rstd: bool
) -> Tensor:
    return _rms_norm_op(x, weight, bias, *formula, save_rstd)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    formula: Formula,
    *,
    save_rstd: bool,
) -> tuple[Tensor, Tensor]:
    found = _add_rms_norm_op(x, residual, weight, bias, *formula, save_rstd)
    return found[0], found[1]


def _rms_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, _, rstd = _forward(x, None, *rest)
    return y, rstd


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    k: int,
    eps: float,
    offset: float,
    llama: bool,
    out: torch.dtype | None,
    save_rstd: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import backend_for

    formula = Formula(k, eps, offset, llama, out)
    y, summed, rstd = backend_for(x).forward(
        x, residual, weight, bias, formula, save_rstd=save_rstd
    )
    if rstd is None:
        rstd = x.new_empty(0, dtype=compute_dtype(summed, weight, bias))
    return y, summed, rstd.contiguous()


def _fake_rms_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    y, _, rstd = _fake_forward(x, None, *rest)
    return y, rstd


def _fake_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    k: int,
    eps: float,
    offset: float,
    llama: bool,
    out: torch.dtype | None,
    save_rstd: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    summed = x
    if residual is not None:
        summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    formula = Formula(k, eps, offset, llama, out)
    y = x.new_empty(x.shape, dtype=output_dtype(summed, weight, formula))
    shape = (*x.shape[:-1], 1) if save_rstd else (0,)
    return y, summed, x.new_empty(shape, dtype=compute_dtype(summed, weight, bias))


def _backward(
    dy: Tensor,
    dsummed: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    k: int,
    eps: float,
    offset: float,
    llama: bool,
    weight_grad: bool,
    bias_grad: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import backend_for

    formula = Formula(k, eps, offset, llama)
    dsum, dweight, dbias = backend_for(x).backward(
        dy, dsummed, x, weight, rstd, formula, weight_grad=weight_grad, bias_grad=bias_grad
    )
    nothing = (x.new_empty(0) if t is None else t for t in (dweight, dbias))
    return dsum, *nothing


def _fake_backward(
    dy: Tensor,
    dsummed: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    k: int,
    eps: float,
    offset: float,
    llama: bool,
    weight_grad: bool,
    bias_grad: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = x.new_empty(0), x.new_empty(0)
    if weight_grad and weight is not None:
        dweight = x.new_empty(x.shape[-1], dtype=weight.dtype)
    if bias_grad is not None:
        dbias = x.new_empty(x.shape[-1], dtype=bias_grad)
    return x.new_empty(x.shape), dweight, dbias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For both forward ops: the one with a residual has one input and one output more."""
    x, *residual, weight, bias, k, eps, offset, llama, out, saved = inputs
    rstd = output[-1]
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if residual else x, weight, rstd)
    ctx.formula = Formula(k, eps, offset, llama, out)
    ctx.saved = saved
    ctx.dtypes = [t.dtype for t in (x, *residual)]
    bias_wanted = bias is not None and ctx.needs_input_grad[len(ctx.dtypes) + 1]
    ctx.bias_grad = bias.dtype if bias_wanted else None


def _gradients(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    terms = len(ctx.dtypes)
    dsummed = others[0] if terms == 2 else None
    dsum, dweight, dbias = dsummed, None, None
    if dy is not None:
        x, weight, rstd = ctx.saved_tensors
        wanted = weight is not None and ctx.needs_input_grad[terms], ctx.bias_grad
        if torch.is_grad_enabled() or not ctx.saved:  # create_graph=True, or no statistic
            dsum, dweight, dbias = reference.backward(
                *(dy, dsummed, x, weight, None, ctx.formula),
                weight_grad=wanted[0],
                bias_grad=wanted[1],
            )
        else:
            arguments = dy, dsummed, x, weight, rstd, *ctx.formula[:4], *wanted
            dsum, dweight, dbias = _backward_op(*arguments)
            dweight, dbias = dweight if wanted[0] else None, dbias if wanted[1] else None
    into = (None if dsum is None else dsum.to(dtype) for dtype in ctx.dtypes)
    return *into, dweight, dbias, *[None] * 6


_RULES: dict[str, tuple[Any, Any]] = {
    "rms_norm": (_rms_norm, _fake_rms_norm),
    "add_rms_norm": (_forward, _fake_forward),
    "backward": (_backward, _fake_backward),
}
for _name, (_kernel, _fake) in _RULES.items():
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)
for _name in ("rms_norm", "add_rms_norm"):
    torch.library.register_autograd(
        f"{NAMESPACE}::{_name}", _gradients, setup_context=_setup, lib=_library
    )
