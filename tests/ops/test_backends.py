"""Every backend against the float64 truth: forward and all gradients, one grid for all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from norm_truth import (
    assert_as_close_as,
    eager_norm,
    run,
    sizes_of_terms,
    statistic_size,
    true_norm,
)
from torch import Tensor

from hf_rmsnorm import functional, ops
from hf_rmsnorm.ops import (
    cpu_autograd,
    cpu_backend,
    cpu_build,
    reference,
    shortcut,
    triton_backend,
)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BACKENDS = ["reference", "cpu", "cpu autograd", "triton"]


class Backend(NamedTuple):
    module: ModuleType
    calls: list[str]
    interpreted: bool
    device: str

    def __repr__(self) -> str:
        return self.module.__name__

    def unit(self, dtype: torch.dtype) -> float | None:
        """Triton's interpreter cuts float32 to bfloat16 where hardware rounds to nearest.

        Each such step is then off by up to a whole unit, and always towards zero, so that sums
        over rows do not average it out.
        """
        return torch.finfo(dtype).eps if self.interpreted and dtype == torch.bfloat16 else None


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Makes `functional` use one backend whatever the device, and records that it ran."""
    module, entries = {
        "reference": (reference, ["forward", "backward"]),
        "cpu": (cpu_backend, ["_kernel"]),
        "cpu autograd": (cpu_backend, ["_kernel"]),
        "triton": (triton_backend, ["launch"]),
    }[request.param]
    if module is cpu_backend and cpu_build.library() is None:
        pytest.skip("no C compiler on this machine")
    calls: list[str] = []
    call = shortcut.none
    if request.param == "cpu autograd":
        if not cpu_autograd.finish():
            pytest.skip("no C++ compiler on this machine")
        call = recording(shortcut.call, calls)
    monkeypatch.setattr(shortcut, "call", call)
    for entry in entries:
        monkeypatch.setattr(module, entry, recording(getattr(module, entry), calls))
    monkeypatch.setattr(ops, "backend_for", lambda x: module if x.numel() else reference)
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    interpreted = request.param == "triton" and not on_gpu
    if interpreted:  # its time is that of the programs, and wide rows have hundreds of these
        monkeypatch.setattr(triton_backend, "_REDUCE_COLUMNS", 512)
    return Backend(module, calls, interpreted, "cuda" if on_gpu else "cpu")


MAY_DECLINE = ("_kernel", "normalise")


def recording(function: Callable, calls: list[str]) -> Callable:
    def wrapper(*args, **kwargs):
        result = function(*args, **kwargs)
        if function.__name__ in MAY_DECLINE and result is None:
            return None  # something slower takes over
        calls.append(getattr(args[0], "__name__", "called"))
        return result

    return wrapper


class Variant(NamedTuple):
    weight: torch.dtype | str | None = "same"
    bias: torch.dtype | str | None = "same"
    p: str = "1"
    offset: float = 0.0
    casting: str = "gemma"
    residual: torch.dtype | str | None = None
    strided: bool = False
    eps: float = 1e-5


VARIANTS = {
    "plain": Variant(),
    "bare": Variant(weight=None, bias=None, p="0.3"),
    "float32-weight": Variant(weight=torch.float32, bias=None, offset=1.0, strided=True),
    "llama": Variant(bias=None, casting="llama", p="0.07", eps=1e-3),
    "llama-mixed": Variant(weight=torch.float32, casting="llama", offset=0.5),
    "bias-only": Variant(weight=None, bias=torch.float32, p="0.0625", strided=True, eps=0.1),
    "add": Variant(residual="same", p="0.3", offset=1.0),
    "add-float32": Variant(residual=torch.float32, bias=None, casting="llama", strided=True),
}
NARROW = [(5, 211, 7), (4, 3, 1), (2, 3, 64), (3, 5, 769), (11, 768)]
WIDE = [(3, 4096), (2, 5120), (2, 12288)]


def names_of(inputs: list[Tensor | None]) -> list[str]:
    """Names of what `run` returns."""
    outputs = ["y"] if inputs[1] is None else ["y", "summed"]
    gradients = zip(("dx", "dresidual", "dweight", "dbias"), inputs, strict=True)
    return outputs + [name for name, t in gradients if t is not None]


def strided_copy(x: Tensor) -> Tensor:
    """The same values, every other element of a buffer and with its first two axes swapped."""
    wide = torch.stack([x, torch.full_like(x, float("nan"))], dim=-1).flatten(-2)
    return wide.transpose(0, -2).contiguous().transpose(0, -2)[..., ::2]


