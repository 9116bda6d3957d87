"""Everything about the kernels that only a GPU can tell, in one command. See gpu_check.sh.

    python scripts/gpu_check.py [OUT_DIR] [--seconds 450] [--parts correctness ops models]
    python scripts/gpu_check.py OUT_DIR --cpu          # the script itself, tiny, in the interpreter
    python scripts/gpu_check.py OUT_DIR --env HF_RMSNORM_CLUSTERS=1    # all of it with clusters

correctness  the checks of harness/kernel_checks.py, in several processes, against float64
ops, models  the benchmarks' quick subsets: what the goals need

Every part gets a share of the time and says what it left out. Writes gpu_check.json, with device,
versions and date, and what the benchmarks write. Exit status: 0; 1 if a result is wrong or a part
broke; 2 for bad arguments.
"""

from __future__ import annotations

import harness  # noqa: F401  first, so that it can say what is missing

# isort: split
import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import goals
from harness.benchmark import Deadline
from harness.children import Child, Line, Worker, environment, run_workers, wait
from harness.results import machine, write_json

PARTS = ("correctness", "ops", "models")
UNTIL = {"correctness": 0.42, "ops": 0.74, "models": 0.97}  # of all the time
GRACE = 30.0  # seconds over its time, to start and to finish, before a benchmark is stopped
TINY = {
    "ops": (
        *("--rows", "5", "--hidden", "24", "--providers", "rms_norm"),
        *("--rounds", "1", "--block_seconds", "0.001"),
    ),
    "models": (
        *("--models", "gpt2", "--width", "32", "--layers", "1", "--batch", "1", "--length", "8"),
        *("--vocabulary", "64", "--rounds", "1", "--block_seconds", "0.001"),
    ),
}
QUICK = {
    "ops": ("--quick", "--profile", "--rounds", "5", "--block_seconds", "0.005"),
    "models": ("--quick", "--rounds", "5"),
}


