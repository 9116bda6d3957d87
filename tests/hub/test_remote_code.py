"""Models that come with their own code (`trust_remote_code=True`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import config_of, forward, randomised, train
from torch import nn
from transformers import AutoModelForCausalLM

import hf_rmsnorm
from hf_rmsnorm import RMSNorm, apply_plan, cli, patch_model, patch_report

CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

class MineConfig(PreTrainedConfig):
    model_type = "mine"
    vocab_size: int = 53
    hidden_size: int = 24

class MineForCausalLM(PreTrainedModel):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        return CausalLMOutput(logits=self.head(self.norm(self.embed(input_ids))))
"""
AUTO_MAP = {
    "AutoConfig": "modeling_mine.MineConfig",
    "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code and weights; `auto_map` names one Auto class."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "modeling_mine.py").write_text(CODE)
    config = {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config))
    settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    torch.manual_seed(0)
    model = randomised(AutoModelForCausalLM.from_config(settings, trust_remote_code=True))
    model.save_pretrained(folder)
    return folder


def test_the_class_is_the_one_that_the_repository_names(repository: Path) -> None:
    model = hf_rmsnorm.from_pretrained(repository, trust_remote_code=True).eval()
    assert type(model).__name__ == "MineForCausalLM"
    plain = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True).eval()
    assert torch.equal(forward(model), forward(plain))


@pytest.mark.parametrize("more", [[], ["--random-weights"]])
def test_the_command_line_finds_it_too(more: list[str], repository: Path, capsys: Any) -> None:
    assert cli.main(["inspect", str(repository), "--trust-remote-code", *more]) == 0
    assert "1 exact" in capsys.readouterr().out


def test_an_exact_one_is_saved_with_its_code(repository: Path, tmp_path: Path) -> None:
    model = hf_rmsnorm.from_pretrained(repository, trust_remote_code=True).eval()
    patch_model(model).save_pretrained(tmp_path / "exact")
    assert config_of(tmp_path / "exact")["auto_map"] == AUTO_MAP
    again = hf_rmsnorm.from_pretrained(tmp_path / "exact", trust_remote_code=True).eval()
    assert type(again.norm) is RMSNorm and torch.equal(forward(again), forward(model))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "exact", trust_remote_code=True).eval()
    assert type(stock.norm) is nn.LayerNorm
    torch.testing.assert_close(forward(stock), forward(model))


def trained(model: Any) -> Any:
    patch_model(model)
    train(model)
    return model


def partial(model: Any) -> Any:
    return patch_model(model, "prmsnorm", p=0.25, strategy="direct")


@pytest.mark.parametrize("patch", [trained, partial])
def test_any_other_is_saved_for_who_builds_the_model(
    patch: Callable, repository: Path, tmp_path: Path
) -> None:
    load = AutoModelForCausalLM.from_pretrained
    model = patch(load(repository, trust_remote_code=True).eval())
    with pytest.warns(UserWarning, match="MineForCausalLM is not a class of transformers"):
        model.save_pretrained(tmp_path / "saved")
    other = load(repository, trust_remote_code=True).eval()
    apply_plan(other, patch_report(model).plan)
    weights = transformers.modeling_utils.load_state_dict(tmp_path / "saved" / "model.safetensors")
    other.load_state_dict(weights)
    assert torch.equal(forward(other), forward(model))
    with pytest.raises((hf_rmsnorm.PatchError, ValueError)):
        load(tmp_path / "saved", trust_remote_code=True)