def check(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype, v: Variant) -> None:
    hidden = shape[-1]
    k = statistic_size(hidden, v.p)

    def randn(spec: torch.dtype | str | None, *size: int) -> Tensor | None:
        if spec is None:
            return None
        kind = dtype if isinstance(spec, str) else spec
        return torch.randn(size, dtype=torch.float64).to(kind).to(backend.device)

    x, residual = randn("same", *shape), randn(v.residual, *shape)
    weight, bias = randn(v.weight, hidden), randn(v.bias, hidden)
    if v.strided:
        x = strided_copy(x)
        residual = None if residual is None else strided_copy(residual)
    settings = {"eps": v.eps, "p": float(v.p), "weight_offset": v.offset, "casting": v.casting}
    exact = {"eps": v.eps, "k": k, "offset": v.offset}

    def ours(x, r, w, b):
        if r is None:
            return functional.rms_norm(x, w, b, **settings)
        return functional.add_rms_norm(x, r, w, b, **settings)

    def formula(norm, **extra):
        def function(x, r, w, b):
            summed = x if r is None else x + r
            y = norm(summed, w, b, **exact, **extra)
            return y if r is None else (y, summed)

        return function

    inputs = [x, residual, weight, bias]
    with torch.no_grad():
        outputs = formula(eager_norm, casting=v.casting)(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [torch.randn_like(o, memory_format=torch.contiguous_format) for o in outputs]
    if v.strided:
        cotangents = [strided_copy(c) for c in cotangents]

    backend.calls.clear()
    got = run(ours, inputs, cotangents)
    least = 2 if shortcut.call is shortcut.none else 1  # C++ goes back unseen
    assert len(backend.calls) >= least, "the backend under test did not run"
    eager = run(formula(eager_norm, casting=v.casting), inputs, cotangents)
    truth = run(formula(true_norm), inputs, cotangents, torch.float64)
    summed = x if residual is None else x.double() + residual.double()
    terms = sizes_of_terms(summed, weight, bias, cotangents[0], **exact)
    for name, a, b, c in zip(names_of(inputs), got, eager, truth, strict=True):
        assert a.is_contiguous(), name
        assert_as_close_as(a, b, c, name=name, terms=terms[name], unit=backend.unit(dtype))
    if residual is not None and backend.unit(dtype) is None:
        assert torch.equal(got[1], eager[1]), "x + residual is one rounding, the same everywhere"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NARROW, ids=str)
def test_narrow(backend: Backend, shape: tuple, dtype: torch.dtype, variant: str) -> None:
    check(backend, shape, dtype, VARIANTS[variant])


