"""What `kernels` binds onto the norms of a model: stateless layers; only their `forward` is used.

The modules that adopt a layer keep their parameters, and each class of them its own formula: where
the epsilon is kept, whether the weight is stored as `w` or `w - 1`, the order of casting. It is
read once per class by running that class's own `forward` (`recipes.check`). A class whose formula
cannot be read keeps its own `forward`, and a warning says so.

The rules that layers follow (no constructor, no members but `forward` and the two flags) are in
the documentation of `kernels`, under "kernel requirements".
"""

from __future__ import annotations

import logging
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import functional
from .recipes.check import NormSpec, check

logger = logging.getLogger(__name__)

_HIDDEN = 24
# One value for each name that an epsilon may have, none of them usual: the fit tells the name.
_EPS = {"variance_epsilon": 3.3e-6, "eps": 7.7e-6, "epsilon": 2.3e-5, "norm_eps": 5.7e-5}


class RMSNorm(nn.Module):
    """For norms of `weight` and an epsilon: the layer name `"RMSNorm"`, which Transformers uses."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _normalise(self, hidden_states, ("weight",))


class RMSNormBias(nn.Module):
    """For norms that also have a `bias`: the layer name `"RMSNormBias"`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _normalise(self, hidden_states, ("weight", "bias"))


class PartialRMSNorm(nn.Module):
    """For norms of `weight`, `bias` (which may be None) and `p`, the share of the features that
    the mean of squares is taken over: the layer name `"PartialRMSNorm"`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _normalise(self, hidden_states, ("weight", "bias", "p"))


class _Formula(NamedTuple):
    """What the `forward` of a class computes: `functional.rms_norm` with these arguments."""

    eps: float | str | None  # a constant, or the attribute that holds it
    weight_offset: float
    casting: Literal["gemma", "llama"]


_formulas: dict[tuple[type, tuple[str, ...]], _Formula | None] = {}


def _normalise(module: Any, x: Tensor, reads: tuple[str, ...]) -> Tensor:
    formula = _formula(type(module), reads)
    if formula is None:
        return type(module).forward(module, x)
    eps, weight_offset, casting = formula
    return functional.rms_norm(
        x,
        module.weight,
        module.bias if "bias" in reads else None,
        eps=getattr(module, eps) if isinstance(eps, str) else eps,
        p=module.p if "p" in reads else 1.0,
        weight_offset=weight_offset,
        casting=casting,
    )


def _formula(cls: type[nn.Module], reads: tuple[str, ...]) -> _Formula | None:
    """The formula of `cls`, read at its first call; None where its own `forward` has to run."""
    key = cls, reads
    if key not in _formulas:
        if (
            torch._C._len_torch_dispatch_stack()
            or torch._C._are_functorch_transforms_active()
            or torch.jit.is_tracing()
        ):
            return None  # tensors made here would be traced or wrapped: read at the next call
        found = _read(cls, reads)
        if isinstance(found, str):
            logger.warning("%s keeps its own forward: %s", cls.__name__, found)
        _formulas[key] = None if isinstance(found, str) else found
    return _formulas[key]


# What torch.compiler.assume_constant_result does, which would import the compiler right away.
_formula._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _read(cls: type[nn.Module], reads: tuple[str, ...]) -> _Formula | str:
    """The formula of `cls`, if `reads` and an epsilon are all it depends on; else why not."""
    if data := _data_attributes(cls, {*reads, *_EPS}):
        return f"what it computes may depend on {', '.join(data)}"
    module = _stand_in(cls, reads)
    spec = check(module, cls.forward)
    if not isinstance(spec, NormSpec):
        return spec.reason
    plain = NormSpec("rmsnorm", (_HIDDEN,), spec.eps, spec.weight_offset, spec.casting)
    if spec != plain:
        return f"it computes {spec}"
    names = (name for name in _EPS if getattr(module, name) == spec.eps)
    formula = _Formula(next(names, spec.eps), spec.weight_offset, spec.casting)
    if "p" in reads and not _takes_its_share(module, formula, spec.eps):
        return "its statistic is not the mean over the first ceil(hidden * p) features"
    return formula


def _stand_in(cls: type[nn.Module], reads: tuple[str, ...]) -> Any:
    """An instance of `cls`, made without its constructor."""
    module: Any = object.__new__(cls)
    nn.Module.__init__(module)
    for name in reads:
        if name == "p":
            vars(module)["p"] = 1.0
        else:
            module._parameters[name] = nn.Parameter(_values(0.5, 1.5, _HIDDEN))
    vars(module).update(_EPS)
    return module


def _values(low: float, high: float, count: int) -> Tensor:
    """Whatever the caller's default dtype and device are."""
    return torch.linspace(low, high, count, dtype=torch.float32, device="cpu")


def _data_attributes(cls: type[nn.Module], known: set[str]) -> list[str]:
    """Plain values on the class, which an instance may override: a stand-in would not show it."""
    return [
        f"{base.__name__}.{name}"
        for base in cls.__mro__
        if not issubclass(nn.Module, base)
        for name, value in vars(base).items()
        if isinstance(value, (bool, int, float, str, torch.Tensor, torch.dtype))
        and name not in known
        and not name.startswith(("__", "kernel_"))
    ]


@torch.no_grad()
def _takes_its_share(module: Any, formula: _Formula, eps: float | None) -> bool:
    module.p = 0.3
    x = _values(-2.0, 3.0, 4 * _HIDDEN).view(4, _HIDDEN)
    y = functional.rms_norm(
        x,
        module.weight,
        module.bias,
        eps=eps,
        p=module.p,
        weight_offset=formula.weight_offset,
        casting=formula.casting,
    )
    return torch.allclose(type(module).forward(module, x), y, rtol=1e-5, atol=1e-6)
