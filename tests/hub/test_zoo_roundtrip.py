"""Saved and loaded again, patched models of many architectures compute the same bits.

Most are the zoo's tiny models, so each comes with the head that its entry has. Left out are those
whose stock round trip is no identity (positions that are computed anew, a random mask), and those
that no Auto class loads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model_zoo
import pytest
import torch
import transformers
from model_zoo.sizes import BERT, D, F, H, V, model
from safetensors.torch import load_file, save_file
from tiny_models import config_of, contents, run_python
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import hf_rmsnorm
from hf_rmsnorm import PartialRMSNorm, RMSNorm, patch_model, patch_report

# Exact, or nearly: each one's plan decides the format.
STOCK = [
    *("gpt2-untied", "gpt-neo", "gptj", "gpt-neox", "opt-pre-proj", "falcon-40b", "mpt", "phi"),
    *("stablelm-qk", "starcoder2", "gpt-bigcode", "codegen", "cohere-qk", "olmo", "nemotron"),
    *("persimmon", "dbrx", "phimoe", "ctrl", "biogpt", "whisper", "vit", "vit-base", "deit"),
    *("beit", "dinov2", "yolos", "videomae", "clip-text", "data2vec-vision"),
]
OWN = [
    *("openai-gpt", "opt-350m", "bloom", "modernbert", "roberta-prelayernorm", "bert", "albert"),
    *("distilbert", "esm", "xlm", "mpnet", "convnext", "sam-vision", "hiera", "reformer", "bart"),
]
# Where every LayerNorm, or RMSNorm, becomes pRMSNorm and no weight is touched.
MORE = [
    *("bert-base", "electra", "deberta", "deberta-v2", "fnet", "canine", "perceiver-mlm", "funnel"),
    *("layoutlm", "modernbert-decoder", "gpt2", "rwkv", "decision-transformer", "nllb-moe"),
    *("speech2text", "seamless-m4t", "swin", "segformer", "cvt", "dpt", "mobilevit", "vitdet"),
    *("clip", "siglip", "llava-neox", "blip", "git", "groupvit", "paligemma", "qwen2-vl"),
    *("wav2vec2", "hubert-stable"),
]
GQA = {**BERT, "num_key_value_heads": 1}
RMS = {
    "llama": model("LlamaForCausalLM", "LlamaConfig", **GQA),
    "gemma2": model("Gemma2ForCausalLM", "Gemma2Config", **GQA, head_dim=8),
    "qwen3": model("Qwen3ForCausalLM", "Qwen3Config", **GQA, head_dim=8),
    "olmo2": model("Olmo2ForCausalLM", "Olmo2Config", **GQA),
    "mixtral": model("MixtralForCausalLM", "MixtralConfig", **GQA, num_local_experts=4),
    "t5": model(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=V,
        d_model=D,
        d_ff=F,
        d_kv=8,
        num_layers=2,
        num_heads=H,
        decoder_start_token_id=0,
    ),
}


def composed() -> Any:
    parts = [transformers.BertConfig(**BERT), transformers.BertConfig(**BERT)]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config)


# What builds parts of itself through AutoModel, from the config that has the patch.
HEADS = {
    "encoder-decoder": composed,
    "llama-classifier": model(
        "LlamaForSequenceClassification", "LlamaConfig", **GQA, num_labels=5, pad_token_id=0
    ),
    "starcoder2-tokens": model(
        "Starcoder2ForTokenClassification", "Starcoder2Config", **GQA, num_labels=5
    ),
}


def build(name: str) -> Any:
    if name in model_zoo.ZOO:
        return model_zoo.build(name)
    found = {**RMS, **HEADS}[name]()
    model_zoo.randomise(found)
    return found.eval()


def tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (dict, list, tuple)):
        for part in output.values() if isinstance(output, dict) else output:
            yield from tensors(part)


def outputs(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        found = list(tensors(model(**inputs)))
    assert found
    return found


def assert_equal(model: Any, loaded: Any, inputs: dict[str, Any]) -> None:
    """The same class, weights under the same names, and outputs, bit for bit."""
    assert type(loaded) is type(model)
    weights, found = model.state_dict(), loaded.state_dict()
    assert list(found) == list(weights)
    assert [name for name in weights if not torch.equal(found[name], weights[name])] == []
    for parameter in loaded.parameters():
        # safetensors leaves weights at addresses where matrix products may round differently
        parameter.data = parameter.data.clone()
    results = zip(outputs(loaded, inputs), outputs(model, inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in results)


def assert_written_alike(first: Path, second: Path) -> None:
    """The same files, but for dtypes in the config, which transformers notes on loading."""
    one, two = contents(first), contents(second)
    if one.pop("config.json") != two.pop("config.json"):
        assert without_dtypes(config_of(first)) == without_dtypes(config_of(second))
    assert one == two


def without_dtypes(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: without_dtypes(value) for key, value in config.items() if key != "dtype"}


def auto_class(base: Any) -> Any:
    """The first Auto class that offers this model class of transformers."""
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        if isinstance(auto, type) and mapping is not None and base.config_class in mapping:
            found = mapping[base.config_class]
            if base in (found if isinstance(found, tuple) else (found,)):
                return auto
    raise LookupError(base)


def norms(model: nn.Module) -> list[type]:
    wanted = [s.name for s in patch_report(model).sites if s.verdict != "kept"]
    return [type(model.get_submodule(name)) for name in wanted]


@pytest.mark.parametrize("name", [*STOCK, *OWN])
@pytest.mark.filterwarnings("ignore:.*approximately")
def test_rmsnorm(name: str, tmp_path: Path) -> None:
    model = build(name)
    base, inputs = type(model), model_zoo.inputs_for(name, model)
    original = outputs(model, inputs[0])
    patch_model(model, inputs=inputs[:1], verify=False)
    model.save_pretrained(tmp_path / "first")
    stock = name in STOCK
    assert config_of(tmp_path / "first")["model_type"] == (
        model.config.model_type if stock else "hf_rmsnorm"
    )
    loaded = hf_rmsnorm.from_pretrained(tmp_path / "first").eval()
    assert set(norms(loaded)) == {RMSNorm}
    loaded.save_pretrained(tmp_path / "second")
    assert_written_alike(tmp_path / "first", tmp_path / "second")
    assert_equal(model, loaded, inputs[0])

    loaded = auto_class(base).from_pretrained(tmp_path / "first").eval()
    if not stock:
        return assert_equal(model, loaded, inputs[0])
    assert type(loaded) is base
    for found, wanted in zip(outputs(loaded, inputs[0]), original, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    return None


@pytest.mark.parametrize("name", [*MORE, *STOCK[::3], *OWN[::3], *RMS, *HEADS])
def test_prmsnorm(name: str, tmp_path: Path) -> None:
    model = build(name)
    base, inputs = type(model), model_zoo.inputs_for(name, model)[0]
    patch_model(model, "prmsnorm", p=0.3, strategy="direct")
    model.save_pretrained(tmp_path / "first")
    loaded = auto_class(base).from_pretrained(tmp_path / "first").eval()
    assert set(norms(loaded)) == {PartialRMSNorm}
    loaded.save_pretrained(tmp_path / "second")
    assert_written_alike(tmp_path / "first", tmp_path / "second")
    assert_equal(model, loaded, inputs)


# In float64, so that a formula that is not quite the same shows.
STRANGER = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file

chosen = {}
for folder, auto, inputs in json.loads(sys.argv[1]):
    load = getattr(transformers, auto).from_pretrained
    try:
        load(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error)
    else:
        raise AssertionError(f"{auto} loaded {folder} as something else")
    model = load(folder, trust_remote_code=True).double().eval()
    chosen[folder] = [model.config._attn_implementation, model.config._experts_implementation]
    if chosen[folder][1]:
        model.set_experts_implementation("eager")  # the only one that knows float64
    given = {k: v.double() if v.is_floating_point() else v for k, v in load_file(inputs).items()}
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**given)[0]
    save_file({"output": output.contiguous()}, f"{folder}/output.safetensors")
    model.float().save_pretrained(f"{folder}-again")
print("CHOSEN", json.dumps(chosen))
"""


