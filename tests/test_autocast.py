"""`autocast_output`: the dtype of a norm's output under autocast, and which sites may choose it."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterator

import pytest
import torch
from model_zoo import build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_rmsnorm import PatchError, RMSNorm, ops, patch_model, plan_patch, unpatch_model
from hf_rmsnorm.ops import reference
from hf_rmsnorm.patching.plan import PatchPlan

HALF = torch.bfloat16


def low() -> torch.autocast:
    return torch.autocast("cpu", HALF)


@pytest.fixture
def one_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arithmetic whatever the dtypes, so that bits can be compared."""
    monkeypatch.setattr(ops, "backend_for", lambda x: reference)
    monkeypatch.setattr(ops.shortcut, "call", ops.shortcut.none)


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.fixture
def fake_gpu() -> Iterator[None]:
    """Tensors on a GPU that hold nothing, under its autocast."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", HALF)
    with FakeTensorMode():
        yield  # without gradients: autograd wants a real device
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_dtype("cuda", torch.float16)


@pytest.mark.parametrize("x_dtype", [torch.float32, HALF, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("output", ["float32", "input", "autocast"])
def test_output_dtype_on_a_gpu(fake_gpu: None, output: str, x_dtype: torch.dtype) -> None:
    weight_dtype = torch.float64 if x_dtype == torch.float64 else torch.float32
    norm = RMSNorm(12, device="cuda", dtype=weight_dtype)
    norm.autocast_output = output
    with torch.no_grad():
        y = norm(torch.empty(5, 12, device="cuda", dtype=x_dtype))
    expected = {"float32": torch.float32, "input": x_dtype, "autocast": HALF}[output]
    assert y.dtype == (torch.float64 if x_dtype == torch.float64 else expected)


@pytest.mark.parametrize("casting", ["gemma", "llama"])
def test_float32_on_a_gpu_is_what_upcasting_the_input_gives(
    one_backend: None, monkeypatch: pytest.MonkeyPatch, casting: str
) -> None:
    norm = randomised(RMSNorm(12))
    norm.casting = casting
    x = torch.randn(5, 12).to(HALF)
    monkeypatch.setattr(RMSNorm, "_autocast", autocast_of_a_gpu)
    with low():
        assert torch.equal(norm(x), norm(x.float()))


def autocast_of_a_gpu(norm: RMSNorm, x: Tensor) -> tuple[Tensor, torch.dtype | None]:
    """`RMSNorm._autocast` told that x is on a GPU."""

    class Elsewhere:
        dtype, device = x.dtype, torch.device("cuda")

        def float(self) -> Tensor:
            return x.float()

    torch.set_autocast_enabled("cuda", True)
    try:
        found, out = original(norm, Elsewhere())
    finally:
        torch.set_autocast_enabled("cuda", False)
    return x if isinstance(found, Elsewhere) else found, out


original = RMSNorm._autocast


def test_nothing_happens_outside_autocast() -> None:
    norm, x = randomised(RMSNorm(12)), torch.randn(5, 12)
    expected = norm(x)
    for output in ("input", "autocast"):
        norm.autocast_output = output
        assert torch.equal(norm(x), expected)
        with torch.autocast("cpu", HALF, enabled=False):
            assert norm(x).dtype == torch.float32
    with low():
        assert norm(torch.randn(5, 12, dtype=torch.float64)).dtype == torch.float64
        assert norm.to("meta")(x.to("meta")).dtype == torch.float32


class Readers(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.norm = RMSNorm(48)
        self.readers = nn.ModuleList(nn.Linear(48, 7) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.cat([reader(y) for reader in self.readers], -1)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("x_dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_direct_output_is_the_rounded_one(
    one_backend: None, count: int, x_dtype: torch.dtype, compiled: bool
) -> None:
    """The readers' outputs to the bit; gradients too with one reader, within bfloat16 with more,
    whose gradients are then summed in bfloat16."""
    block = randomised(Readers(count))
    run = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
    x, dy = torch.randn(31, 48).to(x_dtype), torch.randn(31, 7 * count)
    results = {}
    for output in ("float32", "autocast"):
        block.norm.autocast_output = output
        leaf = x.clone().requires_grad_()
        with low():
            y = run(leaf if output == "autocast" else leaf.float())
        gradients = torch.autograd.grad(y, [leaf, *block.parameters()], dy.to(y.dtype))
        results[output] = y, gradients
    assert torch.equal(results["float32"][0], results["autocast"][0])
    for a, b in zip(results["float32"][1], results["autocast"][1], strict=True):
        assert a.dtype == b.dtype
        if count == 1:
            assert torch.equal(a, b)
        else:
            error = (a.double() - b.double()).norm() / a.double().norm()
            assert error < 2 * torch.finfo(HALF).eps


class Toy(nn.Module):
    """One norm whose readers are Linear, and others that are read otherwise, one for each way."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(9, 16), nn.Linear(16, 16)
        for name in ("good", "added", "given", "trained", "unused"):
            setattr(self, name, nn.LayerNorm(16))
        self.batch, self.dropout = nn.BatchNorm1d(16), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.inner(x).float()
        x = x + self.dropout(self.outer(self.good(x))).float()
        x = x + self.added(x)
        read = torch.tanh if self.training else self.outer
        x = x + read(self.trained(x))
        return self.given(x), self.outer(self.batch(x))


