"""What saving a patched model costs over saving the unpatched one, interleaved.

    python scripts/bench_save.py
    python scripts/bench_save.py --folder /data/bench --rounds 31 --out save.json

A GPT-2 with random weights (12 layers, 768 wide) is written by `save_pretrained` as it is, patched
in the stock format (exact: the check that it still is one is part of the time) and patched in the
format of its own. Each call writes a new folder, after everything earlier went to the disk.
"cached" ends when `save_pretrained` returns, as users see it: the system has the data, maybe not
the disk. "synced" ends when every file is on the disk. "added" is the patched model's time over the
unpatched one's in the same round, less one: median and range. Other work on the machine disturbs
the fastest calls least: "added_p10" compares the tenth percentiles, and "added_ms" is their
difference. The last line is one JSON document.
"""

from __future__ import annotations

import harness  # noqa: F401  first, so that it can say what is missing

# isort: split
import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from harness.benchmark import Call, WallClock, finish, interleaved
from harness.results import machine
from harness.sized_models import Sizes, build

from hf_rmsnorm import patch_model

CONTROL = "unpatched"
ARMS: dict[str, dict[str, Any] | None] = {
    CONTROL: None,
    # planned without what does not concern saving: verification, and runs under autocast
    "stock format": {"verify": False, "autocast_output": "float32"},
    "own format": {"norm": "prmsnorm", "strategy": "direct"},
}
MODES = ("cached", "synced")


class Saving(WallClock):
    """Mean seconds per call, without what each call needs done before it."""

    def block(self, call: Call, calls: int) -> float:
        total = 0.0
        for _ in range(calls):
            if call.before:
                call.before()
            start = time.perf_counter()
            call.run()
            total += time.perf_counter() - start
        return total / calls


def models(sizes: Sizes) -> dict[str, Any]:
    found = {}
    for name, patch in ARMS.items():
        model = build("gpt2", sizes)[0].eval()
        found[name] = model if patch is None else patch_model(model, **patch)
    return found


def saving(model: Any, target: Path, *, synced: bool) -> Call:
    def run() -> None:
        model.save_pretrained(target)
        if synced:
            for path in (*target.iterdir(), target):
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

    def before() -> None:
        shutil.rmtree(target, ignore_errors=True)
        os.sync()

    return Call(run, before)


def check_formats(found: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """The files and bytes that each arm writes; stops if one is not in the format it is named."""
    written = {}
    for name, model in found.items():
        model.save_pretrained(folder)
        config = transformers.PreTrainedConfig.get_config_dict(folder)[0]
        kind = "own format" if config["model_type"] == "hf_rmsnorm" else "stock format"
        if kind != name and (name != CONTROL or "hf_rmsnorm" in config):
            raise SystemExit(f"{name} was written in the {kind}")
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        written[name] = {"files": len(sizes), "bytes": sum(sizes.values())}
        shutil.rmtree(folder)
    return written


def added(speed: dict[str, float]) -> dict[str, float]:
    return {
        "median": 1 / speed["median"] - 1,
        "min": 1 / speed["max"] - 1,
        "max": 1 / speed["min"] - 1,
    }


def measure(found: dict[str, Any], folder: Path, mode: str, rounds: int) -> list[dict[str, Any]]:
    target = folder / "model"
    calls = {n: saving(m, target, synced=mode == "synced") for n, m in found.items()}
    # blocks of one call: what is wanted is the time of a save, not the clock's resolution
    times = interleaved(
        calls, CONTROL, rounds=rounds, block_seconds=0.0, description=mode, timer=Saving()
    )
    rows = []
    for name, row in times.items():
        more = added(row.pop("speed"))
        fastest = times[CONTROL]["us_p10"]
        extra = {
            "added_p10": row["us_p10"] / fastest - 1,
            "added_ms": (row["us_p10"] - fastest) / 1e3,
        }
        rows.append({"format": name, "mode": mode, **row, "added": more, **extra})
        spread = f"{more['median']:+.1%} ({more['min']:+.1%} to {more['max']:+.1%})"
        quiet = f"p10 {extra['added_p10']:+.1%}, {extra['added_ms']:+.1f} ms"
        print(f"{mode:8} {name:14} {row['us_p50'] / 1e3:9.1f} ms   {spread}, {quiet}", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--length", type=int, default=1024, help="positions")
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    found = models(Sizes(args.width, args.layers, args.length, 1, args.vocabulary))
    document: dict[str, Any] = {"environment": machine(torch.device("cpu"), argv), "rows": []}
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench_save.") as folder:
        document["written"] = check_formats(found, Path(folder) / "model")
        for mode in args.modes:
            document["rows"] += measure(found, Path(folder), mode, args.rounds)
    finish(document, args.out)


if __name__ == "__main__":
    main()
