"""Speed of several arms beside the control, measured interleaved in one process.

All arms are in memory at once. A round gives every arm a block of steps, in an order that rotates;
a machine that slows down for a while slows down all of them. Every step is synchronised, the first
step of each block (cold caches) and a warm-up before the first round are not counted. An arm's
ratio to the control is taken within each round; its spread over rounds says how far to trust it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from harness.args import TrainArguments
from harness.arms import CONTROL, Arm
from harness.data import Data
from harness.results import spread, step_times
from harness.training import Run

WARMUP_BLOCKS = 1
MODES = ("training", "inference")


@dataclass
class Contestant:
    """One arm: its model on the device, and the times of its blocks."""

    run: Run
    resident_bytes: int = 0
    peak_bytes: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, list[list[float]]] = field(default_factory=lambda: {m: [] for m in MODES})

    def step(self, mode: str, group: list[dict[str, Tensor]]) -> None:
        if mode == "training":
            self.run.model.train()
            self.run.step(group)
        else:
            self.run.model.eval()
            with torch.no_grad():
                for batch in group:
                    self.run.model(input_ids=batch["input_ids"], use_cache=False)


def measure(
    accelerator: Accelerator,
    arms: Sequence[Arm],
    build: Callable[[Arm], nn.Module],
    data: Data,
    args: TrainArguments,
    *,
    rounds: int,
    steps: int,
) -> dict[str, Any]:
    """Tokens/s, step times, ratio to the control and peak memory, by arm and mode.

    Args:
        build: the arm's model, patched and not prepared.
        rounds: how many blocks every arm gets, for training and for inference.
        steps: timed steps per block.
    """
    on_gpu = accelerator.device.type == "cuda"
    contestants: dict[str, Contestant] = {}
    for arm in arms:
        before = torch.cuda.memory_allocated() if on_gpu else 0
        contestant = Contestant(Run(accelerator, build(arm), data, args, seed=0))
        group = _some_batches(contestant.run)
        for mode in MODES:  # allocates optimizer states, compiles, picks kernels
            for _ in range(WARMUP_BLOCKS * (steps + 1)):
                contestant.step(mode, group)
        contestant.resident_bytes = torch.cuda.memory_allocated() - before if on_gpu else 0
        contestants[str(arm)] = contestant

    names = list(contestants)
    total = len(MODES) * rounds * len(names)
    with tqdm(total=total, desc="throughput", disable=not accelerator.is_local_main_process) as bar:
        for mode in MODES:
            for turn in range(rounds):
                shift = turn % len(names)
                for name in names[shift:] + names[:shift]:
                    _time_block(contestants[name], mode, group, steps, on_gpu)
                    bar.update()

    tokens = sum(batch["labels"].numel() for batch in group) * accelerator.num_processes
    control = contestants[CONTROL]
    return {
        name: {mode: _summary(contestant, control, mode, tokens, on_gpu) for mode in MODES}
        for name, contestant in contestants.items()
    }


def _some_batches(run: Run) -> list[dict[str, Tensor]]:
    """The batches of one optimizer step, on the device; the same for every arm."""
    run.order.seek(0)
    count = run.args.gradient_accumulation_steps
    batches = iter(run.train_loader)
    group = [batch for batch, _ in zip(batches, range(count), strict=False)]
    batches.close()
    return group


def _time_block(
    contestant: Contestant, mode: str, group: list[dict[str, Tensor]], steps: int, on_gpu: bool
) -> None:
    start_bytes = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        start_bytes = torch.cuda.memory_allocated()
    contestant.step(mode, group)
    seconds = []
    for _ in range(steps):
        _synchronize(on_gpu)
        start = time.perf_counter()
        contestant.step(mode, group)
        _synchronize(on_gpu)
        seconds.append(time.perf_counter() - start)
    contestant.blocks[mode].append(seconds)
    if on_gpu:
        used = contestant.resident_bytes + torch.cuda.max_memory_allocated() - start_bytes
        contestant.peak_bytes[mode] = max(used, contestant.peak_bytes.get(mode, 0))


def _synchronize(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _summary(
    contestant: Contestant, control: Contestant, mode: str, tokens: int, on_gpu: bool
) -> dict[str, Any]:
    blocks = contestant.blocks[mode]
    ratios = [
        statistics.median(theirs) / statistics.median(ours)
        for ours, theirs in zip(blocks, control.blocks[mode], strict=True)
    ]
    return {
        **step_times([second for block in blocks for second in block], tokens),
        "speed_ratio": spread(ratios),
        "peak_memory_bytes": contestant.peak_bytes[mode] if on_gpu else None,
    }
