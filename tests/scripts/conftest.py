"""A tiny text, tokenizer and checkpoint, and scripts called in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

BLOCK = 16
OVERRIDES = "n_layer=1,n_embd=32,n_head=2,n_positions=32"


@dataclass(frozen=True)
class Assets:
    folder: Path
    text: Path
    tokenizer: Path
    checkpoint: Path


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    from harness.quickstart import train_tokenizer
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("assets")
    found = Assets(folder, folder / "text.txt", folder / "tokenizer", folder / "checkpoint")
    words = ("the", "norm", "of", "a", "sum", "reads", "what", "every", "layer", "writes", "once")
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(len(words), (4000,), generator=generator).tolist()
    lines = [" ".join(words[i] for i in picks[n : n + 10]) + ".\n" for n in range(0, 4000, 10)]
    found.text.write_text("".join(lines))
    train_tokenizer(found.text, found.tokenizer, vocabulary=300)

    torch.manual_seed(0)
    tokens = len(AutoTokenizer.from_pretrained(found.tokenizer))
    config = GPT2Config(
        n_layer=1, n_embd=32, n_head=2, n_positions=32, vocab_size=tokens, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # as after training: weights with a mean, norms with gain and bias
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) + 0.05
    model.save_pretrained(found.checkpoint)
    AutoTokenizer.from_pretrained(found.tokenizer).save_pretrained(found.checkpoint)
    return found


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these tiny models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """accelerate keeps its settings in process-wide singletons; every test starts without."""
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.setattr(sys, "argv", ["script"])
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


Script = Callable[..., int]


def _call(main: Callable, argv: list[str]) -> int:
    from harness import errors

    try:
        return errors.run(main, argv)
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)


@pytest.fixture
def finetune(assets: Assets, tmp_path: Path) -> Script:
    """Calls finetune_clm.py with a tiny model's defaults; returns the exit status."""
    import finetune_clm

    def call(*argv: str, start: str = "checkpoint", data: bool = True) -> int:
        return _call(finetune_clm.main, [*common_flags(assets, start, data), *argv])

    return call


@pytest.fixture
def compare(assets: Assets, tmp_path: Path) -> Script:
    """Calls compare.py with a tiny model's defaults; returns the exit status."""
    import compare as script

    def call(*argv: str, start: str = "checkpoint", data: bool = True) -> int:
        return _call(script.main, [*common_flags(assets, start, data), *argv])

    return call


def common_flags(assets: Assets, start: str = "checkpoint", data: bool = True) -> list[str]:
    starts = {
        "checkpoint": ["--model_name_or_path", str(assets.checkpoint)],
        "scratch": [
            *("--config_name", "gpt2", "--config_overrides", OVERRIDES),
            *("--tokenizer_name", str(assets.tokenizer)),
        ],
        "": [],
    }
    text = ["--train_file", str(assets.text), "--block_size", str(BLOCK)] if data else []
    cache = str(assets.folder / "cache")
    return [*starts[start], *text, "--cache_dir", cache, "--cpu", "--max_eval_samples", "6"]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
