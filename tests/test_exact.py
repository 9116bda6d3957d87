"""The exact conversion through the public calls: same function, verified, taken back bitwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import hf_rmsnorm
from hf_rmsnorm import (
    PatchError,
    PatchPlan,
    RMSNorm,
    VerificationError,
    patch_model,
    patch_report,
    plan_patch,
    unpatch_model,
)
from hf_rmsnorm.patching import apply_plan
from hf_rmsnorm.patching.verify import verify

TOKENS = {"input_ids": torch.tensor([[5, 9, 2, 40, 11, 7], [3, 8, 21, 6, 30, 1]])}


def build(kind: str = "ForCausalLM", **config: Any) -> nn.Module:
    torch.manual_seed(11)
    model_type = config.pop("model_type")
    settings = transformers.AutoConfig.for_model(model_type, vocab_size=53, **config)
    auto = getattr(transformers, f"AutoModel{kind}")
    model = auto.from_config(settings, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def gpt2(**config: Any) -> nn.Module:
    sizes = {"n_embd": 24, "n_layer": 3, "n_head": 2, "n_positions": 16, "eos_token_id": 2}
    return build(model_type="gpt2", **{**sizes, **config})


def bert() -> nn.Module:
    return build(
        "ForMaskedLM",
        model_type="bert",
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=16,
    )


def forward(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**TOKENS)[0]


def same(model: nn.Module, original: nn.Module) -> bool:
    mine, theirs = model.state_dict(), original.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


@pytest.mark.parametrize("strategy", ["auto", "exact"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_pre_norm_model_keeps_its_function(tied: bool, strategy: str) -> None:
    model = gpt2(tie_word_embeddings=tied)
    original = copy.deepcopy(model)
    before = forward(model)
    patch_model(model, strategy=strategy)

    norms = {type(m) for n, m in model.named_modules() if ".ln_" in n}
    assert norms == {RMSNorm}
    assert len(model.transformer.wte._forward_hooks) == tied
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    rounding = (forward(copy.deepcopy(original).double()) - before).abs().max()
    assert (forward(model) - before).abs().max() < 5 * rounding
    report = patch_report(model)
    assert {site.verdict for site in report.sites} == {"exact"}
    assert report.measured and report.measured.exact_part < 1e-12
    assert "exact part off by" in str(report)

    unpatch_model(model)
    assert same(model, original) and type(model.transformer.wte) is nn.Embedding
    assert torch.equal(forward(model), before)


def test_the_converted_model_is_better_in_low_precision_with_a_common_mode() -> None:
    """A mean that all features share is what LayerNorm removes; in bfloat16 it costs digits."""
    model = gpt2(tie_word_embeddings=False)
    with torch.no_grad():
        model.transformer.wpe.weight.add_(30.0)  # LayerNorm does not see it
    truth = forward(copy.deepcopy(model).double())
    converted = patch_model(copy.deepcopy(model)).bfloat16()
    stock = copy.deepcopy(model).bfloat16()
    error = (forward(converted) - truth).abs().mean()
    assert error < 0.2 * (forward(stock) - truth).abs().mean()


def test_greedy_generation_gives_the_same_tokens() -> None:
    model = gpt2()
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    prompt = TOKENS["input_ids"][:, :5]
    before = model.generate(prompt, **arguments)
    assert torch.equal(patch_model(model).generate(prompt, **arguments), before)


def test_post_norm_models_are_approximate_and_say_so() -> None:
    model = bert()
    before = forward(model)
    with pytest.warns(UserWarning, match="norm sites were changed approximately"):
        patch_model(model)
    report = patch_report(model)
    assert {"approximate"} <= {site.verdict for site in report.sites}
    assert all("|mean|/rms" in s.reason for s in report.sites if s.verdict == "approximate")
    assert report.measured and report.measured.exact_part < 1e-12
    direct = patch_model(bert(), strategy="direct")
    assert (forward(model) - before).norm() < (forward(direct) - before).norm()


def test_exact_refuses_what_cannot_be() -> None:
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=53,
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=40,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    original = copy.deepcopy(model)
    try:
        patch_model(model, strategy="exact", include="encoder.*")
    except PatchError as error:
        assert "none of the" in str(error) and "can be exact" in str(error)
    else:
        pytest.fail("post-norm layers were called exact")
    assert same(model, original)
    with pytest.raises(PatchError, match=r'"exact" cannot hold for pRMSNorm with p=0\.0625'):
        patch_model(gpt2(), "prmsnorm", strategy="exact")


def test_partial_statistics_are_approximate_on_exact_folds() -> None:
    model = gpt2()
    with pytest.warns(UserWarning, match="7 of 7"):
        patch_model(model, "prmsnorm", p=0.25)
    report = patch_report(model)
    assert all(site.mean_free and site.verdict == "approximate" for site in report.sites)
    assert all("6 of 24 features" in site.reason for site in report.sites)


def test_a_wrong_plan_is_caught_before_anything_is_touched() -> None:
    model = gpt2()
    original = copy.deepcopy(model)
    plan = plan_patch(model)
    wrong = replace(plan, folds=plan.folds[2:])
    with pytest.raises(VerificationError, match=r"first at transformer\.(h\.\d\.)?ln_"):
        verify(model, wrong, [TOKENS], apply_plan)
    assert same(model, original) and type(model.transformer.ln_f) is nn.LayerNorm


def test_plans_survive_json_and_fit_deeper_models() -> None:
    plan = plan_patch(gpt2())
    again = PatchPlan.from_json(plan.to_json())
    assert again == plan
    model, twin = gpt2(), gpt2()
    apply_plan(model, again)
    assert same(model, patch_model(twin))


def test_unpatching_a_trained_model_is_refused() -> None:
    model = patch_model(gpt2())
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] += 1
    trained = copy.deepcopy(model)
    with pytest.raises(PatchError, match=r"h\.1\.mlp\.c_proj\.weight was folded .* has changed"):
        unpatch_model(model)
    assert same(model, trained) and type(model.transformer.ln_f) is RMSNorm


def test_checkpoints_keep_folds_and_centres(tmp_path: Path) -> None:
    model = patch_model(gpt2())
    model.save_pretrained(tmp_path)
    again = hf_rmsnorm.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(again.transformer.wte) is nn.Embedding
    assert again.transformer.wte(TOKENS["input_ids"]).mean(-1).abs().max() < 1e-6
    assert again.lm_head.weight is again.transformer.wte.weight
    assert torch.equal(forward(again), forward(model))
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert not stock.transformer.wte._forward_hooks
    torch.testing.assert_close(forward(stock.eval()), forward(model))


def quantised() -> nn.Module:
    model = gpt2()
    weight = model.transformer.h[0].attn.c_attn.weight
    model.transformer.h[0].attn.c_attn.weight = nn.Parameter(
        weight.detach().to(torch.int8), requires_grad=False
    )
    return model


BROKEN: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (lambda: gpt2().to("meta"), {}, r"transformer\.wte\.weight is on the meta device .*load"),
    (quantised, {}, r"c_attn\.weight is quantised or sharded .*torch\.int8"),
    (gpt2, {"inputs": []}, "inputs must be a dict .* got list"),
    (gpt2, {"inputs": [3]}, "inputs must be a dict"),
    (gpt2, {"inputs": {"nonsense": 1}}, "could not be run on the probe inputs"),
    (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), {}, "inputs="),
]


@pytest.mark.parametrize("make,arguments,message", BROKEN)
def test_what_cannot_be_probed_says_what_to_do(
    make: Callable[[], nn.Module], arguments: dict[str, Any], message: str
) -> None:
    model = make()
    classes = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(PatchError, match=message):
        patch_model(model, **arguments)
    assert {n: type(m) for n, m in model.named_modules()} == classes


def test_meta_models_take_the_direct_swap() -> None:
    model = patch_model(gpt2().to("meta"), strategy="direct")
    assert type(model.transformer.ln_f) is RMSNorm


def test_train_mode_and_random_state_are_left_alone() -> None:
    model = gpt2().train()
    state = torch.get_rng_state()
    patch_model(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
