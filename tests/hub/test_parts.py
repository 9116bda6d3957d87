"""Parts that were patched by themselves, and the models around them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import TOKENS, config_of, contents, forward, gpt2, run_python, train
from torch import nn

import hf_rmsnorm
from hf_rmsnorm import PartialRMSNorm, PatchError, RMSNorm, patch_model, unpatch_model

INPUTS = {"hidden_states": torch.randn(1, 4, 24)}


def patched_base(model: Any) -> None:
    patch_model(model.transformer)


def patched_block(model: Any) -> None:
    patch_model(model.transformer.h[1], strategy="direct")


def patched_norm(model: Any) -> None:
    patch_model(model.transformer.ln_f, strategy="direct")


def patched_twice(model: Any) -> None:
    patch_model(model, strategy="exact", exclude="*.h.1.*")
    patch_model(model.transformer.h[1], strategy="direct")


WAYS = [patched_base, patched_block, patched_norm, patched_twice]


def norms(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if type(m) in (RMSNorm, PartialRMSNorm)]


@pytest.mark.parametrize("patch", WAYS)
def test_the_whole_is_saved_as_what_it_computes(patch: Callable, tmp_path: Path) -> None:
    model = gpt2()
    patch(model)
    train(model)
    model.save_pretrained(tmp_path / "model")
    assert config_of(tmp_path / "model")["model_type"] == "hf_rmsnorm"
    assert (tmp_path / "model" / "modeling_hf_rmsnorm.py").exists()
    for load in (
        hf_rmsnorm.from_pretrained,
        transformers.AutoModelForCausalLM.from_pretrained,
    ):
        again = load(tmp_path / "model").eval()
        assert norms(again) == norms(model)
        assert torch.equal(forward(again), forward(model))
    again.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "modeling_hf_rmsnorm.py"):
        assert contents(tmp_path / "again")[name] == contents(tmp_path / "model")[name]


def test_saving_leaves_the_model_and_unpatching_ends_it(tmp_path: Path) -> None:
    model, plain = gpt2(), gpt2()
    plain.save_pretrained(tmp_path / "plain")
    config, cls = model.config, type(model)
    patch_model(model.transformer)
    model.save_pretrained(tmp_path / "model", state_dict=dict(model.state_dict()))
    assert config_of(tmp_path / "model")["model_type"] == "hf_rmsnorm"
    assert model.config is config and type(model) is cls
    unpatch_model(model)
    model.save_pretrained(tmp_path / "unpatched")
    assert contents(tmp_path / "unpatched") == contents(tmp_path / "plain")
    gpt2().save_pretrained(tmp_path / "other")
    assert contents(tmp_path / "other") == contents(tmp_path / "plain")


def test_the_trainer_saves_it_too(tmp_path: Path) -> None:
    model = gpt2()
    patch_model(model.transformer)
    settings = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "max_steps": 1}
    rows = [{"input_ids": TOKENS["input_ids"][0], "labels": TOKENS["input_ids"][0]}] * 8
    arguments = transformers.TrainingArguments(**settings, disable_tqdm=True)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    again = hf_rmsnorm.from_pretrained(tmp_path / "model").eval()
    assert norms(again) == norms(model)
    assert torch.equal(forward(again), forward(model.eval()))


def test_a_patched_encoder_inside_another_model(tmp_path: Path) -> None:
    sizes = {"vocab_size": 53, "hidden_size": 24, "intermediate_size": 20}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    torch.manual_seed(0)
    encoder = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    patch_model(encoder, strategy="direct")
    config = transformers.BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    model = transformers.EncoderDecoderModel(
        encoder=encoder, decoder=transformers.BertLMHeadModel(config)
    ).eval()
    model.save_pretrained(tmp_path / "model")
    again = hf_rmsnorm.from_pretrained(tmp_path / "model").eval()
    assert norms(again) == norms(model) != []
    inputs = {"input_ids": TOKENS["input_ids"], "decoder_input_ids": TOKENS["input_ids"]}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_parts_patched_in_ways_that_do_not_go_together(tmp_path: Path) -> None:
    model = gpt2()
    patch_model(model.transformer.ln_f, strategy="direct")
    patch_model(model.transformer.h[0], "prmsnorm", p=0.5, strategy="direct")
    with pytest.raises(PatchError, match=r"transformer\.ln_f .*one checkpoint cannot say that"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.launch
def test_where_it_was_unpickled(tmp_path: Path) -> None:
    model = gpt2()
    patch_model(model.transformer, strategy="direct")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    code = """
import pickle, sys
from pathlib import Path
folder = Path(sys.argv[1])
model = pickle.loads((folder / "model.pkl").read_bytes())
model.save_pretrained(folder / "model")
"""
    run = run_python(code, tmp_path, package=True)
    assert run.returncode == 0, run.stderr
    again = hf_rmsnorm.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(forward(again), forward(model))
