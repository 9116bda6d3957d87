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
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny_models import TOKENS, forward, gpt2, train

import hf_rmsnorm
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


def lora(**settings: Any) -> Any:
    return LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **settings)


def partial(model: Any) -> Any:
    return patch_model(model, "prmsnorm", p=0.25, strategy="direct")


def base_patched(model: Any) -> Any:
    """Which folds its tied embedding: another function."""
    patch_model(model.transformer)
    return model


PATCHES: dict[str, Callable] = {
    "plain": as_it_is,
    "exact": patch_model,
    "partial": partial,
    "inner": base_patched,
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of trained adapters, beside their unpatched base, by the patch of that."""
    found = {}
    for name, patch in PATCHES.items():
        found[name] = tmp_path_factory.mktemp(name)
        gpt2().save_pretrained(found[name] / "base")
        base = transformers.AutoModelForCausalLM.from_pretrained(found[name] / "base")
        model = get_peft_model(patch(base), lora(task_type="CAUSAL_LM"))
        train(model, 1e-2)
        torch.save(forward(model), found[name] / "output.pt")
        model.save_pretrained(found[name] / "adapter")
    return found


def by_peft(model: Any, folder: Path) -> Any:
    return PeftModel.from_pretrained(model, folder)


def beside_another(model: Any, folder: Path) -> Any:
    adapted = get_peft_model(model, lora())
    adapted.load_adapter(folder, "second")
    adapted.set_adapter("second")
    return adapted


def over_its_own(model: Any, folder: Path) -> Any:
    """As a Trainer resumes."""
    adapted = get_peft_model(model, lora())
    adapted.load_adapter(folder, "default", is_trainable=True)
    return adapted


def by_transformers(model: Any, folder: Path) -> Any:
    model.load_adapter(str(folder))
    return model


@pytest.mark.filterwarnings("ignore:.*missing adapter keys", "ignore:.*multiple adapters")
@pytest.mark.parametrize("base", PATCHES)
@pytest.mark.parametrize("trained_on", PATCHES)
@pytest.mark.parametrize("load", [by_peft, beside_another, over_its_own, by_transformers])
def test_an_adapter_is_loaded_onto_its_own_base_alone(
    trained_on: str, base: str, load: Callable, adapters: dict[str, Path]
) -> None:
    model = PATCHES[base](gpt2())
    folder = adapters[trained_on]
    if base == trained_on:
        loaded = load(model, folder / "adapter").eval()
        assert torch.equal(forward(loaded), torch.load(folder / "output.pt"))
        return
    message = r"adapter_config\.json says (nothing of a patch|that .* patched by hf_rmsnorm)"
    before = forward(model)
    with pytest.raises(PatchError, match=message):
        load(model, folder / "adapter")
    assert torch.equal(forward(model), before)


@pytest.mark.parametrize("trained_on", PATCHES)
def test_the_base_by_its_name_is_the_unpatched_one(
    trained_on: str, adapters: dict[str, Path]
) -> None:
    folder = adapters[trained_on]
    for load in (
        AutoPeftModelForCausalLM.from_pretrained,
        transformers.AutoModelForCausalLM.from_pretrained,
    ):
        if trained_on == "plain":
            wanted = torch.load(folder / "output.pt")
            assert torch.equal(forward(load(folder / "adapter").eval()), wanted)
            continue
        with pytest.raises(PatchError, match=r"this \w+ is not patched: load its base with"):
            load(folder / "adapter")


@pytest.mark.parametrize("patch", [patch_model, partial, base_patched])
def test_a_base_that_is_saved_and_loaded_is_the_same_base(patch: Callable, tmp_path: Path) -> None:
    patch(gpt2()).save_pretrained(tmp_path / "base")
    first = hf_rmsnorm.from_pretrained(tmp_path / "base")
    for i, base in enumerate((patch(gpt2()), first)):
        model = get_peft_model(base, lora())
        train(model, 1e-2)
        model.save_pretrained(tmp_path / str(i))  # without a task
        for other in (patch(gpt2()), hf_rmsnorm.from_pretrained(tmp_path / "base")):
            again = PeftModel.from_pretrained(other, tmp_path / str(i)).eval()
            torch.testing.assert_close(forward(again), forward(model))
        stock = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        with pytest.raises(PatchError, match="is not patched: load its base with"):
            PeftModel.from_pretrained(stock, tmp_path / str(i))


def test_exact_is_exact_whichever_strategy_it_came_by(tmp_path: Path) -> None:
    model = get_peft_model(patch_model(gpt2(), strategy="exact"), lora())
    train(model, 1e-2)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(patch_model(gpt2()), tmp_path).eval()
    torch.testing.assert_close(forward(again), forward(model))
    with pytest.raises(PatchError, match="is patched otherwise"):
        PeftModel.from_pretrained(patch_model(gpt2(), strategy="direct"), tmp_path)


def test_transformers_own_adapters_are_marked_too(tmp_path: Path) -> None:
    model = patch_model(gpt2())
    model.add_adapter(lora())
    train(model, 1e-2)
    model.save_pretrained(tmp_path)
    again = patch_model(gpt2())
    again.load_adapter(str(tmp_path))
    assert torch.equal(forward(again.eval()), forward(model))
    with pytest.raises(PatchError, match="is not patched"):
        gpt2().load_adapter(str(tmp_path))


@pytest.mark.parametrize("load", [by_peft, by_transformers])
@pytest.mark.parametrize("part", ["ln_f", "h.1"])
def test_norms_that_are_part_of_an_adapter(load: Callable, part: str, tmp_path: Path) -> None:
    model = get_peft_model(patch_model(gpt2()), lora(modules_to_save=[part]))
    train(model, 1e-2)
    model.save_pretrained(tmp_path)
    again = load(patch_model(gpt2()), tmp_path).eval()
    assert torch.equal(forward(again), forward(model))


def test_an_adapter_that_was_there_when_the_model_was_patched(tmp_path: Path) -> None:
    model = get_peft_model(gpt2(), lora())
    train(model, 1e-2)
    patch_model(model, inputs=TOKENS)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(patch_model(gpt2()), tmp_path).eval()
    torch.testing.assert_close(forward(again), forward(model), rtol=1e-5, atol=1e-5)
