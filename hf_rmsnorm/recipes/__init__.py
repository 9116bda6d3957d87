"""Which modules of a model are norms, and what each computes.

There is no table of classes: what looks like a norm is run, and `check` finds the formula that its
output fits. Only a class that this gets wrong needs a line, in `NOT_NORMS` or `REFUSED`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Hashable
from dataclasses import fields
from fnmatch import fnmatchcase

import torch
from torch import nn

from .check import Forward, NormSpec, Unreadable, check, eps_attributes, shape_of

__all__ = ["NormSpec", "Unreadable", "find_norms", "read_norm"]

# Class-name patterns of modules that have "norm" in their name and are no LayerNorm or RMSNorm.
NOT_NORMS = (
    "*BatchNorm*",
    "*GroupNorm*",
    "*InstanceNorm*",
    "*LocalResponseNorm",
    "*SpectralNorm",
    "*WeightNorm",
    "NoNorm",
)

# Class-name patterns of norms whose formula fits but which must stay, and why.
REFUSED = {
    "*TTSFlowLayerNorm": "its model differentiates it in forward mode (jvp)",
    "*TTSTimestepNorm": "its model differentiates it in forward mode (jvp)",
}

Reading = NormSpec | Unreadable | None

_NORM_NAME = re.compile(r"norm(?!al|ed|er)", re.IGNORECASE)
_SIMPLE = (str, int, float, bool, type(None), tuple, list, torch.dtype)
_MODULE_STATE = frozenset(vars(nn.Module())) - {"training"}
_FORWARD_STATE = frozenset(("forward", "_old_forward", "_hf_hook"))
_readings: dict[Hashable, NormSpec | Unreadable] = {}


def find_norms(model: nn.Module) -> dict[str, NormSpec | Unreadable]:
    """Every norm of `model`, by module path; a module shared by several paths is listed once."""
    readings = ((name, read_norm(module)) for name, module in model.named_modules())
    return {name: reading for name, reading in readings if reading is not None}


def read_norm(module: nn.Module) -> Reading:
    """What `module` computes, checked by running its own forward on test inputs.

    The module is not touched: a copy with random parameters runs on the CPU, so modules on the
    meta device and offloaded ones are read too. Equal modules are checked once.

    Returns:
        A `NormSpec`, an `Unreadable` for a norm that computes something else, or None for a module
        that is no LayerNorm or RMSNorm at all, and for one that only contains such modules.

    Example:
        >>> read_norm(nn.LayerNorm(8)).kind
        'layernorm'
    """
    name = type(module).__name__
    if any(fnmatchcase(name, pattern) for pattern in NOT_NORMS):
        return None
    children = dict(module.named_children())
    if children:
        if not name.lower().endswith("norm") or any(map(_contains_norm, children.values())):
            return None
        return Unreadable(f"it contains other modules ({', '.join(children)})")
    is_named = bool(_NORM_NAME.search(name)) or isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    if not is_named and not eps_attributes(module):
        return None
    key = _key(module)
    reading = None if key is None else _readings.get(key)
    if reading is None:
        reading = _read(module)
        if key is not None:
            _readings[key] = reading
    return reading if is_named or isinstance(reading, NormSpec) else None


def _contains_norm(module: nn.Module) -> bool:
    return any(read_norm(child) is not None for child in module.modules())


def _key(module: nn.Module) -> Hashable | None:
    """What a reading depends on; None if the module holds something that cannot be compared."""
    state = {k: v for k, v in vars(module).items() if k not in _MODULE_STATE | _FORWARD_STATE}
    if not all(isinstance(value, _SIMPLE) for value in state.values()):
        return None
    parameters = [
        (name, p if p is None else (shape_of(p), p.device))
        for name, p in module._parameters.items()
    ]
    return type(module), _forward(module), repr((parameters, list(module._buffers), state))


def _forward(module: nn.Module) -> Forward | None:
    """The function that runs when `module` is called, unbound; None if it cannot be told.

    Other libraries put a bound forward on the instance: Liger and `kernels` their own, accelerate
    its hook's, with the one that it wraps beside it.
    """
    state = vars(module)
    bound = state.get("_old_forward" if "_hf_hook" in state else "forward")
    if bound is None:
        return type(module).forward
    return bound.__func__ if getattr(bound, "__self__", None) is module else None


def _read(module: nn.Module) -> NormSpec | Unreadable:
    """`read_norm` of a module without children, uncached."""
    if getattr(module, "is_hf_rmsnorm", False):  # ours: says itself what it computes
        names = [field.name for field in fields(NormSpec) if hasattr(module, field.name)]
        return NormSpec("rmsnorm", **{name: getattr(module, name) for name in names})
    for pattern, reason in REFUSED.items():
        if fnmatchcase(type(module).__name__, pattern):
            return Unreadable(reason)
    forward = _forward(module)
    if forward is None:
        return Unreadable("its forward was replaced by something that cannot be checked")
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    extra = [name for name in parameters if name not in ("weight", "bias")]
    extra += [f"the buffer {name}" for name, b in module._buffers.items() if b is not None]
    if extra:
        return Unreadable(f"it holds {', '.join(extra)}; RMSNorm has only a weight and a bias")
    arguments = list(inspect.signature(forward).parameters)[2:]
    if arguments:
        return Unreadable(f"its forward takes more than its input ({', '.join(arguments)})")
    shapes = {shape_of(p) for p in parameters.values()}
    if len(shapes) > 1 or any(len(shape) == 0 or 0 in shape for shape in shapes):
        return Unreadable(f"its parameters have the shapes {sorted(shapes)}")
    return check(module, forward)
