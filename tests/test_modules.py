"""`RMSNorm` and `PartialRMSNorm` as modules: formula, keys, shapes, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from hf_rmsnorm import PartialRMSNorm, RMSNorm, functional


def formula(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, k: int, dims: int = 1
) -> Tensor:
    flat = x.double().flatten(-dims)
    y = flat / (flat[..., :k].square().mean(-1, keepdim=True) + eps).sqrt()
    y = y.view(x.shape)
    y = y if weight is None else y * weight.double()
    return y if bias is None else y + bias.double()


def randomised(norm: RMSNorm) -> RMSNorm:
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    return norm


@pytest.mark.parametrize("affine,bias", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("cls,k", [(RMSNorm, 48), (PartialRMSNorm, 3)])
def test_computes_the_formula(cls: type[RMSNorm], k: int, affine: bool, bias: bool) -> None:
    norm = randomised(cls(48, eps=0.03, elementwise_affine=affine, bias=bias))
    x = torch.randn(5, 7, 48)
    expected = formula(x, norm.weight, norm.bias, 0.03, k)
    torch.testing.assert_close(norm(x), expected.float())
    keys = [name for name, there in (("weight", affine), ("bias", bias)) if there]
    assert list(norm.state_dict()) == keys


def test_state_dicts_are_layernorms() -> None:
    layer_norm = nn.LayerNorm(12)
    norm = RMSNorm(12)
    assert norm.load_state_dict(layer_norm.state_dict()).missing_keys == []
    assert norm.state_dict().keys() == layer_norm.state_dict().keys()


def test_several_normalised_dimensions_share_one_statistic() -> None:
    norm = randomised(RMSNorm((3, 5)))
    x = torch.randn(4, 3, 5)
    expected = formula(x, norm.weight, norm.bias, norm.eps, 15, dims=2)
    torch.testing.assert_close(norm(x), expected.float())
    with pytest.raises(ValueError, match=r"over \(3, 5\) got input of shape \(4, 5, 3\)"):
        norm(x.transpose(1, 2))


def test_channels_first_normalises_axis_one() -> None:
    norm = randomised(RMSNorm(6))
    norm.channels_first = True
    x = torch.randn(2, 6, 3, 4)
    expected = formula(x.permute(0, 2, 3, 1), norm.weight, norm.bias, norm.eps, 6)
    torch.testing.assert_close(norm(x), expected.permute(0, 3, 1, 2).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_weight_per_head(dtype: torch.dtype) -> None:
    norm = RMSNorm(8, bias=False).to(dtype)
    norm.weight = nn.Parameter(torch.randn(3, 8, dtype=dtype))
    x = torch.randn(2, 5, 3, 8, dtype=dtype)
    expected = formula(x, norm.weight, None, norm.eps, 8)
    torch.testing.assert_close(norm(x), expected.to(dtype))
    assert norm(x).dtype == dtype


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16])
def test_classes_that_return_the_weights_dtype(x_dtype: torch.dtype) -> None:
    """T5's cast order: half weights pull a float32 stream down to half."""
    norm = randomised(RMSNorm(12, bias=False)).half()
    norm.casting, norm.returns_weight_dtype = "llama", True
    x = torch.randn(5, 12).to(x_dtype)
    hat = (x.float() * (x.float().square().mean(-1, keepdim=True) + norm.eps).rsqrt()).half()
    assert norm(x).dtype == torch.float16
    torch.testing.assert_close(norm(x), norm.weight * hat)


CHANGES = {
    "eps": lambda norm: setattr(norm, "eps", 0.7),
    "p": lambda norm: setattr(norm, "p", 0.3),
    "weight_offset": lambda norm: setattr(norm, "weight_offset", 1.0),
    "casting": lambda norm: setattr(norm.to(torch.bfloat16), "casting", "llama"),
    "weight": lambda norm: setattr(norm, "weight", nn.Parameter(torch.randn(24))),
    "no weight": lambda norm: setattr(norm, "weight", None),
    "no bias": lambda norm: setattr(norm, "bias", None),
    "half": lambda norm: norm.half(),
    "double": lambda norm: norm.double(),
    "frozen": lambda norm: norm.requires_grad_(False),
    "in place": lambda norm: norm.weight.data.mul_(3.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_count_from_the_next_call_on(change: str) -> None:
    """The same bits as the function with the new settings, which are read at each call."""
    norm, x = randomised(RMSNorm(24)), torch.randn(1, 24)
    before = norm(x)
    CHANGES[change](norm)
    x = x if norm.weight is None else x.to(norm.weight.dtype)
    settings = {name: getattr(norm, name) for name in ("eps", "p", "weight_offset", "casting")}
    expected = functional.rms_norm(x, norm.weight, norm.bias, **settings)
    assert torch.equal(norm(x), expected)
    assert norm(x).requires_grad == (change != "frozen")
    if change != "frozen":
        assert not torch.equal(norm(x), before)


def test_hooks_of_a_module_run() -> None:
    norm, x = randomised(RMSNorm(24)), torch.randn(1, 24)
    expected = 2 * norm(3 * x)
    norm.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    norm.register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize(
    ("error", "says", "x"),
    [
        (ValueError, r"weight must have shape \(7,\), the last", torch.randn(2, 7)),
        (TypeError, "x must be float32.*got torch.int64", torch.ones(2, 24).long()),
        (TypeError, "x must be a tensor, got list", [1.0] * 24),
        (ValueError, "at least one dimension", torch.tensor(1.0)),
        (ValueError, "weight is on cpu but x is on meta", torch.randn(2, 24, device="meta")),
    ],
)
def test_bad_input_says_what_was_found(error: type[Exception], says: str, x) -> None:
    with pytest.raises(error, match=says):
        RMSNorm(24)(x)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("eps", -1.0, "eps must be >= 0, got -1.0"),
        ("p", 1.5, r"p must be in \(0, 1\], got 1.5"),
        ("casting", "float", "casting must be .* got 'float'"),
    ],
)
def test_bad_settings_are_found_at_the_next_call(name: str, value, says: str) -> None:
    norm = RMSNorm(24)
    norm(torch.randn(1, 24))
    setattr(norm, name, value)
    with pytest.raises(ValueError, match=says):
        norm(torch.randn(1, 24))


@pytest.mark.parametrize("arguments", [{"p": 0.0}, {"p": -0.1}, {"p": 1.5}, {"p": float("nan")}])
def test_p_must_be_a_share(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="p"):
        PartialRMSNorm(8, **arguments)


@pytest.mark.parametrize("shape", [0, [], [4, 0], -3])
def test_normalized_shape_must_have_features(shape: int | list[int]) -> None:
    with pytest.raises(ValueError, match="normalized_shape"):
        RMSNorm(shape)


def test_survives_copying_and_pickling() -> None:
    norm = randomised(PartialRMSNorm(32, p=0.25))
    x = torch.randn(3, 32)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(x), norm(x))


def test_repr_says_what_it_computes() -> None:
    assert repr(RMSNorm(4)) == "RMSNorm((4,), eps=1e-05, bias=True)"
    assert "p=0.25 (first 2 features)" in repr(PartialRMSNorm(8, p=0.25))
    odd = RMSNorm(4)
    odd.weight_offset = 1.0
    assert "weight_offset=1.0" in repr(odd)
