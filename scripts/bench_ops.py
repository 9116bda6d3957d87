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

import harness  # noqa: F401  first, so that it can say what is missing

# isort: split
import argparse
import itertools
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

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
from harness.op_trials import COPY, Shape, Trial, call_of, inputs_of, memory_problem, profile_missed
from harness.results import machine, write_json
from torch._functorch import config as functorch_config

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


def measure(shape: Shape, args: argparse.Namespace, report: dict[str, Any]) -> None:
    device = pick_device(cpu=args.cpu)
    on_gpu = device.type == "cuda"
    inputs, cotangents = inputs_of(shape, device)
    trial = Trial(shape, inputs, cotangents, report)
    functions = trial.providers(args.providers)
    if args.only_compile:
        return
    timers: dict[str, Any] = {"eager": GpuEvents(idle=True) if on_gpu else WallClock()}
    if on_gpu:
        timers["graph"] = GpuEvents(idle=False)
    # autograd runs a backward where the forward ran, and the default stream cannot be captured
    with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else nullcontext():
        for which, mode in itertools.product(args.passes, timers):
            if mode not in args.modes:
                continue
            moves = MOVES[shape.op][which]

            def prepare(name: str, function: norms.Function, which: str = which) -> Call:
                return call_of(norms.PROVIDERS[name], function, inputs, cotangents, which)

            calls = trial.each(functions, prepare, f", {which}")
            source = inputs[0].new_ones(moves * inputs[0].numel() // 2)
            calls[COPY] = Call(partial(torch.empty_like(source).copy_, source))
            if mode == "graph":
                pool = torch.cuda.graph_pool_handle()

                def capture(name: str, call: Call, pool: Any = pool) -> Call:
                    return captured(call, pool)

                calls = trial.each(calls, capture, f", {which}, {mode}")
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


def profiles(document: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for goal in document["goals"]:
        if goal["status"] == "missed":
            try:
                times = profile_missed(goal, document["rows"], device)
            except RuntimeError as error:  # not every machine lets a profiler in
                print(f"no profile: {error}")
                return found
            found.append({"goal": goal["goal"], "at": goal["worst_place"], "us_per_call": times})
            print(f"profile: {goal['goal']}, at {goal['worst_at']}")
            for provider, kernels in times.items():
                for kernel, us in list(kernels.items())[:6]:
                    print(f"  {provider:<21}{us:>9.1f} us  {kernel[:90]}")
    return found


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
    parser.add_argument(
        "--profile", action="store_true", help="where a goal is missed most, time each kernel"
    )
    add_flags(parser, rounds=11, block_seconds=0.02)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    functorch_config.donated_buffer = False  # a backward is timed again and again
    device, deadline = pick_device(cpu=args.cpu), Deadline(args.max_seconds)
    shapes = shapes_of(args)
    report: dict[str, Any] = {"rows": [], "without": {}, "skipped": {}, "wrong": {}}
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
    if args.profile:
        document["profiles"] = profiles(document, device)
    plot("ops", document, args.plots)
    finish(document, args.out)
    if report["wrong"]:
        sys.exit("ours failed, and was not timed there: " + "; ".join(report["wrong"]))


if __name__ == "__main__":
    main()
