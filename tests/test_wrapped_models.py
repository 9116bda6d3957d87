"""Models that other libraries have wrapped, hooked, adapted or packed."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from model_zoo import randomise
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_rmsnorm import PatchError, patch_model, patch_report, plan_patch, unpatch_model

IDS = torch.tensor([[5, 9, 12, 40, 11, 7], [13, 8, 21, 6, 30, 41]])


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=57,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        attn_pdrop=0.0,
    )
    return randomise(transformers.GPT2LMHeadModel(config)).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def off(before: Tensor, after: Tensor) -> float:
    return ((before - after).abs().max() / before.abs().max()).item()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def hooked(model: nn.Module) -> nn.Module:
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    return model


def dispatched(model: nn.Module) -> nn.Module:
    return dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def adapted(model: nn.Module, *, merged: bool = False, disabled: bool = False) -> nn.Module:
    """With two LoRA adapters, of which the first is active."""
    peft = pytest.importorskip("peft")
    lora = {"fan_in_fan_out": True, "init_lora_weights": False}
    first = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM", **lora)
    second = peft.LoraConfig(r=2, target_modules=["c_proj"], task_type="CAUSAL_LM", **lora)
    model = peft.get_peft_model(model, first, adapter_name="one")
    model.add_adapter("two", second)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    model.set_adapter("one")
    if merged:
        model.merge_adapter()
    if disabled:
        model.base_model.disable_adapter_layers()
    return model.eval()


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda model: model,
    "training mode": lambda model: model.train(),
    "hooks": hooked,
    "dispatched": dispatched,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": compiled_in_place,
    "data parallel": lambda model: nn.parallel.DistributedDataParallel(model),
    "adapters": adapted,
    "merged adapter": lambda model: adapted(model, merged=True),
    "disabled adapters": lambda model: adapted(model, disabled=True),
    "half frozen": lambda model: model.requires_grad_(False),
}
REFUSED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "offloaded to CPU": lambda model: cpu_offload(model, execution_device="cpu"),
    "sharded": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (1,))),
    "meta": lambda model: model.to("meta"),
}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that could be seen to change: bytes, flags, classes, methods, hooks, configs, the RNG."""
    tensors = {
        name: (
            id(t),
            t.dtype,
            t.device,
            t.requires_grad,
            t.grad,
            t._version,
            b"" if t.is_meta else hashlib.sha256(pickle.dumps(t.detach())).digest(),
        )
        for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    modules = {}
    for name, module in model.named_modules():
        own = {
            k: id(v)
            for k, v in vars(module).items()
            if not isinstance(v, (bool, int, float, str, type(None)))
        }
        simple = {k: v for k, v in vars(module).items() if k not in own}
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks)]
        modules[name] = (type(module), own, simple, hooks)
    configs = {name: str(m.config) for name, m in model.named_modules() if hasattr(m, "config")}
    return {
        "tensors": tensors,
        "modules": modules,
        "configs": configs,
        "rng": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).digest(),
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [
        f"{part}: {name}"
        for part in ("tensors", "modules", "configs")
        for name in before[part].keys() | after[part].keys()
        if before[part].get(name) != after[part].get(name)
    ] + (["rng"] if before["rng"] != after["rng"] else [])


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", WRAPPED)
def test_planning_touches_nothing(kind: str) -> None:
    model = WRAPPED[kind](gpt2())
    before, outputs = fingerprint(model), logits(model.eval() if kind != "training mode" else model)
    before = fingerprint(model)
    plan = plan_patch(model)
    assert not changed(before, fingerprint(model))
    assert plan.count("exact") == 5
    if kind != "training mode":
        assert torch.equal(logits(model), outputs)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_not_touched_either(kind: str) -> None:
    model = REFUSED[kind](gpt2())
    before = fingerprint(model)
    with pytest.raises(PatchError, match=r"meta device|sharded"):
        plan_patch(model)
    assert not changed(before, fingerprint(model))


def test_a_model_offloaded_to_disk_is_refused(tmp_path: Path) -> None:
    model = disk_offload(gpt2(), str(tmp_path / "offload"), execution_device="cpu")
    before = fingerprint(model)
    with pytest.raises(PatchError, match="meta device"):
        plan_patch(model)
    assert not changed(before, fingerprint(model))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", [k for k in WRAPPED if k != "training mode"])
def test_wrapped_models_are_patched_and_put_back(kind: str) -> None:
    model = WRAPPED[kind](gpt2())
    before = logits(model)
    patch_model(model)
    assert 0 < off(before, logits(model)) < 1e-5
    unpatch_model(model)
    assert torch.equal(logits(model), before)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("kind", ["hooks", "dispatched", "compiled in place"])
def test_models_that_are_wrapped_after_the_patch_can_be_put_back(kind: str) -> None:
    before = logits(gpt2())
    model = WRAPPED[kind](patch_model(gpt2()))
    assert 0 < off(before, logits(model)) < 1e-5
    unpatch_model(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("state", ["one active", "two active", "disabled", "merged"])
def test_every_adapter_is_folded_whichever_is_active(state: str) -> None:
    def outputs(model: Any) -> dict[str, Tensor]:
        found = {}
        for name in ("one", "two"):
            model.set_adapter(name)
            found[name] = logits(model)
        with model.disable_adapter():
            found["none"] = logits(model)
        return found

    wanted = outputs(adapted(gpt2()))
    model: Any = adapted(gpt2(), disabled=state == "disabled")
    if state == "two active":
        model.set_adapter("two")
    if state == "merged":
        model.merge_adapter()
    patch_model(model)
    assert patch_report(model).plan.count("exact") == 5
    if state == "merged":
        model.unmerge_adapter()
    if state == "disabled":
        model.base_model.enable_adapter_layers()
    found = outputs(model)
    assert min(off(wanted["one"], wanted[name]) for name in ("two", "none")) > 0.1
    for name, tensor in wanted.items():
        assert off(tensor, found[name]) < 1e-5, name


class Float32Norm(nn.LayerNorm):
    """As in open_clip: always in float32, with its weights as they are."""

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.layer_norm(
            x.float(), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return y.to(x.dtype)


class Float32Layer(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


@pytest.mark.parametrize("norm,layer", [(Float32Norm, nn.Linear), (nn.LayerNorm, Float32Layer)])
def test_code_that_fixes_float32_is_probed_and_verified_in_it(norm: Any, layer: Any) -> None:
    model = randomise(nn.Sequential(layer(7, 12), norm(12), layer(12, 3)))
    x = torch.randn(5, 7)
    before = model(x)
    patch_model(model, inputs={"input": x})
    report = patch_report(model)
    assert report.sites[0].verdict == "exact"
    assert report.measured is not None and report.measured.precision == "float32"
    assert off(before, model(x)) < 1e-6


def test_pruned_weights_that_fill_up_are_named() -> None:
    model = randomise(nn.Sequential(nn.Linear(7, 12), nn.LayerNorm(12), nn.Linear(12, 3)))
    model[0].weight.data[torch.rand(12, 7) < 0.5] = 0
    model[2].weight.data[torch.rand(3, 12) < 0.5] = 0  # is not folded
    plan = plan_patch(model, inputs={"input": torch.randn(5, 7)})
    assert plan.filled == ("0.weight",)
    assert 'pruned weights whose zeros folding fills (strategy="direct" leaves them): 0.w' in str(
        plan
    )
