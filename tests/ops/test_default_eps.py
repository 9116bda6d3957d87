"""`eps=None`: what PyTorch's RMSNorm takes, at every dtype, on every way to a result."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from test_backends import Backend, backend  # noqa: F401
from torch import Tensor, nn

from hf_rmsnorm import PartialRMSNorm, RMSNorm, functional, patch_model, plan_patch, unpatch_model
from hf_rmsnorm.patching.plan import PatchPlan

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HIDDEN = 24


def small(dtype: torch.dtype, *shape: int) -> Tensor:
    """So small that eps decides: mean squares from 1e-9 to 1e-5, the largest of float16's."""
    x = torch.randn(*shape, HIDDEN, dtype=torch.float64)
    return (x * torch.logspace(-4.5, -2.5, shape[0], dtype=torch.float64)[:, None]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend(backend: Backend, dtype: torch.dtype) -> None:  # noqa: F811
    x = small(dtype, 6).to(backend.device).requires_grad_()
    weight = torch.randn(HIDDEN).to(dtype).to(backend.device).requires_grad_()
    dy = torch.randn(6, HIDDEN).to(dtype).to(backend.device)
    expected = F.rms_norm(x, (HIDDEN,), weight, None)
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    found = functional.rms_norm(x, weight, eps=None)
    torch.testing.assert_close(found, expected, **close)
    a, b = (torch.autograd.grad(y, x, dy)[0].double() for y in (found, expected))
    assert (a - b).abs().max() < 64 * torch.finfo(dtype).eps * b.abs().max()
    added, _ = functional.add_rms_norm(x, torch.zeros_like(x), weight, eps=None)
    torch.testing.assert_close(added, expected, **close)
    assert backend.calls


def test_a_sum_is_computed_in_the_wider_dtype() -> None:
    x = small(torch.float64, 3)
    found, _ = functional.add_rms_norm(torch.zeros(3, HIDDEN), x, eps=None)
    torch.testing.assert_close(found, F.rms_norm(x, (HIDDEN,), None, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_modules_compiled_and_exported(dtype: torch.dtype, affine: bool) -> None:
    norm = RMSNorm(HIDDEN, eps=None, elementwise_affine=affine, bias=False, dtype=dtype)
    other = nn.RMSNorm(HIDDEN, None, elementwise_affine=affine, dtype=dtype)
    x = small(dtype, 5)
    expected = other(x)
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(norm(x), expected, **close)
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, **close)
    exported = torch.export.export(norm, (x,)).module()
    torch.testing.assert_close(exported(x), expected, **close)
    assert "eps=None" in repr(norm)
    assert norm.variance_epsilon is None


def test_pickled_and_partial() -> None:
    norm = PartialRMSNorm(HIDDEN, eps=None, p=0.25)
    x = small(torch.float32, 4)
    scale = (x[:, :6].square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()
    torch.testing.assert_close(norm(x), x * scale)
    assert torch.equal(copy.deepcopy(norm)(x), norm(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(7, HIDDEN)
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_patched_model_keeps_it_at_every_dtype(dtype: torch.dtype) -> None:
    net = Net().eval()
    with torch.no_grad():
        net.norm.weight.normal_()
        net.embed.weight.mul_(1e-3)
        net.embed.bias.zero_()
    x = torch.randn(4, 7)
    original = copy.deepcopy(net)
    plan = plan_patch(net, inputs={"x": x})
    assert json.loads(plan.to_json())["sites"][0]["spec"]["eps"] is None
    assert PatchPlan.from_json(plan.to_json()) == plan
    patch_model(net, inputs={"x": x})
    assert type(net.norm) is RMSNorm and net.norm.eps is None
    expected = original.to(dtype)(x.to(dtype))
    unit = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(net.to(dtype)(x.to(dtype)), expected, rtol=unit, atol=unit)
    unpatch_model(net)
    assert type(net.norm) is nn.RMSNorm
    assert torch.equal(net(x.to(dtype)), expected)
