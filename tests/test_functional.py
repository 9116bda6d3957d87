"""The functions users call: errors, derivatives of every order, tracing, and the paper's claims."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from norm_truth import statistic_size, true_norm
from torch import nn

from hf_rmsnorm import functional
from hf_rmsnorm.functional import add_rms_norm, rms_norm


@pytest.mark.parametrize("hidden", [1, 7, 100, 768, 769, 5120, 131072])
@pytest.mark.parametrize("p", ["1", "0.5", "0.3", "0.07", "0.0625", "0.01", "0.29", "0.000001"])
def test_statistic_size_is_the_exact_ceiling(hidden: int, p: str) -> None:
    assert functional.statistic_size(hidden, float(p)) == statistic_size(hidden, p)


def test_float_dust_does_not_add_a_feature() -> None:
    assert 100 * 0.07 > 7
    assert functional.statistic_size(100, 0.07) == 7


X, W = torch.randn(3, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (ValueError, r"weight must have shape \(8,\).*got \(7,\)", lambda: rms_norm(X, W[:7])),
        (ValueError, r"weight must have shape .* got \(1, 8\)", lambda: rms_norm(X, W[None])),
        (ValueError, r"bias must have shape \(8,\)", lambda: rms_norm(X, W, W[:3])),
        (ValueError, "weight is on meta but x is on cpu", lambda: rms_norm(X, W.to("meta"))),
        (TypeError, "x must be float32.*got torch.int64", lambda: rms_norm(X.long(), W)),
        (TypeError, "weight must be float32.*complex64", lambda: rms_norm(X, W.to(torch.cfloat))),
        (TypeError, "x must be a tensor, got list", lambda: rms_norm([1.0, 2.0])),
        (ValueError, r"shape \(3, 0\); hidden must be >= 1", lambda: rms_norm(X[:, :0])),
        (ValueError, "at least one dimension", lambda: rms_norm(torch.tensor(1.0))),
        (ValueError, r"p must be in \(0, 1\], got 0", lambda: rms_norm(X, p=0)),
        (ValueError, r"p must be in \(0, 1\], got 1.5", lambda: rms_norm(X, p=1.5)),
        (ValueError, r"p must be in \(0, 1\], got nan", lambda: rms_norm(X, p=float("nan"))),
        (ValueError, "eps must be >= 0, got -1e-05", lambda: rms_norm(X, eps=-1e-5)),
        (ValueError, "eps must be >= 0, got nan", lambda: rms_norm(X, eps=float("nan"))),
        (ValueError, "casting must be .* got 'float'", lambda: rms_norm(X, casting="float")),
        (ValueError, r"residual must have x's shape \(3, 8\)", lambda: add_rms_norm(X, X[:2])),
        (ValueError, "residual is on meta", lambda: add_rms_norm(X, X.to("meta"))),
        (TypeError, "residual must be a tensor, got NoneType", lambda: add_rms_norm(X, None)),
    ],
)
def test_bad_input_says_what_was_found(error: type[Exception], says: str, call) -> None:
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (0, 1)])
def test_empty_input(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    weight, bias = torch.randn(2, shape[-1]).unbind()
    weight.requires_grad_()
    y, summed = add_rms_norm(x, x, weight, bias)
    (y.sum() + summed.sum() + rms_norm(x, weight).sum()).backward()
    assert y.shape == summed.shape == x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_a_vector_is_a_row() -> None:
    x, weight = torch.randn(2, 9).unbind()
    assert torch.equal(rms_norm(x, weight), rms_norm(x[None], weight)[0])


def doubles(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("p", [1.0, 0.3])
def test_derivatives_of_first_and_second_order(p: float) -> None:
    def norm(x, weight, bias):
        return rms_norm(x, weight, bias, p=p, weight_offset=0.7)

    def added(x, residual, weight, bias):
        return add_rms_norm(x, residual, weight, bias, p=p)

    for function, tensors in (
        (norm, doubles((3, 2, 7), (7,), (7,))),
        (added, doubles((4, 7), (4, 7), (7,), (7,))),
    ):
        assert torch.autograd.gradcheck(
            function, tensors, check_forward_ad=True, check_batched_grad=True
        )
        assert torch.autograd.gradgradcheck(function, tensors)


def test_gradient_penalty_in_float32_matches_float64() -> None:
    """`create_graph=True` where a kernel, not autograd, made the first derivative."""
    x, weight, dy = torch.randn(3, 5, 16), torch.randn(16), torch.randn(5, 16)

    def penalty(function, dtype):
        leaves = [t.to(dtype).detach().requires_grad_() for t in (x[0], weight)]
        (dx,) = torch.autograd.grad(function(*leaves), leaves[0], dy.to(dtype), create_graph=True)
        return torch.autograd.grad(dx.square().sum(), leaves)

    truth = penalty(lambda x, w: true_norm(x, w, None, eps=1e-5, k=16, offset=0.0), torch.float64)
    for got, expected in zip(penalty(rms_norm, torch.float32), truth, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_function_transforms() -> None:
    x, weight, tangent = torch.randn(6, 8), torch.randn(8), torch.randn(6, 8)
    assert torch.equal(torch.func.vmap(rms_norm, (0, None))(x, weight), rms_norm(x, weight))
    leaf = x.clone().requires_grad_()
    rms_norm(leaf, weight).backward(tangent)
    _, pull = torch.func.vjp(lambda x: rms_norm(x, weight), x)
    torch.testing.assert_close(pull(tangent)[0], leaf.grad)
    _, dy = torch.func.jvp(lambda x: rms_norm(x, weight), (x,), (tangent,))
    jacobian = torch.func.jacrev(lambda x: rms_norm(x, weight))(x)
    torch.testing.assert_close(dy, torch.einsum("abcd,cd->ab", jacobian, tangent))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12))
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed, summed = add_rms_norm(x, x.tanh(), self.weight, self.bias, p=0.3)
        return rms_norm(normed, self.weight, casting="llama") + summed


def test_exports() -> None:
    block, x = Block(), torch.randn(5, 12)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(block, (x,), dynamic_shapes=({0: rows},))
    more = torch.randn(9, 12)
    torch.testing.assert_close(program.module()(more), block(more))


def test_shapes_without_memory() -> None:
    y = rms_norm(torch.randn(5, 12, device="meta", dtype=torch.bfloat16))
    assert y.device.type == "meta" and y.shape == (5, 12) and y.dtype == torch.bfloat16


@pytest.mark.launch
def test_triton_is_not_imported_for_cpu_tensors() -> None:
    code = (
        "import sys, torch; from hf_rmsnorm import functional; "
        "functional.rms_norm(torch.ones(2, 3)); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The paper: Table 1 (invariances) and section 4.2 (gradients), for y = norm(W x).


def normed_linear(matrix: torch.Tensor, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return rms_norm(x @ matrix.T, gain, eps=0.0)


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return doubles((11, 6), (4, 6), (11,))


def test_table_1_invariant_to_rescaling(layer: tuple) -> None:
    matrix, x, gain = layer
    y = normed_linear(matrix, x, gain)
    torch.testing.assert_close(normed_linear(3.7 * matrix, x, gain), y)
    torch.testing.assert_close(normed_linear(matrix, 0.2 * x, gain), y)
    each = torch.rand(4, 1, dtype=torch.float64) + 0.5
    torch.testing.assert_close(normed_linear(matrix, each * x, gain), y)
    partial = rms_norm(x @ matrix.T, gain, eps=0.0, p=0.3)
    torch.testing.assert_close(rms_norm(5.0 * x @ matrix.T, gain, eps=0.0, p=0.3), partial)


def test_table_1_not_invariant_to_recentring(layer: tuple) -> None:
    matrix, x, gain = layer
    y = normed_linear(matrix, x, gain)
    shift = torch.randn(6, dtype=torch.float64)
    row = torch.rand(11, 1, dtype=torch.float64) + 0.5
    for other in (
        normed_linear(matrix + shift, x, gain),
        normed_linear(matrix, x + 1.0, gain),
        normed_linear(row * matrix, x, gain),
    ):
        assert (other - y).norm() > 0.05 * y.norm()

    def layer_norm(matrix):
        return nn.functional.layer_norm(x @ matrix.T, (11,), gain, eps=0.0)

    torch.testing.assert_close(layer_norm(matrix + shift), layer_norm(matrix))


def test_gradients_adapt_the_learning_rate(layer: tuple) -> None:
    """Eq. 8-10: scaling W by d scales its gradient by 1/d; scaling the input changes nothing."""
    matrix, x, gain = layer
    dy = torch.randn(4, 11, dtype=torch.float64)

    def gradients(scale: float, input_scale: float) -> tuple[torch.Tensor, ...]:
        leaf = (scale * matrix).detach().requires_grad_()
        y = normed_linear(leaf, input_scale * x, gain)
        return torch.autograd.grad(y, [leaf, gain], dy)

    dmatrix, dgain = gradients(1.0, 1.0)
    for d in (0.1, 8.0):
        scaled, same = gradients(d, 1.0)
        torch.testing.assert_close(scaled, dmatrix / d)
        torch.testing.assert_close(same, dgain)
        for got, expected in zip(gradients(1.0, d), (dmatrix, dgain), strict=True):
            torch.testing.assert_close(got, expected)
    # the gradient is orthogonal to what the norm ignores: the scale of W
    assert abs((dmatrix * matrix).sum()) < 1e-12
