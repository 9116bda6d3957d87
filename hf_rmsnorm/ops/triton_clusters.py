"""Whether the programs of a wide row may form a thread-block cluster, and add up on the chip.

Asked for by HF_RMSNORM_CLUSTERS=1. Needs an NVIDIA GPU of compute capability 9 or 10, Triton 3.8,
and, tried once for each device, results that agree with PyTorch's. Without one of these the log
says so, and wide rows are read twice, as they are by default.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch
import triton

from . import reference
from .reference import Formula

logger = logging.getLogger(__name__)
# rows for each program in turn, and a row of the largest cluster in both directions
_TRIED = ((1000, 5000), (3, 40000))


@functools.cache
def clusters_work(device: torch.device) -> bool:
    if os.environ.get("HF_RMSNORM_CLUSTERS") != "1":
        return False
    problem = what_lacks(device) or what_fails(device)
    if problem:
        logger.warning("HF_RMSNORM_CLUSTERS=1 has no effect on %s: %s", device, problem)
    return problem is None


def what_lacks(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return "clusters are a feature of NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in (9, 10):
        return f"the compute capability is {'.'.join(map(str, capability))}, not 9 or 10"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
        return f"Triton is {triton.__version__}; clusters need 3.8"
    return None


def what_fails(device: torch.device) -> str | None:
    """Compiles, runs and compares a few rows."""
    from . import triton_backend

    generator = torch.Generator(device).manual_seed(0)
    for rows, hidden in _TRIED:
        formula = Formula(hidden, 1e-5, 0.0, False)
        x, dy = torch.randn(2, rows, hidden, device=device, generator=generator)
        weight = torch.randn(hidden, device=device, generator=generator)
        y, _, rstd = reference.forward(x, None, weight, None, formula, save_rstd=True)
        wanted: dict[str, Any] = {"weight_grad": True, "bias_grad": torch.float32}
        expected = y, *reference.backward(dy, None, x, weight, rstd, formula, **wanted)
        try:
            y, _, rstd = triton_backend.forward(
                x, None, weight, None, formula, save_rstd=True, clusters=True
            )
            assert rstd is not None
            found = triton_backend.backward(
                dy, None, x, weight, rstd, formula, **wanted, clusters=True
            )
        except (RuntimeError, triton.TritonError) as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        for name, a, b in zip(("y", "dx", "dw", "db"), (y, *found), expected, strict=True):
            assert a is not None and b is not None
            off = (a - b).abs().max().item()
            if not off <= 1e-4 * b.abs().max().item():
                return f"{name} of {rows} rows of {hidden} is off by {off:.1e}"
    return None
