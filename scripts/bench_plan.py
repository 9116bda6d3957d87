"""How long planning an exact conversion takes, and how much memory, against depth and width.

    python scripts/bench_plan.py
    python scripts/bench_plan.py --depths 12 --widths 768 --out plan.json

Each point is a GPT-2 with random weights in a process of its own: wall time of `plan_patch` and of
`patch_model` (which plans, verifies and patches), and the process's peak resident memory,
of which the model itself and the libraries are part ("before"). The last line is one JSON document.
"""

from __future__ import annotations

import harness  # noqa: F401  first, so that it can say what is missing

# isort: split
import argparse
import contextlib
import datetime
import json
import multiprocessing
import platform
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def measure(
    depth: int, width: int, vocabulary: int, threads: int, twin: str, dtype: str
) -> dict[str, Any]:
    import torch
    import transformers

    import hf_rmsnorm

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=depth, n_embd=width, n_head=width // 64, vocab_size=vocabulary, n_positions=1024
    )
    config.bos_token_id = config.eos_token_id = vocabulary - 1
    config.dtype = dtype
    with default_dtype(getattr(torch, dtype)):
        model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    before = peak_gib()
    start = time.perf_counter()
    plan = hf_rmsnorm.plan_patch(model, twin=twin)
    planned, plan_peak = time.perf_counter() - start, peak_gib()
    start = time.perf_counter()
    hf_rmsnorm.patch_model(model, twin=twin)
    return {
        "depth": depth,
        "width": width,
        "dtype": dtype,
        "twin": plan.twin,
        "parameters": sum(p.numel() for p in model.parameters()),
        "plan_s": round(planned, 2),
        "patch_s": round(time.perf_counter() - start, 2),
        "before_gib": round(before, 2),
        "plan_peak_gib": round(plan_peak, 2),
        "patch_peak_gib": round(peak_gib(), 2),
        "exact": plan.count("exact"),
        "sites": len(plan.sites),
    }


@contextlib.contextmanager
def default_dtype(dtype: Any) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 6, 12])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 768])
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--twin", choices=("auto", "never", "always"), default="auto", help="as of patch_model"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()

    import torch
    import transformers

    rows = []
    columns = ("depth", "width", "plan_s", "patch_s", "before_gib", "plan_peak_gib", "exact")
    print("  ".join(f"{name:>13}" for name in columns))
    spawn = multiprocessing.get_context("spawn")
    for width in arguments.widths:
        for depth in arguments.depths:
            with spawn.Pool(1) as pool:
                how = (arguments.vocabulary, arguments.threads, arguments.twin, arguments.dtype)
                rows.append(pool.apply(measure, (depth, width, *how)))
            print("  ".join(f"{rows[-1][name]:>13}" for name in columns), flush=True)
    document = {
        "rows": rows,
        "threads": arguments.threads,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
