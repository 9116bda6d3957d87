"""RMSNorm and pRMSNorm against the norms of PyTorch: time per call, interleaved, in one process.

    python scripts/bench_ops.py                                  # this machine's device
    python scripts/bench_ops.py --cpu --threads 1 --rows 512 --hidden 768
    python scripts/bench_ops.py --dtype bfloat16 --out ops.json

Each shape first passes a check against float64. "speed" is the time of F.layer_norm over the
provider's, within each round: median and range; above 1 is faster than LayerNorm. The bytes are
the least a pass must move (forward: read x, write y; backward: read dy and x, write dx), so GB/s
compares with a copy ("copy", timed in the same rounds). The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from harness.benchmark import add_flags, finish, interleaved, ratio
from harness.results import environment
from torch import Tensor
from torch.nn import functional as F

from hf_rmsnorm import functional

CONTROL = "F.layer_norm"
PASSES = ("forward", "both")
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]

NORMS: dict[str, Norm] = {
    CONTROL: lambda x, w, b: F.layer_norm(x, w.shape, w, b),
    "F.rms_norm": lambda x, w, b: F.rms_norm(x, w.shape, w, 1e-5),
    "rms_norm": functional.rms_norm,
    "rms_norm p=1/16": lambda x, w, b: functional.rms_norm(x, w, b, p=0.0625),
}


def check(x: Tensor, w: Tensor, b: Tensor) -> None:
    """Ours must be within rounding of float64, or there is no timing."""
    for p, name in ((1.0, "rms_norm"), (0.0625, "rms_norm p=1/16")):
        wide = x.double()
        k = functional.statistic_size(x.shape[-1], p)
        exact = wide * (wide[:, :k].square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w + b
        error = ((NORMS[name](x, w, b).double() - exact).abs().max() / exact.abs().max()).item()
        if not error <= 4 * torch.finfo(x.dtype).eps:
            sys.exit(f"{name} is off by {error:.1e} at {tuple(x.shape)} {x.dtype}: not timed")


def runner(norm: Norm, x: Tensor, w: Tensor, b: Tensor, dy: Tensor, which: str) -> Callable:
    if which == "forward":

        def forward() -> None:
            with torch.no_grad():
                norm(x, w, b)

        return forward
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]

    def both() -> None:
        y = norm(*leaves)
        torch.autograd.grad(y, leaves, dy, allow_unused=True)

    return both


def measure(rows: int, hidden: int, dtype: torch.dtype, args: argparse.Namespace) -> list[dict]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    x, dy = torch.randn(2, rows, hidden, device=device).to(dtype)
    w, b = torch.randn(2, hidden, device=device).to(dtype)
    check(x, w, b)
    found = []
    for which in PASSES:
        providers = {n: runner(norm, x, w, b, dy, which) for n, norm in NORMS.items()}
        target = torch.empty_like(x)
        providers["copy"] = lambda target=target: target.copy_(x)
        summaries = interleaved(
            providers,
            CONTROL,
            rounds=args.rounds,
            block_seconds=args.block_seconds,
            description=f"{rows}x{hidden} {which}",
        )
        for name, summary in summaries.items():
            moves = 2 if which == "forward" or name == "copy" else 5
            gb_per_s = moves * x.numel() * x.element_size() / summary["us_p50"] / 1e3
            row: dict[str, Any] = {"rows": rows, "hidden": hidden, "dtype": str(dtype)[6:]}
            found.append({**row, "pass": which, "provider": name, **summary, "gb_per_s": gb_per_s})
            print(
                f"{rows:>7} {hidden:>7} {row['dtype']:>9} {which:>8}  {name:<16}"
                f"{summary['us_p50']:>10.1f} us {gb_per_s:>8.1f} GB/s  {ratio(summary)}",
                flush=True,
            )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 512, 4096])
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 768, 1024, 4096])
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="as torch names them")
    add_flags(parser, rounds=11, block_seconds=0.02)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = [
        row
        for dtype in args.dtype
        for hidden in args.hidden
        for count in args.rows
        for row in measure(count, hidden, getattr(torch, dtype), args)
    ]
    document = {"environment": environment(Accelerator(cpu=args.cpu), argv), "rows": rows}
    finish(document, args.out)


if __name__ == "__main__":
    main()
