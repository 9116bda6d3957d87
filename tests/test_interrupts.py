"""A patch or an undo that is interrupted anywhere: wholly or not at all."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from harness.injecting import Injected, InjectedError, Lines, difference, lines_of, state
from model_zoo import build, inputs_for
from torch import nn

from hf_rmsnorm import PatchError, apply_plan, patch_model, patch_report, plan_patch, unpatch_model
from hf_rmsnorm.patching import on_unpatched


def encoder() -> tuple[nn.Module, dict[str, Any]]:
    """nn.TransformerEncoder has a fused path that a hook and an attribute turn off."""
    torch.manual_seed(4)
    layer = nn.TransformerEncoderLayer(16, 2, 20, batch_first=True, norm_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    net.use_nested_tensor = True
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.eval(), {"src": torch.randn(2, 5, 16)}


def zoo(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    def make() -> tuple[nn.Module, Any]:
        model = build(name)
        return model, inputs_for(name, model)

    return make


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], dict[str, Any]]] = {
    "gpt2": (zoo("gpt2"), {}),
    "bert, wider": (zoo("bert"), {"post_norm": "extra_neuron"}),
    "encoder": (encoder, {"strategy": "direct"}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    make, arguments = CASES[request.param]
    model, inputs = make()
    return model, plan_patch(model, inputs=inputs, **arguments)


def test_a_patch_that_is_interrupted_leaves_the_model_as_it_was(case: Any) -> None:
    model, plan = case
    before, parameters = state(model), dict(model.named_parameters())
    total = lines_of(lambda: apply_plan(copy.deepcopy(model), plan))
    for at in range(1, total + 1, 1 + total // 150):
        error = Injected if at % 2 else InjectedError
        with pytest.raises(error) as raised, Lines(at, error):
            apply_plan(model, plan)
        assert not difference(before, state(model)), raised.value
        now = dict(model.named_parameters())
        assert all(now[name] is parameters[name] for name in now), "an optimizer holds these"


def test_an_undo_that_is_interrupted_is_done(case: Any) -> None:
    model, plan = case
    before = state(model)
    apply_plan(model, plan)
    patched = state(model)
    copies = [copy.deepcopy(model) for _ in range(2)]
    total = lines_of(lambda: unpatch_model(copies.pop()))
    for at in range(1, total + 1, 1 + total // 150):
        found = copy.deepcopy(model)
        with pytest.raises(Injected) as raised, Lines(at):
            unpatch_model(found)
        now = state(found)
        if difference(now, before):  # not begun
            assert _but_for_hooks(now) == _but_for_hooks(patched), raised.value
            unpatch_model(found)
        assert not difference(before, state(found)), raised.value


def _but_for_hooks(found: dict[str, Any]) -> dict[str, Any]:
    """Hooks are other objects in a copy, and so is what guards its loading."""
    return {k: v if len(v) < 4 else (*v[:2], *v[3:]) for k, v in found.items()}


def test_an_undo_that_fails_for_good_is_finished_by_the_next_call(tmp_path: Path) -> None:
    model: Any = build("gpt2")
    before = state(model)
    patch_model(model)

    def fail(_: nn.Module) -> None:
        raise MemoryError("no memory")

    on_unpatched.append(fail)
    try:
        with pytest.raises(MemoryError):
            unpatch_model(model)
    finally:
        on_unpatched.remove(fail)
    for refused in (patch_report, patch_model, lambda m: m.save_pretrained(tmp_path / "half")):
        with pytest.raises(PatchError, match=r"half unpatched.*unpatch_model, which finishes"):
            refused(model)
    assert not (tmp_path / "half").exists()
    assert not difference(before, state(unpatch_model(model)))
    with pytest.raises(PatchError, match="was not patched"):
        unpatch_model(model)


def test_a_tensor_that_is_as_it_was_counts_as_untouched() -> None:
    model: Any = build("gpt2")
    original = copy.deepcopy(model)
    before = state(model)
    patch_model(model)
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(original.transformer.wpe.weight)
    assert not difference(before, state(unpatch_model(model)))
    assert type(model) is transformers.GPT2LMHeadModel


def test_a_warning_that_is_made_an_error_leaves_the_model_as_it_was() -> None:
    model: Any = build("bert")
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="changed approximately"):
            patch_model(model, inputs=inputs_for("bert", model), verify=False)
    assert not difference(before, state(model))
