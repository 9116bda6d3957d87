"""Adapters of `peft` on patched models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tiny_models import forward, gpt2, train

from hf_rmsnorm import patch_model


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
