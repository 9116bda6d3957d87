"""Where one explicit mean subtraction makes many norms exact.

A port is an input or output of a module. It may be centred if the outputs are invariant under a
shift of the tensor that passes there, on every call; it is worth it if two norms become exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .facts import Center
from .outputs import is_float
from .symmetry import cotangent, spread
from .workbench import Bench

Edit = Callable[[Center, Tensor], Tensor]


def edit_output(output: Any, module: str, edit: Edit) -> Any:
    """The output with `edit` applied at each of its ports."""
    if isinstance(output, Tensor):
        return edit(Center(module, "output"), output)
    if isinstance(output, dict):
        for key, value in list(output.items()):
            if isinstance(value, Tensor):
                output[key] = edit(Center(module, "output", key), value)
        return output
    if type(output) in (tuple, list):
        return type(output)(
            edit(Center(module, "output", i), x) if isinstance(x, Tensor) else x
            for i, x in enumerate(output)
        )
    return output


@contextmanager
def editing(model: nn.Module, names: Sequence[str], edit: Edit) -> Iterator[None]:
    """Run `edit` at every port of the named modules."""
    handles = []

    def attach(name: str, module: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            new = tuple(
                edit(Center(name, "input", i), x) if isinstance(x, Tensor) else x
                for i, x in enumerate(args)
            )
            return new, {
                k: edit(Center(name, "input", k), x) if isinstance(x, Tensor) else x
                for k, x in kwargs.items()
            }

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            return edit_output(output, name, edit)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    try:
        for name in names:
            attach(name, model.get_submodule(name))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Port:
    order: int
    root: int
    width: int
    ratios: list[float] = field(default_factory=list)
    mean: float = 0.0


def subtract_mean(x: Tensor, axis: int) -> Tensor:
    return x - x.mean(axis, keepdim=True)


@contextmanager
def centered(bench: Bench, centers: Sequence[Center], shift: float = 0.0) -> Iterator[None]:
    """Subtract the mean at the centres; with `shift`, add noise to the mean instead."""
    generator = torch.Generator().manual_seed(4)
    wanted = {replace(c, axis=-1, serves=()): c.axis for c in centers}

    def edit(port: Center, x: Tensor) -> Tensor:
        axis = wanted.get(port)
        if axis is None or not is_float(x):
            return x
        y = subtract_mean(x, axis)
        if shift:
            noise = torch.randn(y.narrow(axis, 0, 1).shape, generator=generator, device="cpu").to(y)
            y = y + noise * (shift * spread(x))
        return y

    with editing(bench.model, sorted({c.module for c in centers}), edit):
        yield


def admissible(bench: Bench, chosen: Sequence[Center]) -> tuple[set[str], list[tuple[Center, int]]]:
    """The norms whose input has a mean, and the ports that may be centred and have a mean, in
    execution order, each with the number of these norms that run after it.

    Where a tensor passes several such ports only the first is listed: it reaches most readers.
    """
    tol, sizes = bench.tolerance, bench.sizes
    generator = torch.Generator().manual_seed(5)
    ports: dict[Center, _Port] = {}
    roots: dict[int, int] = {}
    alive: list[Tensor] = []  # an id must not be used again while it stands for a tensor
    last_call: dict[str, int] = {}
    clock = itertools.count()

    def edit(port: Center, x: Tensor) -> Tensor:
        now = next(clock)
        if not is_float(x) or x.ndim < 2 or x.shape[-1] not in sizes or not x.numel():
            return x
        alias = (x if x.requires_grad else x.detach().requires_grad_()).clone()
        roots[id(alias)] = root = roots.get(id(x), id(x))
        alive.extend((x, alias))
        record = ports.setdefault(port, _Port(now, root, x.shape[-1]))
        if rms := x.detach().square().mean().sqrt().item():
            record.mean = max(record.mean, x.detach().mean(-1).abs().max().item() / rms)

        def collect(grad: Tensor | None) -> None:
            if grad is None:  # no gradient passes here: packed weights
                return
            if norm := grad.norm().item() * grad.shape[-1] ** 0.5:
                record.ratios.append(grad.sum(-1).norm().item() / norm)

        if alias.requires_grad:
            alias.register_hook(collect)
        return alias

    def watch(name: str, x: Tensor) -> None:
        last_call[name] = next(clock)

    names = [name for name, _ in bench.model.named_modules() if name]
    with (
        centered(bench, chosen),
        editing(bench.model, names, edit),
        bench.watching(watch),
        bench.measuring() as means,
        torch.enable_grad(),
    ):
        loss = cotangent([x for held, _ in bench.run() for x in held.values()], generator)
        pending = {name for name, mean in means.items() if tol.mean <= mean < math.inf}
        if loss is not None and len(pending) > 1:
            loss.backward()
    widths = set().union(*(bench.widths[name] for name in pending))
    good: dict[int, tuple[Center, int]] = {}
    for port, record in sorted(ports.items(), key=lambda item: item[1].order):
        if record.width not in widths or (port.side == "input" and port.module in bench.norms):
            continue
        if record.ratios and max(record.ratios) < tol.symmetry and record.mean > tol.mean:
            later = sum(last_call.get(name, -1) > record.order for name in pending)
            first, _ = good.setdefault(record.root, (port, later))
            if first.side == "input" and first.module == port.module:
                good[record.root] = port, later  # what it returns: the same, and easier to hook
    return pending, list(good.values())


def _fixed(
    bench: Bench,
    centers: Sequence[Center],
    pending: set[str],
    which: int | None = None,
    ports: Sequence[Center] = (),
) -> tuple[set[str], set[Center]]:
    """Which of the norms, and what passes which of the ports, has no mean any more: on every input
    or on one."""
    tol, worst = bench.tolerance.mean, dict.fromkeys(ports, 0.0)

    def observe(port: Center, x: Tensor) -> Tensor:
        if port in worst and is_float(x) and (rms := x.square().mean().sqrt().item()):
            worst[port] = max(worst[port], x.mean(-1).abs().max().item() / rms)
        return x

    modules = sorted({port.module for port in ports})
    with centered(bench, centers), editing(bench.model, modules, observe):
        means = bench.means(which)
    fixed = {name for name in pending if means.get(name, 1.0) < tol}
    return fixed, {port for port, mean in worst.items() if mean < tol}


def choose_centers(bench: Bench, confirmed: Callable[[Sequence[Center]], bool]) -> list[Center]:
    """Greedily the port that makes most norms exact, until the best would serve a single one.

    A port serving one norm *is* a LayerNorm again.
    """
    chosen: list[Center] = []
    refused: set[Center] = set()
    while True:
        pending, ports = admissible(bench, chosen)
        best, serves = None, set[str]()

        which = bench.smallest(pending)
        below: set[Center] = set()  # where nothing has a mean once a port before it is centred
        for port, later in ports:
            if later <= max(len(serves), 1) or port in refused | below:
                continue
            fixed, silent = _fixed(
                bench, [*chosen, port], pending, which, [other for other, _ in ports]
            )
            below |= silent
            if len(fixed) > max(len(serves), 1) and which is not None:
                fixed, _ = _fixed(bench, [*chosen, port], pending)  # one shows what is not fixed
            if len(fixed) > max(len(serves), 1):
                best, serves = port, fixed
            if serves == pending:
                break
        if best is None:
            return chosen
        if not confirmed([*chosen, best]):
            refused.add(best)
            continue
        chosen.append(replace(best, serves=tuple(sorted(serves))))
        if len(pending - serves) < 2:
            return chosen
