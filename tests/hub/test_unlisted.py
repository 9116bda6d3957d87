"""Model classes that no Auto class finds by the type of their config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import config_of, randomised, run_python
from torch import Tensor

import hf_rmsnorm
from hf_rmsnorm import PatchError, patch_model

TOKENS = torch.tensor([[5, 9, 2, 40, 11, 7]])


def owlvit() -> tuple[Any, dict[str, Any]]:
    config = transformers.OwlViTTextConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=12,
        eos_token_id=2,
    )
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    return transformers.OwlViTTextModel(config), inputs


def qwen2_vision() -> tuple[Any, dict[str, Any]]:
    from transformers.models.qwen2_vl import configuration_qwen2_vl, modeling_qwen2_vl

    config = configuration_qwen2_vl.Qwen2VLVisionConfig(
        depth=2, embed_dim=24, hidden_size=20, num_heads=2, patch_size=4, mlp_ratio=2
    )
    model = modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(config)
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(0))
    return model, {"hidden_states": pixels, "grid_thw": torch.tensor([[1, 4, 4]])}


def speecht5_encoder() -> tuple[Any, dict[str, Any]]:
    from transformers.models.speecht5 import modeling_speecht5

    config = transformers.SpeechT5Config(
        vocab_size=53,
        hidden_size=24,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=20,
        encoder_layerdrop=0.0,
        encoder_max_relative_position=5,
    )
    model = modeling_speecht5.SpeechT5Encoder(config)
    states = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0))
    return model, {"hidden_states": states}


def other_config() -> tuple[Any, dict[str, Any]]:
    """A model class used with the config of another model."""
    config = transformers.ImageGPTConfig(
        vocab_size=53, n_embd=24, n_layer=2, n_head=2, n_positions=16, activation_function="gelu"
    )
    return transformers.GPT2Model(config), {"input_ids": TOKENS}


BUILD: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "owlvit": owlvit,
    "qwen2_vision": qwen2_vision,
    "speecht5_encoder": speecht5_encoder,
    "other_config": other_config,
}


def built(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = BUILD[name]()
    return randomised(model), inputs


def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("name", BUILD)
def test_they_are_saved_and_loaded_as_what_they_are(name: str, tmp_path: Path) -> None:
    model, inputs = built(name)
    patch_model(model, "prmsnorm", p=0.25, strategy="direct")
    model.save_pretrained(tmp_path / "model")
    expected = output(model, inputs)
    for load in (hf_rmsnorm.from_pretrained, transformers.AutoModel.from_pretrained):
        again = load(tmp_path / "model").eval()
        assert type(again) is type(model)
        assert torch.equal(output(again, inputs), expected)
    again.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path / "model")


@pytest.mark.parametrize("name", ["owlvit", "other_config"])
def test_in_the_stock_format(name: str, tmp_path: Path) -> None:
    model, inputs = built(name)
    patch_model(model, inputs=inputs, strategy="exact")
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["model_type"] == model.config.model_type
    again = hf_rmsnorm.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    torch.testing.assert_close(output(again, inputs), output(model, inputs))


STRANGER = """
import json, sys
from pathlib import Path
import torch, transformers
for folder in map(Path, sys.argv[1:]):
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model(**torch.load(folder / "inputs.pt"))[0], folder / "output.pt")
    model.save_pretrained(folder / "again")
    transformers.AutoModel.from_pretrained(folder / "again", trust_remote_code=True)
"""


@pytest.mark.launch
def test_without_the_package(tmp_path: Path) -> None:
    wanted = {}
    for name in BUILD:
        model, inputs = built(name)
        patch_model(model, "prmsnorm", p=0.25, strategy="direct")
        model.save_pretrained(tmp_path / name)
        torch.save(inputs, tmp_path / name / "inputs.pt")
        wanted[name] = output(model, inputs)
    folders = [tmp_path / name for name in BUILD]
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = run_python(STRANGER, *folders, package=False, env=cache)
    assert run.returncode == 0, run.stderr
    for name, expected in wanted.items():
        found = torch.load(tmp_path / name / "output.pt")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        again = hf_rmsnorm.from_pretrained(tmp_path / name / "again").eval()
        assert torch.equal(output(again, built(name)[1]), expected)


@pytest.mark.parametrize("path", ["models.gpt2.nonesuch.Mine", "os.path.join", "models.gpt2", 3])
def test_a_class_that_is_not_there(path: object, tmp_path: Path) -> None:
    model, _ = built("owlvit")
    patch_model(model, strategy="direct").save_pretrained(tmp_path)
    config = config_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "base_class": path}))
    for load in (hf_rmsnorm.from_pretrained, transformers.AutoModel.from_pretrained):
        with pytest.raises(PatchError, match="this version of transformers has no PreTrained"):
            load(tmp_path)
