"""Under `torch.compile`: one graph, the chosen body in it, and the numbers of eager mode."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from hf_rmsnorm import PartialRMSNorm, RMSNorm, functional, ops
from hf_rmsnorm.functional import add_rms_norm, rms_norm
from hf_rmsnorm.ops import cpu_build

OPS = torch.ops.hf_rmsnorm
needs_kernel = pytest.mark.skipif(
    not torch.cuda.is_available() and cpu_build.library() is None, reason="no kernel here"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No compiled code, and no choice of body, from another test; one compiling process."""
    monkeypatch.setitem(os.environ, "TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    functional.set_compiled_body("torch")


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad)


HALF = torch.bfloat16
# x, weight, bias, k, eps, offset, llama, out, save_rstd
CALLS = {
    "plain": lambda: (randn(5, 12), randn(12), randn(12), 12, 1e-5, 0.0, False, None, True),
    "bare, partial": lambda: (randn(5, 12), None, None, 3, 0.1, 0.0, False, None, True),
    "llama": lambda: (
        *(randn(2, 5, 12, dtype=HALF), randn(12), None),
        *(12, 1e-5, 1.0, True, None, True),
    ),
    "low output": lambda: (randn(5, 12), randn(12), None, 12, 1e-5, 0.0, False, HALF, True),
    "strided": lambda: (
        randn(5, 6, 12).detach().transpose(0, 1).requires_grad_(),
        randn(24).detach()[::2].requires_grad_(),
        *(randn(12), 12, 1e-5, 0.0, False, None, True),
    ),
    "no statistic": lambda: (
        *(randn(5, 12, grad=False), randn(12, grad=False), None),
        *(12, 1e-5, 0.0, False, None, False),
    ),
    "statistic not asked for": lambda: (
        *(randn(5, 12), randn(12), randn(12)),
        *(12, 1e-5, 0.0, False, None, False),
    ),
    "no rows": lambda: (randn(0, 12), randn(12), randn(12), 12, 1e-5, 0.0, False, None, True),
}


@pytest.mark.parametrize("case", CALLS)
def test_ops_hold_to_the_contract(case: str) -> None:
    x, *rest = CALLS[case]()
    opcheck(OPS.rms_norm, (x, *rest))
    residual = randn(*x.shape, dtype=torch.float32, grad=x.requires_grad)
    opcheck(OPS.add_rms_norm, (x, residual, *rest))
    weight, bias, *formula, out, _ = rest
    dy = randn(*x.shape, dtype=out or x.dtype, grad=False)
    rstd = torch.rand((*x.shape[:-1], 1), device=DEVICE)
    for wanted in ((weight is not None, bias.dtype if bias is not None else None), (False, None)):
        detached = x.detach(), None if weight is None else weight.detach()
        opcheck(OPS.backward, (dy, None, *detached, rstd, *formula, *wanted))
        opcheck(OPS.backward, (dy, residual.detach(), *detached, rstd, *formula, *wanted))


class Block(nn.Module):
    """Every way to call the norms; both outputs of the add are used."""

    def __init__(self, hidden: int = 12) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden))
        self.bias = nn.Parameter(torch.randn(hidden))
        self.norm, self.partial = RMSNorm(hidden), PartialRMSNorm(hidden, p=0.3, bias=False)
        for parameter in (*self.norm.parameters(), *self.partial.parameters()):
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        normed, summed = add_rms_norm(x, x.tanh(), self.weight, self.bias, p=0.3)
        normed = rms_norm(normed, self.weight, casting="llama") + self.norm(summed)
        return self.partial(normed.sin()) + summed


def step(block: nn.Module, function: Callable, x: Tensor, dy: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *block.parameters()], dy)]


