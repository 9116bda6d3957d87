"""Thousands of faults on purpose: every one must be refused with an error that says what it is, and
leave models and files as they were, or whole.

    python scripts/inject_faults.py --json faults.json
    python scripts/inject_faults.py --parts "full disks" --count 20 --seed 3

The parts, on models that are made here:
- exceptions, of a kind that `except Exception` catches and of one that it does not, at lines of the
  package while it plans, applies and undoes a patch, and while it saves and loads;
- kill -9 at random times during saves and during `hf-rmsnorm patch --overwrite`;
- full disks: a small tmpfs where one may be mounted, and a limit on the size of files;
- mutated plans and records, whose digest fits;
- damaged files of checkpoints.

Counted are: raw errors (neither PatchError, VerificationError, OSError nor ImportError), half-done
states (of a model or of a folder), random weights (others with another seed), and files lost or
left over. The exit status is 1 if there is any. Linux and macOS only.
"""

from __future__ import annotations

import harness  # noqa: F401  first, so that it can say what is missing

# isort: split
import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import transformers
from harness.faults import PARTS, run

from hf_rmsnorm.ops import cpu_autograd


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--count", type=int, help="tries of each part (default: its own)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the report there, too")
    arguments = parser.parse_args(argv)
    if arguments.count is not None and arguments.count < 1:
        parser.error("--count must be at least 1")
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    cpu_autograd.finish()  # it builds in the background, which a fork would not see the end of
    report = {}
    for part in arguments.parts:
        count = arguments.count or PARTS[part][1]
        start = shown = time.perf_counter()
        for tries, tally in run(part, count, arguments.seed):
            if time.perf_counter() - shown > 10:
                shown = time.perf_counter()
                print(f"{part}: {tries} tries, {tally.faults} faults", file=sys.stderr, flush=True)
        seconds = time.perf_counter() - start
        report[part] = {**asdict(tally), "seconds": round(seconds, 1)}
        print(
            f"{part}: {tally.tries} tries, {tally.refused} refused or stopped; raw errors "
            f"{len(tally.raw)}, half-done states {len(tally.half)}, random weights "
            f"{len(tally.random)}, files lost {len(tally.lost)} ({seconds:.0f} s)",
            flush=True,
        )
        for fault in (*tally.raw, *tally.half, *tally.random, *tally.lost)[:10]:
            print(f"    {fault}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    kinds = ("raw", "half", "random", "lost")
    return int(any(found[kind] for found in report.values() for kind in kinds))


if __name__ == "__main__":
    sys.exit(main())
