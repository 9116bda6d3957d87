"""What a record keeps of each layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from model_zoo import build, inputs_for
from tiny_models import config_of, gpt2, randomised

import hf_rmsnorm
from hf_rmsnorm import patch_model, patch_report
from hf_rmsnorm.hub.records import digest


@pytest.fixture
def bert() -> Any:
    model = build("bert")
    with pytest.warns(UserWarning, match="approximately"):
        patch_model(model, inputs=inputs_for("bert", model))
    return model


def test_every_layer_keeps_its_own_reason_and_leftover(bert: Any, tmp_path: Path) -> None:
    sites = patch_report(bert).sites
    assert len({site.reason for site in sites if "output.LayerNorm" in site.name}) > 2
    bert.save_pretrained(tmp_path)
    for load in (hf_rmsnorm.from_pretrained, transformers.AutoModelForMaskedLM.from_pretrained):
        again = patch_report(load(tmp_path)).sites
        assert [(s.name, s.reason) for s in again] == [(s.name, s.reason) for s in sites]
        for one, other in zip(again, sites, strict=True):
            assert one.leftover == pytest.approx(other.leftover, rel=1e-2)
            assert one.mean_free == other.mean_free
    card = (tmp_path / "README.md").read_text()
    for site in sites:
        assert site.reason.replace("|", "\\|") + " |" in card


def test_a_record_of_many_layers_stays_small() -> None:
    size = {}
    for layers in (2, 12):
        config = transformers.BertConfig(
            vocab_size=53,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
        model = randomised(transformers.BertModel(config))
        with pytest.warns(UserWarning, match="approximately"):
            patch_model(model)
        size[layers] = len(json.dumps(model.config.hf_rmsnorm))
    assert (size[12] - size[2]) / 10 < 150, "bytes for a layer, which has two norms"


def test_another_depth(tmp_path: Path) -> None:
    model = gpt2()
    patch_model(model, strategy="direct").save_pretrained(tmp_path)
    config = config_of(tmp_path)
    record = config["hf_rmsnorm"]
    row = next(row for row in record["sites"] if row["name"] == "h.*.ln_1")
    row["reason"], row["leftover"] = ["up to", ["1", "2", "3"], "of it"], [1.0, 2.0, 3.0]
    record["digest"] = digest(record)
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 4}))
    settings = transformers.AutoConfig.from_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_config(settings)
    found = [s for s in patch_report(again).sites if s.name.endswith("ln_1")]
    assert [s.reason for s in found] == [f"up to {i} of it" for i in (1, 2, 3, 3)]
    assert [s.leftover for s in found] == [1.0, 2.0, 3.0, 3.0]
