"""Ask a model which of its LayerNorms can be RMSNorms: no architecture table, no rule per op."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..recipes import NormSpec
from .confirm import folded, settle, shifted, sibling_folds, unseen_folds, used_unseen
from .copies import plain_copy
from .explain import explain
from .facts import Center, Fold, LayerScale, ProbeResult, fold_tensor, scale_tensor
from .outputs import Training, relative_change, rounding_gap, run_outputs
from .reach import beyond, unproven
from .scales import absorbed, find_scales
from .set_up import More, make_bench
from .streams import centered, choose_centers
from .symmetry import NotDifferentiable, survey
from .workbench import Bench

__all__ = [
    "Center",
    "Fold",
    "LayerScale",
    "ProbeResult",
    "Training",
    "fold_tensor",
    "plain_copy",
    "probe",
    "relative_change",
    "rounding_gap",
    "run_outputs",
    "scale_tensor",
]


def probe(
    model: nn.Module,
    norms: Mapping[str, NormSpec],
    inputs: Sequence[Mapping[str, Any]],
    more: More | None = None,
    hold: Sequence[str] = (),
) -> ProbeResult:
    r"""Find the LayerNorms whose input mean can be made zero without moving the model's outputs.

    Works on a private copy; the model is never touched.

    Args:
        model: any module; `inputs` are keyword arguments of its forward.
        norms: name -> what the module computes. Those of kind `"rmsnorm"` are not looked at.
        inputs: at least one; better two that differ in shape and content, and reach every branch.
        more: makes further inputs; those that reach further weights are appended to `inputs`, which
            must then be a list.
        hold: patterns of outputs to hold beside the main ones.

    Raises:
        PatchError: the forward fails on the inputs, or gives nothing finite to compare.
    """
    layernorms = {name: spec for name, spec in norms.items() if spec.kind == "layernorm"}
    targets = {n: spec for n, spec in layernorms.items() if len(spec.normalized_shape) <= 1}
    kept = {n: "normalises over several axes" for n in layernorms if n not in targets}
    if not targets:
        return ProbeResult({}, kept, {})
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it would not call the norms' forward
        bench = make_bench(model, targets, inputs, more, hold)  # type: ignore[arg-type]
        result = _probe(bench)
    except NotDifferentiable as error:
        return ProbeResult({}, {**kept, **dict.fromkeys(targets, str(error))}, bench.means())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    aliases: dict[int, list[str]] = defaultdict(list)
    for name, leaf in itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    ):
        aliases[id(leaf)].append(name)
    tied = {names[0]: tuple(names[1:]) for names in aliases.values()}
    folds = tuple(replace(f, aliases=tied.get(f.parameter, ())) for f in result.folds)
    return replace(result, kept={**result.kept, **kept}, folds=folds)


def _probe(bench: Bench) -> ProbeResult:
    found = survey(bench)
    scales = find_scales(bench, found)
    if scales:
        bench.rewrite(lambda leaves: absorbed(leaves, scales))
        found = survey(bench)

    def holds(folds: Sequence[Fold], centers: Sequence[Center] = ()) -> bool:
        """No output moves, however far the folded axes and the centred means are shifted."""
        for scale, which in bench.tolerance.shifts:
            with (
                bench.replaced(shifted(bench.leaves(), folds, scale)),
                centered(bench, centers, scale),
            ):
                if bench.change(which) > bench.tolerance.moved:
                    return False
        return True

    def choose(
        folds: Sequence[Fold], confirmed: Callable[[Sequence[Center]], bool]
    ) -> list[Center]:
        with bench.replaced(folded(bench.leaves(), folds)):
            return choose_centers(bench, confirmed)

    # All at once first: that nearly always holds, and then nothing needs to be told apart.
    unseen = used_unseen(bench, found.dead)
    folds = found.folds + unseen_folds(bench, unseen)
    centers = choose(folds, lambda centers: True)
    if not holds(folds, centers):
        folds = settle(folds, holds)
        centers = choose(folds, lambda centers: holds((), centers))
    siblings = sibling_folds(bench, folds, found.dead)
    folds = sorted(folds + siblings, key=lambda fold: fold.size)
    unreached = found.dead - (found.dropped & bench.touched) - set(unseen)
    missing = beyond(bench, unreached)
    result = _conclude(bench, folds, centers, scales, tuple(f.parameter for f in siblings))
    count = len(bench.leaves())
    return replace(
        result,
        unproven={n: leaf for n, leaf in unproven(bench, missing).items() if n in result.exact},
        unreached=tuple(sorted(missing)),
        reached=(count - len(unreached), count),
    )


def _conclude(
    bench: Bench,
    folds: Sequence[Fold],
    centers: Sequence[Center],
    scales: Sequence[LayerScale],
    assumed: tuple[str, ...],
) -> ProbeResult:
    """Measure the means that are left, and say why: on the weights as given, where these are all
    alike, but without letting that make a norm exact."""
    with bench.replaced(folded(bench.leaves(), folds)), centered(bench, centers):
        with bench.measuring() as leftover:
            change, moved = bench.changes()
        exact = {n for n, mean in leftover.items() if mean < bench.tolerance.mean}
        if bench.given:
            as_folded = bench.replaced(folded({**bench.leaves(), **bench.given}, folds))
            with bench.as_given(), as_folded, bench.measuring() as given:
                change = max(change, bench.change())
            leftover = {name: given.get(name, mean) for name, mean in leftover.items()}
        if change > bench.tolerance.moved:  # shifts moved nothing, but centring did
            why = f"centring moved the outputs by {change:.1g} of their size"
            return ProbeResult({}, dict.fromkeys(bench.norms, why), leftover)
        reasons = explain(bench, [n for n in bench.norms if n not in exact], leftover)
    via = {name: center for center in centers for name in center.serves}
    return ProbeResult(
        exact={
            name: f"one mean subtraction at {via[name]}"
            if name in via
            else "every writer of its stream is centred"
            for name in leftover
            if name in exact
        },
        kept=reasons,
        leftover={name: mean for name, mean in leftover.items() if math.isfinite(mean)},
        folds=tuple(folds),
        centers=tuple(centers),
        layerscales=tuple(scales),
        assumed=assumed,
        uncalled=tuple(name for name in bench.norms if name not in leftover),
        moved=tuple(moved),
        dtype=str(bench.dtype).removeprefix("torch."),
    )
