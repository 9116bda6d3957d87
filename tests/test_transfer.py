"""Plans from shallow twins, and folding shard by shard, against planning on the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_rmsnorm import PatchError, PatchPlan, apply_plan, fit_plan, fold_shard, plan_patch


def randomised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def gpt2(layers: int) -> nn.Module:
    torch.manual_seed(layers)
    config = transformers.GPT2Config(
        vocab_size=53, n_embd=24, n_layer=layers, n_head=2, n_positions=16, eos_token_id=2
    )
    return randomised(transformers.GPT2LMHeadModel(config))


def beit(layers: int) -> nn.Module:
    torch.manual_seed(layers)
    config = transformers.BeitConfig(
        hidden_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=40,
        image_size=12,
        patch_size=4,
        layer_scale_init_value=0.3,
    )
    return randomised(transformers.BeitForImageClassification(config))


def unordered(plan: PatchPlan) -> dict[str, Any]:
    return {
        "sites": {(s.name, s.verdict, s.spec) for s in plan.sites},
        "folds": set(plan.folds),
        "scales": {(s.parameter, frozenset(s.writers)) for s in plan.layerscales},
        "centers": {(c.module, c.side, c.key) for c in plan.centers},
    }


@pytest.mark.parametrize("make", [gpt2, beit])
def test_a_twins_plan_is_the_models_plan(make: Callable[[int], nn.Module]) -> None:
    model = make(5)
    fitted = fit_plan(PatchPlan.from_json(plan_patch(make(2)).to_json()), model)
    direct = plan_patch(model)
    assert unordered(fitted) == unordered(direct)

    by_shards = dict(model.state_dict())
    names = sorted(by_shards)
    whole = dict(by_shards)
    for part in (names[::3], names[1::3], names[2::3]):
        shard = {name: whole[name] for name in part}
        by_shards.update(fold_shard(shard, fitted, whole.get))
    apply_plan(model, direct)
    expected = model.state_dict()
    assert all(torch.equal(by_shards[name], expected[name]) for name in by_shards)


def test_the_target_may_be_on_the_meta_device() -> None:
    plan = plan_patch(gpt2(2))
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(copy.deepcopy(gpt2(7).config))
    assert fit_plan(plan, model).count("exact") == 15


def test_plans_that_do_not_fit_are_refused() -> None:
    plan = plan_patch(gpt2(3))
    uneven = replace(plan, folds=plan.folds[:-3])
    with pytest.raises(PatchError, match=r"twin disagree about transformer\.h\.\*"):
        fit_plan(uneven, gpt2(4))
    with pytest.raises(PatchError, match="which the model does not have"):
        fit_plan(plan, beit(2))
    fewer = replace(plan, sites=tuple(s for s in plan.sites if s.name != "transformer.ln_f"))
    with pytest.raises(PatchError, match=r"transformer\.ln_f is a norm site .* does not know"):
        fit_plan(fewer, gpt2(4))


def test_a_missing_scale_is_an_error() -> None:
    model = beit(2)
    plan = plan_patch(model)
    state = model.state_dict()
    writer = plan.layerscales[0].writers[0][0]
    with pytest.raises(PatchError, match="is needed to fold"):
        fold_shard({writer: state[writer]}, plan)
