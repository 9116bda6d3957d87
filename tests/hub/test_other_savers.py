"""Libraries that save weights on their own. Needs `diffusers`, which the tests do not install."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import randomised
from torch import Tensor, nn

from hf_rmsnorm import apply_plan, patch_model, patch_report

diffusers = pytest.importorskip("diffusers")

SIZES: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def output(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    states = torch.randn(1, 5, 24, generator=generator)
    with torch.no_grad():
        return model(sample, torch.tensor([3]), encoder_hidden_states=states)[0]


def test_a_unet(tmp_path: Path, caplog: Any) -> None:
    torch.manual_seed(0)
    model = randomised(diffusers.UNet2DConditionModel(**SIZES))
    patch_model(model, "prmsnorm", p=0.25, strategy="direct")
    model.save_pretrained(tmp_path)
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        plain = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert "not used" in caplog.text and "hf_rmsnorm_p" in caplog.text
    assert not torch.equal(output(plain.eval()), output(model))
    apply_plan(plain, patch_report(model).plan)
    assert torch.equal(output(plain), output(model))
