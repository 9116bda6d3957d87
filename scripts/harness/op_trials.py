"""One shape of bench_ops: its inputs, what is called, and which providers are left to be timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness import norms
from harness.benchmark import Call, kernel_times

COPY = "copy"


class Shape(NamedTuple):
    op: str
    rows: int
    hidden: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.op} {self.rows}x{self.hidden} {self.dtype}"


def inputs_of(shape: Shape, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """`([x, w, b] or [x, r, w, b], cotangents)`."""
    torch.manual_seed(0)
    dtype, count = getattr(torch, shape.dtype), 1 + (shape.op == "add_norm")

    def randn(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    by_row = [randn(shape.rows, shape.hidden) for _ in range(2 * count)]
    weights = [1.0 + 0.25 * randn(shape.hidden), randn(shape.hidden)]
    return [*by_row[:count], *weights], by_row[count:]


def call_of(
    provider: norms.Provider,
    function: norms.Function,
    inputs: list[Tensor],
    cotangents: list[Tensor],
    which: str,
) -> Call:
    if which == "forward":

        def forward() -> None:
            with torch.no_grad():
                function(*inputs)

        return Call(forward)

    leaves = [t.detach().requires_grad_() for t in inputs]
    given = cotangents
    before: Callable[[], Any] | None = None
    if provider.writes_dy:
        given = [c.clone() for c in cotangents[:1]] + cotangents[1:]
        before = partial(given[0].copy_, cotangents[0])

    if which == "both":

        def both() -> None:
            y = function(*leaves)
            torch.autograd.grad(y, leaves, given, allow_unused=True)

        return Call(both, before)

    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    edges = [torch.autograd.graph.get_gradient_edge(y) for y in outputs]  # the outputs can go

    def backward() -> None:
        torch.autograd.grad(edges, leaves, given, retain_graph=True, allow_unused=True)

    return Call(backward, before)


class Trial(NamedTuple):
    """One shape: who is left, and what is written down about the others."""

    shape: Shape
    inputs: list[Tensor]
    cotangents: list[Tensor]
    report: dict[str, Any]

    def each(self, work: dict[str, Any], function: Callable, where: str) -> dict[str, Any]:
        """`function(name, value)` of all; without those that raise or give a norms.Wrong."""
        found = {}
        for name, value in work.items():
            try:
                found[name] = function(name, value)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                if name in (norms.CONTROL, COPY):
                    raise
                reason = " ".join(str(error).split()[:50])
                kind = "" if isinstance(error, norms.Wrong) else f"{type(error).__name__}: "
                self.note(f"{name} at {self.shape}{where}", kind + reason, norms.is_ours(name))
        return found

    def note(self, what: str, reason: str, is_ours: bool = False) -> None:
        """Once."""
        kept = self.report["wrong" if is_ours else "without"]
        if what not in kept:
            kept[what] = reason
            print(f"{'WRONG: ' if is_ours else 'without '}{what}: {reason}", flush=True)

    def providers(self, names: list[str] | None) -> dict[str, norms.Function]:
        """Those that pass the check."""
        torch._dynamo.reset()  # one shape, one compilation: as fast as compilation gets
        functions, reasons = norms.available(self.shape.op, self.inputs[0].device, names)
        for name, reason in reasons.items():
            self.note(name, reason)

        def check(name: str, function: norms.Function) -> norms.Function:
            with torch.no_grad():  # compiled functions are compiled for this case too
                function(*self.inputs)
            try:
                norms.check(name, function, self.inputs, self.cotangents)
            except norms.Wrong as wrong:
                if name != norms.CONTROL:  # PyTorch's is, on a CPU in bfloat16; nothing to do
                    raise
                self.note(f"{name} at {self.shape}", f"{wrong}; timed all the same, as the control")
            return function

        return self.each(functions, check, "")


def memory_problem(shape: Shape, device: torch.device) -> str | None:
    """Why the shape does not fit: inputs, gradients, and what providers keep for a backward."""
    if device.type != "cuda":
        return None
    tensor = shape.rows * shape.hidden * getattr(torch, shape.dtype).itemsize
    tensors = 14 if shape.op == "norm" else 20 + len(norms.PROVIDERS)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if tensors * tensor <= free:
        return None
    return f"would take about {tensors * tensor / 2**30:.0f} GiB, {free / 2**30:.0f} are free"


def profile_missed(goal: dict[str, Any], rows: list[dict[str, Any]], device: torch.device) -> Any:
    """Where a goal is missed most: kernels and their times, of ours and of the fastest other."""
    place = goal["worst_place"]
    cell = [row for row in rows if all(row[key] == value for key, value in place.items())]
    peers = [row for row in cell if row["provider"] != COPY and not norms.is_ours(row["provider"])]
    fastest = min(peers, key=lambda row: row["us_p50"])["provider"]
    shape = Shape(place["op"], place["rows"], place["hidden"], place["dtype"])
    inputs, cotangents = inputs_of(shape, device)
    torch._dynamo.reset()
    functions, _ = norms.available(shape.op, device, [norms.OURS, fastest])
    return {
        name: kernel_times(
            call_of(norms.PROVIDERS[name], functions[name], inputs, cotangents, place["pass"]).run,
            device,
        )
        for name in (norms.OURS, fastest)
    }
