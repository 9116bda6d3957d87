r"""What can be done for norms that read the output of another norm, as all in BERT do.

Such a norm reads $y + f(y)$ with $y = g \odot n + b$. The writers in $f$ are centred already; left
is $\bar y = \overline{g \odot n} + \bar b$. $\bar b$ can be taken away (`Absorb`); where $f$ is a
feed-forward block, one more hidden unit takes away all of $\bar y$ (`Widen`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..recipes import NormSpec
from .confirm import folded, settle
from .facts import OFFSET, RANGE, Absorb, ProbeResult, Widen, extended, with_unit
from .readers import Reads, find_absorbs, find_reads, find_served, output_axis, shifted
from .scales import absorbed
from .set_up import make_bench
from .streams import centered
from .workbench import Bench

WORTH = 0.99  # of the leftover before: an absorbed mean must bring it below this
UNITS = 17  # tried activations, from one end of the extra unit's range to the other

NOT_A_BLOCK = "no extra neuron: no plain feed-forward block before it"
NOT_LINEAR = "no extra neuron: the block before it does not pass on values from 8 to 24 as they are"
NOT_ZERO = "no extra neuron: tried, and its mean did not become zero"


def improve(
    model: nn.Module,
    norms: Mapping[str, NormSpec],
    inputs: Sequence[Mapping[str, Any]],
    result: ProbeResult,
    *,
    absorb: bool,
    widen: bool,
    hold: Sequence[str] = (),
) -> ProbeResult:
    """`result` with what can be done for the norms it keeps. Works on a private copy.

    Args:
        model, norms, inputs, hold: as for `probe`, which gave `result`.
        absorb: take the mean of a bias away where that lowers the mean before a norm that is not
            exact, and moves no output.
        widen: one more unit per feed-forward block, where that makes the norm after it exact.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it would not call the norms' forward
        called = {n: norms[n] for n in norms if n in result.leftover}
        bench = make_bench(model, called, list(inputs), hold=hold)
        bench.rewrite(lambda leaves: absorbed(leaves, result.layerscales))
        bench.rewrite(lambda leaves: folded(leaves, result.folds))
        with centered(bench, result.centers):
            reads = find_reads(bench)
            links = find_absorbs(bench, reads)
            served = find_served(bench, links)
            if widen:
                result = _widened(bench, reads, served, result)
            return _absorbed(bench, served, result) if absorb else result
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _absorbed(bench: Bench, served: Mapping[str, Absorb], result: ProbeResult) -> ProbeResult:
    """Each bias whose mean is worth taking away, and the means that are left."""
    pending = {name: served[name] for name in result.kept if name in served}
    before = result.leftover
    with bench.as_given():
        leaves = bench.leaves()
        shifts: dict[Absorb, Tensor | float] = {a: -leaves[a.bias].mean() for a in pending.values()}
        with bench.replaced(shifted(bench, shifts)):
            after = bench.means()
    floor = bench.tolerance.mean
    worse = {a for n, a in pending.items() if not floor < before[n] > after[n] / WORTH}
    chosen = tuple(dict.fromkeys(a for a in pending.values() if a not in worse))
    lower = {name: after[name] for name, a in pending.items() if a in chosen}
    return replace(result, absorbs=chosen, leftover={**result.leftover, **lower})


def _widened(
    bench: Bench, reads: Reads, served: Mapping[str, Absorb], result: ProbeResult
) -> ProbeResult:
    """The blocks that get one more unit, and why the other norms have none."""
    found = {n: _block(bench, reads, n, served[n]) for n in result.kept if n in served}
    blocks = {name: block for name, block in found.items() if block is not None}
    linear = settle(list(blocks), lambda group: _is_linear(bench, [blocks[n] for n in group]))

    def holds(group: Sequence[str]) -> bool:
        def run() -> bool:
            with bench.measuring() as means:
                moved = bench.change()
            zero = all(means[name] < bench.tolerance.mean for name in group)
            return zero and moved <= bench.tolerance.rounding

        leaves, units = bench.leaves(), [blocks[name] for name in group]

        def value(block: Widen, name: str) -> Tensor:
            axis, leaf = block.grown.get(name), leaves[name]
            wide = leaf.detach() if axis is None else extended(leaf, axis)
            return with_unit(block, name, wide.double(), leaves.__getitem__).to(leaf.dtype)

        return _try(bench, units, {n: value(b, n) for b in units for n in b.names}, 1, run)

    chosen = settle(linear, holds)
    why = {
        name: NOT_A_BLOCK if name not in blocks else NOT_LINEAR if name not in linear else NOT_ZERO
        for name in result.kept
        if name in result.leftover and name not in chosen
    }
    exact = "one more unit of the feed-forward block before it subtracts the mean"
    return replace(
        result,
        exact={**result.exact, **dict.fromkeys(chosen, exact)},
        kept={
            n: f"{r}; {why[n]}" if n in why else r
            for n, r in result.kept.items()
            if n not in chosen
        },
        leftover={**result.leftover, **dict.fromkeys(chosen, 0.0)},
        widens=tuple(blocks[name] for name in chosen),
    )


