"""One case of the norms against float64: made, run forward and backward, and held against PyTorch.

What correct means is `tests/norm_truth.py`: the same as for the tests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_rmsnorm import functional

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import norm_truth

Dtype = torch.dtype


class Finding(NamedTuple):
    """Of all results of a check the one closest to its limit: errors against float64."""

    what: str = ""
    error: float = 0.0
    torch_error: float = 0.0  # of PyTorch's own expression in the same dtypes
    limit: float = 0.0

    @property
    def share(self) -> float:
        """Of the limit; NaN is over every limit."""
        if self.error <= self.limit:
            return self.error / self.limit if self.limit else 0.0
        return self.error / self.limit if self.limit and self.error == self.error else float("inf")


class Wrong(Exception):
    """A check failed; the message says how."""


class Variant(NamedTuple):
    """Weight, bias and residual: their dtype, None for none, "same" for x's."""

    weight: Dtype | str | None = "same"
    bias: Dtype | str | None = "same"
    residual: Dtype | str | None = None
    p: str = "1"
    offset: float = 0.0
    casting: str = "gemma"
    layout: str = "contiguous"
    train: bool = True  # weight and bias
    out: Dtype | None = None  # of the result, instead of what the casting says


VARIANTS = {
    "plain": Variant(bias=None),
    "bias": Variant(),
    "bare, p": Variant(weight=None, bias=None, p="0.3"),
    "float32 weight, offset": Variant(weight=torch.float32, bias=None, offset=1.0),
    "llama, p": Variant(bias=None, casting="llama", p="0.07"),
    "llama, mixed, strided": Variant(
        weight=torch.float32, casting="llama", offset=0.5, layout="strided"
    ),
    "bias only, p, row stride": Variant(
        weight=None, bias=torch.float32, p="0.0625", layout="row stride"
    ),
    "add": Variant(residual="same"),
    "add, p, offset, unaligned": Variant(residual="same", p="0.3", offset=1.0, layout="unaligned"),
    "add, float32 residual, llama": Variant(residual=torch.float32, bias=None, casting="llama"),
    "frozen, unaligned": Variant(layout="unaligned", train=False),
    "add, frozen": Variant(residual="same", train=False),
    "float32 output": Variant(out=torch.float32),
    "bfloat16 output, float32 weight": Variant(
        weight=torch.float32, bias=torch.float32, p="0.3", out=torch.bfloat16
    ),
}


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same values with other strides or another alignment, in a buffer filled up with NaN."""
    if layout == "contiguous":
        return t
    rows, hidden = t.shape
    if layout == "strided":  # every other element
        return t.new_full((rows, hidden, 2), float("nan"))[..., 0].copy_(t)
    if layout == "row stride":  # a row starts anywhere
        return t.new_full((rows, hidden + 9), float("nan"))[:, 4 : 4 + hidden].copy_(t)
    if layout == "unaligned":
        return t.new_full((rows * hidden + 1,), float("nan"))[1:].view(rows, hidden).copy_(t)
    if layout == "transposed":
        return t.T.contiguous().T
    raise ValueError(f"unknown layout {layout!r}")


def case(
    rows: int, hidden: int, dtype: Dtype, variant: Variant, device: str, *, eps: float | None = None
) -> Finding:
    """Runs one case; raises Wrong, or returns the result that is closest to its limit."""
    k = norm_truth.statistic_size(hidden, variant.p)
    if eps is None:  # few features may be near zero all: gradients would leave float16's range
        eps = 1e-5 if k >= 64 else 0.1
    exact: dict[str, Any] = {"eps": eps, "k": k, "offset": variant.offset}
    settings: dict[str, Any] = {
        "eps": eps,
        "p": float(variant.p),
        "weight_offset": variant.offset,
        "casting": variant.casting,
    }

    def randn(spec: Dtype | str | None, *size: int) -> Tensor | None:
        if spec is None:
            return None
        return torch.randn(size, device=device).to(dtype if isinstance(spec, str) else spec)

    x, residual = randn("same", rows, hidden), randn(variant.residual, rows, hidden)
    weight, bias = randn(variant.weight, hidden), randn(variant.bias, hidden)
    assert x is not None
    x = laid_out(x, variant.layout)
    residual = None if residual is None else laid_out(residual, variant.layout)
    frozen: tuple[Tensor | None, ...] = () if variant.train else (weight, bias)
    trained = (weight, bias) if variant.train else ()

    def arguments(given: tuple[Tensor | None, ...]) -> tuple[Any, Any, Any, Any]:
        x, r, w, b = (*given, *frozen)
        return x, r, w, b

    def ours(*given: Tensor | None) -> Any:
        x, r, w, b = arguments(given)
        if r is None:
            return functional.rms_norm(x, w, b, **settings, out_dtype=variant.out)
        return functional.add_rms_norm(x, r, w, b, **settings)

    def formula(norm: Any, **more: Any) -> Any:
        def function(*given: Tensor | None) -> Any:
            x, r, w, b = arguments(given)
            if norm is norm_truth.true_norm:
                w, b = (None if t is None else t.double() for t in (w, b))
            summed = x if r is None else x + r
            if variant.out and summed.dtype != torch.float64:  # rounded once, from float32
                y = norm(summed.float(), w, b, **exact, **more).to(variant.out)
            else:
                y = norm(summed, w, b, **exact, **more)
            return y if r is None else (y, summed)

        return function

    inputs = [x, residual, *trained]
    eager = formula(norm_truth.eager_norm, casting=variant.casting)
    with torch.no_grad():
        outputs = eager(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    layout = "contiguous" if variant.layout == "row stride" else variant.layout
    cotangents = [laid_out(torch.randn_like(o), layout) for o in outputs]
    results = norm_truth.run(ours, inputs, cotangents)
    in_torch = norm_truth.run(eager, inputs, cotangents)
    truth = norm_truth.run(formula(norm_truth.true_norm), inputs, cotangents, torch.float64)

    names = ["y"] if residual is None else ["y", "summed"]
    gradients = ("dx", "dresidual", "dweight", "dbias")
    names += [n for n, t in zip(gradients, inputs, strict=False) if t is not None]
    summed = x if residual is None else x.double() + residual.double()
    terms = norm_truth.sizes_of_terms(summed, weight, bias, cotangents[0], **exact)
    worst = Finding()
    for name, got, expected, true in zip(names, results, in_torch, truth, strict=True):
        if got.dtype != expected.dtype or got.shape != expected.shape:
            raise Wrong(f"{name} is {got.dtype} {tuple(got.shape)}, not {expected.dtype}")
        if name in ("y", "summed") and not got.is_contiguous():
            raise Wrong(f"{name} is not contiguous: strides {got.stride()}")
        found = norm_truth.closeness(
            got, expected, true, terms=terms[name], unit=unit(dtype, variant.out)
        )
        worst = max(worst, Finding(name, *found), key=lambda finding: finding.share)
    if not worst.share <= 1.0:
        raise Wrong(
            f"{worst.what}: error {worst.error:.2e}, PyTorch's own {worst.torch_error:.2e}, "
            f"limit {worst.limit:.2e}"
        )
    return worst


def unit(*dtypes: Dtype | None) -> float | None:
    """Triton's interpreter cuts float32 to bfloat16, where hardware rounds to nearest."""
    interpreted = not torch.cuda.is_available()
    return torch.finfo(torch.bfloat16).eps if interpreted and torch.bfloat16 in dtypes else None


@contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` holds NaN, so that reading what nobody wrote cannot pass unseen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
