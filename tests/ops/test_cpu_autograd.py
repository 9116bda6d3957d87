"""The CPU kernels behind PyTorch's dispatcher: the same bits as through Python, for less."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from norm_truth import run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from hf_rmsnorm import functional
from hf_rmsnorm.ops import build_cache, cpu_autograd, cpu_build, shortcut

pytestmark = pytest.mark.skipif(not cpu_autograd.finish(), reason="no C++ compiler here")

CASES = {
    "plain": (torch.float32, torch.float32, {}),
    "narrow": (torch.bfloat16, torch.bfloat16, {"p": 0.3, "weight_offset": 1.0}),
    "llama": (torch.float16, torch.float16, {"casting": "llama"}),
    "mixed": (torch.bfloat16, torch.float32, {"casting": "llama", "eps": 0.1}),
    "wide": (torch.float64, torch.float64, {"p": 0.07}),
}
# what follows the tensors in a call of the shortcut
SETTINGS = (functional._formula, 1e-5, 1.0, 0.0, "gemma", None)


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
    assert functional.rms_norm(leaf).grad_fn.name() == "RMSNormBackward"
    monkeypatch.setattr(shortcut, "call", shortcut.none)
    assert functional.rms_norm(leaf).grad_fn.name() == "RMSNormFunctionBackward"
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


def test_only_wanted_gradients_are_made() -> None:
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((4, 6), (6,), (6,)))
    dy = torch.randn(4, 6)
    together = torch.autograd.grad(functional.rms_norm(x, weight, bias), [x, weight, bias], dy)
    for leaf, expected in zip((x, weight, bias), together, strict=True):
        y = functional.rms_norm(x, weight, bias)
        assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], expected)
    frozen = functional.rms_norm(x, weight.detach(), bias)
    assert torch.equal(torch.autograd.grad(frozen, bias, dy)[0], together[2])
    _, summed = functional.add_rms_norm(x, x.detach(), weight)
    assert torch.equal(torch.autograd.grad(summed, x, dy)[0], dy)


def test_what_is_kept_for_the_backward_pass_can_be_packed_and_is_let_go() -> None:
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    dy, kept = torch.randn(4, 6), []
    (expected,) = torch.autograd.grad(sum(functional.add_rms_norm(x, x, weight)), x, dy)

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.shape)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        normed, summed = functional.add_rms_norm(x, x, weight)
    assert sorted(kept) == [(4, 1), (4, 6), (6,)]
    assert torch.equal(torch.autograd.grad(normed + summed, x, dy)[0], expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(normed + summed, x, dy)

    outputs = functional.add_rms_norm(x, x, weight)  # one of them is kept by their own node
    outputs[0].grad_fn.register_hook(hook := lambda *_: None)
    left = weakref.ref(hook)
    del outputs, hook
    assert left() is None


def test_hooks_and_anomalies() -> None:
    x, dy = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    y = functional.rms_norm(x)
    seen: list[torch.Tensor] = []
    y.register_hook(seen.append)
    y.grad_fn.register_hook(lambda dx, dys: (2 * dx[0], *dx[1:]))
    (doubled,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(seen[0], dy)
    assert torch.equal(doubled, 2 * torch.autograd.grad(functional.rms_norm(x), x, dy)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of itself, and then prints where it was
        with torch.autograd.detect_anomaly():
            y = functional.rms_norm(x)
            with pytest.raises(RuntimeError, match="'RMSNormBackward' returned nan"):
                torch.autograd.grad(y, x, torch.full_like(dy, float("nan")))


def test_a_node_called_by_hand() -> None:
    """Nothing casts or checks what it is given."""
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6)
    y, dy = functional.rms_norm(x, weight), torch.randn(4, 6)
    expected = y.grad_fn(dy)[0]
    torch.testing.assert_close(y.grad_fn(dy.double())[0], expected)
    with pytest.raises(RuntimeError, match="size of tensor"):
        y.grad_fn(torch.randn(4, 7))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # PyTorch's own, of itself
def test_compiled_autograd_knows_the_node() -> None:
    leaves = [torch.randn(s, requires_grad=True) for s in ((4, 6), (4, 6), (6,), (6,))]
    dy = torch.randn(4, 6)
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    for p in (1.0, 0.3):
        for t in leaves:
            t.grad = None
        normed, summed = functional.add_rms_norm(*leaves, p=p)
        expected = torch.autograd.grad(normed * summed, leaves, dy, retain_graph=True)
        with torch._dynamo.compiled_autograd._enable(compiler):
            (normed * summed).backward(dy)
        for leaf, d in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, d)
    assert len(graphs) == 2, "p is part of what a graph is made for"


def test_threads_share_it() -> None:
    weight = torch.randn(96, requires_grad=True)
    x, dy = torch.randn(2, 8, 700, 96).unbind()
    expected = [functional.rms_norm(part, weight) for part in x]
    gradients = [torch.autograd.grad(y, weight, d)[0] for y, d in zip(expected, dy, strict=True)]

    def work(i: int) -> bool:
        y = functional.rms_norm(x[i], weight)
        (dw,) = torch.autograd.grad(y, weight, dy[i])
        return torch.equal(y, expected[i]) and torch.equal(dw, gradients[i])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, list(range(8)) * 5))


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


X, W = torch.randn(3, 8), torch.randn(8)


class Named(torch.Tensor):
    """A tensor that wants to hear of every function."""


NOT_FOR_IT = {
    "no tensor": lambda: ([[1.0, 2.0]], None),
    "no dimension": lambda: (torch.tensor(1.0), None),
    "nothing in it": lambda: (X[:0], W),
    "an integer": lambda: (X.long(), W),
    "a float8": lambda: (X.to(torch.float8_e4m3fn), W),
    "another device": lambda: (X.to("meta"), W.to("meta")),
    "two devices": lambda: (X, W.to("meta")),
    "a subclass": lambda: (X.as_subclass(Named), W),
    "a subclass as weight": lambda: (X, W.as_subclass(Named)),
    "sparse": lambda: (X.to_sparse(), W),
    "negated lazily": lambda: (torch._neg_view(X), W),
    "zeros without memory": lambda: (torch._efficientzerotensor((3, 8)), W),
    "wrong weight": lambda: (X, W[:7]),
    "weight of two dimensions": lambda: (X, W[None]),
    "complex weight": lambda: (X, W.to(torch.cfloat)),
    "wide weight": lambda: (X, W.double()),
}


@pytest.mark.parametrize("case", NOT_FOR_IT)
def test_what_it_leaves_to_python(case: str) -> None:
    x, weight = NOT_FOR_IT[case]()
    assert shortcut.call(x, None, weight, None, *SETTINGS) is None
    if case == "negated lazily":
        torch.testing.assert_close(functional.rms_norm(x, weight), -functional.rms_norm(X, W))


def test_it_stands_back_while_something_traces_or_transforms() -> None:
    def taken(x: torch.Tensor = X) -> bool:
        return shortcut.call(x, None, None, None, *SETTINGS) is not None

    seen: list[bool] = [taken()]

    def see(x: torch.Tensor) -> torch.Tensor:
        seen.append(taken(X))
        return x

    torch.func.vmap(see)(X)
    torch.func.grad(lambda x: see(x).sum())(X)
    torch.jit.trace(see, X, check_trace=False)
    with FakeTensorMode():
        see(X)
    with FlopCounterMode(display=False):
        see(X)
    with forward_ad.dual_level():
        seen.append(taken(forward_ad.make_dual(X, X)))
    assert seen == [True] + [False] * 6
    with torch.autocast("cpu"), torch.inference_mode():
        assert taken()


def test_mixtures_it_does_not_know_go_through_python() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8, dtype=torch.float64)
    assert shortcut.call(x, None, weight, None, *SETTINGS) is None
    assert shortcut.call(x, x.bfloat16(), None, None, *SETTINGS) is None
    assert functional.add_rms_norm(x, x.bfloat16(), weight)[0].shape == (3, 8)


CODE = """
import torch
from hf_rmsnorm import functional
from hf_rmsnorm.ops import cpu_autograd
x = torch.randn(3, 8, requires_grad=True)
names = [functional.rms_norm(x).grad_fn.name()]
print(cpu_autograd.finish())
names.append(functional.rms_norm(x).grad_fn.name())
for line in (*names, cpu_autograd.status()):
    print(line)
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
    return done.stdout.splitlines()


