"""The norms that are timed against each other: PyTorch's, ours, other packages' where installed.

A provider gives a function for each op: `norm(x, w, b) -> y`, and `add_norm(x, r, w, b) -> (y, s)`
with `s = x + r`. Those without a bias leave `b` alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_rmsnorm import functional

EPS = 1e-5
OPS = ("norm", "add_norm")
CONTROL = "F.layer_norm"
OURS = "rms_norm"
Function = Callable[..., Any]


class Unavailable(Exception):
    """This provider cannot run here; the message says why."""


class Wrong(Exception):
    """This provider computes something else; the message says what."""


@dataclass(frozen=True)
class Provider:
    """Attributes:
    make: op, device to the function; raises Unavailable.
    centred: LayerNorm, which subtracts the mean.
    biased: adds `b`.
    p: share of the features in the statistic.
    writes_dy: its backward writes dx over dy.
    ops: what it has.
    """

    make: Callable[[str, torch.device], Function]
    centred: bool = False
    biased: bool = False
    p: float = 1.0
    writes_dy: bool = False
    ops: tuple[str, ...] = OPS


def after_add(norm: Function) -> Function:
    """`add_norm` in two steps."""

    def add_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        summed = x + r
        return norm(summed, w, b), summed

    return add_norm


def _for_op(op: str, norm: Function) -> Function:
    return norm if op == "norm" else after_add(norm)


def _layer_norm(op: str, device: torch.device) -> Function:
    return _for_op(op, lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS))


def _rms_norm(op: str, device: torch.device) -> Function:
    return _for_op(op, lambda x, w, b: F.rms_norm(x, w.shape, w, EPS))


def _compiled(make: Callable[[str, torch.device], Function]) -> Callable:
    return lambda op, device: torch.compile(make(op, device), dynamic=False)


def _ours(op: str, device: torch.device) -> Function:
    if op == "norm":
        return lambda x, w, b: functional.rms_norm(x, w, eps=EPS)
    return lambda x, r, w, b: functional.add_rms_norm(x, r, w, eps=EPS)


def _ours_biased(op: str, device: torch.device) -> Function:
    if op == "norm":
        return lambda x, w, b: functional.rms_norm(x, w, b, eps=EPS)
    return lambda x, r, w, b: functional.add_rms_norm(x, r, w, b, eps=EPS)


def _ours_partial(op: str, device: torch.device) -> Function:
    if op == "norm":
        return lambda x, w, b: functional.rms_norm(x, w, eps=EPS, p=0.0625)
    return lambda x, r, w, b: functional.add_rms_norm(x, r, w, eps=EPS, p=0.0625)


def _ours_in_two_steps(op: str, device: torch.device) -> Function:
    return after_add(_ours("norm", device))


def _liger(op: str, device: torch.device) -> Function:
    if op == "norm":
        norm = _imported("liger_kernel.ops.rms_norm", device).LigerRMSNormFunction.apply
        return lambda x, w, b: norm(x, w, EPS, 0.0, "llama", True)
    add = _imported("liger_kernel.ops.fused_add_rms_norm", device).LigerFusedAddRMSNormFunction
    return lambda x, r, w, b: add.apply(x, r, w, EPS, 0.0, "llama", True)


def _quack(op: str, device: torch.device) -> Function:
    norm = _imported("quack.rmsnorm", device).rmsnorm
    if op == "norm":
        return lambda x, w, b: norm(x, w, eps=EPS)
    return lambda x, r, w, b: norm(x, w, residual=r, eps=EPS, prenorm=True)


def _flash_attn(op: str, device: torch.device) -> Function:
    norm = _imported("flash_attn.ops.triton.layer_norm", device).rms_norm_fn
    if op == "norm":
        return lambda x, w, b: norm(x, w, None, eps=EPS)
    return lambda x, r, w, b: norm(x, w, None, residual=r, eps=EPS, prenorm=True)


def _apex(op: str, device: torch.device) -> Function:
    norm = _imported("apex.normalization.fused_layer_norm", device).fused_rms_norm_affine
    return lambda x, w, b: norm(x, w, w.shape, EPS)


PROVIDERS = {
    CONTROL: Provider(_layer_norm, centred=True, biased=True),
    "F.rms_norm": Provider(_rms_norm),
    "compiled F.layer_norm": Provider(_compiled(_layer_norm), centred=True, biased=True),
    "compiled F.rms_norm": Provider(_compiled(_rms_norm)),
    OURS: Provider(_ours),
    "rms_norm, bias": Provider(_ours_biased, biased=True),
    "rms_norm, p=1/16": Provider(_ours_partial, p=0.0625),
    "add, then rms_norm": Provider(_ours_in_two_steps, ops=("add_norm",)),
    "Liger": Provider(_liger, writes_dy=True),
    "quack": Provider(_quack),
    "flash-attn": Provider(_flash_attn),
    "Apex": Provider(_apex, ops=("norm",)),
}


def is_ours(name: str) -> bool:
    return "rms_norm" in name and "F." not in name


def available(
    op: str, device: torch.device, names: list[str] | None
) -> tuple[dict[str, Function], dict[str, str]]:
    """`({provider: function}, {provider: why not})`."""
    functions, reasons = {}, {}
    for name, provider in PROVIDERS.items():
        wanted = names is None or name in names or name == CONTROL
        if not wanted or op not in provider.ops:
            continue
        try:
            functions[name] = provider.make(op, device)
        except Unavailable as reason:
            reasons[name] = str(reason)
    return functions, reasons


def check(name: str, function: Function, inputs: list[Tensor], cotangents: list[Tensor]) -> None:
    """Holds outputs and gradients against float64, a few rows at a time; raises Wrong.

    Args:
        inputs: x, with r for `add_norm`, then w and b; x and r are `(rows, hidden)`.
    """
    provider = PROVIDERS[name]
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents_given = [c.clone() for c in cotangents] if provider.writes_dy else cotangents
    gradients = torch.autograd.grad(outputs, leaves, cotangents_given, allow_unused=True)
    by_row = [*outputs, *gradients[:-2]]
    sums: list[Tensor] = []
    errors: dict[str, list[float]] = {}  # name: largest error, largest value
    rows, hidden = inputs[0].shape
    step = max(1, 2**22 // hidden)
    names = ["y", "sum"][: len(outputs)] + ["dx", "dr"][: len(gradients) - 2]
    for start in range(0, rows, step):
        part = slice(start, start + step)
        exact_rows, exact_sums = _truth(
            provider, [t[part] for t in inputs[:-2]] + inputs[-2:], [c[part] for c in cotangents]
        )
        for label, got, exact in zip(names, by_row, exact_rows, strict=True):
            _note(errors, label, got[part], exact)
        sums = [a + b for a, b in zip(sums, exact_sums, strict=True)] if sums else exact_sums
    for label, gradient, exact in zip(("dw", "db"), gradients[-2:], sums, strict=False):
        if gradient is not None:
            _note(errors, label, gradient, exact)
    for label, (error, largest) in errors.items():
        unit = torch.finfo(inputs[0].dtype).eps
        allowed = 4 * unit + (0.5 * torch.finfo(torch.float32).eps * rows**0.5) * (
            label in ("dw", "db")
        )
        if not error <= allowed * largest:
            raise Wrong(f"{label} is off by {error:.1e}, where values reach {largest:.1e}")


def _note(errors: dict[str, list[float]], label: str, got: Tensor, exact: Tensor) -> None:
    found = errors.setdefault(label, [0.0, 0.0])
    error = (got.double() - exact).abs().max().item()
    found[0] = error if not error <= found[0] else found[0]  # NaN stays
    found[1] = max(found[1], exact.abs().max().item())


def _truth(
    provider: Provider, inputs: list[Tensor], cotangents: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """In float64: outputs and gradients by row; gradients of w and b."""
    leaves = [t.double().requires_grad_() for t in inputs]
    *terms, w, b = leaves
    x = terms[0]
    if len(terms) == 2:  # the sum is rounded to its dtype, as all but its gradient see it
        rounded = (inputs[0] + inputs[1]).double()
        x = terms[0] + terms[1]
        x = x + (rounded - x).detach()
    outputs = [x] if len(terms) == 2 else []
    if provider.centred:
        x = x - x.mean(-1, keepdim=True)
    head = x[:, : functional.statistic_size(x.shape[-1], provider.p)]
    y = x * (head.square().mean(-1, keepdim=True) + EPS).rsqrt() * w + provider.biased * b
    outputs = [y, *outputs]
    gradients = torch.autograd.grad(outputs, leaves, [c.double() for c in cotangents])
    return [t.detach() for t in (*outputs, *gradients[:-2])], list(gradients[-2:])


def _imported(module: str, device: torch.device) -> Any:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"not installed ({error})") from error
    if device.type == "cpu":
        raise Unavailable("has no CPU kernels")
    return found
