"""Another library (Liger) takes over norms that were patched: the same numbers, or an error."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from test_patching import RMS_MODELS, classes_of, forward
from torch import Tensor, nn

from hf_rmsnorm import (
    PartialRMSNorm,
    PatchError,
    RMSNorm,
    functional,
    patch_model,
    unpatch_model,
)

liger = pytest.importorskip("liger_kernel.transformers.monkey_patch")


@pytest.fixture(autouse=True)
def liger_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels want a GPU; the formula is that of its documentation."""
    from liger_kernel.transformers.layer_norm import LigerLayerNorm
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    def rms_norm(self: nn.Module, x: Tensor) -> Tensor:
        y = x.float() * (x.float().square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return (self.weight + self.offset) * y.to(x.dtype)

    def layer_norm(self: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    if not torch.cuda.is_available():
        monkeypatch.setattr(LigerRMSNorm, "forward", rms_norm)
        monkeypatch.setattr(LigerLayerNorm, "forward", layer_norm)


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, RMSNorm) or "Norm" in type(m).__name__]


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_liger_after_the_patch_computes_the_same(name: str) -> None:
    model = RMS_MODELS[name]()
    classes, expected = classes_of(model), forward(model)
    patch_model(model)
    for module in norms(model):
        offset, casting = (1.0, "gemma") if name == "gemma" else (0.0, "llama")
        liger._patch_rms_norm_module(module, offset=offset, casting_mode=casting, in_place=False)
        assert "forward" in vars(module)
    torch.testing.assert_close(forward(model), expected)
    unpatch_model(model)
    assert classes_of(model) == classes
    torch.testing.assert_close(forward(model), expected)
    for module in norms(model):
        vars(module).pop("forward")
    assert torch.equal(forward(model), expected)


def test_the_call_that_trainer_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    modeling = transformers.models.llama.modeling_llama
    monkeypatch.setattr(modeling, "LlamaRMSNorm", modeling.LlamaRMSNorm)  # it exchanges that too

    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        rms_norm_eps=1e-4,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(61, (2, 9))
    expected = model(tokens).logits
    patch_model(model)
    _apply_liger_kernel_to_instance(
        model, rope=False, swiglu=False, fused_linear_cross_entropy=False
    )
    assert {m.variance_epsilon for m in norms(model)} == {1e-4}
    torch.testing.assert_close(model(tokens).logits, expected)


OTHERS: dict[str, Callable[[], RMSNorm]] = {
    "part of the features": lambda: PartialRMSNorm(24, p=0.25, bias=False),
    "a bias": lambda: RMSNorm(24),
    "eps of None": lambda: RMSNorm(24, eps=None, bias=False),
    "eps of 0": lambda: RMSNorm(24, eps=0.0, bias=False),
    "two axes": lambda: RMSNorm((3, 8), bias=False),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_norm_that_liger_would_change_is_refused(case: str) -> None:
    norm = OTHERS[case]()
    state = dict(vars(norm))
    with pytest.raises(PatchError, match=r"Liger would not compute what .*RMSNorm.*liger_kernel"):
        liger._patch_rms_norm_module(norm)
    assert vars(norm) == state


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_another_offset_is_refused(offset: float) -> None:
    norm = RMSNorm(24, bias=False)
    norm.weight_offset = 1.0 - offset
    with pytest.raises(PatchError, match="Liger would not compute"):
        liger._patch_rms_norm_module(norm, offset=offset)
    norm.weight_offset = offset
    liger._patch_rms_norm_module(norm, offset=offset)


def test_ligers_layer_norm_is_refused() -> None:
    net = nn.Sequential(nn.Linear(5, 24), nn.LayerNorm(24), nn.Linear(24, 3)).eval()
    x = torch.randn(4, 5)
    patch_model(net, strategy="direct", inputs={"input": x})
    expected = net(x)
    with pytest.raises(PatchError, match="layer_norm=False"):
        liger._patch_layer_norm_module(net[1])
    assert torch.equal(net(x), expected)
    unpatch_model(net)
    liger._patch_layer_norm_module(net[1])


@pytest.mark.parametrize("name", ["eps", "variance_epsilon"])
def test_an_epsilon_set_from_outside_counts(name: str) -> None:
    norm, x = RMSNorm(24, bias=False), torch.randn(3, 24)
    setattr(norm, name, 0.3)
    assert norm.eps == norm.variance_epsilon == 0.3
    assert torch.equal(norm(x), functional.rms_norm(x, norm.weight, eps=0.3))
    assert torch.equal(copy.deepcopy(norm)(x), norm(x))