@pytest.mark.launch
def test_a_compiler_that_fails_costs_nothing_but_time(tmp_path: Path) -> None:
    """The way through Python is taken at once, and stays; nothing is left in the cache."""
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    cache = tmp_path / "cache"
    *names, status = process(cache, CXX=str(broken))
    assert names == ["False", *["RMSNormFunctionBackward"] * 2]
    assert status == f"through Python: {broken} failed: it is broken"
    (kept,) = cache.glob("*.so")
    assert kept.name.startswith("rms_norm-")


@pytest.mark.launch
def test_what_is_in_the_cache_is_used_from_the_second_call(tmp_path: Path) -> None:
    where, stem = cpu_autograd._target()
    for kept in (*where.glob(f"{stem}-*.so"), *where.glob("rms_norm-*.so")):
        shutil.copy(kept, tmp_path)
    *names, status = process(tmp_path)
    assert names == ["True", "RMSNormFunctionBackward", "RMSNormBackward"]
    assert status == "through C++"
    (kept,) = tmp_path.glob(f"{stem}-*.so")
    os.truncate(kept, 20000)
    assert build_cache.find(tmp_path, stem) is None
    whole = next(tmp_path.glob("rms_norm-*.so")).read_bytes()  # but no extension of Python
    unusable = tmp_path / f"{stem}-{hashlib.sha256(whole).hexdigest()}.so"
    unusable.write_bytes(whole)
    *names, status = process(tmp_path)
    assert names == ["False", *["RMSNormFunctionBackward"] * 2]
    assert status.startswith(f"through Python: {unusable} cannot be used: ")
    assert not unusable.exists()


@pytest.mark.launch
def test_without_a_compiler_it_says_what_to_install(tmp_path: Path) -> None:
    for built in build_cache.folder().glob("rms_norm-*.so"):
        (tmp_path / built.name).symlink_to(built)
    c_compiler = next(filter(None, map(shutil.which, cpu_build._compilers())))
    *names, status = process(tmp_path, PATH=str(tmp_path), CXX="", CC=c_compiler)
    assert names == ["False", *["RMSNormFunctionBackward"] * 2]
    assert status.startswith("through Python: no C++ compiler") and "set CXX" in status
