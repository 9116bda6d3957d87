"""The Accelerator of a run, and whether the launcher started what it was asked for."""

from __future__ import annotations

import sys
from typing import Any

import psutil
from accelerate import Accelerator

from harness.args import TrainArguments
from harness.errors import ScriptError


def make_accelerator(args: TrainArguments, **options: Any) -> Accelerator:
    """An Accelerator with one policy for precision and compilation.

    Gradient accumulation is not its business: the loop normalises by tokens (see `training`).
    The scheduler is stepped by the loop once per optimizer step, whatever the number of processes.
    """
    try:
        accelerator = Accelerator(
            cpu=args.cpu,
            mixed_precision=args.mixed_precision,
            dynamo_backend="inductor" if args.torch_compile else None,
            step_scheduler_with_optimizer=False,
            **options,
        )
    except ValueError as error:  # a precision this device does not have
        raise ScriptError(f"accelerate refused these settings: {error}") from error
    asked = requested_processes()
    if asked is not None and asked > accelerator.num_processes:
        print(
            f"warning: accelerate launch was asked for {asked} processes, but "
            f"{accelerator.num_processes} runs. On CPU, `accelerate launch --cpu` starts one only: "
            f"use `accelerate launch --multi_gpu --num_processes {asked} SCRIPT --cpu ...` or "
            f"`torchrun --nproc-per-node {asked} SCRIPT --cpu ...`",
            file=sys.stderr,
        )
    return accelerator


def requested_processes() -> int | None:
    """`--num_processes` of the `accelerate launch` that started this process, if one did."""
    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent else []
    except psutil.Error:
        return None
    if not any(word.endswith("accelerate") or "accelerate.commands" in word for word in command):
        return None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes"):
            value = value or following
            return int(value) if value.isdigit() else None
    return None
