"""Finite shifts: the gradient test holds to first order, these hold at any size.

A gradient cannot see a branch on the mean, a `no_grad` reader, a rounding or a dead ReLU. Large
random shifts along the proposed axes wake them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from .facts import Fold, fold_tensor
from .reach import Family, families
from .symmetry import spread
from .workbench import Bench

T = TypeVar("T")


def shifted(leaves: Mapping[str, Tensor], folds: Iterable[Fold], scale: float) -> dict[str, Tensor]:
    r"""Each folded leaf plus $c \otimes 1_n$, $c$ normal, `scale` times the leaf's spread."""
    generator = torch.Generator().manual_seed(2)
    values: dict[str, Tensor] = {}
    for fold in folds:
        leaf = leaves[fold.parameter].detach()
        view = fold.view(values.get(fold.parameter, leaf))
        shape = list(view.shape)
        shape[fold.axis + 1] = 1
        shift = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(leaf)
        mask = fold.mask(leaf)
        shift *= scale * spread(leaf) if mask is None else scale * spread(leaf) * mask
        values[fold.parameter] = (view + shift).reshape(leaf.shape)
    return values


def folded(leaves: Mapping[str, Tensor], folds: Iterable[Fold]) -> dict[str, Tensor]:
    """Each folded leaf, centred."""
    values: dict[str, Tensor] = {}
    for fold in folds:
        leaf = values.get(fold.parameter, leaves[fold.parameter])
        values[fold.parameter] = fold_tensor(leaf, fold)
    return values


def settle(items: Sequence[T], holds: Callable[[Sequence[T]], bool]) -> list[T]:
    """A large subset that holds jointly: bisect, then test the survivors together again."""
    if not items or holds(items):
        return list(items)
    if len(items) == 1:
        return []
    middle = len(items) // 2
    left, right = settle(items[:middle], holds), settle(items[middle:], holds)
    if not left or not right or holds([*left, *right]):
        return [*left, *right]
    return max(left, right, key=len)


def used_unseen(bench: Bench, dead: Iterable[str]) -> list[str]:
    """Which of the leaves that gradients say nothing of are used all the same, in code under
    `no_grad`: noise on them moves the outputs."""
    leaves = bench.leaves()
    names = [name for name in leaves if name in set(dead) & bench.touched]
    generator = torch.Generator().manual_seed(3)

    def idle(group: Sequence[str]) -> bool:
        noisy = {}
        for name in group:
            x = leaves[name]
            noise = torch.randn(x.shape, generator=generator, device="cpu", dtype=torch.float32).to(
                x
            )
            noisy[name] = x + noise * spread(x)
        with bench.replaced(noisy):
            return bench.change() == 0

    def used(group: Sequence[str]) -> list[str]:
        if not group or idle(group):
            return []
        if len(group) == 1:
            return list(group)
        middle = len(group) // 2
        return [*used(group[:middle]), *used(group[middle:])]

    return used(names)


def unseen_folds(bench: Bench, used: Iterable[str]) -> list[Fold]:
    """Proposals for tables read under `no_grad`, those of `used_unseen`: a shift moves a norm's
    mean. Finite shifts decide."""
    leaves = bench.leaves()
    sizes = set(bench.sizes)
    tables = [n for n in used if leaves[n].ndim > 1 and leaves[n].shape[-1] in sizes]
    means = bench.means() if tables else {}
    proposed = []
    for name in tables:
        fold = Fold(name, leaves[name].ndim - 1, leaves[name].shape[-1])
        with bench.replaced(shifted(leaves, [fold], 3.0)):
            after = bench.means()
        if any(abs(after[n] - means.get(n, 0.0)) > bench.tolerance.mean for n in after):
            proposed.append(fold)
    return proposed


def sibling_folds(bench: Bench, folds: Sequence[Fold], dead: Iterable[str]) -> list[Fold]:
    """Folds for leaves the probe never reached whose reached siblings all fold: idle experts."""
    family, dead = families(bench), set(dead)
    alive: dict[Family, set[str]] = defaultdict(set)
    for name in family:
        if name not in dead:
            alive[family[name]].add(name)
    views: dict[Family, dict[Fold, set[str]]] = defaultdict(lambda: defaultdict(set))
    for fold in folds:
        views[family[fold.parameter]][replace(fold, parameter="")].add(fold.parameter)
    done = {fold.parameter for fold in folds}
    return [
        replace(view, parameter=name)
        for name in sorted(dead - done)
        for view, members in views.get(family[name], {}).items()
        if members == alive[family[name]]
    ]
