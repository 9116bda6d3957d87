"""Which norms may write autocast's dtype themselves: found by running the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..names import layer_pattern
from . import plain_copy, run_outputs
from .outputs import model_place

logger = logging.getLogger(__name__)

AUTOCAST_OUTPUTS = ("auto", "float32", "input")
_DTYPE = torch.bfloat16

Inputs = Sequence[Mapping[str, Any]]


def direct_sites(model: nn.Module, upcast: Mapping[str, bool], inputs: Inputs) -> set[str]:
    """The norm sites whose readers all round to autocast's dtype: where the norm may do it instead.

    A float32 copy of the model is run under autocast, its norms giving float32 as `nn.LayerNorm`
    does on a GPU, in eval mode and with dropout. A site passes if rounding its output changes no
    output of the model, bitwise. All are tried together, then layer pattern by layer pattern.

    Args:
        upcast: the sites to try; true where autocast hands the norm float32 off the CPU.
    Returns:
        Names; none where the model does not run under autocast, or not in float32.
    """
    if not upcast:
        return set()
    twin = plain_copy(model, torch.float32)
    device_type = model_place(twin)[1].type
    rounded: set[str] = set()
    called: set[str] = set()

    def before(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            called.add(name)
            return tuple(a.float() if _is_low(a) else a for a in args) if upcast[name] else args

        return hook

    def after(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            fits = name in rounded and isinstance(output, Tensor)
            return output.to(_DTYPE) if fits and output.dtype == torch.float32 else output

        return hook

    for name in upcast:
        module = twin.get_submodule(name)
        module.register_forward_pre_hook(before(name))
        module.register_forward_hook(after(name))

    def outputs(names: Collection[str], inputs: Inputs = inputs) -> list[Tensor]:
        rounded.clear()
        rounded.update(names)
        with torch.autocast(device_type, _DTYPE):
            return run_outputs(twin, inputs)

    sizes = [sum(x.numel() for x in k.values() if isinstance(x, Tensor)) for k in inputs]
    smallest = [inputs[sizes.index(min(sizes))]]

    passing: set[str] = set(upcast)
    try:
        # all of eval first: training moves the statistics of other layers
        for training in (False, True):
            twin.train(training)
            truth, first = outputs(()), outputs((), smallest)

            def holds(names: Collection[str], truth: Sequence[Tensor] = truth) -> bool:
                return _equal(outputs(names), truth)

            def may_hold(names: Collection[str], truth: Sequence[Tensor] = first) -> bool:
                return _equal(outputs(names, smallest), truth)

            passing = _unchanged(passing & called, may_hold, holds)
    except Exception as error:  # a model's own forward may raise anything
        logger.info("norms stay float32 under autocast, where the model raises %r", error)
        return set()
    return passing


def _unchanged(
    names: set[str],
    may_hold: Callable[[Collection[str]], bool],
    holds: Callable[[Collection[str]], bool],
) -> set[str]:
    """The largest part of `names`, in whole layer patterns, for which it `holds`; what cannot hold
    is found out on the smallest input."""
    if not names or (may_hold(names) and holds(names)):
        return names
    patterns: dict[str, set[str]] = {}
    for name in names:
        patterns.setdefault(layer_pattern(name), set()).add(name)
    if len(patterns) == 1:
        return set()
    good = set().union(*(group for group in patterns.values() if may_hold(group)))
    return good if good and holds(good) else set()


def _is_low(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Bitwise, dtypes too; a NaN equals a NaN."""
    return len(a) == len(b) and all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and bool(((x == y) | (x.isnan() & y.isnan())).all())
        for x, y in zip(a, b, strict=True)
    )
