"""Which folded tensors are still centred, and what counts as the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import config_of, gpt2
from torch import Tensor, nn

import hf_rmsnorm
from hf_rmsnorm import patch_model, plan_patch
from hf_rmsnorm.hub.exactness import Evidence, off_centre
from hf_rmsnorm.probing import Fold

# as (shape, fold): fused and plain writers along either axis, some of whose blocks are not centred
LAYOUTS = [
    ((6, 7), Fold("", 0, 6)),
    ((7, 6), Fold("", 1, 6)),
    ((5,), Fold("", 0, 5)),
    ((40, 6, 3), Fold("", 1, 6)),
    ((24, 7), Fold("", 0, 6, inner=2, blocks=((0, 1), (1, 0)))),
    ((7, 24), Fold("", 1, 6, inner=2, blocks=((0, 0), (1, 1)))),
    ((3, 12, 50), Fold("", 1, 6, blocks=((1, 0),))),
]


def folded(shape: tuple[int, ...], fold: Fold) -> Tensor:
    tensor = torch.randn(shape, dtype=torch.float64) + 0.3
    view, mask = fold.view(tensor), fold.mask(tensor)
    mean = view.mean(fold.axis + 1, keepdim=True)
    centred = (view - (mean if mask is None else mean * mask)).reshape(shape)
    return centred


@pytest.mark.parametrize("columns", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape, fold", LAYOUTS)
def test_each_tensor_is_judged_by_itself(
    shape: tuple[int, ...], fold: Fold, dtype: torch.dtype, columns: int | None
) -> None:
    torch.manual_seed(0)
    net = nn.Module()
    for name in "abcd":
        net.register_parameter(name, nn.Parameter(folded(shape, fold).to(dtype)))
    with torch.no_grad():
        size = 0.05 * torch.ones(shape, dtype=dtype)
        view, mask = fold.view(size), fold.mask(size)
        net.b.add_((view if mask is None else view * mask).reshape(shape))
        net.d[...] = torch.nan
        if mask is not None:  # what is not centred may be anything
            net.c.add_((view * 7 * (1 - mask)).reshape(shape))
    folds = [Fold(**{**vars(fold), "parameter": name}) for name in "abcd"]
    assert off_centre(net, folds, columns) == ["b", "d"]


def test_writes_that_autograd_does_not_see_are_found_in_large_weights() -> None:
    weight = torch.randn(96, 768)
    for changed in ((3, slice(None)), (95, slice(None)), (slice(None), 5), (slice(None), 766)):
        net = nn.Linear(768, 96)
        net.weight.data.copy_(weight)
        evidence = Evidence(net, ())
        assert evidence.unchanged(net, None) == {torch.float32}
        assert evidence.unchanged(net.to(torch.bfloat16), None) == {torch.bfloat16}
        net.to(torch.float32).weight.data.copy_(weight)
        assert evidence.unchanged(net, None) is None, "the bias was rounded, the weight is not"
        net.bias.data.copy_(evidence.samples["bias"])
        assert evidence.unchanged(net, None)
        net.weight.data[changed] *= 1.001
        assert evidence.unchanged(net, None) is None


def test_weights_that_were_not_centred_are_no_evidence() -> None:
    model = gpt2()
    folds = plan_patch(model).folds
    assert Evidence(model, folds).unchanged(model, None) is None
    patch_model(model)
    assert Evidence(model, folds).unchanged(model, None)


def test_weights_of_several_dtypes_are_compared_as_each_is(tmp_path: Path) -> None:
    model = patch_model(gpt2())
    model.transformer.h[1].to(torch.bfloat16)
    state = model.state_dict()
    model.save_pretrained(tmp_path / "mixed", state_dict=dict(state))
    assert config_of(tmp_path / "mixed")["model_type"] == "gpt2"
    changed = {**state, "transformer.h.1.ln_1.bias": state["transformer.h.1.ln_1.bias"] * 1.01}
    model.save_pretrained(tmp_path / "changed", state_dict=changed)
    assert config_of(tmp_path / "changed")["model_type"] == "hf_rmsnorm"


def test_the_record_is_of_the_weights_that_are_written(tmp_path: Path) -> None:
    model = patch_model(gpt2())
    half = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=half)
    assert config_of(tmp_path)["model_type"] == "gpt2"
    for dtype in (torch.float32, torch.bfloat16):
        loaded = hf_rmsnorm.from_pretrained(tmp_path, dtype=dtype)
        assert type(loaded.transformer.ln_f) is hf_rmsnorm.RMSNorm


def test_models_made_under_inference_mode_are_saved_as_stock(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = gpt2()
        assert model.transformer.wte.weight.is_inference()
        patch_model(model)
        model.save_pretrained(tmp_path / "exact")
        model.transformer.h[0].mlp.c_proj.weight.mul_(1.5)
        model.save_pretrained(tmp_path / "trained")
    assert config_of(tmp_path / "exact")["model_type"] == "gpt2"
    assert config_of(tmp_path / "trained")["model_type"] == "hf_rmsnorm"
