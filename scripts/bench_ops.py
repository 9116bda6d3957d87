"""RMSNorm and pRMSNorm against the norms of PyTorch and of other packages, interleaved.

    python scripts/bench_ops.py                            # this machine's device
    python scripts/bench_ops.py --cpu --threads 1 --rows 512 --hidden 768
    python scripts/bench_ops.py --quick --out ops.json --plots plots

Every provider first passes a check of outputs and gradients against float64 at each shape; what
fails or is not installed is named and not timed. Ops: `norm`, and `add_norm` (residual add, then
norm). Modes: `eager`, from an idle device, so that the host's time counts, and, on a GPU, `graph`,
a CUDA graph's replay, which leaves the device's time; both with an empty L2 cache. On a CPU calls
follow each other.

"speed" is the time of F.layer_norm over the provider's, within each round: median and range; above
1 is faster than LayerNorm. The bytes are the least a pass must move (norm: forward reads x and
writes y; backward reads dy and x and writes dx), and "% of copy" is the time of a copy that moves
as many bytes, timed in the same rounds, over the provider's. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from harness import goals, norms
from harness.benchmark import (
    Call,
    Deadline,
    GpuEvents,
    WallClock,
    add_flags,
    captured,
    finish,
    interleaved,
    pick_device,
    plot,
    ratio,
)
from harness.results import machine, write_json
from torch import Tensor
from torch._functorch import config as functorch_config

COPY = "copy"
# bytes moved, in tensors of the input's size
MOVES = {
    "norm": {"forward": 2, "backward": 3, "both": 5},
    "add_norm": {"forward": 4, "backward": 4, "both": 8},
}
# rows, hidden sizes, dtypes
Grid = tuple[list[int], list[int], list[str]]
GPU: Grid = (
    [1, 64, 4096, 32768],
    [64, 128, 256, 768, *(2**n for n in range(10, 18)), 5120, 12288],
    ["bfloat16", "float32"],
)
CPU: Grid = ([1, 64, 512, 4096], [256, 768, 1024, 4096], ["float32"])
# what the goals need, the most telling first: time may run out
QUICK = {
    "cuda": [
        *((4096, n) for n in (8192, 1024, 4096, 16384, 65536, 32768, 2048, 768, 5120, 12288)),
        *((32768, 1024), (32768, 4096), (64, 4096), (1, 8192), (32768, 128), (4096, 256)),
    ],
    "cpu": [(512, 768), (4096, 768)],
}


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


def checked(
    shape: Shape, inputs: list[Tensor], cotangents: list[Tensor], names: list[str] | None
) -> tuple[dict[str, norms.Function], dict[str, str]]:
    """Providers that pass, and why the others do not; ends the script if ours is wrong."""
    torch._dynamo.reset()  # one shape, one compilation: as fast as compilation gets
    functions, reasons = norms.available(shape.op, inputs[0].device, names)
    for name, function in list(functions.items()):
        try:
            with torch.no_grad():  # compiled functions are compiled for this case too
                function(*inputs)
            reason = norms.wrong(name, function, inputs, cotangents)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if norms.is_ours(name):
                raise
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        if reason and norms.is_ours(name):
            sys.exit(f"{name} at {shape}: {reason}. Not timed")
        if reason:
            reasons[f"{name} at {shape}"] = reason
            del functions[name]
    return functions, reasons


def measure(shape: Shape, args: argparse.Namespace, report: dict[str, Any]) -> None:
    device = pick_device(cpu=args.cpu)
    on_gpu = device.type == "cuda"
    inputs, cotangents = inputs_of(shape, device)
    functions, reasons = checked(shape, inputs, cotangents, args.providers)
    for name, reason in reasons.items():
        if report["without"].setdefault(name, reason) is reason:
            print(f"without {name}: {reason}", flush=True)
    if args.only_compile:
        return
    timers: dict[str, Any] = {"eager": GpuEvents(idle=True) if on_gpu else WallClock()}
    if on_gpu:
        timers["graph"] = GpuEvents(idle=False)
    # autograd runs a backward where the forward ran, and the default stream cannot be captured
    stream = torch.cuda.stream(torch.cuda.Stream()) if on_gpu else nullcontext()
    with stream:
        for which, mode in itertools.product(args.passes, timers):
            if mode not in args.modes:
                continue
            moves = MOVES[shape.op][which]
            calls = {
                name: call_of(norms.PROVIDERS[name], function, inputs, cotangents, which)
                for name, function in functions.items()
            }
            source = inputs[0].new_ones(moves * inputs[0].numel() // 2)
            target = torch.empty_like(source)
            calls[COPY] = Call(partial(target.copy_, source))
            if mode == "graph":
                pool = torch.cuda.graph_pool_handle()
                calls = {name: captured(call, pool) for name, call in calls.items()}
            summaries = interleaved(
                calls,
                norms.CONTROL,
                rounds=args.rounds,
                block_seconds=args.block_seconds,
                description=f"{shape} {which} {mode}",
                timer=timers[mode],
            )
            moved = moves * inputs[0].numel() * inputs[0].element_size()
            for name, summary in summaries.items():
                row = {**shape._asdict(), "pass": which, "mode": mode, "provider": name, **summary}
                row["gb_per_s"] = moved / summary["us_p50"] / 1e3
                row["percent_of_copy"] = 100 * summaries[COPY]["us_p50"] / summary["us_p50"]
                report["rows"].append(row)
                print(line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    where = f"{row['op']:>8} {row['rows']:>6} {row['hidden']:>6} {row['dtype']:>8}"
    return (
        f"{where} {row['pass']:>8} {row['mode']:>5}  {row['provider']:<21}{row['us_p50']:>9.1f} us "
        f"{row['gb_per_s']:>7.1f} GB/s {row['percent_of_copy']:>6.1f}% of copy  {ratio(row)}"
    )


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


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    device_type = pick_device(cpu=args.cpu).type
    rows, hidden, dtypes = GPU if device_type == "cuda" else CPU
    dtypes = args.dtype or dtypes
    if args.quick:
        return [
            Shape(op, rows, hidden, dtypes[0])
            for rows, hidden in QUICK[device_type]
            for op in args.ops
        ]
    return [
        Shape(op, n_rows, width, dtype)
        for op in args.ops
        for dtype in dtypes
        for width in sorted(args.hidden or hidden)
        for n_rows in args.rows or rows
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", choices=norms.OPS, default=list(norms.OPS))
    parser.add_argument("--passes", nargs="+", choices=MOVES["norm"], default=list(MOVES["norm"]))
    parser.add_argument(
        "--modes", nargs="+", choices=("eager", "graph"), default=["eager", "graph"]
    )
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--hidden", type=int, nargs="+")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16", "float64"))
    parser.add_argument("--providers", nargs="+", choices=norms.PROVIDERS, help="and F.layer_norm")
    parser.add_argument("--quick", action="store_true", help="the shapes that the goals need")
    parser.add_argument(
        "--only_compile", metavar="I/N", help="fill the compilers' caches for every Nth shape"
    )
    add_flags(parser, rounds=11, block_seconds=0.02)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    functorch_config.donated_buffer = False  # a backward is timed again and again
    device, deadline = pick_device(cpu=args.cpu), Deadline(args.max_seconds)
    shapes = shapes_of(args)
    report: dict[str, Any] = {"rows": [], "without": {}, "skipped": {}}
    if args.only_compile:
        index, count = map(int, args.only_compile.split("/"))
        shapes = shapes[index::count]
    document: dict[str, Any] = {}
    for shape in shapes:
        problem = memory_problem(shape, device)
        if deadline.passed:
            problem = f"the {args.max_seconds:.0f} seconds are over"
        if problem is None:
            try:
                measure(shape, args, report)
            except torch.OutOfMemoryError:
                problem = "out of memory"
        if problem:
            report["skipped"][str(shape)] = problem
            print(f"skipped {shape}: {problem}", flush=True)
        document = {"environment": machine(device, argv), **report}
        if args.out:  # what there is, should this process be stopped
            write_json(args.out, document)
    document["goals"] = goals.of_ops(document["rows"], device.type)
    goals.show(document["goals"])
    plot("ops", document, args.plots)
    finish(document, args.out)


if __name__ == "__main__":
    main()