def _block(bench: Bench, reads: Reads, site: str, link: Absorb) -> Widen | None:
    """The two weights between the norm of `link` and the norm `site`, if there are just two."""
    norm = link.bias.removesuffix(".bias")
    if len(link.readers) != 1 or f"{norm}.weight" not in bench.leaves():
        return None
    weight, axis, _ = link.readers[0]
    up, hidden = weight.removesuffix(".weight"), bench.leaves()[weight].shape[axis]
    later = itertools.islice(reads.calls, reads.calls.index(up) + 1, None)
    between = list(dict.fromkeys(itertools.takewhile(lambda name: name != site, later)))
    if len(between) != 1:
        return None
    down = between[0]
    module = bench.model.get_submodule(down)
    out = output_axis(module, reads.inputs[down], bench.tolerance.rounding)
    if out is None or bench.leaves()[f"{down}.weight"].shape[1 - out] != hidden:
        return None
    return Widen(norm, up, axis, down, 1 - out)


def _is_linear(bench: Bench, blocks: Sequence[Widen]) -> bool:
    """Whether hidden units come out as they went in, over the range that the extra one may have."""
    leaves = bench.leaves()
    values = {
        name: extended(leaves[name], axis, UNITS)
        for block in blocks
        for name, axis in block.grown.items()
    }
    ends = (OFFSET - RANGE, OFFSET + RANGE)
    units = torch.linspace(*ends, UNITS, dtype=bench.dtype, device=bench.device)
    for block in blocks:
        values[f"{block.up}.bias"][-UNITS:] = units
    errors: list[float] = []

    def check(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden = args[0].movedim(args[0].ndim - 1, 0)[-UNITS:].flatten(1)
        errors.append((hidden / units[:, None] - 1).abs().max().item())

    handles = [
        bench.model.get_submodule(block.down).register_forward_pre_hook(check) for block in blocks
    ]
    try:
        return _try(
            bench,
            blocks,
            values,
            UNITS,
            lambda: bench.change() <= bench.tolerance.rounding >= max(errors),
        )
    finally:
        for handle in handles:
            handle.remove()


def _try(
    bench: Bench,
    blocks: Sequence[Widen],
    values: Mapping[str, Tensor],
    units: int,
    run: Callable[[], bool],
) -> bool:
    """`run` with the blocks made wider; False where the model does not run so."""
    with bench.replaced(values), _widths(bench.model, blocks, units):
        try:
            return run()
        except Exception:  # a model's own forward may raise anything
            return False


def width_attributes(model: nn.Module, block: Widen) -> Iterator[tuple[str, str]]:
    """`(module, attribute)` of each number of hidden units that a module of the block notes."""
    outs, ins = ("out_features", "out_channels", "nf"), ("in_features", "in_channels", "nx")
    for name, attributes in ((block.up, outs), (block.down, ins)):
        known = vars(model.get_submodule(name))
        yield from ((name, attribute) for attribute in attributes if attribute in known)


@contextmanager
def _widths(model: nn.Module, blocks: Sequence[Widen], units: int) -> Iterator[None]:
    def add(number: int) -> None:
        for block in blocks:
            for name, attribute in width_attributes(model, block):
                vars(model.get_submodule(name))[attribute] += number

    add(units)
    try:
        yield
    finally:
        add(-units)
