"""Where one explicit mean subtraction makes many norms exact.

A port is an input or output of a module. It may be centred if the outputs are invariant under a shift of
the tensor that passes there, on every call; it is worth it if at least two norms become exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .bench import Bench, is_float, relative_change
from .confirm import spread
from .facts import Center

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
            noise = torch.randn(y.narrow(axis, 0, 1).shape, generator=generator).to(y)
            y = y + noise * (shift * spread(x))
        return y

    with editing(bench.model, sorted({c.module for c in centers}), edit):
        yield


def admissible(
    bench: Bench, pending: set[str], chosen: Sequence[Center]
) -> list[tuple[Center, int]]:
    """Ports that may be centred and have a mean, in execution order, with how many pending norms run later.

    Where a tensor passes several such ports only the first is listed: it reaches the most readers.
    """
    tol = bench.tolerance
    sizes = {bench.norms[name].normalized_shape[0] for name in pending}
    generator = torch.Generator().manual_seed(5)
    ports: dict[Center, _Port] = {}
    roots: dict[int, int] = {}
    alive: list[Tensor] = []  # ids must not be reused while they stand for tensors
    clock = 0
    calls: dict[str, int] = {}

    def edit(port: Center, x: Tensor) -> Tensor:
        nonlocal clock
        clock += 1
        if not is_float(x) or x.ndim < 2 or x.shape[-1] not in sizes:
            return x
        alias = (x if x.requires_grad else x.detach().requires_grad_()).clone()
        root = roots.get(id(x), id(x))
        roots[id(alias)] = root
        alive.extend((x, alias))
        record = ports.setdefault(port, _Port(clock, root))
        rms = x.detach().square().mean().sqrt().item()
        if rms > 0:
            record.mean = max(record.mean, x.detach().mean(-1).abs().max().item() / rms)

        def collect(grad: Tensor) -> None:
            norm = grad.norm().item()
            if norm > 0:
                record.ratios.append(grad.sum(-1).norm().item() / (norm * grad.shape[-1] ** 0.5))

        if alias.requires_grad:
            alias.register_hook(collect)
        return alias

    def watch(name: str, x: Tensor) -> None:
        calls[name] = clock

    names = [name for name, _ in bench.model.named_modules() if name]
    with centered(bench, chosen), editing(bench.model, names, edit), bench.watching(watch):
        with torch.enable_grad():
            loss = [
                (
                    torch.where(x.isfinite(), x, 0.0)
                    * torch.randn(x.shape, generator=generator).to(x)
                ).sum()
                / x[x.isfinite()].detach().std().clamp(min=1e-300)
                for x in bench.run()
                if x.requires_grad
            ]
            if loss:
                torch.stack(loss).sum().backward()
    good: dict[int, tuple[Center, int]] = {}
    for port, record in sorted(ports.items(), key=lambda item: item[1].order):
        if port.side == "input" and port.module in bench.norms:
            continue
        if record.ratios and max(record.ratios) < tol.symmetry and record.mean > tol.mean:
            later = sum(calls.get(name, 0) >= record.order for name in pending)
            good.setdefault(record.root, (port, later))
    return list(good.values())


def choose_centers(bench: Bench, before: list[Tensor], pending: set[str]) -> list[Center]:
    """Greedily the port that makes most norms exact, until the best would serve a single one.

    A port serving one norm *is* a LayerNorm again.
    """
    tol = bench.tolerance
    chosen: list[Center] = []

    def exact_with(centers: Sequence[Center]) -> set[str]:
        with centered(bench, centers):
            means, _ = bench.means()
        return {name for name in pending if means.get(name, 1.0) < tol.mean}

    def confirmed(centers: Sequence[Center]) -> bool:
        for scale in (0.0, *tol.shifts):
            with centered(bench, centers, scale):
                if relative_change(before, bench.measure()) > tol.moved:
                    return False
        return True

    refused: set[Center] = set()
    while len(pending) > 1:
        best, serves = None, set[str]()
        for port, later in admissible(bench, pending, chosen):
            if later <= max(len(serves), 1) or port in refused:
                continue
            fixed = exact_with([*chosen, port])
            if len(fixed) > max(len(serves), 1):
                best, serves = port, fixed
            if serves == pending:
                break
        if best is None:
            break
        if confirmed([*chosen, best]):
            chosen.append(replace(best, serves=tuple(sorted(serves))))
            pending = pending - serves
        else:
            refused.add(best)
    return chosen
