"""Patched checkpoints in the hands of those who don't have the package, and back."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_zoo import build, inputs_for
from safetensors.torch import load_file, save_file
from tiny_models import TOKENS, config_of, forward, gpt2, run_python, train
from torch import Tensor

import hf_rmsnorm
from hf_rmsnorm import patch_model
from hf_rmsnorm.hub import modeling

# Loads every checkpoint that it is told to with the Auto class it is told to, runs it, and saves
# both again.
STRANGER = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file

found = {}
for folder, auto, inputs in json.loads(sys.argv[1]):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        output = model(**load_file(inputs))[0]
    out = Path(folder + "-" + auto)
    model.save_pretrained(out)
    save_file({"output": output}, out / "output.safetensors")
    remote = sys.modules[type(model).__module__]
    found[out.name] = [type(model).__name__, remote.__name__, remote.functional.__class__.__name__]
print("FOUND", json.dumps(found))
"""


def output_of(model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs)[0]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any, Any]]:
    """Name -> (folder, model, inputs), one for each thing that a modeling file has to do."""
    root = tmp_path_factory.mktemp("checkpoints")
    models: dict[str, tuple[Any, dict[str, Any]]] = {}
    with pytest.warns(UserWarning, match="approximately"):
        partial = patch_model(gpt2(), "prmsnorm", p=0.25, exclude="*.h.1.ln_2")
    models["partial"] = partial, TOKENS
    trained = patch_model(gpt2())
    train(trained)
    models["trained"] = trained, TOKENS  # with a centred embedding
    bert = build("bert")
    inputs = inputs_for("bert", bert)
    with pytest.warns(UserWarning, match="approximately"):
        models["widened"] = patch_model(bert, post_norm="extra_neuron", inputs=inputs), inputs[0]
    for name in ("vit-base", "phimoe"):  # with weight conversions
        model = build(name)
        models[name] = patch_model(model, strategy="direct"), inputs_for(name, model)[0]
    found = {}
    for name, (model, inputs) in models.items():
        model.save_pretrained(root / name)
        tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
        save_file(tensors, root / f"{name}-inputs.safetensors")
        found[name] = root / name, model.eval(), tensors
    return found


def visit(checkpoints: Any, jobs: list[tuple[str, str]], *, package: bool) -> dict[str, list[str]]:
    root = next(iter(checkpoints.values()))[0].parent
    orders = [(str(root / n), auto, str(root / f"{n}-inputs.safetensors")) for n, auto in jobs]
    cache = {"HF_MODULES_CACHE": str(root / f"modules-{package}")}
    run = run_python(STRANGER, json.dumps(orders), package=package, env=cache)
    lines = [line for line in run.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, run.stderr
    return json.loads(lines[0].removeprefix("FOUND "))


@pytest.mark.launch
def test_without_the_package_every_head_computes_the_same(
    checkpoints: dict[str, tuple[Path, Any, Any]],
) -> None:
    jobs = [
        ("partial", "AutoModelForCausalLM"),
        ("partial", "AutoModel"),
        ("trained", "AutoModelForCausalLM"),
        ("widened", "AutoModelForMaskedLM"),
        ("vit-base", "AutoModel"),
        ("phimoe", "AutoModelForCausalLM"),
    ]
    found = visit(checkpoints, jobs, package=False)
    for name, auto in jobs:
        folder, model, inputs = checkpoints[name]
        out = folder.with_name(f"{name}-{auto}")
        class_name, module, functional = found[out.name]
        assert module.startswith("transformers_modules.") and functional == "SimpleNamespace"
        part = model if class_name == type(model).__name__ else model.base_model
        assert class_name == type(part).__name__
        theirs, ours = load_file(out / "output.safetensors")["output"], output_of(part, inputs)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)

        # what they saved: still complete, and loaded by the package bit for bit
        assert (out / modeling.FILE).read_text() == modeling.source()
        config = config_of(out)
        assert config["model_type"] == "hf_rmsnorm"
        assert config["auto_map"] == config_of(folder)["auto_map"]
        again = hf_rmsnorm.from_pretrained(out)
        assert type(again).__module__.startswith("hf_rmsnorm.")
        weights = part.state_dict()
        assert all(torch.equal(t, weights[k]) for k, t in again.state_dict().items())
        torch.testing.assert_close(output_of(again, inputs), ours, rtol=1e-6, atol=1e-7)