@pytest.mark.parametrize("variant", ["llama", "add"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_wide(backend: Backend, shape: tuple, dtype: torch.dtype, variant: str) -> None:
    check(backend, shape, dtype, VARIANTS[variant])


@pytest.mark.parametrize("out", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("added", [False, True])
def test_an_output_dtype_of_its_own(
    backend: Backend, dtype: torch.dtype, out: torch.dtype, added: bool
) -> None:
    """As in float32 throughout, with one cast at the end."""
    x, residual = torch.randn(2, 13, 96, device=backend.device).to(dtype)
    weight, bias = torch.randn(2, 96, device=backend.device)
    exact = {"eps": 1e-5, "k": 96, "offset": 1.0}

    def ours(x, r, w, b):
        settings = {"weight_offset": 1.0, "out_dtype": out}
        if added:
            return functional.add_rms_norm(x, r, w, b, **settings)
        return functional.rms_norm(x, w, b, **settings)

    def formula(norm, wide, cast, **extra):
        def function(x, r, w, b):
            summed = x + r if added else x
            y = norm(summed.to(wide), w, b, **exact, **extra).to(cast)
            return (y, summed) if added else y

        return function

    inputs = [x, residual if added else None, weight, bias]
    eagerly = formula(eager_norm, torch.float32, out, casting="gemma")
    cotangents = [torch.randn_like(x, dtype=t) for t in ((out, dtype) if added else (out,))]
    backend.calls.clear()
    got = run(ours, inputs, cotangents)
    # pairs of dtypes the C kernel was not built for go to the reference
    assert len(backend.calls) >= 2 or backend.module is cpu_backend
    eager = run(eagerly, inputs, cotangents)
    truth = run(formula(true_norm, torch.float64, torch.float64), inputs, cotangents, torch.float64)
    terms = sizes_of_terms(
        x.double() + residual.double() if added else x, weight, bias, cotangents[0], **exact
    )
    unit = backend.unit(torch.bfloat16 if torch.bfloat16 in (dtype, out) else dtype)
    for name, a, b, c in zip(names_of(inputs), got, eager, truth, strict=True):
        assert_as_close_as(a, b, c, name=name, terms=terms[name], unit=unit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_roundings_are_where_the_casting_puts_them(backend: Backend, dtype: torch.dtype) -> None:
    """A missing rounding only makes results more accurate; so compare bits, not errors."""
    if backend.unit(dtype) is not None:
        pytest.skip("the interpreter does not round to bfloat16, it cuts")
    x = torch.randn(31, 96, device=backend.device).to(dtype)
    weight = torch.randn(96, device=backend.device).to(dtype)
    settings = {"eps": 1e-5, "k": 96, "offset": 0.0}
    expected = {c: eager_norm(x, weight, None, casting=c, **settings) for c in ("gemma", "llama")}
    assert (expected["gemma"] == expected["llama"]).double().mean() < 0.9
    for casting, y in expected.items():
        got = functional.rms_norm(x, weight, casting=casting)
        assert (got == y).double().mean() > 0.995, casting
    # the same in dweight, with a cotangent that picks single rows
    leaf = weight.clone().requires_grad_()
    dy = torch.zeros_like(x)
    dy[7] = 1.0
    functional.rms_norm(x, leaf, casting="llama").backward(dy)
    xhat = eager_norm(x, None, None, casting="gemma", **settings)[7]
    assert (leaf.grad == xhat).double().mean() > 0.98
    wide = weight.float().requires_grad_()
    functional.rms_norm(x, wide, casting="llama").backward(dy.float())
    assert (wide.grad == xhat.float()).double().mean() > 0.98


@st.composite
def inputs(draw: st.DrawFn) -> tuple[list[Tensor | None], dict, bool]:
    """x, residual, weight and bias of any float dtypes, with any strides and storage offsets.

    Also the settings, and whether the cotangents are strided too.
    """
    torch.manual_seed(draw(st.integers(0, 1000)))
    hidden = draw(st.integers(1, 70))
    shape = (*draw(st.lists(st.integers(0, 4), max_size=3)), hidden)

    def tensor(size: tuple[int, ...]) -> Tensor:
        dtype = draw(st.sampled_from(DTYPES))
        steps = [draw(st.integers(1, 2)) for _ in size]
        axes = draw(st.permutations(range(len(size))))
        offset = draw(st.integers(0, 3))
        stored = [size[a] * steps[a] for a in axes]
        t = torch.randn(offset + torch.Size(stored).numel()).to(dtype)[offset:].view(stored)
        t = t.permute([axes.index(a) for a in range(len(size))])
        return t[tuple(slice(None, None, step) for step in steps)]

    tensors = [
        tensor(size) if wanted else None
        for size, wanted in (
            (shape, True),
            (shape, draw(st.booleans())),
            ((hidden,), draw(st.booleans())),
            ((hidden,), draw(st.booleans())),
        )
    ]
    settings = {
        "p": draw(st.floats(0.01, 1.0)),
        "eps": draw(st.floats(0.1, 1.0)),  # float16 gradients overflow at less
        "weight_offset": draw(st.sampled_from([0.0, 1.0, -0.37])),
        "casting": draw(st.sampled_from(["gemma", "llama"])),
    }
    return tensors, settings, draw(st.booleans())


@hypothesis.settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(case=inputs())
def test_any_strides_and_dtypes(backend: Backend, case: tuple) -> None:
    tensors, settings, strided = case
    tensors = [None if t is None else t.to(backend.device) for t in tensors]
    with_residual = tensors[1] is not None

    def ours(x, r, w, b):
        if with_residual:
            return functional.add_rms_norm(x, r, w, b, **settings)
        return functional.rms_norm(x, w, b, **settings)

    def truth(x, r, w, b):
        summed = x + r if with_residual else x
        k = functional.statistic_size(x.shape[-1], settings["p"])
        y = true_norm(summed, w, b, eps=settings["eps"], k=k, offset=settings["weight_offset"])
        return (y, summed) if with_residual else y

    with torch.no_grad():
        outputs = ours(*tensors)
    outputs = outputs if with_residual else (outputs,)
    cotangents = [torch.randn_like(o) for o in outputs]
    if strided and outputs[0].dim() > 1:
        cotangents = [strided_copy(c) for c in cotangents]
    got = run(ours, tensors, cotangents)
    expected = run(truth, tensors, cotangents, torch.float64)
    coarsest = max(torch.finfo(t.dtype).eps for t in (*tensors, *outputs) if t is not None)
    x, residual, weight, bias = tensors
    terms = sizes_of_terms(
        x if residual is None else x.double() + residual.double(),
        weight,
        bias,
        cotangents[0],
        eps=settings["eps"],
        k=functional.statistic_size(x.shape[-1], settings["p"]),
        offset=settings["weight_offset"],
    )
    for name, a, b in zip(names_of(tensors), got, expected, strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        # a handful of roundings, each up to a unit of the coarsest dtype
        atol = 6.0 * coarsest * terms[name]
        if name in ("dx", "dresidual") and with_residual:
            atol += 2.0 * coarsest * cotangents[1].abs().max().item() if a.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=0.0, atol=atol)


def test_nothing_is_computed_that_is_not_wanted(backend: Backend) -> None:
    x = torch.randn(6, 40, device=backend.device)
    weight, bias = torch.randn(2, 40, device=backend.device)
    formula = reference.Formula(40, 1e-5, 0.0, False)
    assert backend.module.forward(x, None, weight, bias, formula, save_rstd=False)[2] is None
    for train_x, train_weight, train_bias in itertools.product([False, True], repeat=3):
        leaves = [x.clone(), weight.clone(), bias.clone()]
        for t, wanted in zip(leaves, (train_x, train_weight, train_bias), strict=True):
            t.requires_grad_(wanted)
        y = functional.rms_norm(*leaves)
        assert y.requires_grad == (train_x or train_weight or train_bias)
        backend.calls.clear()
        if y.requires_grad:
            y.backward(torch.randn_like(y))
        assert [t.grad is not None for t in leaves] == [train_x, train_weight, train_bias]
        reduced = "reduce_partials" in backend.calls
        assert backend.module is not triton_backend or reduced == (train_weight or train_bias)


def test_a_row_does_not_depend_on_its_batch(backend: Backend) -> None:
    x = torch.randn(37, 96, device=backend.device)
    weight, bias = torch.randn(2, 96, device=backend.device)
    dy = torch.randn_like(x)
    whole = run(functional.rms_norm, [x, weight, bias], [dy])
    some = run(functional.rms_norm, [x[5:8], weight, bias], [dy[5:8]])
    assert torch.equal(some[0], whole[0][5:8])
    assert torch.equal(some[1], whole[1][5:8])
    again = run(functional.rms_norm, [x, weight, bias], [dy])
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under Triton's interpreter
@pytest.mark.parametrize("p", [1.0, 0.3])
def test_infinities_and_nans_spread_as_in_torch(backend: Backend, p: float) -> None:
    x = torch.randn(5, 40, device=backend.device)
    x[1, 3], x[2, 39], x[3, 0] = float("inf"), float("-inf"), float("nan")
    x[4] = 0.0
    weight, bias = torch.randn(2, 40, device=backend.device)
    dy = torch.randn_like(x)
    got = run(lambda *t: functional.rms_norm(*t, eps=0.0, p=p), [x, weight, bias], [dy])
    settings = {"eps": 0.0, "k": 40 if p == 1.0 else 12, "offset": 0.0, "casting": "gemma"}
    expected = run(lambda *t: eager_norm(*t, **settings), [x, weight, bias], [dy])
    torch.testing.assert_close(got[0], expected[0], equal_nan=True)
    torch.testing.assert_close(got[1][0], expected[1][0])
    assert not got[1][1:].isfinite().all(1).any()


def test_only_one_of_the_two_outputs_is_used(backend: Backend) -> None:
    tensors = [torch.randn(4, 24, device=backend.device, requires_grad=True) for _ in range(2)]
    weight = torch.randn(24, device=backend.device, requires_grad=True)
    for used in (0, 1):
        outputs = functional.add_rms_norm(*tensors, weight)
        dy = torch.randn_like(outputs[0])
        got = torch.autograd.grad(outputs[used], [*tensors, weight], dy, allow_unused=True)
        summed = tensors[0] + tensors[1]
        expected = (functional.rms_norm(summed, weight), summed)[used]
        wanted = torch.autograd.grad(expected, [*tensors, weight], dy, allow_unused=True)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b) if b is not None else None
            assert (a is None) == (b is None)
