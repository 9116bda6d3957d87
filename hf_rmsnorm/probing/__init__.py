"""Ask a model which of its LayerNorms can be RMSNorms: no table of architectures, no rules per op."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..recipes import NormSpec
from .bench import make_bench, relative_change, run_outputs
from .confirm import confirm, folded, sibling_folds, unseen_folds
from .facts import Center, Fold, LayerScale, ProbeResult, fold_tensor, scale_tensor
from .streams import centered, choose_centers
from .symmetry import gradients, propose

__all__ = [
    "Center",
    "Fold",
    "LayerScale",
    "ProbeResult",
    "fold_tensor",
    "probe",
    "relative_change",
    "run_outputs",
    "scale_tensor",
]


def probe(
    model: nn.Module, norms: Mapping[str, NormSpec], inputs: Sequence[Mapping[str, Any]]
) -> ProbeResult:
    targets = {name: spec for name, spec in norms.items() if spec.kind == "layernorm"}
    bench = make_bench(model, targets, inputs)
    before = bench.measure()
    found = gradients(bench)
    dead = set(bench.leaves()) - found.alive()
    folds = propose(bench, found)
    folds += unseen_folds(bench, dead, before)
    folds = confirm(bench, folds, before)
    siblings = sibling_folds(bench, folds, dead)
    folds = sorted(folds + siblings, key=lambda f: f.size)
    with bench.replaced(folded(bench.leaves(), folds)):
        means, order = bench.means()
        free = {n for n, m in means.items() if m < bench.tolerance.mean}
        pending = set(means) - free
        centers = choose_centers(bench, before, pending)
        with centered(bench, centers):
            leftover, _ = bench.means()
    exact = {n: "every writer of its stream is centred" for n in order if n in free}
    for center in centers:
        exact.update({n: f"via one centring on {center}" for n in center.serves})
    kept = {n: "not explained" for n in targets if n not in exact}
    return ProbeResult(
        exact=exact,
        kept=kept,
        leftover=leftover,
        folds=tuple(folds),
        centers=tuple(centers),
        assumed=tuple(f.parameter for f in siblings),
        uncalled=tuple(n for n in targets if n not in order),
        dtype=str(bench.dtype).removeprefix("torch."),
    )
