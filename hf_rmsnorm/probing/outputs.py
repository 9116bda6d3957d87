"""Run a model and compare what comes out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError

# Outputs that show the inside of a model: conversion centres the stream, so they move by design.
INTERNAL_OUTPUTS = (
    "hidden_states",
    "attentions",
    "past_key_values",
    "_model_output",
    "_outputs",
)

# Settings of a Transformers config that leave out shortcuts and extras.
_PLAIN: dict[str, Any] = {
    "_attn_implementation": "eager",
    "_experts_implementation": "eager",
    "use_cache": False,
    "output_hidden_states": False,
    "output_attentions": False,
}

Outputs = dict[str, Tensor]


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def named_outputs(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every float tensor in a model's output, however nested, with the path to it."""
    if is_float(output):
        yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from named_outputs(value, f"{name}.{key}" if name else str(key))
    elif isinstance(output, (list, tuple)):
        for i, value in enumerate(output):
            yield from named_outputs(value, f"{name}[{i}]")


def split_outputs(output: Any) -> tuple[Outputs, Outputs]:
    """`(held, internal)`: the outputs conversion must not move, and those that show the stream."""

    def internal(name: str) -> bool:
        return any(part.endswith(INTERNAL_OUTPUTS) for part in name.replace("[", ".").split("."))

    found = dict(named_outputs(output))
    held = {name: x for name, x in found.items() if not internal(name)}
    if not held:
        return found, {}
    return held, {name: x for name, x in found.items() if name not in held}


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers in every run: some models sample in eval, too."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


def cast_inputs(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The same inputs with every float tensor in `dtype`, everything on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {k: cast_inputs(v, dtype, device) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(cast_inputs(v, dtype, device) for v in value)
    return value


def model_place(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of a model's first float tensor."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    raise PatchError("The model has no floating-point parameter: there is nothing to convert.")


def run_outputs(model: nn.Module, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """The outputs conversion must not move, input after input; seeded, without gradients.

    Leaves out `hidden_states`, `attentions`, `past_key_values` and the outputs of sub-models,
    unless the model returns nothing else. Float inputs are cast to the model's dtype.
    """
    dtype, device = model_place(model)
    found: list[Tensor] = []
    for kwargs in inputs:
        with torch.no_grad(), seeded(device):
            held, _ = split_outputs(model(**cast_inputs(kwargs, dtype, device)))
        found += held.values()
    return found


def plain_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in eval mode and `dtype`, with plain attention and experts and without a cache: fused
    ones exist for some dtypes only. Where a model has no such settings it is copied as it is."""
    # Plain tensors are cast on their way, which saves a second copy of the model.
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point():
            value = tensor.detach().to(dtype, copy=True)
            memo[id(tensor)] = nn.Parameter(value) if type(tensor) is nn.Parameter else value
    twin = copy.deepcopy(model, memo).eval().to(dtype)
    for module in twin.modules():
        config = getattr(module, "config", None)
        for key, setting in _PLAIN.items():
            if getattr(config, key, None) is not None:
                setattr(config, key, setting)
    return twin


def rounding_gap(model: nn.Module, inputs: Sequence[Mapping[str, Any]]) -> float | None:
    """Relative distance of the model's own float32 outputs from its float64 ones: what no rewriting
    can be asked to beat. None where the model cannot run in float64."""
    single = run_outputs(plain_copy(model, torch.float32), inputs)
    try:
        double = run_outputs(plain_copy(model, torch.float64), inputs)
    except Exception:  # a model's own forward may raise anything
        return None
    gap = relative_change(double, single)
    return gap if math.isfinite(gap) else None


def relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    r"""$\max_k \max|a_k - b_k| / \max|b_k|$ over the finite entries; inf where these differ."""
    if len(before) != len(after):
        return math.inf
    worst = 0.0
    for b, a in zip(before, after, strict=True):
        if a.shape != b.shape:
            return math.inf
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return math.inf
        b, a = b[finite].double(), a[finite].double()
        if b.numel() and (delta := (a - b).abs().max().item()) > 0:
            worst = max(worst, delta / max(b.abs().max().item(), 1e-300))
    return worst
