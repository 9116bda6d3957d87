"""What starting one kernel costs on the host: Triton's `kernel[grid](...)` against ours. No GPU.

    python scripts/bench_launch.py
    python scripts/bench_launch.py --hidden 8192 --dtype float32 --out launch.json

The kernels are those that one forward and backward start. A stub takes the place of the driver, so
the time is Python's alone: what the driver itself takes comes on top of both. "speed" is the time
of `kernel[grid](...)` over the provider's; the shortest of all blocks is "us_min".
"""

from __future__ import annotations

import harness  # noqa: F401  first, so that it can say what is missing

# isort: split
import argparse
import timeit
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness.benchmark import finish
from harness.results import machine
from harness.stub_driver import StubDriver

from hf_rmsnorm.ops import triton_backend, triton_launch
from hf_rmsnorm.ops.reference import Formula

CONTROL = "kernel[grid]"


def launches_of(rows: int, hidden: int, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """`(kernel, grid, args, constants)` of one forward and backward, with weight and bias."""
    found: list[tuple[Any, ...]] = []
    launch, triton_backend.launch = (
        triton_backend.launch,
        lambda kernel, grid, *args, **constants: found.append((kernel, grid, args, constants)),
    )
    try:
        x, dy = torch.randn(2, rows, hidden).to(dtype)
        weight, bias = torch.randn(2, hidden).to(dtype)
        formula = Formula(hidden, 1e-5, 0.0, False)
        *_, rstd = triton_backend.forward(x, None, weight, bias, formula, save_rstd=True)
        assert rstd is not None
        triton_backend.backward(
            dy, None, x, weight, rstd, formula, weight_grad=True, bias_grad=dtype
        )
    finally:
        triton_backend.launch = launch
    return found


def microseconds(statement: Any, blocks: int, calls: int) -> float:
    statement()
    return 1e6 * min(timeit.repeat(statement, repeat=blocks, number=calls)) / calls


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--dtype", default="bfloat16", help="as torch names it")
    parser.add_argument("--blocks", type=int, default=50)
    parser.add_argument("--calls", type=int, default=200, help="launches in a block")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    driver = StubDriver()
    driver.activate()
    driver.recording = False
    rows = []
    for kernel, grid, tensors, constants in launches_of(
        args.rows, args.hidden, getattr(torch, args.dtype)
    ):
        providers = {
            CONTROL: lambda k=kernel, g=grid, t=tensors, c=constants: k[g](*t, **c),
            "launch": lambda k=kernel, g=grid, t=tensors, c=constants: triton_launch.launch(
                k, g, *t, **c
            ),
        }
        cost = {n: microseconds(run, args.blocks, args.calls) for n, run in providers.items()}
        for name, us in cost.items():
            speed = cost[CONTROL] / us
            rows.append({"kernel": kernel.__name__, "provider": name, "us_min": us, "speed": speed})
            print(f"{kernel.__name__:<20}{name:<14}{us:>8.2f} us{speed:>8.1f}x", flush=True)
    finish({"environment": machine(torch.device("cpu"), argv), "rows": rows}, args.out)


if __name__ == "__main__":
    main()