@pytest.mark.launch
def test_with_the_package_installed_but_not_imported_its_kernels_are_used(
    checkpoints: dict[str, tuple[Path, Any, Any]],
) -> None:
    found = visit(checkpoints, [("partial", "AutoModelForCausalLM")], package=True)
    (class_name, module, functional), folder = *found.values(), checkpoints["partial"][0]
    assert (class_name, functional) == ("GPT2LMHeadModel", "module")
    assert module.startswith("transformers_modules.")
    output = load_file(folder.with_name("partial-AutoModelForCausalLM") / "output.safetensors")
    assert torch.equal(output["output"], forward(checkpoints["partial"][1]))


def test_the_imported_package_comes_before_the_file(
    checkpoints: dict[str, tuple[Path, Any, Any]], tmp_path: Path
) -> None:
    folder, model, _ = checkpoints["partial"]
    (folder / modeling.FILE).rename(tmp_path / modeling.FILE)
    (folder / modeling.FILE).write_text("raise RuntimeError('not to be run')")
    try:
        for trust in (True, False, None):
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=trust
            )
            assert type(loaded).__module__ == "hf_rmsnorm.hub.loading"
            assert torch.equal(forward(loaded.eval()), forward(model))
    finally:
        (tmp_path / modeling.FILE).replace(folder / modeling.FILE)


@pytest.mark.launch
def test_without_trust_it_is_refused_and_stock_needs_none(
    checkpoints: dict[str, tuple[Path, Any, Any]], tmp_path: Path
) -> None:
    exact = patch_model(gpt2())
    exact.save_pretrained(tmp_path / "exact")
    code = """
import sys
import torch, transformers
from safetensors.torch import save_file
own, stock = sys.argv[1:]
for load in (transformers.AutoConfig, transformers.AutoModel, transformers.AutoModelForCausalLM):
    for trust in (False, None):
        try:
            load.from_pretrained(own, trust_remote_code=trust)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise AssertionError(f"{load} loaded it")
model = transformers.AutoModelForCausalLM.from_pretrained(stock).eval()
assert type(model.transformer.ln_f) is torch.nn.LayerNorm
with torch.no_grad():
    tokens = torch.tensor([[5, 9, 2, 40, 11, 7]])
    save_file({"output": model(input_ids=tokens).logits}, stock + "/output.safetensors")
"""
    run = run_python(code, checkpoints["partial"][0], tmp_path / "exact", package=False)
    assert run.returncode == 0, run.stderr
    output = load_file(tmp_path / "exact" / "output.safetensors")["output"]
    torch.testing.assert_close(output, forward(exact))


def test_the_file_names_every_head_and_needs_nothing_else(
    checkpoints: dict[str, tuple[Path, Any, Any]],
) -> None:
    config = config_of(checkpoints["partial"][0])
    heads = {auto: name.partition(".")[2] for auto, name in config["auto_map"].items()}
    assert heads == {
        "AutoConfig": "RMSNormAutoConfig",
        "AutoModel": "GPT2Model",
        "AutoModelForCausalLM": "GPT2LMHeadModel",
        "AutoModelForPreTraining": "GPT2LMHeadModel",
        "AutoModelForQuestionAnswering": "GPT2ForQuestionAnswering",
        "AutoModelForSequenceClassification": "GPT2ForSequenceClassification",
        "AutoModelForTokenClassification": "GPT2ForTokenClassification",
    }
    wanted = {
        alias.name.partition(".")[0]
        for node in ast.parse(modeling.source()).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(str(node.module))])
    }
    standard = {"__future__", "collections", "contextlib", "dataclasses", "types", "typing"}
    standard |= {"enum", "hashlib", "importlib", "json", "math", "re"}
    assert wanted <= standard | {"torch", "transformers"}
