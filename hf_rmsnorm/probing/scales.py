r"""LayerScale: a writer followed by a per-feature scale, $\lambda \odot (W x + b)$.

Its mean is $\tfrac{1}{n}\sum_j \lambda_j (W x + b)_j$, so $W$ cannot be centred as it is, but
$\lambda W$ can. The gradient shows the pair: that of $W_j$ over $\lambda_j$ sums to zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .confirm import settle
from .facts import LayerScale, scale_tensor
from .symmetry import Survey, ratios
from .workbench import Bench

MAX_LEVELS = 3  # between a writer's module and the module it shares with its scale


def _close(writer: str, scale: str) -> bool:
    w, s = writer.split(".")[:-1], scale.split(".")[:-1]
    shared = 0
    while shared < min(len(w), len(s)) and w[shared] == s[shared]:
        shared += 1
    return max(len(w), len(s)) - shared <= MAX_LEVELS


def absorbed(leaves: Mapping[str, Tensor], scales: Sequence[LayerScale]) -> dict[str, Tensor]:
    """The leaves after `LayerScale` rewriting: writers scaled, scales one."""
    values: dict[str, Tensor] = {}
    for scale in scales:
        factor = leaves[scale.parameter]
        values[scale.parameter] = torch.ones_like(factor)
        for name, axis in scale.writers:
            values[name] = scale_tensor(leaves[name], factor.flatten(), axis)
    return values


def find_scales(bench: Bench, found: Survey) -> list[LayerScale]:
    """Scales that can be absorbed into weights before them, leaving every output where it is."""
    leaves, tol = bench.leaves(), bench.tolerance.symmetry
    owned = {f"{name}.{leaf}" for name in bench.norms for leaf in ("weight", "bias")}
    folded = {fold.parameter for fold in found.folds}
    vectors = {
        name: leaf
        for name, leaf in leaves.items()
        if leaf.numel() in bench.sizes
        and leaf.numel() == max(leaf.shape)
        and name not in owned | folded | found.dead
        and leaf.all()
    }
    writers: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for (name, axis), sketch in found.sketches.items():
        for scale, vector in vectors.items():
            size = len(sketch)
            if size == vector.numel() and scale != name and _close(name, scale):
                ratio = ratios(sketch, size, weights=1 / vector.detach()).item()
                if ratio < tol and ratios(sketch, size).item() >= tol:
                    writers[scale].append((name, axis))
    scales = [
        LayerScale(scale, tuple(pairs))
        for scale, pairs in writers.items()
        if any(leaves[name].ndim > 1 for name, _ in pairs)
    ]

    def holds(group: Sequence[LayerScale]) -> bool:
        with bench.replaced(absorbed(leaves, group)):
            return bench.change() < bench.tolerance.rounding

    return settle(scales, holds)
