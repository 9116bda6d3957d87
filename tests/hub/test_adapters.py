"""Adapters of `peft` on patched models."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tiny_models import TOKENS, forward, gpt2, train

from hf_rmsnorm import PatchError, patch_model, unpatch_model


@pytest.mark.parametrize("strategy", ["auto", "direct"])
def test_its_layers_are_found_by_the_architecture(strategy: str) -> None:
    model = get_peft_model(
        patch_model(gpt2(), strategy=strategy), LoraConfig(r=2, fan_in_fan_out=True)
    )
    assert model.peft_config["default"].target_modules == {"c_attn"}


def test_nothing_is_said_about_the_base_when_it_is_saved_or_loaded(
    tmp_path: Path, caplog: Any
) -> None:
    patch_model(gpt2(), strategy="direct").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True))
    train(model, 1e-2)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        model.save_pretrained(tmp_path / "adapter")
        again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "model of type" not in caplog.text
    assert torch.equal(forward(again), forward(model))


EMBEDDING_ADAPTERS: dict[str, dict[str, Any]] = {
    "tokens": {"trainable_token_indices": [5, 9]},
    "lora": {"target_modules": ["wte"]},
    "dora": {"target_modules": ["wte"], "use_dora": True},
    "whole": {"modules_to_save": ["wte"], "target_modules": ["c_attn"]},
}


def as_it_is(model: Any) -> Any:
    return model


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize(
    "kind, reached",
    [(kind, as_it_is) for kind in EMBEDDING_ADAPTERS]
    + [("tokens", copy.deepcopy), ("tokens", through_pickle)],
)
def test_an_embedding_stays_centred_under_an_adapter(kind: str, reached: Callable) -> None:
    original, model = gpt2(), reached(patch_model(gpt2()))
    lora = LoraConfig(**{"target_modules": ["c_proj"], **EMBEDDING_ADAPTERS[kind]}, r=2)
    lora.fan_in_fan_out = "wte" not in (lora.target_modules or ())
    adapted = get_peft_model(model, lora)
    torch.testing.assert_close(forward(adapted), forward(original), rtol=1e-5, atol=1e-5)
    train(adapted, 1e-2)
    with torch.no_grad():
        trained = model.transformer.wte(TOKENS["input_ids"])
        assert trained.mean(-1).abs().max() < 1e-6
        merged = adapted.merge_and_unload().transformer.wte(TOKENS["input_ids"])
    assert not torch.equal(merged, original.transformer.wte(TOKENS["input_ids"]))
    torch.testing.assert_close(merged, trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"trainable_token_indices": [5]}, {"modules_to_save": ["ln_f"]}]
)
def test_unpatching_under_an_adapter_is_refused(settings: Any) -> None:
    original, model = gpt2(), patch_model(gpt2())
    lora = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, **settings)
    adapted = get_peft_model(model, lora)
    before = forward(model)
    with pytest.raises(PatchError, match=r"^transformer\.(wte|ln_f) .*unload adapters"):
        unpatch_model(adapted)
    assert torch.equal(forward(adapted), before)
    assert torch.equal(forward(unpatch_model(adapted.unload())), forward(original))


def test_a_new_embedding_is_centred() -> None:
    original, model = gpt2(), patch_model(gpt2())
    for changed in (original, model):
        torch.manual_seed(0)
        changed.set_input_embeddings(torch.nn.Embedding(53, 24))
    assert torch.equal(original.transformer.wte.weight, model.transformer.wte.weight)
    torch.testing.assert_close(forward(model), forward(original), rtol=1e-5, atol=1e-5)
    unpatch_model(model)
    assert not model.transformer.wte._forward_hooks
