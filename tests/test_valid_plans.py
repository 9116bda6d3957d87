"""Plans whose fields are not what they may be, or are of another model: typed errors, no change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from harness.injecting import difference, state
from harness.mutating import mutated
from model_zoo import build, inputs_for

from hf_rmsnorm import PatchError, PatchPlan, apply_plan, fit_plan, fold_shard, plan_patch
from hf_rmsnorm.probing.facts import Absorb, Fold, LayerScale, Widen
from hf_rmsnorm.recipes import NormSpec


def planned(name: str = "gpt2", **arguments: Any) -> tuple[Any, PatchPlan]:
    model = build(name)
    return model, plan_patch(model, inputs=inputs_for(name, model), **arguments)


def with_site(plan: PatchPlan, **changes: Any) -> PatchPlan:
    return replace(plan, sites=(replace(plan.sites[0], **changes), *plan.sites[1:]))


def with_spec(plan: PatchPlan, **changes: Any) -> PatchPlan:
    assert plan.sites[0].spec is not None
    return with_site(plan, spec=replace(plan.sites[0].spec, **changes))


def with_fold(plan: PatchPlan, **changes: Any) -> PatchPlan:
    return replace(plan, folds=(replace(plan.folds[0], **changes), *plan.folds[1:]))


def with_center(plan: PatchPlan, **changes: Any) -> PatchPlan:
    return replace(plan, centers=(replace(plan.centers[0], **changes),))


NAN = float("nan")
WPE = "transformer.wpe.weight"
# what is wrong with the plan of a GPT-2, and what the error says of it
NONSENSE: dict[str, tuple[Callable[[PatchPlan], Any], str]] = {
    "norm": (lambda p: replace(p, norm="banana"), "norm is 'banana': .*'rmsnorm' or 'prmsnorm'"),
    "p of 0": (lambda p: replace(p, norm="prmsnorm", p=0.0), "p is 0.0: .*greater than 0"),
    "p of nan": (lambda p: replace(p, norm="prmsnorm", p=NAN), "p is nan"),
    "p of RMSNorm": (lambda p: replace(p, p=0.5), "only 'prmsnorm' has a p"),
    "strategy": (lambda p: replace(p, strategy="best"), "'auto', 'exact' or 'direct'"),
    "version": (lambda p: replace(p, version=-3), "version is -3"),
    "no sites": (lambda p: replace(p, sites=None), "sites is None"),
    "verdict": (lambda p: with_site(p, verdict="banana"), r"sites\[0\].verdict is 'banana'"),
    "reason": (lambda p: with_site(p, reason=7), r"sites\[0\].reason is 7"),
    "no spec": (lambda p: with_site(p, spec=None), "no spec|without a spec"),
    "twice": (lambda p: replace(p, sites=p.sites[:1] * 2), "more than once"),
    "eps": (lambda p: with_spec(p, eps=NAN), r"sites\[0\].spec.eps is nan"),
    "eps below 0": (lambda p: with_spec(p, eps=-1e-5), r"greater than or equal to 0"),
    "size": (lambda p: with_spec(p, normalized_shape=(0,)), r"normalized_shape\[0\] is 0"),
    "axis": (lambda p: with_fold(p, axis=-1), r"folds\[0\].axis is -1"),
    "size of a fold": (lambda p: with_fold(p, size="24"), r"folds\[0\].size is '24'"),
    "tensor": (lambda p: with_fold(p, inner=torch.ones(2)), r"folds\[0\].inner is 'tensor"),
    "side": (lambda p: with_center(p, side="top"), "'input' or 'output'"),
    "no key": (lambda p: with_center(p, side="input", key=None), "without a key"),
    "no plan": (lambda p: {"norm": "rmsnorm"}, "must be a PatchPlan, not a dict"),
}
OTHERS: dict[str, tuple[Callable[[PatchPlan], PatchPlan], str]] = {
    "site": (lambda p: with_site(p, name="nope"), "it has no module 'nope'"),
    "class": (lambda p: with_site(p, class_name="T5LayerNorm"), "is a LayerNorm there, not a T5"),
    "width": (lambda p: with_spec(p, normalized_shape=(25,)), r"shape \[24\], not \[25\]"),
    "parameter": (lambda p: with_fold(p, parameter="nope"), "it has no tensor 'nope'"),
    "alias": (lambda p: with_fold(p, aliases=("nope",)), "it has no tensor 'nope'"),
    "axes": (lambda p: with_fold(p, axis=2), "2 axes, not an axis 2|1 axes, not an axis 2"),
    "entries": (lambda p: with_fold(p, size=23), "no multiple of 23"),
    "block": (lambda p: with_fold(p, blocks=((9, 0),)), r"has no block \(9, 0\)"),
    "center": (lambda p: with_center(p, module="nope"), "it has no module 'nope'"),
    "scale": (lambda p: replace(p, layerscales=(LayerScale("nope", ()),)), "nope is no vector"),
    "writer": (
        lambda p: replace(p, layerscales=(LayerScale("transformer.ln_f.bias", ((WPE, 0),)),)),
        "axis 0 of transformer.wpe.weight has 41 entries, not 24",
    ),
    "absorb": (lambda p: replace(p, absorbs=(Absorb("nope", ()),)), "it has no tensor 'nope'"),
    "widen": (lambda p: replace(p, widens=(Widen("", "a", 0, "b", 1),)), "a.bias is no vector"),
}


@pytest.mark.parametrize("case", [*NONSENSE, *OTHERS])
def test_a_plan_is_checked_before_anything_is_touched(case: str) -> None:
    model, plan = planned()
    change, message = {**NONSENSE, **OTHERS}[case]
    before, wrong = state(model), change(plan)
    with pytest.raises(PatchError, match=message):
        apply_plan(model, wrong)
    assert not difference(before, state(model))
    if case in NONSENSE:
        with pytest.raises(PatchError, match=message):
            fit_plan(wrong, model)
        with pytest.raises(PatchError, match=message):
            fold_shard(model.state_dict(), wrong)
        if isinstance(wrong, PatchPlan) and case != "tensor":
            with pytest.raises(PatchError, match=message):
                PatchPlan.from_json(json.dumps(asdict(wrong)))
    apply_plan(model, plan)
    with pytest.raises(PatchError, match="is already patched"):
        apply_plan(model, plan)


@pytest.mark.parametrize("case", ["parameter", "axes", "entries", "block"])
def test_a_shard_is_held_against_the_plan(case: str) -> None:
    model, plan = planned()
    change, message = OTHERS[case]
    weights, wrong = model.state_dict(), change(plan)
    if case == "parameter":  # may be in another shard
        assert len(fold_shard(weights, wrong)) == len(fold_shard(weights, plan)) - 1
        return
    with pytest.raises(PatchError, match=message):
        fold_shard(weights, wrong)


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "null", '{"version": 1}', "[" * 100_000, '{"version": 9}', b"\xff"]
)
def test_what_is_no_plan_at_all(text: Any) -> None:
    with pytest.raises(PatchError, match=r"not a patch plan|is not valid|has format version 9"):
        PatchPlan.from_json(text)


@pytest.mark.parametrize("name", ["absorbs", "layerscales", "folds", "widens", "centers", "sites"])
def test_a_plan_without_one_of_its_parts_would_do_something_else(name: str) -> None:
    data = asdict(planned()[1])
    del data[name]
    with pytest.raises(PatchError, match=f"{name}.* is missing"):
        PatchPlan.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("name", "arguments"), [("gpt2", {}), ("bert", {"post_norm": "extra_neuron"}), ("beit", {})]
)
def test_mutated_plans_are_refused_or_whole(name: str, arguments: dict[str, Any]) -> None:
    model, plan = planned(name, **arguments)
    data, before = json.loads(plan.to_json()), state(model)
    assert PatchPlan.from_json(json.dumps(data)) == plan
    refused = 0
    for seed in range(60):
        try:
            found = PatchPlan.from_json(json.dumps(mutated(data, seed)))
            apply_plan(model, found)
        except PatchError:
            refused += 1
            assert not difference(before, state(model)), seed
        else:
            model = build(name)
    assert refused > 30


def test_every_number_of_a_spec_has_a_range() -> None:
    """A field that is added without one is found here."""
    plan = planned()[1]
    for field in NormSpec.__dataclass_fields__:
        for value in (NAN, -1, "x", [[]]):
            if isinstance(value, str) and field in ("kind", "casting"):
                continue
            if (field, value) == ("weight_offset", -1):
                continue
            data = asdict(plan)
            data["sites"][0]["spec"][field] = value
            with pytest.raises(PatchError, match=rf"sites\[0\].spec.{field}"):
                PatchPlan.from_json(json.dumps(data))
    for field in Fold.__dataclass_fields__:
        data = asdict(plan)
        data["folds"][0][field] = -1
        with pytest.raises(PatchError, match=rf"folds\[0\].{field} is -1"):
            PatchPlan.from_json(json.dumps(data))