@pytest.mark.launch
def test_strangers_compute_the_same(tmp_path: Path) -> None:
    jobs, models = [], {}
    for name in ("t5", "mixtral", "clip", "wav2vec2", "convnext", "olmo", *HEADS):
        model = build(name)
        inputs = model_zoo.inputs_for(name, model)[0]
        folder, given = tmp_path / name, tmp_path / f"{name}.safetensors"
        auto = auto_class(type(model))
        patch_model(model, "prmsnorm", p=0.3, strategy="direct").save_pretrained(folder)
        save_file({k: v for k, v in inputs.items() if isinstance(v, Tensor)}, given)
        jobs.append((str(folder), auto.__name__, str(given)))
        models[name] = model, load_file(given)
    cache = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = run_python(STRANGER, json.dumps(jobs), package=False, env=cache)
    assert run.returncode == 0, run.stderr
    chosen = json.loads(run.stdout.partition("CHOSEN")[2])
    for name, (model, inputs) in models.items():
        config = model.config
        ours = [config._attn_implementation, config._experts_implementation]
        assert chosen[str(tmp_path / name)] == ours
        again = hf_rmsnorm.from_pretrained(tmp_path / f"{name}-again").eval()
        assert_equal(model, again, inputs)
        given = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        theirs = load_file(tmp_path / name / "output.safetensors")["output"]
        if config._experts_implementation:
            model.set_experts_implementation("eager")
        expected = outputs(model.double(), given)[0]
        assert theirs.dtype == torch.float64 and theirs.shape == expected.shape
        assert (theirs - expected).norm() <= 1e-12 * expected.norm()
