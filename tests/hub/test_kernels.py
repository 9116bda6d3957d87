"""Our layers under the real `kernels` package: bound onto other classes' norms, same numbers.

Transformers 5.23 wants a newer `kernels` than could be had here, so that its decorator does
nothing; `adopt` does what the decorator would do. The last test has Transformers itself call it.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import kernels
import pytest
import torch
import transformers
from kernels import Mode, kernelize, use_kernel_mapping
from norm_truth import assert_as_close_as, run, sizes_of_terms, statistic_size, true_norm
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_rmsnorm import RMSNorm, functional, layers, patch_model, patch_report, unpatch_model
from hf_rmsnorm.hub.kernels import LAYER_NAMES, mapping, register

HIDDEN = 40
# of the input, and of the weight
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
)


def adopt(cls: type[nn.Module], layer: str = "RMSNorm") -> type[nn.Module]:
    """`cls` as it is after `@use_kernel_forward_from_hub(layer)`; `cls` itself is left alone."""
    adopting = type(cls.__name__, (cls,), {})
    kernels.replace_kernel_forward_from_hub(adopting, layer)
    return adopting


def randomised(module: nn.Module) -> nn.Module:
    for name, parameter in module.named_parameters():
        if "norm" in name or parameter.dim() < 2:
            parameter.data.copy_(1 + 0.3 * torch.randn_like(parameter))
    return module


def kernelized(module: nn.Module, mode: Mode = Mode.TRAINING) -> nn.Module:
    with use_kernel_mapping(mapping(), inherit_mapping=False):
        return kernelize(module, mode=mode, device="cpu", use_fallback=False)


def bound(module: nn.Module) -> bool:
    return vars(module)["forward"].__func__ in [
        getattr(layers, name).forward for name in LAYER_NAMES
    ]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What our kernels were called with."""
    seen: list[dict] = []
    original = functional.rms_norm

    def recorded(x: Tensor, *args: Tensor | None, **kwargs) -> Tensor:
        seen.append(kwargs)
        return original(x, *args, **kwargs)

    monkeypatch.setattr(functional, "rms_norm", recorded)
    return seen


def decorated() -> dict[str, type[nn.Module]]:
    """Every class that Transformers decorates as "RMSNorm"."""
    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        names = re.findall(
            r'^@use_kernel_forward_from_hub\("RMSNorm"\)\n(?:@.*\n)*class (\w+)', text, re.MULTILINE
        )
        for name in names:
            module = f"transformers.models.{path.parent.name}.{path.stem}"
            found[f"{path.parent.name}.{name}"] = getattr(importlib.import_module(module), name)
    return found


def with_weight(norm: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,))


def test_every_norm_that_transformers_decorates_computes_the_same(calls: list[dict]) -> None:
    classes = decorated()
    assert len(classes) > 100
    x, dy, weight = torch.randn(2, 7, HIDDEN), torch.randn(2, 7, HIDDEN), torch.rand(HIDDEN) + 0.5
    for i, (name, cls) in enumerate(classes.items()):
        eps = 0.02 * (1 + i % 5)  # large enough to be seen
        stock, ours = cls(HIDDEN, eps=eps), kernelized(adopt(cls)(HIDDEN, eps=eps))
        assert bound(ours)
        sizes = sizes_of_terms(x, weight, None, dy, eps=eps, k=HIDDEN, offset=0.0)
        for dtypes in DTYPES:
            inputs = [t.to(dtype) for t, dtype in zip((x, weight), dtypes, strict=True)]
            truth = run(
                lambda x, w, eps=eps: true_norm(x, w, None, eps=eps, k=HIDDEN, offset=0.0),
                inputs,
                [dy],
                torch.float64,
            )
            before = len(calls)
            got, expected = (run(with_weight(norm), inputs, [dy]) for norm in (ours, stock))
            assert len(calls) == before + 1, f"{name} did not run our kernel"
            for what, *values in zip(("y", "dx", "dweight"), got, expected, truth, strict=True):
                assert_as_close_as(
                    *values,
                    name=f"{name} {dtypes} {what}",
                    terms=sizes[what],
                    unit=max(torch.finfo(dtype).eps for dtype in dtypes),
                )
            # the same roundings, in the same places: another order of casting moves every third
            moved = (got[0] != expected[0]).float().mean()
            assert got[0].dtype == torch.float32 or moved < 0.02, f"{name} {dtypes}: {moved}"


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        rms_norm_eps=1e-4,
    )
    return randomised(transformers.LlamaForCausalLM(config)).eval()


