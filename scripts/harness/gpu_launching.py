"""Checks of launches on a GPU, at one width: graphs, streams, repeats, and kernels kept for later.

Each raises Wrong, or whatever went wrong.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from harness.kernel_grid import Finding, Variant, Wrong, case, norm_truth
from hf_rmsnorm import functional

ROWS = 1027


def tensors(rows: int, hidden: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """x, residual, weight, bias, and the cotangents of both outputs."""
    by_row = torch.randn(4, rows, hidden, device="cuda").to(dtype)
    weights = torch.randn(2, hidden, device="cuda").to(dtype)
    return [*by_row[:2], *weights, *by_row[2:]]


def step(x: Tensor, r: Tensor, w: Tensor, b: Tensor, *cotangents: Tensor) -> list[Tensor]:
    """Outputs and gradients of `rms_norm` and `add_rms_norm`."""
    alone = norm_truth.run(functional.rms_norm, [x, w, b], cotangents[:1])
    return alone + norm_truth.run(functional.add_rms_norm, [x, r, w, b], cotangents)


def expect_same(got: list[Tensor], expected: list[Tensor], what: str) -> None:
    names = ("y", "dx", "dweight", "dbias", "add's y", "sum", "dx", "dresidual", "dweight", "dbias")
    for name, a, b in zip(names, got, expected, strict=True):
        if not torch.equal(a, b):
            off = (a.double() - b.double()).abs().max().item()
            raise Wrong(f"{name} of {what} is off by {off:.2e}; bit for bit was expected")


def graph(hidden: int) -> None:
    """A captured step, replayed on other values, gives what an eager step gives."""
    static, fresh = tensors(ROWS, hidden), tensors(ROWS, hidden)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(*static)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured, stream=stream):
        results = step(*static)
    for _ in range(2):
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
        captured.replay()
        torch.cuda.synchronize()
        expect_same(results, step(*fresh), "a replayed CUDA graph")
        fresh = tensors(ROWS, hidden)


def deterministic(hidden: int) -> None:
    inputs = tensors(ROWS, hidden)
    first = step(*inputs)
    for _ in range(5):
        expect_same(step(*inputs), first, "the same call again")


def batch_invariant(hidden: int) -> None:
    """A row's outputs and dx do not depend on its neighbours, nor on how many there are."""
    x, r, w, b, *cotangents = tensors(ROWS, hidden)
    whole = step(x, r, w, b, *cotangents)
    for rows in (slice(0, 1), slice(5, 8), slice(400, 400 + 128), slice(ROWS - 1, ROWS)):
        some = step(x[rows], r[rows], w, b, *(c[rows] for c in cotangents))
        for name, index in (("y", 0), ("dx", 1), ("add's y", 4), ("sum", 5), ("add's dx", 6)):
            if not torch.equal(some[index], whole[index][rows]):
                raise Wrong(f"{name} of rows {rows.start}:{rows.stop} depends on the batch")


def stream(hidden: int) -> None:
    """Kernels go to the current stream: there they wait for inputs that are written late."""
    late, expected = tensors(ROWS, hidden), None
    expected = step(*late)
    for _ in range(3):  # the first call compiles, later ones launch directly
        inputs = [torch.full_like(t, float("nan")) for t in late]
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(20_000_000)
            for t, value in zip(inputs, late, strict=True):
                t.copy_(value)
            got = step(*inputs)
            torch.cuda.current_stream().synchronize()
        expect_same(got, expected, "a call on another stream")


def launches(hidden: int) -> Finding:
    """A kernel kept from one call is not used for another call that needs another kernel.

    Rows, strides and alignments change from call to call, there and back; each is held against
    float64.
    """
    kinds = [
        (rows, layout)
        for layout in ("contiguous", "unaligned", "row stride", "strided", "transposed")
        for rows in (1, 16, 33)
    ]
    found = []
    for rows, layout in kinds + kinds[::-1]:
        for residual in (None, "same"):
            variant = Variant(residual=residual, layout=layout)
            found.append(case(rows, hidden, torch.bfloat16, variant, "cuda"))
    launcher = sys.modules.get("hf_rmsnorm.ops.triton_launch")
    kept = getattr(launcher, "_bound", None)
    if kept is not None and not kept:
        raise Wrong("no compiled kernel was kept for a direct launch")
    return max(found, key=lambda finding: finding.share)


BY_WIDTH = (graph, deterministic, batch_invariant, stream, launches)
