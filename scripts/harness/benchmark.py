"""Timing several callables against each other in one process, and printing ratios."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harness.results import quantile, spread, write_json


class Call(NamedTuple):
    """What is timed, and what has to happen before each call, untimed."""

    run: Callable[[], Any]
    before: Callable[[], Any] | None = None


class WallClock:
    """Mean seconds per call of calls in a row, with the device idle before and after."""

    def block(self, call: Call, calls: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            if call.before:
                call.before()
            call.run()
        synchronize()
        return (time.perf_counter() - start) / calls


class GpuEvents:
    """Median seconds per call between two CUDA events, with an empty L2 cache before each.

    Args:
        idle: wait until the GPU has nothing to do, then start: the host's time counts too. Without
            it the host works ahead while the cache is cleared, and the device's time is left.
    """

    def __init__(self, *, idle: bool):
        self.idle = idle
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        l2 = getattr(properties, "L2_cache_size", 0) or 64 * 2**20
        self.eraser = torch.empty(2 * l2, dtype=torch.int8, device="cuda")

    def block(self, call: Call, calls: int) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        synchronize()
        for start, end in pairs:
            if call.before:
                call.before()
            self.eraser.zero_()
            if self.idle:
                synchronize()
            start.record()
            call.run()
            end.record()
        synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


Timer = WallClock | GpuEvents


def captured(call: Call, pool: Any) -> Call:
    """The call as a CUDA graph. What it returns is not kept, so graphs may share one `pool`.

    Autograd runs a backward on the stream of its forward; so both the call and whatever it
    differentiates must have been set up on the stream that is current now, and that is not the
    default one.
    """
    for _ in range(3):  # compiles and loads kernels, which a capture must not
        if call.before:
            call.before()
        call.run()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
        call.run()
    return Call(graph.replay, call.before)


class Deadline:
    """So many seconds from now on; None for ever."""

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float | None:
        return None if self.end is None else max(0.0, self.end - time.monotonic())

    @property
    def passed(self) -> bool:
        return self.left == 0.0


def interleaved(
    providers: Mapping[str, Callable[[], Any] | Call],
    control: str,
    *,
    rounds: int,
    block_seconds: float,
    description: str = "",
    timer: Timer | None = None,
) -> dict[str, dict[str, Any]]:
    """Seconds per call of each provider, and its speed relative to `control` within each round.

    Providers take turns: a round gives each one a block of calls, in an order that rotates, so that
    a machine that slows down for a while slows down all of them. Blocks are synchronised and long
    enough for the clock; the calls that size them are the warm-up.
    """
    timer = timer or WallClock()
    runs = {n: run if isinstance(run, Call) else Call(run) for n, run in providers.items()}
    calls = {name: _calls_for(timer, call, block_seconds) for name, call in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    names = list(providers)
    for turn in progress(range(rounds), description):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(timer.block(runs[name], calls[name]))
    return {
        name: {
            "us_min": 1e6 * min(values),
            "us_p10": 1e6 * quantile(values, 0.1),
            "us_p50": 1e6 * statistics.median(values),
            "us_p90": 1e6 * quantile(values, 0.9),
            "speed": spread([c / v for c, v in zip(seconds[control], values, strict=True)]),
        }
        for name, values in seconds.items()
    }


def progress(items: Iterable[Any], description: str) -> Iterable[Any]:
    """A progress bar, where tqdm is installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=description, leave=False, disable=None)  # None: only on a terminal


def add_flags(parser: argparse.ArgumentParser, *, rounds: int, block_seconds: float) -> None:
    """The flags every benchmark has, with its own defaults for how long to measure."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--block_seconds", type=float, default=block_seconds)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--max_seconds", type=float, help="start nothing new after so long")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--plots", type=Path, help="write plots into this folder (matplotlib)")


def pick_device(*, cpu: bool) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")


def finish(document: Any, out: Path | None) -> None:
    """The JSON as the last line, and as a file where one was asked for."""
    if out:
        write_json(out, document)
    print(json.dumps(document))


def plot(name: str, document: dict[str, Any], folder: Path | None) -> None:
    """`plots.NAME(document, folder)`, or a line that says why there are no plots."""
    if folder is None:
        return
    try:
        from harness import plots
    except ImportError as error:
        print(f"no plots: {error}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    print("plots:", *(folder / file for file in getattr(plots, name)(document, folder)))


def _calls_for(timer: Timer, call: Call, block_seconds: float) -> int:
    timer.block(call, 2)  # compiles, picks kernels, fills caches
    start = time.perf_counter()
    timer.block(call, 3)
    return max(1, round(3 * block_seconds / (time.perf_counter() - start)))


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(summary: Mapping[str, Any]) -> str:
    """`1.23 (1.20-1.27)`: median and range over rounds of the speed relative to the control."""
    speed = summary["speed"]
    return f"{speed['median']:.2f} ({speed['min']:.2f}-{speed['max']:.2f})"


def kernel_times(run: Callable[[], Any], device: torch.device, calls: int = 10) -> dict[str, float]:
    """Microseconds per call of each kernel (on a CPU: of each operator), by PyTorch's profiler.

    The calls follow each other, so part of the inputs may come from a cache.
    """
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    for _ in range(min(3, calls)):
        run()
    synchronize()
    with profile(activities=[activity]) as found:
        for _ in range(calls):
            run()
        synchronize()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {event.key: getattr(event, name) / calls for event in found.key_averages()}
    return dict(sorted(((k, v) for k, v in times.items() if v), key=lambda item: -item[1]))
