"""Result files and what goes into them: quantiles, versions, device, where the code was."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:  # the benchmarks run where accelerate is not installed
    from accelerate import Accelerator

PACKAGES = (
    *("torch", "triton", "transformers", "accelerate", "datasets", "evaluate", "hf_rmsnorm"),
    *("liger_kernel", "quack-kernels", "flash-attn", "apex", "nvidia-cutlass-dsl"),
)


def write_json(path: Path, content: Any) -> None:
    """Writes beside, then renames: the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")
    beside.replace(path)


def _finite(content: Any) -> Any:
    """JSON has no NaN: what is not finite (a run that diverged) becomes null."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the closest ranks."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def step_times(seconds: Sequence[float], tokens_per_step: float) -> dict[str, float]:
    """Median, p10 and p90 of step times, and tokens/s at the median."""
    median = statistics.median(seconds)
    return {
        "steps": len(seconds),
        "step_s_p10": quantile(seconds, 0.1),
        "step_s_p50": median,
        "step_s_p90": quantile(seconds, 0.9),
        "tokens_per_s": tokens_per_step / median,
    }


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Median, smallest and largest; None if a value is missing, as after a divergence."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(values):
        return None
    return {"median": statistics.median(known), "min": min(known), "max": max(known)}


def environment(accelerator: Accelerator, argv: Sequence[str] | None) -> dict[str, Any]:
    """`machine`, and what the Accelerator was set up for."""
    return {
        **machine(accelerator.device, argv),
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
    }


def machine(device: torch.device, argv: Sequence[str] | None) -> dict[str, Any]:
    """When, where, with what and from which code."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)]),
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "git": _git_state(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {platform.machine()}, {os.cpu_count()} cores"
    return str(device)


def _git_state() -> dict[str, Any] | None:
    def git(*words: str) -> str:
        folder = Path(__file__).parent
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=20
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
