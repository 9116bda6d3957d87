"""Timing several callables against each other in one process, and printing ratios."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from harness.results import quantile, spread, write_json


def interleaved(
    providers: Mapping[str, Callable[[], Any]],
    control: str,
    *,
    rounds: int,
    block_seconds: float,
    description: str = "",
) -> dict[str, dict[str, Any]]:
    """Seconds per call of each provider, and its speed relative to `control` within each round.

    Providers take turns: a round gives each one a block of calls, in an order that rotates, so that
    a machine that slows down for a while slows down all of them. Blocks are synchronised and long
    enough for the clock; the calls that size them are the warm-up.
    """
    calls = {name: _calls_for(run, block_seconds) for name, run in providers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    names = list(providers)
    for turn in tqdm(range(rounds), desc=description, leave=False):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(_block(providers[name], calls[name]))
    return {
        name: {
            "us_p10": 1e6 * quantile(values, 0.1),
            "us_p50": 1e6 * statistics.median(values),
            "us_p90": 1e6 * quantile(values, 0.9),
            "speed": spread([c / v for c, v in zip(seconds[control], values, strict=True)]),
        }
        for name, values in seconds.items()
    }


def add_flags(parser: argparse.ArgumentParser, *, rounds: int, block_seconds: float) -> None:
    """The flags every benchmark has, with its own defaults for how long to measure."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--block_seconds", type=float, default=block_seconds)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the JSON here")


def finish(document: Any, out: Path | None) -> None:
    """The JSON as the last line, and as a file where one was asked for."""
    if out:
        write_json(out, document)
    print(json.dumps(document))


def _calls_for(run: Callable[[], Any], block_seconds: float) -> int:
    _block(run, 2)  # compiles, picks kernels, fills caches
    once = _block(run, 3)
    return max(1, round(block_seconds / once))


def _block(run: Callable[[], Any], calls: int) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize()
    return (time.perf_counter() - start) / calls


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(summary: Mapping[str, Any]) -> str:
    """`1.23 (1.20-1.27)`: median and range over rounds of the speed relative to the control."""
    speed = summary["speed"]
    return f"{speed['median']:.2f} ({speed['min']:.2f}-{speed['max']:.2f})"