@pytest.mark.parametrize("body", ["kernel", "torch"])
@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_one_graph_forward_and_backward(mode: str, body: str) -> None:
    functional.set_compiled_body(body)
    block, x, dy = Block().to(DEVICE), *torch.randn(2, 5, 12, device=DEVICE)
    compiled = torch.compile(block, fullgraph=True, backend=mode)
    results = zip(step(block, block, x, dy), step(block, compiled, x, dy), strict=True)
    for a, b in results:
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("body", ["kernel", "torch"])
def test_dynamic_rows_compile_nothing_new(body: str) -> None:
    functional.set_compiled_body(body)
    block = Block().to(DEVICE)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter, dynamic=True)
    frames = []
    for rows in (5, 7, 11):
        x, dy = torch.randn(2, rows, 12, device=DEVICE)
        for a, b in zip(step(block, block, x, dy), step(block, compiled, x, dy), strict=True):
            torch.testing.assert_close(a, b)
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


def ops_in_graph(function: Callable, *args: Tensor) -> int:
    found: list[torch.fx.Node] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        found.extend(n for n in graph.graph.nodes if str(n.target).startswith("hf_rmsnorm."))
        return graph.forward

    torch.compile(function, fullgraph=True, backend=backend)(*args)
    torch._dynamo.reset()
    return len(found)


@needs_kernel
def test_the_setting_chooses_the_body() -> None:
    block, x = Block().to(DEVICE), torch.randn(5, 12, device=DEVICE)
    for body, ops_wanted in (("kernel", 4), ("torch", 0)):
        functional.set_compiled_body(body)
        assert ops_in_graph(block, x) == ops_wanted
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    compiled(x)
    functional.set_compiled_body("kernel")
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        pytest.raises(Exception, match="Recompiling"),
    ):
        compiled(x)
    with pytest.raises(ValueError, match="body must be one of torch, kernel; got 'fast'"):
        functional.set_compiled_body("fast")


@needs_kernel
def test_the_kernel_runs_and_keeps_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ops.backend_for(torch.empty(1, device=DEVICE))
    calls: list[tuple] = []
    forward, backward = module.forward, module.backward

    def seen_forward(*args, save_rstd):
        calls.append(("forward", save_rstd))
        return forward(*args, save_rstd=save_rstd)

    def seen_backward(*args, weight_grad, bias_grad):
        calls.append(("backward", weight_grad, bias_grad))
        return backward(*args, weight_grad=weight_grad, bias_grad=bias_grad)

    monkeypatch.setattr(module, "forward", seen_forward)
    monkeypatch.setattr(module, "backward", seen_backward)
    functional.set_compiled_body("kernel")
    norm = RMSNorm(12).to(DEVICE)
    norm.weight.requires_grad_(False)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 12, device=DEVICE)
    compiled(x).backward(torch.randn_like(x))
    assert calls == [("forward", True), ("backward", False, torch.float32)]
    calls.clear()
    with torch.no_grad():
        compiled(x)
    assert calls == [("forward", False)]


def test_function_transforms_inside_a_compiled_function() -> None:
    x, weight, tangent = randn(6, 8, grad=False), randn(8, grad=False), randn(6, 8, grad=False)

    def mapped(x: Tensor) -> Tensor:
        return torch.func.vmap(rms_norm, (0, None))(x, weight)

    def pushed(x: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: rms_norm(x, weight), (x,), (tangent,))[1]

    def pulled(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: (rms_norm(x, weight) * tangent).sum())(x)

    functional.set_compiled_body("kernel")
    for function in (mapped, pushed, pulled):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), function(x))


def test_bad_input_is_a_typed_error_in_a_compiled_function() -> None:
    compiled = torch.compile(rms_norm, backend="eager")
    with pytest.raises(ValueError, match="weight must have shape"):
        compiled(torch.randn(3, 8), torch.ones(7))


def test_exports_without_the_op() -> None:
    functional.set_compiled_body("kernel")
    block, x = Block(), torch.randn(5, 12)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: rows},))
    assert "hf_rmsnorm" not in str(program.graph)
    more = torch.randn(9, 12)
    torch.testing.assert_close(program.module()(more), block(more))


def test_the_op_gives_second_derivatives() -> None:
    """Outside a compiled function; inside, AOTAutograd has none for any op."""
    x, weight = (randn(*s, dtype=torch.float64) for s in ((4, 7), (7,)))

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return OPS.rms_norm(x, weight, None, 7, 1e-5, 0.5, False, None, True)[0]

    assert torch.autograd.gradcheck(function, (x, weight))
    assert torch.autograd.gradgradcheck(function, (x, weight))
