"""Run a model and compare what comes out."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import PatchError
from .copies import plain_copy

# Outputs that show the inside of a model: conversion centres the stream, so they move by design.
INTERNAL_OUTPUTS = (
    "hidden_states",
    "attentions",
    "past_key_values",
    "_model_output",
    "_outputs",
)

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


def is_named(name: str, pattern: str) -> bool:
    """Whether `pattern` means the output `name`: as a glob, or as what the output is a part of."""
    return fnmatchcase(name, pattern) or name.startswith((f"{pattern}.", f"{pattern}["))


def split_outputs(output: Any, hold: Sequence[str] = ()) -> tuple[Outputs, Outputs]:
    """`(held, internal)`: the outputs conversion must not move, and those that show the stream.

    Args:
        hold: further outputs to hold, as patterns for `is_named`.
    """

    def internal(name: str) -> bool:
        parts = name.replace("[", ".").split(".")
        shows = any(part.endswith(INTERNAL_OUTPUTS) for part in parts)
        return shows and not any(is_named(name, pattern) for pattern in hold)

    found = dict(named_outputs(output))
    held = {name: x for name, x in found.items() if not internal(name)}
    if not held:
        return found, {}
    return held, {name: x for name, x in found.items() if name not in held}


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers in every run: some models sample in eval, too, and some by NumPy."""
    devices = [device] if device.type == "cuda" else []
    numpy: Any = getattr(sys.modules.get("numpy"), "random", None)
    states = random.getstate(), numpy and numpy.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            torch.manual_seed(0)
            random.seed(0)
            if numpy:
                numpy.seed(0)
            yield
        finally:
            random.setstate(states[0])
            if numpy:
                numpy.set_state(states[1])


class Training(dict[str, Any]):
    """Keyword arguments to call a model with in training mode, but without dropout: for branches
    that no other mode takes, such as the masking of a spectrogram."""


_DROPOUTS = frozenset(
    (
        torch.dropout,
        torch.alpha_dropout,
        torch.feature_dropout,
        F.dropout,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
    )
)


class _NoDropout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args, kwargs = args[:4], {"attn_mask": None, **kwargs, "dropout_p": 0.0}
            if len(args) == 4:
                del kwargs["attn_mask"]
        return func(*args, **kwargs)


@contextmanager
def in_mode(model: nn.Module, training: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Each module in the mode that `training` says, for a while."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = training(module)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _trains(module: nn.Module) -> bool:
    """Not a layer that would gather statistics."""
    return getattr(module, "running_mean", None) is None


def call(model: nn.Module, kwargs: Mapping[str, Any]) -> Any:
    """`model(**kwargs)`, in the mode that the kind of `kwargs` asks for."""
    if not isinstance(kwargs, Training):
        return model(**kwargs)
    with in_mode(model, _trains), _NoDropout():
        return model(**kwargs)


def are_sound(outputs: Iterable[Tensor]) -> bool:
    """Whether there is something finite in each, and no nan."""
    return all(x.isfinite().any() and not x.isnan().any() for x in outputs)


def cast_inputs(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The same inputs with every float tensor in `dtype`, everything on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        kind = Training if isinstance(value, Training) else dict
        return kind({k: cast_inputs(v, dtype, device) for k, v in value.items()})
    if type(value) in (list, tuple):
        return type(value)(cast_inputs(v, dtype, device) for v in value)
    return value


def model_place(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of a model's first float tensor."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    raise PatchError("The model has no floating-point parameter: there is nothing to convert.")


def run_outputs(
    model: nn.Module, inputs: Sequence[Mapping[str, Any]], hold: Sequence[str] = ()
) -> list[Tensor]:
    """The outputs conversion must not move, input after input; seeded, without gradients.

    Leaves out `hidden_states`, `attentions`, `past_key_values` and the outputs of sub-models,
    unless `hold` names them or the model returns nothing else. Float inputs are cast to the
    model's dtype.
    """
    dtype, device = model_place(model)
    found: list[Tensor] = []
    for kwargs in inputs:
        with torch.no_grad(), seeded(device):
            held, _ = split_outputs(call(model, cast_inputs(kwargs, dtype, device)), hold)
        found += held.values()
    return found


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