def test_sites_pass_by_how_they_are_read() -> None:
    model = randomised(Toy()).eval()
    state = copy.deepcopy(model.state_dict())
    inputs = {"x": torch.randn(11, 9)}
    plan = plan_patch(model, strategy="direct", inputs=inputs)
    found = {site.name: site.autocast_output for site in plan.sites}
    assert found == {
        "good": "autocast",
        "added": "float32",
        "given": "float32",
        "trained": "float32",
        "unused": "float32",
    }
    assert "under autocast 1 norms write its dtype themselves" in str(plan)
    assert PatchPlan.from_json(plan.to_json()) == plan
    assert not model.training and all(
        torch.equal(a, state[name]) for name, a in model.state_dict().items()
    )


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x))
        x[0] = 0.0
        return torch.addcmul(x, y, y) if y.dtype == x.dtype else x.scatter_add(0, y, y)


def test_a_model_that_does_not_run_under_autocast_stays_float32() -> None:
    plan = plan_patch(Raises(), strategy="direct", inputs={"x": torch.randn(4, 8)})
    assert [site.autocast_output for site in plan.sites] == ["float32"]


def test_choices() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5))
    inputs = {"input": torch.randn(3, 6)}

    def chosen(**arguments) -> str:
        return plan_patch(model, **arguments).sites[0].autocast_output

    assert chosen(inputs=inputs) == "autocast"
    assert chosen(inputs=inputs, autocast_output="float32") == "float32"
    assert chosen(inputs=inputs, autocast_output="input") == "input"
    assert chosen(strategy="direct") == "float32"  # nothing is run
    assert chosen(strategy="direct", autocast_output="input") == "input"
    with pytest.raises(PatchError, match=r"autocast_output must be one of auto.*got 'bfloat16'"):
        chosen(inputs=inputs, autocast_output="bfloat16")


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return randomised(LlamaForCausalLM(config).eval())


@pytest.mark.parametrize(
    ("make", "low_sites", "count"),
    [
        (lambda: build("gpt2"), "*", 7),
        # the norms after attention and feed-forward are added to, the one before the head is not
        (lambda: build("bert"), "cls.predictions.transform.LayerNorm", 1),
        (llama, "*", 5),
    ],
    ids=["gpt2", "bert", "llama"],
)
def test_models_keep_their_outputs(
    one_backend: None, make: Callable[[], nn.Module], low_sites: str, count: int
) -> None:
    model, ids = make(), torch.randint(5, 20, (3, 9))
    patched = patch_model(copy.deepcopy(model), strategy="direct", inputs={"input_ids": ids})
    norms = {name: m for name, m in patched.named_modules() if isinstance(m, RMSNorm)}
    low_norms = {name for name, m in norms.items() if m.autocast_output == "autocast"}
    assert low_norms == set(fnmatch.filter(norms, low_sites)) and len(low_norms) == count

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad(), low():
            return model(input_ids=ids).logits

    direct = logits(patched)
    for norm in norms.values():
        norm.autocast_output = "float32"
    assert torch.equal(logits(patched), direct)
    assert torch.equal(logits(unpatch_model(patched)), logits(model))
