"""What the probe inputs reached: a claim about a model holds for the paths that were run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .workbench import Bench

Family = tuple[str, torch.Size]


class _Touches(TorchFunctionMode):
    """Notes which tensors the operations read, where something comes of it: an expert that is
    called with no tokens is not reached."""

    def __init__(self, names: Mapping[int, str], seen: set[str]):
        super().__init__()
        self.names, self.seen = names, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = list(_tensors((args, kwargs)))
        found = {self.names[id(x)] for x in read if id(x) in self.names} - self.seen
        if found and all(x.numel() for x in read) and any(True for _ in _tensors(result)):
            self.seen |= found
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


@contextmanager
def touching(leaves: Mapping[str, Tensor], seen: set[str]) -> Iterator[None]:
    """Adds to `seen` the names of the leaves that operations read."""
    with _Touches({id(leaf): name for name, leaf in leaves.items()}, seen):
        yield


def families(bench: Bench) -> dict[str, Family]:
    """Leaf -> what it shares with its siblings: a shape, and a name but for the numbers of layers
    and experts and the keys of a `ModuleDict`."""
    keys: dict[str, set[str]] = {
        name: set(module.keys())
        for name, module in bench.model.named_modules()
        if isinstance(module, nn.ModuleDict)
    }

    def stem(name: str) -> str:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part in keys.get(".".join(name.split(".")[:i]), ()):
                parts[i] = "#"
        return re.sub(r"\d+", "#", ".".join(parts))

    return {name: (stem(name), leaf.shape) for name, leaf in bench.leaves().items()}


def beyond(bench: Bench, unreached: Iterable[str]) -> set[str]:
    """Those of the leaves `unreached` that might write to a stream, with no sibling within reach
    to show what they do."""
    unreached = set(unreached)
    if not unreached:
        return unreached
    family = families(bench)
    known = {family[name] for name in family if name not in unreached}
    return {n for n in unreached if family[n] not in known and writable_widths(bench, n)}


def writable_widths(bench: Bench, name: str) -> set[int]:
    """The norms' widths that the leaf could write to. A layer is run by itself: what it gives has
    a width. Of a parameter by itself, any axis may be that of the features."""
    leaves, sizes = bench.leaves(), set(bench.sizes)
    owner = bench.model.get_submodule(name.rpartition(".")[0])
    weight = getattr(owner, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim > 1 and not any(owner.children()):
        width = _output_width(owner, weight)
        if width is not None:
            return {width} & sizes
    return set(leaves[name].shape) & sizes


@torch.no_grad()
def _output_width(module: nn.Module, weight: Tensor) -> int | None:
    inputs = [torch.zeros(2, n, dtype=weight.dtype, device=weight.device) for n in weight.shape]
    inputs.append(torch.zeros(2, dtype=torch.long, device=weight.device))  # of an embedding
    for x in inputs:
        with suppress(Exception):  # not what this layer takes
            y = module(x)
            if isinstance(y, Tensor) and y.ndim == x.ndim + (not x.is_floating_point()):
                return y.shape[-1]
    return None


def unproven(bench: Bench, beyond_reach: Iterable[str]) -> dict[str, str]:
    """Norm -> one of the leaves beyond reach that may write to what it reads."""
    by_width: dict[int, str] = {}
    for name in sorted(beyond_reach):
        for width in writable_widths(bench, name):
            by_width.setdefault(width, name)
    found: dict[str, str] = {}
    for norm, widths in bench.widths.items():
        for width in sorted(widths & by_width.keys()):
            found.setdefault(norm, by_width[width])
    return found