def correctness(args: argparse.Namespace, folder: Path, deadline: Deadline) -> list[Line]:
    """Results of all checks. On a GPU the compilers' caches are filled at the same time."""
    device = "cpu" if args.cpu else "cuda"
    env = environment(interpret=args.cpu, TORCHINDUCTOR_COMPILE_THREADS="1", **args.env)
    script = "scripts/harness/kernel_checks.py"
    workers = [
        Worker(Child((script, device, f"{i}/{args.workers}"), env, folder / f"worker-{i}"))
        for i in range(args.workers)
    ]
    ahead = []
    if not args.cpu and "ops" in args.parts:
        for i in range(max(1, args.workers // 2)):
            share = f"{i}/{max(1, args.workers // 2)}"
            command = ("scripts/bench_ops.py", "--quick", "--only_compile", share)
            ahead.append(Child(command, env, folder / f"ahead-{i}"))
            ahead[-1].start()
    results = run_workers(workers, deadline)
    late = wait(ahead, deadline)
    if late:
        print(f"compiling ahead for the benchmark: {len(late)} of {len(ahead)} had to be stopped")
    return results


def benchmark(part: str, args: argparse.Namespace, folder: Path, seconds: float) -> Line | None:
    """The benchmark's document, as far as it came; None if it wrote none."""
    out = args.out / f"{part}.json"
    out.unlink(missing_ok=True)
    flags = ("--cpu", "--threads", "1", *TINY[part]) if args.cpu else QUICK[part]
    own = ("--max_seconds", f"{seconds:.0f}", "--out", str(out), "--plots", str(args.out))
    env = environment(interpret=False, **args.env)
    child = Child((f"scripts/bench_{part}.py", *flags, *own), env, folder / part)
    child.start()
    late = wait([child], Deadline(seconds + GRACE))
    print("\n".join(line for line in child.text().splitlines() if not line.startswith("{")))
    if late:
        print(f"{part}: stopped after {seconds + GRACE:.0f} s")
    document = json.loads(out.read_text()) if out.exists() else None
    if document is None or (child.status and not late):
        args.broken.append(f"{part}: ended with status {child.status}")
    return document


def table(results: Sequence[Line]) -> str:
    """By group: how many passed, and the largest share of its limit that an error took."""
    head = f"{'group':<14}{'passed':>7}{'failed':>7}{'skipped':>8}{'not run':>8}  "
    lines = [head + "closest to its limit: error, PyTorch's own, limit"]
    for group in dict.fromkeys(line["group"] for line in results):
        here = [line for line in results if line["group"] == group]
        counts = [
            sum(line["status"] == status for line in here)
            for status in ("passed", "failed", "skipped", "not run")
        ]
        text = "{:<14}{:>7}{:>7}{:>8}{:>8}".format(group, *counts)
        measured = [line for line in here if "share_of_limit" in line and line["what"]]
        if measured:
            worst = max(measured, key=lambda line: line["share_of_limit"])
            text += f"  {worst['what']} of {worst['check']}: " + ", ".join(
                f"{worst[key]:.1e}" for key in ("error", "torch_error", "limit")
            )
        lines.append(text)
    for status in ("failed", "skipped"):
        lines += [
            f"{status}: {line['group']}, {line['check']}: {line['why']}"
            for line in results
            if line["status"] == status
        ]
    return "\n".join(lines)


def setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--seconds", type=float, default=450.0, help="for everything")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cpu", action="store_true", help="tiny, through Triton's interpreter")
    parser.add_argument("--workers", type=int, help="processes that check (default: by cores)")
    parser.add_argument(
        "--env", type=setting, nargs="+", default=[], metavar="NAME=VALUE", help="for all parts"
    )
    args = parser.parse_args(argv)
    if not args.cpu and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here; --cpu checks this script itself")
    args.workers = args.workers or (1 if args.cpu else max(1, min(8, (os.cpu_count() or 2) - 2)))
    args.env, args.broken = dict(args.env), []
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu" if args.cpu else "cuda")
    start = time.monotonic()
    document: dict[str, Any] = {"environment": machine(device, argv), "env": args.env}
    found_goals: list[Line] = []
    results: list[Line] = []
    with tempfile.TemporaryDirectory() as temporary:
        for part in args.parts:
            left = UNTIL[part] * args.seconds - (time.monotonic() - start)
            print(f"== {part}: {max(0.0, left):.0f} s", flush=True)
            if left <= GRACE:
                args.broken.append(f"{part}: no time left")
            elif part == "correctness":
                results = correctness(args, Path(temporary), Deadline(left))
                document["correctness"] = results
                print(table(results), flush=True)
            else:
                found = benchmark(part, args, Path(temporary), left - GRACE)
                if found is not None:
                    judge = goals.of_ops if part == "ops" else goals.of_models
                    found_goals += judge(found["rows"], device.type)
            document |= {"goals": found_goals, "seconds": round(time.monotonic() - start, 1)}
            write_json(args.out / "gpu_check.json", document)
    failed = sum(line["status"] == "failed" for line in results)
    if "correctness" in args.parts and not any(line["status"] == "passed" for line in results):
        args.broken.append("correctness: no check passed")
    document |= {"failed": failed, "broken": args.broken, "passed": not (failed or args.broken)}
    write_json(args.out / "gpu_check.json", document)
    summary(document, results, args.out)
    return 0 if document["passed"] else 1


def summary(document: dict[str, Any], results: Sequence[Line], out: Path) -> None:
    """The last lines: what counts."""
    where = document["environment"]
    print(f"== {where['device']}, torch {torch.__version__}, {document['seconds']:.0f} s")
    goals.show(document["goals"])
    if results:
        counts = {
            status: sum(line["status"] == status for line in results)
            for status in ("passed", "failed", "skipped", "not run")
        }
        print("checks:", ", ".join(f"{count} {status}" for status, count in counts.items()))
    for text in document["broken"]:
        print(f"broken: {text}")
    print(f"{'PASSED' if document['passed'] else 'FAILED'}; all of it in {out / 'gpu_check.json'}")


if __name__ == "__main__":
    sys.exit(main())
