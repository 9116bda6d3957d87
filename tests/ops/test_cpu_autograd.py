"""The CPU kernels behind PyTorch's dispatcher: the same bits as through Python, for less."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from norm_truth import run
from torch.autograd import gradcheck, gradgradcheck

from hf_rmsnorm import functional
from hf_rmsnorm.ops import cpu_autograd, cpu_backend, cpu_build

pytestmark = pytest.mark.skipif(not cpu_autograd.finish(), reason="no C++ compiler here")

CASES = {
    "plain": (torch.float32, torch.float32, {}),
    "narrow": (torch.bfloat16, torch.bfloat16, {"p": 0.3, "weight_offset": 1.0}),
    "llama": (torch.float16, torch.float16, {"casting": "llama"}),
    "mixed": (torch.bfloat16, torch.float32, {"casting": "llama", "eps": 0.1}),
    "wide": (torch.float64, torch.float64, {"p": 0.07}),
}


@pytest.mark.parametrize("rows", [1, 3, 1111])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("add", [False, True])
def test_same_bits_as_through_python(
    monkeypatch: pytest.MonkeyPatch, case: str, rows: int, add: bool
) -> None:
    dtype, weight_dtype, settings = CASES[case]
    x, residual = torch.randn(2, rows, 2 * 77, dtype=torch.float64).to(dtype)[..., ::2]
    weight, bias = torch.randn(2, 77, dtype=torch.float64).to(weight_dtype)
    inputs = [x, residual, weight, bias] if add else [x, weight, bias]
    norm = functional.add_rms_norm if add else functional.rms_norm
    cotangents = [torch.randn(rows, 77) for _ in range(1 + add)]

    def everything() -> list:
        with torch.no_grad():
            y = norm(*inputs, **settings)
        return [*(y if add else [y]), *run(lambda *t: norm(*t, **settings), inputs, cotangents)]

    light = everything()
    leaf = x.clone().requires_grad_()
    assert "CppFunction" in type(functional.rms_norm(leaf).grad_fn).__name__
    monkeypatch.setattr(cpu_autograd, "operators", {})
    assert "CppFunction" not in type(functional.rms_norm(leaf).grad_fn).__name__
    for a, b in zip(light, everything(), strict=True):
        assert a.dtype == b.dtype and a.is_contiguous() and torch.equal(a, b)


@pytest.mark.parametrize("casting", ["gemma", "llama"])
@pytest.mark.parametrize("p", [1.0, 0.4])
def test_gradients_of_gradients_and_batches_of_them(p: float, casting: str) -> None:
    x, residual = torch.randn(2, 3, 5, dtype=torch.float64)
    weight, bias = torch.randn(2, 5, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]

    def norm(*tensors):
        return functional.add_rms_norm(*tensors, p=p, casting=casting, weight_offset=0.3)

    assert gradcheck(norm, leaves, check_batched_grad=True)
    assert gradgradcheck(norm, leaves)


def test_tensors_that_are_no_plain_memory_get_the_reference() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    y = functional.rms_norm(x)
    dys = torch.randn(7, 4, 6)
    together = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)[0]
    alone = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys]
    torch.testing.assert_close(together, torch.stack(alone))
    mapped = torch.func.vmap(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0])(dys)
    torch.testing.assert_close(mapped, torch.stack(alone))
    zero = torch._efficientzerotensor((4, 6))
    assert torch.equal(torch.autograd.grad(y, x, zero)[0], torch.zeros(4, 6))


def test_inputs_changed_in_place_are_noticed() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    hidden = x * 1.0
    y = functional.rms_norm(hidden)
    hidden.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.randn(4, 6))


def test_inference_mode() -> None:
    x = torch.randn(4, 6)
    with torch.inference_mode():
        y = functional.rms_norm(x)
    assert y.is_inference() and torch.equal(y, functional.rms_norm(x))


def test_mixtures_it_does_not_know_go_through_python() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8, dtype=torch.float64)
    formula = functional.Formula(8, 1e-5, 0.0, False)
    assert cpu_backend.differentiable(x, None, weight, None, formula) is None
    assert cpu_backend.differentiable(x, x.bfloat16(), None, None, formula) is None
    assert functional.add_rms_norm(x, x.bfloat16(), weight)[0].shape == (3, 8)


CODE = """
import torch
from hf_rmsnorm import functional
from hf_rmsnorm.ops import cpu_autograd
x = torch.randn(3, 8, requires_grad=True)
names = [type(functional.rms_norm(x).grad_fn).__name__]
print(cpu_autograd.finish())
names.append(type(functional.rms_norm(x).grad_fn).__name__)
print(*names)
"""


def process(cache: Path, **env: str) -> list[str]:
    root = Path(__file__).parents[2]
    settings = {"PYTHONPATH": str(root), "HF_RMSNORM_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=dict(os.environ) | settings | env,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.launch
def test_a_compiler_that_fails_costs_nothing_but_time(tmp_path: Path) -> None:
    """The way through Python is taken at once, and stays; nothing is left in the cache."""
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    cache = tmp_path / "cache"
    assert process(cache, CXX=str(broken)) == ["False", *["RMSNormFunctionBackward"] * 2]
    (kept,) = cache.iterdir()
    assert kept.name.startswith("rms_norm-")


@pytest.mark.launch
def test_what_is_in_the_cache_is_used_from_the_first_call(tmp_path: Path) -> None:
    target = cpu_autograd._target()
    for built in (target, *cpu_build.cache_dir().glob("rms_norm-*.so")):
        (tmp_path / built.name).symlink_to(built)
    assert process(tmp_path) == ["True", *["CppFunction"] * 2]
    damaged = tmp_path / target.name
    damaged.unlink()
    damaged.write_bytes(b"damaged")
    assert process(tmp_path) == ["False", *["RMSNormFunctionBackward"] * 2]
    assert not damaged.exists()


def test_a_lock_is_held_by_one_and_not_for_ever(tmp_path: Path) -> None:
    lock = tmp_path / "a.building"
    assert cpu_autograd._taken(lock)
    assert not cpu_autograd._taken(lock)
    long_ago = time.time() - 2 * cpu_autograd._ABANDONED_SECONDS
    os.utime(lock, (long_ago, long_ago))
    assert cpu_autograd._taken(lock)
