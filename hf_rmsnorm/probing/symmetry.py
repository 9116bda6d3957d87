r"""Which weights can be centred: the gradient test.

Centring a parameter $p$ along an axis changes no output if and only if the outputs are invariant
under $p \to p + c \otimes 1_n$ for every $c$. To first order: for a random cotangent $r$, the
gradient of $\langle r, \mathrm{out} \rangle$ sums to zero along the axis. One backward pass tests
every parameter, tied or not, of any layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .facts import Fold
from .workbench import Bench, norm_axis

PROBES = 4
MAX_BLOCKS = 512
FELT = 1e-3  # of the tolerance: a mean that moves by less feels nothing but rounding


# (leaf, axis) -> the products of the gradient's slices along the axis with random vectors,
# `(length, PROBES)`: enough to sum the gradient over any blocks of the axis.
Sketches = dict[tuple[str, int], Tensor]


def ratios(sketch: Tensor, size: int, inner: int = 1, weights: Tensor | None = None) -> Tensor:
    r"""$\lVert \sum_j w_j g_j \rVert / (\lVert w \rVert \lVert g \rVert)$ of a sketched gradient,
    per `(outer, inner)` block; inf where a block has no gradient."""
    w = torch.ones(size, device="cpu") if weights is None else weights.flatten()
    blocks, w = sketch.reshape(-1, size, inner, PROBES), w.to(sketch)
    total = torch.einsum("osip,s->oip", blocks, w).norm(dim=-1)
    power = blocks.norm(dim=(1, 3)) * w.norm()
    return torch.where(power > 0, total / power, math.inf)


def totals(sketch: Tensor, size: int, inner: int = 1) -> Tensor:
    r"""$\lVert \sum_j g_j \rVert$ per block, about."""
    total = sketch.reshape(-1, size, inner, PROBES).sum(1).norm(dim=-1)
    return total / PROBES**0.5


def spread(tensor: Tensor) -> float:
    """The unit of a shift: the tensor's own standard deviation, 1 where it has none."""
    std = tensor.std().item() if tensor.numel() > 1 else 0.0
    return std if std > 0 else 1.0


def block_views(length: int, sizes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Every `(size, inner)` that splits an axis into `(outer, size, inner)`."""
    for size in sizes:
        count, rest = divmod(length, size)
        if rest == 0 and count <= MAX_BLOCKS:
            yield from ((size, inner) for inner in range(1, count + 1) if count % inner == 0)


def cotangent(tensors: Iterable[Tensor], generator: torch.Generator) -> Tensor | None:
    r"""$\sum_k \langle r_k, x_k / \mathrm{rms}(x_k) \rangle$, random $r_k$, over finite entries."""
    terms = []
    for x in tensors:
        if x.requires_grad and x.numel():
            finite = torch.where(x.isfinite(), x, 0.0)
            unit = finite.detach().square().mean().sqrt().clamp(min=1e-300)
            r = torch.randn(x.shape, generator=generator, device="cpu", dtype=torch.float64).to(x)
            terms.append((finite / unit * r).sum())
    return torch.stack(terms).sum() if terms else None


@dataclass(frozen=True)
class Survey:
    """What one forward and two backward passes say about every leaf.

    Attributes:
        sketches: of the outputs' gradient.
        folds: whose shift moves no output but moves a norm's mean, to first order.
        dead: leaves the outputs have no gradient for, or one of zeros.
        dropped: those of them that no path leads from to an output.
    """

    sketches: Sketches
    folds: list[Fold]
    dead: frozenset[str]
    dropped: frozenset[str]


@contextmanager
def _reduced(
    leaves: Mapping[str, Tensor], sizes: list[int], sink: Sketches, alive: dict[str, bool]
) -> Iterator[None]:
    """Sketch each leaf's gradient and free it, as soon as a backward pass has it; `alive` says of
    each leaf that has one whether it is more than zeros."""
    generator = torch.Generator().manual_seed(1)

    def reduce(name: str, leaf: Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        alive[name] = grad is not None and bool(grad.any())
        for axis, length in enumerate(leaf.shape):
            if grad is not None and any(block_views(length, sizes)):
                slices = grad.movedim(axis, 0).reshape(length, -1)
                noise = torch.randn(slices.shape[1], PROBES, generator=generator, device="cpu").to(
                    slices
                )
                sink[name, axis] = (slices @ noise).cpu()

    handles = [
        leaf.register_post_accumulate_grad_hook(lambda p, name=name: reduce(name, p))
        for name, leaf in leaves.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class NotDifferentiable(Exception):
    """A model's own code refuses gradients."""


def survey(bench: Bench) -> Survey:
    """The gradient test on every leaf, axis, block and norm size at once.

    A zero sum alone is not enough: softmax does not see a shift of its keys' bias either. So the
    shift must also move the mean of some norm's input.
    """
    leaves, tol = bench.leaves(), bench.tolerance.symmetry
    generator = torch.Generator().manual_seed(2)
    of_outputs: Sketches = {}
    of_means: Sketches = {}
    alive: dict[str, bool] = {}
    means: list[Tensor] = []

    def watch(name: str, x: Tensor) -> None:
        if not x.numel():
            return
        rms = x.detach().square().mean().sqrt().clamp(min=1e-300)
        means.append(x.mean(norm_axis(bench.norms[name], x)) / rms)

    try:
        for leaf in leaves.values():
            leaf.requires_grad_(True)
        with torch.enable_grad(), bench.watching(watch):
            loss = cotangent([x for held, _ in bench.run() for x in held.values()], generator)
            need = cotangent(means, generator)
        passing = []
        if loss is not None:
            with _reduced(leaves, bench.sizes, of_outputs, alive):
                loss.backward(retain_graph=True)
        for (name, axis), sketch in of_outputs.items():
            for size, inner in block_views(len(sketch), bench.sizes):
                if (passes := ratios(sketch, size, inner) < tol).any():
                    passing.append((name, axis, size, inner, passes))
        wanted = {view[0]: leaves[view[0]] for view in passing}
        if need is not None and wanted:
            with _reduced(wanted, bench.sizes, of_means, {}):
                need.backward(inputs=list(wanted.values()))
    except Exception as error:  # a model's own code may raise anything
        what = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise NotDifferentiable(f"its model cannot be differentiated in eval ({what})") from error
    finally:
        for leaf in leaves.values():
            leaf.grad = None
            leaf.requires_grad_(False)

    folds = []
    for name, axis, size, inner, passes in passing:
        if (name, axis) in of_means:
            needed = ratios(of_means[name, axis], size, inner)
            felt = totals(of_means[name, axis], size, inner) * spread(leaves[name])
            blocks = passes & (needed > tol) & needed.isfinite() & (felt > FELT * tol)
            if blocks.any():
                where = tuple((int(i), int(j)) for i, j in blocks.nonzero())
                folds.append(Fold(name, axis, size, inner, None if blocks.all() else where))
    dead = frozenset(name for name in leaves if not alive.get(name))
    return Survey(of_outputs, folds, dead, dead - alive.keys())
