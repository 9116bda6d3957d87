"""Every check of the kernels that wants real hardware, and the worker process that runs a share.

    python scripts/harness/kernel_checks.py cuda 0/6        # every sixth check, from the first on
    python scripts/harness/kernel_checks.py cpu 0/1         # what Triton's interpreter can do

One JSON object a line: the checks to come; each check as it starts, then what it found.
`gpu_check.py` reads them; when a check takes the process down with it, this file is started anew
without the checks that were done.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, this folder is the first entry

import torch

from harness import gpu_behaviour, gpu_launching
from harness.kernel_grid import VARIANTS, Finding, Variant, case, poisoned
from hf_rmsnorm import ops

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = (BF16, FP32, FP16)
# one of every tile, both sides of every limit, and widths of real models
WIDTHS = (
    *(1, 7, 16, 17, 64, 96, 100, 128, 255, 256, 511, 512, 513, 640, 768, 1000, 1024, 1536, 2048),
    *(2560, 3072, 3584, 4096, 5120, 6144, 7168, 8191, 8192, 8193, 10240, 11008, 12288, 14336),
    *(16384, 16385, 20480, 24576, 28672, 32768, 32769, 50257, 65536, 98304, 131072, 262144),
)
TELLING = (64, 768, 5120, 8192, 16384, 65536)  # these get every variant
MIXED = "add, p, offset, unaligned"


class Check(NamedTuple):
    group: str
    name: str
    run: Callable[[], Finding | None]


def rows_for(hidden: int) -> int:
    """Enough to keep every program of a persistent kernel busy more than once."""
    return max(149, min(33333, 2**21 // hidden)) | 1


def spoken(function: Callable) -> str:
    return function.__name__.replace("_", " ")


def on_gpu() -> list[Check]:
    found = []

    def add(group: str, name: str, function: Callable, *arguments: Any) -> None:
        found.append(Check(group, name, functools.partial(function, *arguments)))

    def grid(group: str, rows: int, hidden: int, dtype: torch.dtype, variant: str) -> None:
        name = f"{rows}x{hidden} {str(dtype)[6:]} {variant}"
        add(group, name, case, rows, hidden, dtype, VARIANTS[variant], "cuda")

    for hidden, variant in itertools.product(TELLING, VARIANTS):
        grid("variants", rows_for(hidden), hidden, BF16, variant)
    for hidden, variant in itertools.product((64, 768, 4096, 16384), ("bias", MIXED)):
        grid("float64", rows_for(hidden), hidden, FP64, variant)
    for hidden in TELLING:
        for function in gpu_launching.BY_WIDTH:
            add("launching", f"{spoken(function)}, {hidden}", function, hidden)
    for hidden in (5120, 8192, 16384, 65536):
        add("clusters", f"{hidden}", gpu_behaviour.in_clusters, hidden)
    for function in gpu_behaviour.SINGLE:
        add("behaviour", spoken(function), function)
    for function in gpu_behaviour.LARGE:
        add("large", spoken(function), function)
    for rows, hidden in itertools.product((1, 2, 3, 16, 17), (64, 768, 8192, 65536)):
        grid("few rows", rows, hidden, BF16, MIXED)
    for rows, hidden in ((1_000_003, 64), (100_003, 768)):
        grid("many rows", rows, hidden, BF16, "add")
    names = list(VARIANTS)  # each width gets three of them, and each dtype gets all
    for (i, hidden), (j, dtype) in itertools.product(enumerate(WIDTHS), enumerate(DTYPES)):
        grid("widths", rows_for(hidden), hidden, dtype, names[(5 * i + 4 * j) % len(names)])
    return found


def on_cpu() -> list[Check]:
    """What the interpreter can do in seconds."""
    sizes = itertools.cycle(itertools.product((1, 7, 64, 300), (FP32, BF16, FP16)))
    cases = [(5, *next(sizes), variant) for variant in VARIANTS]
    cases += [(rows, 24, FP32, "add") for rows in (1, 17)]
    checks = []
    for rows, hidden, dtype, name in cases:
        label = f"{rows}x{hidden} {str(dtype)[6:]} {name}"
        run = functools.partial(case, rows, hidden, dtype, VARIANTS[name], "cpu")
        checks.append(Check("variants", label, run))
    run = functools.partial(case, 3, 40, FP32, Variant(layout="transposed"), "cpu")
    return [*checks, Check("variants", "3x40 float32 transposed", run)]


def launches_of(modules: Sequence[Any]) -> set[str]:
    """Starts recording: the names of the Triton kernels launched from now on."""
    names: set[str] = set()

    def recording(launch: Callable) -> Callable:
        def recorded(kernel: Any, *args: Any, **constants: Any) -> Any:
            names.add(getattr(kernel, "__name__", str(kernel)))
            return launch(kernel, *args, **constants)

        return recorded

    for module in modules:
        if callable(getattr(module, "launch", None)):
            module.launch = recording(module.launch)
    return names


def run(checks: Sequence[Check], device: str) -> Iterator[dict[str, Any]]:
    from hf_rmsnorm.ops import triton_backend, triton_fallback

    if device == "cpu":
        ops.backend_for = lambda x: triton_backend if x.numel() else ops.reference  # type: ignore
        ops.shortcut.call = ops.shortcut.none
    prefix = "hf_rmsnorm.ops.triton"
    kernels = launches_of([m for name, m in list(sys.modules.items()) if name.startswith(prefix)])
    for check in checks:
        label = {"group": check.group, "check": check.name}
        yield {**label, "status": "started"}
        torch.manual_seed(0)
        kernels.clear()
        start = time.perf_counter()
        problem, finding = None, None
        try:
            with poisoned(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                finding = check.run()
                if device == "cuda":
                    torch.cuda.synchronize()
            if not kernels and check.name not in gpu_behaviour.WITHOUT_KERNELS:
                problem = "no Triton kernel ran"
            if triton_fallback.failed:
                problem = f"not built: {'; '.join(dict.fromkeys(triton_fallback.failed.values()))}"
                triton_fallback.failed.clear()
        except gpu_behaviour.Skipped as reason:
            yield {**label, "status": "skipped", "why": str(reason)}
            continue
        except torch.OutOfMemoryError:
            yield {**label, "status": "skipped", "why": "too little memory beside other checks"}
            continue
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).strip()[:600]}"
        yield {
            **label,
            "status": "failed" if problem else "passed",
            **({"why": problem} if problem else {}),
            **(finding._asdict() | {"share_of_limit": finding.share} if finding else {}),
            "kernels": sorted(kernels),
            "seconds": round(time.perf_counter() - start, 2),
        }
        finding = None
        if device == "cuda":
            torch.cuda.synchronize()  # raises, and ends the process, once the device is lost
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("share", help="I/N: every Nth check, from the Ith on")
    parser.add_argument("--done", type=int, default=0, help="leave out so many of the share")
    parser.add_argument("--match", default="", help="only checks whose group or name has this")
    args = parser.parse_args()
    torch.set_num_threads(1)
    index, count = map(int, args.share.split("/"))
    checks = on_gpu() if args.device == "cuda" else on_cpu()
    checks = [check for check in checks if args.match in f"{check.group} {check.name}"]
    checks = checks[index::count][args.done :]
    print(json.dumps({"checks": [[check.group, check.name] for check in checks]}), flush=True)
    for line in run(checks, args.device):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