@pytest.fixture
def llama_adopts() -> Iterator[None]:
    """`LlamaRMSNorm` as Transformers decorates it where it finds a `kernels` it likes."""
    kernels.replace_kernel_forward_from_hub(LlamaRMSNorm, "RMSNorm")
    yield
    del LlamaRMSNorm.kernel_layer_name, LlamaRMSNorm.kernel_condition


IDS = torch.tensor([[3, 14, 15, 9, 2, 6, 5], [35, 8, 9, 7, 9, 3, 2]])


@pytest.mark.usefixtures("llama_adopts")
@pytest.mark.parametrize(
    "mode", [Mode.INFERENCE, Mode.TRAINING, Mode.TRAINING | Mode.TORCH_COMPILE]
)
def test_a_kernelized_model_computes_and_trains_the_same(mode: Mode, calls: list[dict]) -> None:
    stock, model = llama(), kernelized(llama(), mode)
    dy = torch.randn(2, 7, 61)
    outputs = [m(IDS).logits for m in (stock, model)]
    assert len(calls) == 5
    for y in outputs:
        (y * dy).sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0])
    for (name, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.usefixtures("llama_adopts")
def test_a_kernelized_model_compiles_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_formulas", {})  # so that tracing meets the class first
    model = kernelized(llama(), Mode.INFERENCE | Mode.TORCH_COMPILE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, llama()(IDS).logits)
    assert list(layers._formulas) == [(LlamaRMSNorm, ("weight",))]


@pytest.mark.usefixtures("llama_adopts")
def test_patching_takes_a_kernelized_model_and_gives_it_back() -> None:
    model = kernelized(llama())
    expected = model(IDS).logits
    assert patch_report(patch_model(model)).plan.count("exact") == 5
    kernelized(model)  # no longer adopts anything
    assert type(model.model.norm) is RMSNorm and "forward" not in vars(model.model.norm)
    torch.testing.assert_close(model(IDS).logits, expected)
    unpatch_model(model)
    assert type(model.model.norm) is LlamaRMSNorm and bound(model.model.norm)


class OffsetNorm(LlamaRMSNorm):
    """A subclass with a formula of its own: it inherits the layer name all the same."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class OtherEps(nn.Module):
    """Has both names, and uses the less usual one."""

    def __init__(self, hidden: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.variance_epsilon, self.eps = 0.5, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class ConstantEps(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        return (self.weight * wide).to(x.dtype)


@pytest.mark.parametrize("cls", [OffsetNorm, OtherEps, ConstantEps])
def test_the_layer_follows_the_class(cls: type[nn.Module], calls: list[dict]) -> None:
    module = randomised(adopt(cls)(HIDDEN, eps=0.1))
    x = torch.randn(3, HIDDEN) * torch.logspace(0, -3, 3)[:, None]
    torch.testing.assert_close(kernelized(module)(x), cls.forward(module, x))
    assert len(calls) == 1


class Centred(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class Scaled(LlamaRMSNorm):
    gain = 1.0  # an instance may say otherwise

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(x)


class WithBias(LlamaRMSNorm):
    def __init__(self, hidden: int, eps: float):
        super().__init__(hidden, eps)
        self.bias = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class Sized(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Centred, "NormSpec\\(kind='layernorm'"),
        (Scaled, "Scaled.gain"),
        (WithBias, "bias"),
        (Sized, "scale"),
    ],
)
def test_a_class_that_computes_something_else_keeps_its_own_forward(
    cls: type[nn.Module], why: str, calls: list[dict], caplog: pytest.LogCaptureFixture
) -> None:
    module = randomised(adopt(cls)(HIDDEN, eps=0.1))
    module.gain, module.scale = 3.0, 2.0
    x = torch.randn(3, HIDDEN)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(kernelized(module)(x), cls.forward(module, x))
        module(x)
    (record,) = caplog.records
    assert re.search(f"{cls.__name__} keeps its own forward: .*{why}", record.getMessage())
    assert not calls


class Partial(WithBias):
    def __init__(self, hidden: int, eps: float):
        super().__init__(hidden, eps)
        self.p = 0.3

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled_by(x, x[..., : statistic_size(x.shape[-1], str(self.p))])

    def scaled_by(self, x: Tensor, head: Tensor) -> Tensor:
        mean_square = head.float().square().mean(-1, keepdim=True)
        y = x.float() * torch.rsqrt(mean_square + self.variance_epsilon) * self.weight.float()
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


class LastFeatures(Partial):
    def forward(self, x: Tensor) -> Tensor:
        return self.scaled_by(x, x[..., -statistic_size(x.shape[-1], str(self.p)) :])


@pytest.mark.parametrize(
    ("cls", "layer", "p"), [(WithBias, "RMSNormBias", 1.0), (Partial, "PartialRMSNorm", 0.3)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_biased_and_partial_norms_have_names_of_their_own(
    cls: type[nn.Module], layer: str, p: float, bias: bool, calls: list[dict]
) -> None:
    module = randomised(adopt(cls, layer)(HIDDEN, eps=0.1))
    if not bias and cls is Partial:
        module.bias = None
    x = torch.randn(3, HIDDEN)
    torch.testing.assert_close(kernelized(module)(x), cls.forward(module, x))
    assert [call["p"] for call in calls if call["p"] != 0.3 or call["eps"] == 0.1] == [p]


def test_reading_a_class_leaves_the_callers_surroundings_alone(calls: list[dict]) -> None:
    module = kernelized(randomised(adopt(Partial, "PartialRMSNorm")(HIDDEN, eps=0.1)))
    x = torch.randn(3, HIDDEN)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module(x)  # not read: the class's own forward
    assert not calls
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu"):
            y = module(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert calls
    torch.testing.assert_close(y, type(module).forward(module, x))


def test_another_statistic_is_not_taken_for_a_partial_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = randomised(adopt(LastFeatures, "PartialRMSNorm")(HIDDEN, eps=0.1))
    x = torch.randn(3, HIDDEN)
    assert torch.equal(kernelized(module)(x), LastFeatures.forward(module, x))
    assert "not the mean over the first" in caplog.text


def test_each_name_is_registered_for_all_modes() -> None:
    with use_kernel_mapping({}, inherit_mapping=False):
        register()
        for layer in LAYER_NAMES:
            module = adopt(Partial, layer)(HIDDEN, eps=0.1)
            for mode in (Mode.INFERENCE, Mode.TRAINING | Mode.TORCH_COMPILE):
                kernelize(module, mode=mode, device="cpu", use_fallback=False)
                assert vars(module)["forward"].__func__ is getattr(layers, layer).forward
        with pytest.raises(ValueError, match="No layer mapping"):  # xpu: only if asked for
            kernelize(module, mode=Mode.INFERENCE, device="xpu", use_fallback=False)
        register("xpu")
        kernelize(module, mode=Mode.INFERENCE, device="xpu", use_fallback=False)


def test_bad_devices_and_a_missing_package_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"\['tpu'\]; there are \['cpu', 'cuda'"):
        register(["cpu", "tpu"])
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError, match="pip install kernels"):
        register()


USE_KERNELS = """
import importlib.metadata
found = importlib.metadata.version
# Transformers asks for 0.18.2; what it calls is the same in 0.17.2.
importlib.metadata.version = lambda name: "0.18.2" if name == "kernels" else found(name)

import sys, torch, transformers, hf_rmsnorm.hub.kernels
from kernels.layer.globals import _KERNEL_MAPPING
from hf_rmsnorm import layers

hf_rmsnorm.hub.kernels.register()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], use_kernels=True)
ids = torch.tensor([[3, 14, 15, 9, 2, 6, 5]])
for training in (False, True, False):  # each change makes Transformers register its own again
    model.train(training)
    assert model.model.norm.forward.__func__ is layers.RMSNorm.forward
    print(repr(model(ids).logits.tolist()))
repositories = _KERNEL_MAPPING.get()["RMSNorm"]
for device in ("cuda", "rocm"):
    (chosen,) = repositories[device].repos_by_capability.find_smallest_interval(90).values()
    assert isinstance(chosen, hf_rmsnorm.hub.kernels.Layer), chosen
"""


@pytest.mark.launch
def test_transformers_itself_binds_them_and_puts_nothing_in_their_place(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", USE_KERNELS, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = model(IDS[:1]).logits
    for line in done.stdout.splitlines():
        torch.testing.assert_close(torch.tensor(json.loads(line)), expected)
