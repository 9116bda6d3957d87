"""Who reads a norm's output, found by running the model and settled by finite shifts."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .confirm import settle
from .facts import Absorb, shift_term
from .outputs import is_float, relative_change
from .symmetry import spread
from .workbench import Bench, norm_axis


@dataclass
class Reads:
    """What one run on every input saw.

    Attributes:
        sources: module with a weight -> the norms whose output it read, `""` for anything else.
        inputs: module with a weight -> one of its inputs.
        calls: modules with a weight, in the order of their calls.
    """

    sources: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    inputs: dict[str, Tensor] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)


@torch.no_grad()
def find_reads(bench: Bench) -> Reads:
    """Run the model; a module reads a norm's output if it is given that memory, viewed or not."""
    found = Reads()
    made: dict[int, str] = {}  # address of a norm's output -> norm
    alive: list[Tensor] = []  # so that no address is used twice

    def written(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            alive.append(output)
            made[output.untyped_storage().data_ptr()] = name

    def read(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for x in (*args, *kwargs.values()):
            if is_float(x):
                found.sources[name].add(made.get(x.untyped_storage().data_ptr(), ""))
                found.inputs.setdefault(name, x)
        found.calls.append(name)

    handles = []
    for name, module in bench.model.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter) and not any(module.children()):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, name=name: read(name, args, kwargs), with_kwargs=True
                )
            )
        if name in bench.norms:
            handles.append(
                module.register_forward_hook(
                    lambda _, args, output, name=name: written(name, output)
                )
            )
    try:
        bench.run()
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def output_axis(module: nn.Module, x: Tensor, tolerance: float) -> int | None:
    """The weight's axis of outputs, if the module's bias can make up for a constant added to all
    of `x`; tried on the module itself, so that a kind of layer needs no rule."""
    weight, bias = module.weight, getattr(module, "bias", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(bias, nn.Parameter):
        return None
    before, saved = module(x), bias.data
    for axis in range(weight.ndim):
        others = [i for i in range(weight.ndim) if i != axis]
        if others and weight.shape[axis] == bias.numel():
            try:
                bias.data = saved - weight.sum(others)
                after = module(x + 1.0)
            finally:
                bias.data = saved
            if relative_change([before], [after]) < tolerance:
                return axis
    return None


def find_absorbs(bench: Bench, reads: Reads) -> list[Absorb]:
    """The norms whose bias can be shifted at no cost to the outputs, with their readers.

    All of what reads the norm with a weight must have a bias to give the shift to, of its own, and
    read nothing else. What reads it without a weight, finite shifts of the bias tell: all sizes of
    them, on every input.
    """
    leaves, rounding = bench.leaves(), bench.tolerance.rounding
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in bench.model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    tied = set(itertools.chain.from_iterable(n for n in names.values() if len(n) > 1))

    def reader(name: str, norm: str) -> tuple[str, int, str] | None:
        weight, bias = f"{name}.weight", f"{name}.bias"
        if reads.sources[name] != {norm} or not {weight, bias} <= leaves.keys() - tied:
            return None
        axis = output_axis(bench.model.get_submodule(name), reads.inputs[name], rounding)
        return None if axis is None else (weight, axis, bias)

    candidates = []
    for norm in bench.norms:
        found = [
            reader(name, norm)
            for name, sources in reads.sources.items()
            if norm in sources and name not in bench.norms
        ]
        if found and all(found) and f"{norm}.bias" in leaves.keys() - tied:
            candidates.append(Absorb(f"{norm}.bias", tuple(r for r in found if r)))

    def holds(group: Sequence[Absorb]) -> bool:
        for (scale, which), sign in itertools.product(bench.tolerance.shifts, (1, -1)):
            with bench.replaced(shifted(bench, random_shifts(bench, group, sign * scale))):
                if not bench.change(which) <= rounding:
                    return False
        return True

    return settle(candidates, holds)


def random_shifts(bench: Bench, group: Sequence[Absorb], scale: float) -> dict[Absorb, float]:
    """A shift for each, no two alike, `scale` times the spread of its bias."""
    leaves = bench.leaves()
    generator = torch.Generator().manual_seed(7)
    sizes = (
        torch.rand(len(group), generator=generator, device="cpu", dtype=torch.float64) + 0.5
    ).tolist()
    return {
        absorb: scale * size * spread(leaves[absorb.bias])
        for absorb, size in zip(group, sizes, strict=True)
    }


def shifted(bench: Bench, shifts: Mapping[Absorb, Tensor | float]) -> dict[str, Tensor]:
    """The bench's leaves with these biases shifted, and their readers making up for it."""
    leaves = bench.leaves()

    def value(absorb: Absorb, name: str, shift: Tensor | float) -> Tensor:
        leaf = leaves[name].detach()
        return (leaf + shift_term(absorb, name, leaves.__getitem__, shift)).to(leaf.dtype)

    return {
        name: value(absorb, name, shift)
        for absorb, shift in shifts.items()
        for name in absorb.names
    }


def find_served(bench: Bench, absorbs: Sequence[Absorb]) -> dict[str, Absorb]:
    """Norm -> the one of `absorbs` that its input is a sum with: what shifts its mean by just as
    much, in every row."""
    shifts = random_shifts(bench, absorbs, 3.0)
    before = _row_means(bench)
    with bench.replaced(shifted(bench, shifts)):
        after = _row_means(bench)
    served = {}
    for norm, means in before.items():
        for absorb, shift in shifts.items():
            error = (after[norm] - means - shift).abs().max().item()
            if error <= bench.tolerance.moved * abs(shift):
                served[norm] = absorb
    return served


@torch.no_grad()
def _row_means(bench: Bench) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = defaultdict(list)

    def watch(name: str, x: Tensor) -> None:
        rows[name].append(x.mean(norm_axis(bench.norms[name], x)).flatten())

    with bench.watching(watch):
        bench.run()
    return {name: torch.cat(means) for name, means in rows.items()}
