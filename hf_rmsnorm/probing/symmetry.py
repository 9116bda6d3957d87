r"""Which weights can be centred: the gradient test.

Centring a parameter $p$ along an axis changes no output if and only if the outputs are invariant under
$p \to p + c \otimes 1_n$ for every $c$. To first order: for a random cotangent $r$, the gradient of
$\langle r, \mathrm{out} \rangle$ sums to zero along the axis. One backward pass tests every parameter.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .bench import Bench, norm_axis
from .facts import Fold

PROBES = 4
MAX_BLOCKS = 512


@dataclass(frozen=True)
class Sketch:
    """A gradient $g$ seen along one axis: `(size,)` norms of its slices, and the slices' products with
    `PROBES` random vectors. Enough for the sum over any blocks of the axis, at no memory."""

    norms: Tensor
    probes: Tensor

    def ratios(self, size: int, inner: int, weights: Tensor | None = None) -> Tensor:
        r"""$\lVert \sum_j w_j g_j \rVert / (\lVert w \rVert \lVert g \rVert)$ per `(outer, inner)` block;
        inf where the block has no gradient."""
        w = torch.ones(size, 1, 1) if weights is None else weights.reshape(size, 1, 1)
        probes = self.probes.reshape(-1, size, inner, PROBES)
        total = (probes * w.to(probes)).sum(1).norm(dim=-1) / math.sqrt(PROBES)
        power = self.norms.reshape(-1, size, inner).norm(dim=1) * w.norm().item()
        return torch.where(power > 0, total / power, math.inf)


Sketches = dict[tuple[str, int], Sketch]


def block_views(length: int, size: int) -> Iterator[int]:
    """The `inner` lengths that split an axis into `(outer, size, inner)`."""
    count, rest = divmod(length, size)
    if rest == 0 and count <= MAX_BLOCKS:
        yield from (inner for inner in range(1, count + 1) if count % inner == 0)


def _sketch(grad: Tensor, axis: int, generator: torch.Generator) -> Sketch:
    slices = grad.movedim(axis, 0).reshape(grad.shape[axis], -1)
    noise = torch.randn(slices.shape[1], PROBES, generator=generator, dtype=torch.float64)
    return Sketch(torch.linalg.vector_norm(slices, dim=1).cpu(), (slices @ noise.to(slices)).cpu())


@dataclass
class Gradients:
    """Sketches of the outputs' gradient, and of the gradient of the norms' input means."""

    outputs: Sketches
    means: Sketches

    def alive(self) -> set[str]:
        return {name for (name, _), s in self.outputs.items() if s.norms.any()}


def gradients(bench: Bench) -> Gradients:
    """One forward and two backward passes; every gradient is reduced and freed as it appears."""
    leaves = bench.leaves()
    generator = torch.Generator().manual_seed(1)
    sinks: list[Sketches] = []
    handles = []

    def reduce(name: str, leaf: Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        for axis, length in enumerate(leaf.shape):
            if grad is not None and any(any(block_views(length, n)) for n in bench.sizes):
                sinks[-1][name, axis] = _sketch(grad, axis, generator)

    def cotangent(x: Tensor) -> Tensor:
        r = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        return (torch.where(x.isfinite(), x, 0.0) * r).sum()

    means: list[Tensor] = []

    def watch(name: str, x: Tensor) -> None:
        mean = x.mean(norm_axis(bench.norms[name], x))
        rms = x.detach().square().mean().sqrt().clamp(min=1e-300)
        if mean.requires_grad:
            means.append(cotangent(mean / rms))

    try:
        for name, leaf in leaves.items():
            leaf.requires_grad_(True)
            handles.append(
                leaf.register_post_accumulate_grad_hook(lambda p, name=name: reduce(name, p))
            )
        with torch.enable_grad(), bench.watching(watch):
            outputs = [
                cotangent(x / x[x.isfinite()].detach().std().clamp(min=1e-300))
                for x in bench.run()
                if x.requires_grad
            ]
        for loss in (outputs, means):
            sinks.append({})
            if loss:
                torch.stack(loss).sum().backward(retain_graph=loss is outputs)
    finally:
        for handle in handles:
            handle.remove()
        for leaf in leaves.values():
            leaf.grad = None
            leaf.requires_grad_(False)
    return Gradients(*sinks)


def propose(bench: Bench, found: Gradients) -> list[Fold]:
    """Folds whose shift moves no output but does move a norm's mean, to first order."""
    tol = bench.tolerance.symmetry
    folds: dict[tuple[str, int], list[Fold]] = defaultdict(list)
    for (name, axis), sketch in found.outputs.items():
        need = found.means.get((name, axis))
        if need is None:
            continue
        for size in bench.sizes:
            for inner in block_views(len(sketch.norms), size):
                needed = need.ratios(size, inner)
                passes = (sketch.ratios(size, inner) < tol) & (needed > tol) & needed.isfinite()
                if passes.any():
                    blocks = None if passes.all() else tuple(map(tuple, passes.nonzero().tolist()))
                    folds[name, axis].append(Fold(name, axis, size, inner, blocks))
    return [fold for group in folds.values() for fold in group]
