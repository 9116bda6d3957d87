"""The loop: token normalisation, weight decay, order, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import BLOCK, OVERRIDES, Assets, Script, read, weights
from harness import models
from harness.args import ModelArguments, TrainArguments
from harness.arms import NORMS, Arm
from harness.data import Data, TokenBlocks
from harness.training import Run, parameter_groups

pytestmark = pytest.mark.filterwarnings("ignore:.*changed approximately:UserWarning")


def build(assets: Assets, norm: str = "layernorm") -> Any:
    args = ModelArguments(
        config_name="gpt2", config_overrides=OVERRIDES, tokenizer_name=str(assets.tokenizer)
    )
    tokenizer = models.load_tokenizer(args)
    model = models.load_model(args, models.load_config(args, tokenizer), tokenizer, seed=0)
    strategy = "direct" if NORMS[norm].strategy else None
    return Arm.make(norm, strategy).apply(model)


def some_data(vocabulary: int = 200) -> Data:
    tokens = np.random.default_rng(0).integers(0, vocabulary, 40 * BLOCK, dtype=np.int32)
    blocks = TokenBlocks(tokens, BLOCK)
    return Data(blocks.take(0, 36), blocks.take(36, None))


def batch(ids: torch.Tensor, ignored: list[int]) -> dict[str, torch.Tensor]:
    """Sequences whose first tokens, `ignored[i]` of row i, are no targets."""
    labels = ids.clone()
    for row, count in enumerate(ignored):
        labels[row, :count] = -100
    return {"input_ids": ids, "labels": labels}


Gradients = dict[str, torch.Tensor]


def step_once(assets: Assets, group: list[dict[str, torch.Tensor]]) -> tuple[float, Gradients]:
    """Loss and gradients of one optimizer step on the batches of `group`."""
    model = build(assets).eval()  # no dropout
    args = TrainArguments(cpu=True, per_device_train_batch_size=1, max_train_steps=1)
    run = Run(Accelerator(cpu=True), model, some_data(), args, seed=0)
    gradients: Gradients = {}
    run.optimizer.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    nll, tokens, _ = run.step(group)
    return nll / tokens, gradients


def test_accumulation_is_one_big_batch_whatever_the_token_counts(assets: Assets) -> None:
    ids = torch.randint(200, (3, BLOCK), generator=torch.Generator().manual_seed(5))
    ignored = [0, 13, 6]
    loss, gradients = step_once(assets, [batch(ids, ignored)])
    pieces = [batch(ids[:1], ignored[:1]), batch(ids[1:], ignored[1:])]
    split_loss, split = step_once(assets, pieces)
    assert split_loss == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == split.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6)
    # The usual mistake, a mean of the batches' means, would be seen here:
    name = "transformer.wte.weight"
    first, second = (step_once(assets, [piece])[1][name] for piece in pieces)
    assert ((first + second) / 2 - gradients[name]).abs().max() > 1e-3


def test_environment_cannot_rescale_the_loss(
    assets: Assets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch --gradient_accumulation_steps` makes accelerate divide every loss."""
    ids = torch.randint(200, (2, BLOCK), generator=torch.Generator().manual_seed(5))
    _, expected = step_once(assets, [batch(ids, [0, 0])])
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    _, gradients = step_once(assets, [batch(ids, [0, 0])])
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient)


def test_weight_decay_spares_norms_and_biases_of_every_arm_alike(assets: Assets) -> None:
    spared = {}
    for norm in ("layernorm", "rmsnorm", "prmsnorm", "l2norm"):
        model = build(assets, norm)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        decayed, free = parameter_groups(model, 0.1)
        assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0
        assert len(decayed["params"]) + len(free["params"]) == len(names)
        spared[norm] = {names[id(parameter)] for parameter in free["params"]}
    assert "transformer.h.0.ln_1.weight" in spared["layernorm"]
    assert "transformer.h.0.attn.c_attn.bias" in spared["layernorm"]
    assert "transformer.wte.weight" not in spared["layernorm"]
    assert all(names == spared["layernorm"] for names in spared.values())


def test_every_arm_sees_the_same_batches_in_the_same_order(assets: Assets) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    for norm in ("layernorm", "rmsnorm"):
        args = TrainArguments(cpu=True, per_device_train_batch_size=4, max_train_steps=12)
        run = Run(Accelerator(cpu=True), build(assets, norm), some_data(), args, seed=7)
        seen[norm] = []
        run.model.register_forward_pre_hook(
            lambda module, args, kwargs, norm=norm: seen[norm].append(kwargs["input_ids"]),
            with_kwargs=True,
        )
        run.train()
        assert run.progress.epoch == 1 and run.progress.step_in_epoch == 3
    assert len(seen["layernorm"]) == len(seen["rmsnorm"])
    for ours, theirs in zip(seen["rmsnorm"], seen["layernorm"], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("every", ["3", "epoch"])
def test_resumed_run_is_the_uninterrupted_run_bit_by_bit(
    finetune: Script, tmp_path: Path, every: str
) -> None:
    """With dropout, accumulation, an epoch that ends in a smaller step, and a schedule."""
    flags = [
        *("--norm", "prmsnorm", "--p", "0.5", "--strategy", "direct", "--seed", "3"),
        *("--max_train_samples", "26", "--per_device_train_batch_size", "4"),
        *("--gradient_accumulation_steps", "4", "--max_train_steps", "5", "--logging_steps", "2"),
        *("--learning_rate", "1e-2", "--num_warmup_steps", "2", "--weight_decay", "0.1"),
        *("--checkpointing_steps", every),
    ]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert finetune(*flags, "--output_dir", str(straight)) == 0
    names = {"3": ["step_3"], "epoch": ["epoch_1", "epoch_2"]}[every]
    assert sorted(path.name for path in straight.iterdir() if path.is_dir()) == names
    checkpoint = straight / names[0]
    status = finetune(
        *flags, "--output_dir", str(resumed), "--resume_from_checkpoint", str(checkpoint)
    )
    assert status == 0
    ours, theirs = weights(resumed), weights(straight)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (read(folder / "all_results.json") for folder in (resumed, straight))
    for key in ("history", "evaluations", "tokens", "steps", "epochs"):
        assert ours[key] == theirs[key], key
    assert ours["steps"] == 5 and len(ours["history"]) == 2


def test_resume_refuses_another_run(
    finetune: Script, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--max_train_steps", "2", "--checkpointing_steps", "1"]
    folder = tmp_path / "run"
    latest = ["--resume_from_checkpoint", "latest"]
    assert finetune(*flags, "--output_dir", str(folder), *latest) == 2
    assert "no checkpoint to resume from" in capsys.readouterr().err
    assert finetune(*flags, "--output_dir", str(folder)) == 0
    assert finetune(*flags, "--output_dir", str(folder), *latest, "--learning_rate", "1e-3") == 2
    complaint = capsys.readouterr().err
    assert "step_2" in complaint and "training" in complaint
    assert finetune(*flags, "--output_dir", str(folder), *latest) == 0
    assert finetune(*flags, "--output_dir", str(folder), "--resume_from_checkpoint", "text") == 2
    assert "there is no such folder" in capsys.readouterr().err
