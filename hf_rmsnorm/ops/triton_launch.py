"""Starting a Triton kernel: the one door from the backend to Triton's launcher."""

from __future__ import annotations

import functools
from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Every kernel of this backend starts here."""
    device = next(t.device for t in args if t is not None)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 1
