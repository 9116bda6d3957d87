"""Tiny models with random norm weights and biases, and what the hub tests ask of them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

TOKENS = {"input_ids": torch.tensor([[5, 9, 2, 40, 11, 7]])}


def randomised(model: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def gpt2(seed: int = 3, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 53, "n_embd": 24, "n_layer": 3, "n_head": 2, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, **kwargs)
    return randomised(transformers.GPT2LMHeadModel(config))


def gemma() -> Any:
    torch.manual_seed(0)
    config = transformers.GemmaConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
    )
    return randomised(transformers.GemmaForCausalLM(config))


def forward(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**TOKENS)[0]


def train(model: nn.Module, rate: float = 1e-3) -> None:
    """One step of a real optimizer."""
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
    logits = model(**TOKENS)[0]
    (logits * torch.randn_like(logits)).sum().backward()
    optimizer.step()
    model.zero_grad()
    model.eval()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def contents(folder: Path) -> dict[str, str]:
    """Every file below `folder` and the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_rmsnorm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def run_python(
    code: str, *arguments: object, package: bool, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, where `hf_rmsnorm` can be imported or cannot."""
    return subprocess.run(
        [sys.executable, "-c", code if package else BLOCK + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
    )
