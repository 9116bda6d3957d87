"""What a checkpoint lacks is named, and never loads as random numbers."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import config_of, forward, gpt2, randomised

import hf_rmsnorm
from hf_rmsnorm import PatchError, patch_model

AUTO = transformers.AutoModelForCausalLM
LOST = "transformer.h.1.mlp.c_fc.weight"


@pytest.fixture(params=["plain", "stock", "own"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = gpt2()
    if request.param != "plain":
        patch_model(model, strategy="direct" if request.param == "own" else "auto")
    model.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


def change_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **changes}))


def test_missing_weights_are_named(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop(LOST))
    with pytest.raises(PatchError, match=rf"{folder}: 1 weights are missing .* {LOST} among them"):
        hf_rmsnorm.from_pretrained(folder)
    with pytest.raises(PatchError, match=LOST):
        hf_rmsnorm.from_pretrained(folder, output_loading_info=True, new_weights="*.ln_1.*")
    if folder.name != "stock":  # where a record says that it is centred
        model, info = hf_rmsnorm.from_pretrained(
            folder, output_loading_info=True, new_weights=["*.c_fc.weight"]
        )
        assert info["missing_keys"] == {LOST} and model.get_parameter(LOST).std() > 0
    if folder.name == "own":
        with pytest.raises(PatchError, match=LOST):
            AUTO.from_pretrained(folder)


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    edit_config(folder, n_positions=17)
    with pytest.raises(PatchError, match=r"transformer.wpe.weight \(of shape \[16, 24\]\) among"):
        hf_rmsnorm.from_pretrained(folder)
    if folder.name == "plain":
        loaded = hf_rmsnorm.from_pretrained(folder, ignore_mismatched_sizes=True)
        assert loaded.transformer.wpe.weight.shape == (17, 24)
    if folder.name == "own":
        with pytest.raises(PatchError, match=r"transformer.wpe.weight"):
            AUTO.from_pretrained(folder)


def test_a_new_head_that_was_asked_for_starts_at_random(folder: Path) -> None:
    auto = transformers.AutoModelForSequenceClassification
    model, info = auto.from_pretrained(folder, output_loading_info=True, num_labels=3)
    assert info["missing_keys"] == {"score.weight"} and model.score.weight.shape[0] == 3
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    again, info = hf_rmsnorm.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(again.score.weight, model.score.weight)
    with pytest.raises(PatchError, match=r"score.weight \(of shape \[3, 24\]\) among them"):
        hf_rmsnorm.from_pretrained(folder, num_labels=5)
    other = hf_rmsnorm.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    assert other.score.weight.shape == (5, 24)
    if folder.name == "own":
        change_weights(folder, lambda weights: weights.pop(LOST))
        with pytest.raises(PatchError, match=LOST):
            auto.from_pretrained(folder)


def test_a_pooler_that_the_saved_class_has_not_is_a_new_head(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=53,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
    )
    model: Any = randomised(transformers.BertForMaskedLM(config))
    patch_model(model, strategy="direct").save_pretrained(tmp_path)
    auto = transformers.AutoModelForSequenceClassification
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert info["missing_keys"] == {*pooler, "classifier.weight", "classifier.bias"}
    assert type(loaded).__name__ == "BertForSequenceClassification"


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": Path("x")}, 2))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a list": (lambda f: (f / "config.json").write_text("[1, 2]"), "holds a list, where an object"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "config.json is not JSON"),
    "nested": (lambda f: edit_config(f, x=nested(500)), "nested more than 64 deep"),
    "deeper": (
        lambda f: (f / "config.json").write_text("[" * 100_000 + "]" * 100_000),
        "config.json is not JSON",
    ),
    "no class": (lambda f: edit_config(f, architectures=["AutoTokenizer"]), "which is no model"),
    "no name": (lambda f: edit_config(f, architectures=[{"a": 1}]), "must be a list of names"),
    "a number": (lambda f: edit_config(f, architectures=7), "must be a list of names"),
    "pickled": (pickled, "does not load"),
    "a size of text": (lambda f: edit_config(f, n_embd="many"), "does not load"),
    "heads that do not divide": (lambda f: edit_config(f, n_head=5), "does not load"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_typed_errors(folder: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises(PatchError, match=message) as raised:
        hf_rmsnorm.from_pretrained(folder)
    assert str(folder) in str(raised.value)


def test_a_damaged_config_is_written_over(folder: Path) -> None:
    model = hf_rmsnorm.from_pretrained(folder)
    for text in ("[1, 2]", "{", "[" * 100_000):
        (folder / "config.json").write_text(text)
        model.save_pretrained(folder)
        assert torch.equal(forward(hf_rmsnorm.from_pretrained(folder)), forward(model))


def test_whole_checkpoints_load_as_ever(folder: Path) -> None:
    expected = forward(AUTO.from_pretrained(folder))
    loaded, info = hf_rmsnorm.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    torch.testing.assert_close(forward(loaded), expected, atol=1e-5, rtol=1e-5)
