"""`torch.export` of patched models: the same outputs, by PyTorch's own operations only."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import build, inputs_for
from norm_truth import assert_as_close_as
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as pytree

from hf_rmsnorm import RMSNorm, patch_model

PARTIAL = {"norm": "prmsnorm", "p": 0.3, "strategy": "direct"}

CASES = [
    pytest.param("gpt2", {}, id="gpt2"),  # tied head: it has a centring op
    pytest.param("gpt2", PARTIAL, id="gpt2-prmsnorm"),
    pytest.param("vit", {}, id="vit"),
    pytest.param("bert", {"post_norm": "extra_neuron"}, id="bert"),
    pytest.param("convnext", {}, id="convnext"),  # channels first
]


def patched(name: str, how: dict[str, Any]) -> nn.Module:
    model = build(name)
    model.config.use_cache = False  # a cache is an output of a class of transformers' own
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*approximate")
        patch_model(model, verify=False, **how)
    assert any(isinstance(module, RMSNorm) for module in model.modules())
    return model


def inputs(name: str, model: nn.Module, batch: int, tokens: int) -> dict[str, Tensor]:
    return inputs_for(name, model, [(batch, tokens)], seed=batch)[0]


def exported(name: str, model: nn.Module, *, strict: bool = False) -> ExportedProgram:
    """With a free batch, and free lengths of text."""
    example = inputs(name, model, 2, 9)
    free = {
        key: dict.fromkeys(range(2 if value.dim() == 2 else 1), Dim.DYNAMIC)
        for key, value in example.items()
    }
    return export(model, (), example, dynamic_shapes=free, strict=strict)


def operations(program: ExportedProgram) -> Iterator[str]:
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            if node.op == "call_function":
                yield str(node.target)


def tensors(outputs: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]


def assert_same_outputs(name: str, model: nn.Module, program: ExportedProgram) -> None:
    run = program.module()
    for batch, tokens in ((2, 9), (3, 13)):
        example = inputs(name, model, batch, tokens)
        with torch.no_grad():
            got, expected = tensors(run(**example)), tensors(model(**example))
        assert len(got) == len(expected) > 0
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "how"), CASES)
def test_an_exported_model_computes_the_same(
    name: str, how: dict[str, Any], tmp_path: Path
) -> None:
    model = patched(name, how)
    program = exported(name, model)
    assert_same_outputs(name, model, program)
    own = {"<built-in function getitem>", "wrap_with_set_grad_enabled"}
    assert {op for op in operations(program) if not op.startswith("aten.")} <= own
    torch.export.save(program, tmp_path / "model.pt2")
    assert_same_outputs(name, model, torch.export.load(tmp_path / "model.pt2"))


class Logits(nn.Module):
    """Returns a plain tensor: the outputs of Transformers' models are classes of its own."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids)[0]


LOAD = """
import sys
for name in ("hf_rmsnorm", "transformers", "triton"):
    sys.modules[name] = None
import torch
ids, expected = torch.load(sys.argv[2])
torch.testing.assert_close(torch.export.load(sys.argv[1]).module()(ids), expected)
"""


@pytest.mark.launch
def test_a_saved_program_needs_torch_alone(tmp_path: Path) -> None:
    model = Logits(patched("gpt2", PARTIAL))
    ids = torch.randint(90, (4, 7))
    torch.export.save(export(model, (ids,)), tmp_path / "model.pt2")
    torch.save((ids, model(ids).detach()), tmp_path / "expected")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "model.pt2", tmp_path / "expected"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


class Norms(nn.Module):
    """Each way a norm of ours computes, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([RMSNorm(24), RMSNorm(24, bias=False), RMSNorm((4, 6))])
        for norm, way in zip(self.norms, ("", "llama", ""), strict=True):
            nn.init.normal_(norm.weight, 1.0, 0.3)
            norm.casting = way or norm.casting
        self.norms[1].weight_offset, self.norms[0].p = 1.0, 0.3

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[1](self.norms[0](x))
        return self.norms[2](x.unflatten(-1, (4, 6))).flatten(-2)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_by_themselves_and_their_gradients(strict: bool, dtype: torch.dtype) -> None:
    model = Norms().to(dtype)
    example = torch.randn(2, 3, 24).to(dtype)
    program = export(model, (example,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=strict)
    assert all(op.startswith("aten.") for op in operations(program))
    x, dy = torch.randn(5, 3, 24).to(dtype), torch.randn(5, 3, 24).to(dtype)
    results = []
    for run in (program.module(), model, copy.deepcopy(model).double()):
        parameters = list(run.parameters())
        leaf = x.to(parameters[0].dtype).requires_grad_()
        y = run(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *parameters], dy.to(y.dtype))])
    for i, (got, eager, truth) in enumerate(zip(*results, strict=True)):
        size = truth.abs().max().item()
        unit = torch.finfo(dtype).eps
        assert_as_close_as(got, eager, truth, name=str(i), terms=size, unit=unit)
