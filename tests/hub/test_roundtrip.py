"""Patched models through `save_pretrained` and back; never a LayerNorm model in silence."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import forward, gemma, gpt2
from torch import Tensor, nn

import hf_rmsnorm
from hf_rmsnorm import PartialRMSNorm, PatchError, RMSNorm, patch_model, patch_report
from hf_rmsnorm.hub.records import digest


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Tensor]:
    model = patch_model(gpt2(), "prmsnorm", p=0.25, strategy="direct", exclude="*.h.1.ln_2")
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", forward(model)


def test_every_way_of_loading_gives_the_same_numbers(saved: tuple[Path, Tensor]) -> None:
    path, expected = saved
    loaders = (
        hf_rmsnorm.from_pretrained,
        transformers.AutoModelForCausalLM.from_pretrained,
    )
    for load in loaders:
        model = load(path).eval()
        assert torch.equal(forward(model), expected)
        assert type(model).__name__ == "GPT2LMHeadModel"
        assert type(model.transformer.h[0].ln_2) is PartialRMSNorm
        assert type(model.transformer.h[1].ln_2) is nn.LayerNorm
        assert patch_report(model).plan.p == 0.25


def test_the_base_model_and_other_heads_load_patched(saved: tuple[Path, Tensor]) -> None:
    path, _ = saved
    base = transformers.AutoModel.from_pretrained(path)
    assert type(base).__name__ == "GPT2Model" and type(base.ln_f) is PartialRMSNorm
    base.save_pretrained(path.parent / "base")
    again = transformers.AutoModelForCausalLM.from_pretrained(path.parent / "base")
    assert type(again.transformer.ln_f) is PartialRMSNorm
    torch.manual_seed(0)
    other = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=3)
    assert type(other.transformer.h[2].ln_1) is PartialRMSNorm


def test_a_loaded_model_saves_and_loads_again(saved: tuple[Path, Tensor]) -> None:
    path, expected = saved
    model = hf_rmsnorm.from_pretrained(path)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(2)
    model.save_pretrained(path.parent / "second")
    again = hf_rmsnorm.from_pretrained(path.parent / "second").eval()
    assert torch.equal(forward(again), forward(model.eval()))
    assert not torch.equal(forward(again), expected)


@pytest.mark.launch
@pytest.mark.parametrize(
    "imports",
    [
        "hf_rmsnorm, transformers",
        "transformers, hf_rmsnorm",
        "hf_rmsnorm, transformers.models.gpt2.modeling_gpt2",
        "hf_rmsnorm, peft",
    ],
)
def test_the_order_of_imports_does_not_matter(saved: tuple[Path, Tensor], imports: str) -> None:
    path, _ = saved
    code = (
        f"import {imports}, sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.transformer.ln_f).__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "PartialRMSNorm", run.stderr


def test_unpatched_models_in_the_same_process_are_untouched(saved: tuple[Path, Tensor]) -> None:
    path, _ = saved
    plain = gpt2()
    plain.save_pretrained(path.parent / "plain")
    hf_rmsnorm.from_pretrained(path)
    for load in (
        hf_rmsnorm.from_pretrained,
        transformers.AutoModelForCausalLM.from_pretrained,
        transformers.GPT2LMHeadModel.from_pretrained,
    ):
        model = load(path.parent / "plain").eval()
        assert type(model.transformer.ln_f) is nn.LayerNorm
        assert torch.equal(forward(model), forward(plain))


def test_the_config_is_marked_and_unmarked() -> None:
    model = gpt2()
    shared, before = model.config, model.config.to_dict()
    patch_model(model, strategy="direct")
    assert shared.to_dict() == before, "another model may share the config"
    assert model.config is model.transformer.config
    assert model.config._attn_implementation == shared._attn_implementation
    assert isinstance(model.config, transformers.GPT2Config)
    assert model.config.to_dict()["model_type"] == type(model.config).model_type == "gpt2"
    assert json.loads(model.config.to_json_string())["model_type"] == "hf_rmsnorm"
    assert pickle.loads(pickle.dumps(model.config)).to_dict() == model.config.to_dict()
    hf_rmsnorm.unpatch_model(model)
    assert type(model.config) is transformers.GPT2Config
    assert model.config.to_dict() == before


def test_submodels_with_their_own_config_are_marked_too(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 50, "max_position_embeddings": 9},
        vision_config={**sizes, "image_size": 12, "patch_size": 4},
        projection_dim=8,
    )
    model = patch_model(transformers.CLIPModel(config).eval(), strategy="direct")
    model.save_pretrained(tmp_path / "clip")
    again = hf_rmsnorm.from_pretrained(tmp_path / "clip").eval()
    inputs = {
        "input_ids": torch.tensor([[3, 4, 5, 49]]),
        "pixel_values": torch.randn(1, 3, 12, 12),
    }
    weights, loaded = model.state_dict(), again.state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    with torch.no_grad():  # not bitwise: the stock model's own round trip is not, either
        torch.testing.assert_close(
            again(**inputs).logits_per_image, model(**inputs).logits_per_image
        )
    model.vision_model.save_pretrained(tmp_path / "vision")
    data = json.loads((tmp_path / "vision" / "config.json").read_text())
    assert data["model_type"] == "hf_rmsnorm"


def edit(path: Path, **changes: object) -> None:
    data = json.loads((path / "config.json").read_text())
    for key, value in changes.items():
        data[key] = value
    (path / "config.json").write_text(json.dumps(data))


def signed(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "digest": digest(record)}


def test_damaged_records_are_refused(saved: tuple[Path, Tensor]) -> None:
    path, _ = saved
    record = json.loads((path / "config.json").read_text())["hf_rmsnorm"]
    cases: list[tuple[dict[str, object], str]] = [
        ({"hf_rmsnorm": None}, "no usable 'hf_rmsnorm' record"),
        *(
            (
                {"hf_rmsnorm": {k: v for k, v in record.items() if k != key}},
                "no usable 'hf_rmsnorm' record",
            )
            for key in record
        ),
        ({"hf_rmsnorm": {**record, "version": 99}}, "update the package"),
        ({"hf_rmsnorm": record, "base_model_type": "nonesuch"}, "'nonesuch'"),
    ]
    for changes, message in cases:
        edit(path, **changes)
        for load in (
            hf_rmsnorm.from_pretrained,
            transformers.AutoModelForCausalLM.from_pretrained,
        ):
            with pytest.raises(PatchError, match=message):
                load(path)
    wrong = [{**row, "name": row["name"].replace("ln_f", "norm")} for row in record["sites"]]
    edit(path, hf_rmsnorm={**record, "sites": wrong}, base_model_type="gpt2")
    with pytest.raises(PatchError, match=r"model/config\.json was edited"):
        hf_rmsnorm.from_pretrained(path)
    edit(path, hf_rmsnorm=signed({**record, "sites": wrong}))
    with pytest.raises(PatchError, match=r"names 'transformer.norm', which this GPT2LMHeadModel"):
        hf_rmsnorm.from_pretrained(path)


def test_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"is not a checkpoint: it has no config\.json"):
        hf_rmsnorm.from_pretrained(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PatchError, match="file is not a checkpoint"):
        hf_rmsnorm.from_pretrained(tmp_path / "file")
    with pytest.raises(PatchError, match="nowhere does not exist"):
        hf_rmsnorm.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("strategy", ["auto", "direct"])
def test_half_a_checkpoint_is_refused(tmp_path: Path, strategy: str) -> None:
    def refused(message: str) -> None:
        with pytest.raises(PatchError, match=message):
            hf_rmsnorm.from_pretrained(tmp_path)

    model = patch_model(gpt2(), strategy=strategy)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    refused(f"{shards[1].name} is damaged or incomplete")
    shards[1].write_bytes(b"")
    refused(f"{shards[1].name} is damaged or incomplete")
    shards[1].unlink()
    refused(f"{shards[1].name} is missing")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text()[:50])
    refused(f"{index.name} is damaged")
    for path in (index, *shards):
        path.unlink(missing_ok=True)
    refused("half a checkpoint: it has a config.json, but no weights")


def test_a_stock_record_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    patch_model(gpt2()).save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["hf_rmsnorm"]
    other = [{**row, "name": row["name"].replace("ln_f", "norm")} for row in record["sites"]]
    wide = [{**row, "spec": {**row["spec"], "normalized_shape": [48]}} for row in record["sites"]]
    loose = [*record["folds"], {**record["folds"][0], "name": "h.*.mlp.c_fc.bias"}]
    none = {key: value for key, value in record.items() if key != "folds"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({**record, "version": 99}, r"config\.json has version 99.*update the package"),
        ({**record, "sites": []}, r"config\.json was edited"),
        ({"folds": []}, r"config\.json has no usable 'hf_rmsnorm' record"),
        (signed({**record, "sites": other}), r"config\.json names 'transformer\.norm'"),
        (signed({**record, "sites": wide}), r"config\.json has .* over \(48,\)"),
        (signed({**record, "folds": loose}), r"transformer\.h\.0\.mlp\.c_fc\.bias is not centred"),
        (signed(none), r"config\.json does not say which weights are centred"),
    ]
    for wrong, message in cases:
        edit(tmp_path, hf_rmsnorm=wrong)
        with pytest.raises(PatchError, match=message):
            hf_rmsnorm.from_pretrained(tmp_path)
    edit(tmp_path, hf_rmsnorm=record)
    assert type(hf_rmsnorm.from_pretrained(tmp_path).transformer.ln_f) is RMSNorm


def test_rms_models_with_our_kernel_stay_stock_checkpoints(tmp_path: Path) -> None:
    model = patch_model(gemma())
    model.save_pretrained(tmp_path)
    again = transformers.GemmaForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again.model.norm).__name__ == "GemmaRMSNorm"
    torch.testing.assert_close(forward(again), forward(model))


def test_rms_models_made_partial_keep_their_offset(tmp_path: Path) -> None:
    model = patch_model(gemma(), "prmsnorm", strategy="direct")
    model.save_pretrained(tmp_path)
    again = hf_rmsnorm.from_pretrained(tmp_path).eval()
    assert type(again.model.norm) is PartialRMSNorm and again.model.norm.weight_offset == 1.0
    assert torch.equal(forward(again), forward(model))


@pytest.mark.parametrize("strategy", ["auto", "direct"])
def test_a_model_from_the_config_in_memory_is_patched(strategy: str) -> None:
    model = patch_model(gpt2(), strategy=strategy)
    for auto, kind in (
        (transformers.AutoModelForCausalLM, "GPT2LMHeadModel"),
        (transformers.AutoModel, "GPT2Model"),
    ):
        new = auto.from_config(model.config)
        assert type(new).__name__ == kind
        found = [type(module) for module in new.modules() if isinstance(module, nn.LayerNorm)]
        assert found == [RMSNorm] * 7
