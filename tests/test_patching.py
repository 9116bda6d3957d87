"""`patch_model`, `patch_report`, `unpatch_model` on whole models."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_rmsnorm import (
    PartialRMSNorm,
    PatchError,
    PatchPlan,
    RMSNorm,
    patch_model,
    patch_report,
    plan_patch,
    unpatch_model,
)
from hf_rmsnorm.patching import on_patched
from hf_rmsnorm.patching.config import unwrap

TOKENS = {"input_ids": torch.tensor([[5, 9, 2, 40, 11, 7], [3, 8, 21, 6, 30, 1]])}
PIXELS = {"pixel_values": torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0))}


def tiny(model_type: str, **config: Any) -> nn.Module:
    """A small model of `model_type` whose every parameter is random, norms and biases included."""
    torch.manual_seed(7)
    settings = transformers.AutoConfig.for_model(model_type, **config)
    auto = transformers.AutoModel if "image_size" in config else transformers.AutoModelForCausalLM
    model = auto.from_config(settings, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def llama_like(model_type: str, **config: Any) -> Callable[[], nn.Module]:
    sizes = {
        "vocab_size": 53,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 24,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return lambda: tiny(model_type, **{**sizes, **config})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: tiny(
        "gpt2", vocab_size=53, n_embd=48, n_layer=2, n_head=3, n_positions=24, eos_token_id=2
    ),
    "gpt_neox": llama_like("gpt_neox"),
    "opt": lambda: tiny(
        "opt",
        vocab_size=53,
        hidden_size=48,
        word_embed_proj_dim=48,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
    ),
    "cohere": llama_like("cohere", use_qk_norm=True),
    "nemotron": llama_like("nemotron"),
    "olmo": llama_like("olmo"),
    "stablelm": llama_like("stablelm", qk_layernorm=True, partial_rotary_factor=0.5),
    "vit": lambda: tiny(
        "vit",
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=20,
        patch_size=5,
    ),
    "convnext": lambda: tiny(
        "convnext", hidden_sizes=[6, 8, 10, 12], depths=[1, 1, 1, 1], image_size=20, patch_size=2
    ),
}
RMS_MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama_like("llama"),
    "gemma": llama_like("gemma", head_dim=12),
    "olmo2": llama_like("olmo2"),
    "qwen3": llama_like("qwen3", head_dim=12),
}


def forward(model: nn.Module) -> Tensor:
    inputs = PIXELS if getattr(model.config, "image_size", None) else TOKENS
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(**{k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()})[
            0
        ]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict(keep_vars=False).items()}


def assert_same_model(model: nn.Module, classes: dict[str, type], state: dict[str, Tensor]) -> None:
    assert {n: type(m) for n, m in model.named_modules()} == classes
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())


def classes_of(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def with_formula(model: nn.Module, plan: PatchPlan, share: float) -> Tensor:
    """The output of `model` with each planned site computed by a formula written out here."""

    def replacement(site: Any) -> Callable[..., Tensor]:
        def run(self: nn.Module, x: Tensor) -> Tensor:
            channels = site.spec.channels_first
            y = x.movedim(1, -1).double() if channels else x.double()
            k = max(1, round(y.shape[-1] * share + 0.4999))
            y = y / (y[..., :k].square().mean(-1, keepdim=True) + site.spec.eps).sqrt()
            if self.weight is not None:
                y = y * (self.weight.double() + site.spec.weight_offset)
            if getattr(self, "bias", None) is not None:
                y = y + self.bias.double()
            return (y.movedim(-1, 1) if channels else y).to(x.dtype)

        return run

    twin = copy.deepcopy(model)
    for site in plan.sites:
        module = twin.get_submodule(site.name)
        if not hasattr(module, "weight"):
            module.weight = None
        module.forward = MethodType(replacement(site), module)
    return forward(twin)


@pytest.mark.parametrize("norm,share", [("rmsnorm", 1.0), ("prmsnorm", 0.0625), ("prmsnorm", 0.3)])
@pytest.mark.parametrize("name", MODELS)
def test_every_layernorm_becomes_the_papers_norm(name: str, norm: str, share: float) -> None:
    model = MODELS[name]()
    p = None if norm == "rmsnorm" else share
    plan = plan_patch(model, norm, p=p, strategy="direct")
    assert plan.count("approximate") == len(plan.sites) > 0
    rounded, before = with_formula(model, plan, share), forward(model)
    # a statistic of one feature may be near zero, and then rounding is magnified: for all alike
    expected = with_formula(copy.deepcopy(model).double(), plan, share)
    rounding = (rounded - expected).abs().max()

    assert patch_model(model, norm, p=p, strategy="direct") is model
    assert all(
        type(model.get_submodule(site.name)) is (RMSNorm if share == 1 else PartialRMSNorm)
        for site in plan.sites
    )
    after = forward(model)
    assert (after - expected).abs().max() <= 5 * rounding + 1e-5 * expected.abs().max()
    assert not torch.allclose(after, before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RMS_MODELS)
def test_models_that_are_rms_already_keep_their_function(name: str, dtype: torch.dtype) -> None:
    model = RMS_MODELS[name]().to(dtype)
    before = forward(model)
    patch_model(model)
    report = patch_report(model)
    assert {site.verdict for site in report.sites} == {"exact"}
    after = forward(model)
    assert after.dtype == before.dtype
    if dtype == torch.float32:
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    else:  # same roundings at the same places: equal but for the order of the sum of squares
        ulp = torch.finfo(dtype).eps * before.abs().max()
        assert (after - before).abs().max() <= 4 * ulp
        assert (after == before).float().mean() > 0.5


@pytest.mark.parametrize("name", [*MODELS, *RMS_MODELS])
@pytest.mark.parametrize("norm", ["rmsnorm", "prmsnorm"])
def test_unpatching_is_bitwise(name: str, norm: str) -> None:
    model = {**MODELS, **RMS_MODELS}[name]()
    state, classes, out = tensors(model), classes_of(model), forward(model)
    parameters = dict(model.named_parameters())
    own = {n: set(m.__dict__) for n, m in model.named_modules()}
    config = model.config.to_dict()

    patch_model(model, norm, strategy="direct")
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[n] for n, p in model.named_parameters())
    marks = {name for name in model.state_dict() if name.endswith(".hf_rmsnorm_p")}
    assert model.state_dict().keys() == state.keys() | marks
    changed = name in MODELS or norm == "prmsnorm"  # else they compute what their class does
    norms = [n for n, m in model.named_modules() if type(m) in (RMSNorm, PartialRMSNorm)]
    affine = {f"{n}.hf_rmsnorm_p" for n in norms if list(model.get_submodule(n).parameters())}
    assert marks == (affine if changed else set())

    assert unpatch_model(model) is model
    assert_same_model(model, classes, state)
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == own
    assert model.config.to_dict() == config
    assert torch.equal(forward(model), out)


def test_unpatching_keeps_trained_norm_weights() -> None:
    model = patch_model(MODELS["gpt2"](), strategy="direct")
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(3)
    trained = {n: t for n, t in tensors(model).items() if not n.endswith(".hf_rmsnorm_p")}
    unpatch_model(model)
    assert_same_model(model, classes_of(MODELS["gpt2"]()), trained)


def test_a_failing_patch_leaves_the_model_as_it_was() -> None:
    model = MODELS["gpt2"]()
    state, classes = tensors(model), classes_of(model)

    def fail(model: nn.Module, plan: PatchPlan) -> None:
        raise MemoryError("out of memory, say")

    on_patched.append(fail)
    try:
        with pytest.raises(MemoryError):
            patch_model(model, strategy="direct")
    finally:
        on_patched.remove(fail)
    assert_same_model(model, classes, state)
    with pytest.raises(PatchError, match="not patched"):
        patch_report(model)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"norm": "rms"}, "norm must be one of rmsnorm, prmsnorm; got 'rms'"),
    ({"norm": "prmsnorm", "p": 0.0}, r"p must be a share in \(0, 1\], got 0.0"),
    ({"norm": "prmsnorm", "p": 1.01}, r"p must be a share in \(0, 1\], got 1.01"),
    ({"norm": "prmsnorm", "p": "half"}, "p must be a share"),
    ({"norm": "prmsnorm", "p": float("nan")}, "p must be a share"),
    ({"p": 0.5}, 'p=0.5 has no meaning for norm="rmsnorm"'),
    ({"strategy": "magic"}, "strategy must be one of auto, exact, direct; got 'magic'"),
    ({"include": "*.nothing"}, r"include pattern '\*.nothing' matches no norm site; there are 5"),
    ({"exclude": ["*ln_1", "h.9*"]}, r"exclude pattern 'h.9\*' matches no norm site"),
    ({"include": "*ln_1", "exclude": "*ln*"}, "none of the 5 norm sites can be patched"),
    ({"include": 3}, "include must be a glob pattern or a list of them, got 3"),
    ({"exclude": ["*ln_1", None]}, "exclude must be a glob pattern or a list of them"),
    ({"inputs": 3}, "inputs must be a dict of the forward's keyword arguments, .* got int"),
]


@pytest.mark.parametrize("arguments,message", BAD, ids=lambda value: str(value)[:40])
def test_bad_arguments_say_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    model = MODELS["gpt2"]()
    state, classes = tensors(model), classes_of(model)
    arguments = {"strategy": "direct", **arguments}
    for call in (plan_patch, patch_model):
        with pytest.raises(PatchError, match=message):
            call(model, **arguments)
    assert_same_model(model, classes, state)


def test_nothing_to_patch_is_an_error() -> None:
    with pytest.raises(PatchError, match="nothing to patch"):
        patch_model(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    with pytest.raises(PatchError, match=r"must be a torch.nn.Module, got dict"):
        patch_model({})  # type: ignore[arg-type]
    with pytest.raises(PatchError, match="Linear was not patched"):
        unpatch_model(nn.Linear(2, 2))


def test_include_and_exclude_choose_sites() -> None:
    model = patch_model(
        MODELS["gpt2"](), strategy="direct", include=["*.ln_1", "*.ln_2"], exclude="*.h.0.*"
    )
    changed = {n for n, m in model.named_modules() if type(m) is RMSNorm}
    assert changed == {"transformer.h.1.ln_1", "transformer.h.1.ln_2"}
    reasons = {site.reason for site in patch_report(model).sites if site.verdict == "kept"}
    assert reasons == {"left out by include/exclude"}


def test_patching_twice() -> None:
    model = patch_model(MODELS["gpt2"](), "prmsnorm", strategy="direct")
    state, classes = tensors(model), classes_of(model)
    said = (
        r"already patched \(5 norm sites .*strategy direct: .*nothing done: .*unpatch_model first"
    )
    for other in ({}, {"strategy": "auto"}, {"include": "*.ln_1"}):
        with pytest.warns(UserWarning, match=said):
            patch_model(model, "prmsnorm", p=0.0625, **{"strategy": "direct", **other})
    with pytest.raises(PatchError, match=r"already patched .* unpatch_model first"):
        patch_model(model, "rmsnorm", strategy="direct")
    assert_same_model(model, classes, state)


def test_another_share_of_the_features_is_never_called_exact() -> None:
    model = nn.Sequential(nn.Linear(5, 32), PartialRMSNorm(32, p=0.25))
    for norm, p in (("rmsnorm", None), ("prmsnorm", 0.5)):
        (site,) = plan_patch(model, norm, p=p).sites
        assert site.verdict == "approximate" and "instead of 0.25" in site.reason
    with pytest.raises(PatchError, match="can be exact"):
        patch_model(model, strategy="exact")
    with pytest.raises(PatchError, match="already"):
        patch_model(model, "prmsnorm", p=0.25)
    x = torch.randn(3, 5)
    expected = RMSNorm(32)(model[0](x))
    with pytest.warns(UserWarning, match="approximately"):
        patch_model(model)
    torch.testing.assert_close(model(x), expected)


def test_part_by_part() -> None:
    model = MODELS["gpt2"]()
    classes, state = classes_of(model), tensors(model)
    patch_model(model.transformer.h[0], strategy="direct")
    patch_model(model, "prmsnorm", strategy="direct", exclude="*.h.0.*")
    assert type(model.transformer.h[0].ln_1) is RMSNorm
    assert type(model.transformer.h[1].ln_1) is PartialRMSNorm
    names = [site.name for site in patch_report(model).sites if site.verdict != "kept"]
    assert sorted(names) == sorted(n for n, m in model.named_modules() if isinstance(m, RMSNorm))
    unpatch_model(model)
    assert_same_model(model, classes, state)


def test_auto_warns_once_about_what_it_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4))
    with pytest.warns(UserWarning, match="1 of 1 norm sites were changed approximately") as caught:
        patch_model(model, inputs=[{"input": torch.randn(2, 3)}])
    assert len(caught) == 1


def test_the_plan_is_data() -> None:
    model = MODELS["cohere"]()
    plan = plan_patch(model, "prmsnorm", p=0.25, strategy="direct")
    assert PatchPlan.from_json(plan.to_json()) == plan
    table = str(plan)
    assert "model.layers.*.input_layernorm" in table
    assert "CohereLayerNorm" in table and "12 of 48 features" in table
    for text in ("{", "[]", '{"version": 1}', '{"version": 99}'):
        with pytest.raises(PatchError, match="plan"):
            PatchPlan.from_json(text)


def test_a_center_that_does_not_say_whom_it_serves_is_not_said_to_serve_none() -> None:
    plan = plan_patch(MODELS["gpt2"]())
    assert "at the output of transformer.wte, for 5 norms" in str(plan)
    unknown = replace(plan, centers=tuple(replace(c, serves=()) for c in plan.centers))
    assert "at the output of transformer.wte\n" in str(unknown)


def test_copies_and_pickles_stay_patched_and_can_be_unpatched() -> None:
    original = MODELS["nemotron"]()
    model = patch_model(copy.deepcopy(original), "prmsnorm", strategy="direct")
    out = forward(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(forward(twin), out)
        unpatch_model(twin)
        assert_same_model(twin, classes_of(original), tensors(original))
        assert torch.equal(forward(twin), forward(original))
    assert torch.equal(forward(model), out)


class Around(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize(
    "reached",
    [
        lambda m: m,
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        torch.compile,
        Around,
    ],
    ids=["itself", "copy", "pickle", "compiled", "inside"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_unpatched_weights_are_not_loaded_over_folded_ones(
    reached: Callable[[nn.Module], nn.Module], strict: bool
) -> None:
    plain = MODELS["gpt2"]()
    model = reached(patch_model(copy.deepcopy(plain)))
    prefix = next(iter(model.state_dict())).removesuffix("transformer.wte.weight")
    state = tensors(model)
    message = f"^{prefix}transformer.* is that of the unpatched model"
    for dtype in (None, torch.float64, torch.bfloat16):
        given = {prefix + name: t.to(dtype) for name, t in plain.state_dict().items()}
        with pytest.raises(PatchError, match=message):
            model.load_state_dict(given, strict=strict)
        one = "transformer.h.1.mlp.c_proj.bias"  # the others trained since
        given = {n: t if n.endswith(one) else t + 1 for n, t in given.items()}
        with pytest.raises(PatchError, match=f"^{prefix}{one} .*before patch_model, or call unp"):
            model.load_state_dict(given, strict=strict)
    assert_same_model(model, classes_of(model), state)


@pytest.mark.parametrize(
    "part", ["transformer", "transformer.h", "transformer.h.1", "transformer.h.1.mlp.c_proj"]
)
@pytest.mark.parametrize("reached", [lambda model: model, copy.deepcopy], ids=["itself", "copy"])
def test_nor_are_those_of_a_part(part: str, reached: Callable[[nn.Module], nn.Module]) -> None:
    plain = MODELS["gpt2"]()
    model = reached(patch_model(copy.deepcopy(plain)))
    state, given = tensors(model), plain.get_submodule(part).state_dict()
    for strict in (True, False):
        with pytest.raises(PatchError, match=r" in the state dict is that of the unpatched model"):
            model.get_submodule(part).load_state_dict(given, strict=strict)
    assert_same_model(model, classes_of(model), state)
    unpatch_model(model)
    model.get_submodule(part).load_state_dict(given)


def test_other_weights_are_loaded() -> None:
    plain = MODELS["gpt2"]()
    model = patch_model(copy.deepcopy(plain))
    own = tensors(model)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for _ in range(2):
            with torch.no_grad():  # trained since
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            saved = {name: t.to(dtype, copy=True) for name, t in tensors(model).items()}
            model.load_state_dict(saved)
            model.load_state_dict({name: t.to(dtype) for name, t in own.items()})
    model.load_state_dict({n: t.to("meta") for n, t in plain.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({n: t[:1] for n, t in plain.state_dict().items()})

    again = patch_model(unpatch_model(patch_model(copy.deepcopy(plain))))
    for twin in (pickle.loads(pickle.dumps(again)), copy.deepcopy(again), again):
        unpatch_model(twin)
        twin.load_state_dict(plain.state_dict())
        assert_same_model(twin, classes_of(plain), tensors(plain))
    direct = patch_model(copy.deepcopy(plain), strategy="direct")
    direct.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("norm", ["rmsnorm", "prmsnorm"])
def test_a_state_dict_says_that_it_is_of_rmsnorms(norm: str, tmp_path: Path) -> None:
    plain = MODELS["gpt2"]()
    model = patch_model(copy.deepcopy(plain), norm, strategy="direct")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*ln_1\.hf_rmsnorm_p"):
        plain.load_state_dict(state)
    for dtype in (torch.float32, torch.bfloat16):
        model.load_state_dict({name: t.to(dtype) for name, t in state.items()})
    model.load_state_dict(plain.state_dict())  # as of before there were marks
    other = patch_model(copy.deepcopy(plain), "prmsnorm", p=0.5, strategy="direct")
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"ln_2\.weight was trained with p .* has p 0\.5"):
            other.load_state_dict(state, strict=strict)


def test_weights_that_the_patch_only_rounded_are_loaded() -> None:
    """As of a checkpoint that was saved exactly patched and then loaded as the stock class."""
    folded = patch_model(MODELS["gpt2"]())
    plain = MODELS["gpt2"]()
    plain.load_state_dict(folded.state_dict(), strict=False)
    with torch.no_grad():  # a bias that the patch leaves alone, too
        plain.transformer.h[0].mlp.c_proj.bias.zero_()
    model = patch_model(copy.deepcopy(plain))
    assert any(not torch.equal(t, plain.state_dict()[n]) for n, t in model.state_dict().items())
    model.load_state_dict(plain.state_dict())
    model.load_state_dict({n: t.bfloat16() for n, t in plain.state_dict().items()})


def test_shared_modules_and_modes_and_hooks_stay() -> None:
    model = MODELS["gpt2"]()
    norm = model.transformer.ln_f
    norm.weight.requires_grad_(False)
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda module, args, output: seen.append(output))
    patch_model(model, strategy="direct")
    forward(model)
    assert model.transformer.ln_f is norm and len(seen) == 1
    assert not norm.weight.requires_grad and not norm.training


@pytest.fixture
def hooked(tmp_path: Any) -> Iterator[dict[str, Callable[[nn.Module], nn.Module]]]:
    """Ways accelerate puts a forward of its own on each module."""
    import accelerate
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Logging(ModelHook):
        pass

    def each(model: nn.Module) -> nn.Module:
        for module in model.modules():
            add_hook_to_module(module, Logging())
        return model

    yield {
        "hook on each module": each,
        "cpu offload": lambda m: accelerate.cpu_offload(m, execution_device="cpu"),
        "disk offload": lambda m: accelerate.disk_offload(
            m, str(tmp_path / "offload"), execution_device="cpu"
        ),
    }


@pytest.mark.parametrize("kind", ["hook on each module", "cpu offload", "disk offload"])
def test_accelerate_hooks_do_not_hide_the_patch(kind: str, hooked: dict[str, Any]) -> None:
    expected = forward(patch_model(MODELS["gpt2"](), strategy="direct"))
    before = forward(MODELS["gpt2"]())
    model = hooked[kind](MODELS["gpt2"]())
    patch_model(model, strategy="direct")
    torch.testing.assert_close(forward(model), expected)
    unpatch_model(model)
    torch.testing.assert_close(forward(model), before)


def test_a_forward_left_by_liger_does_not_hide_the_patch() -> None:
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers.monkey_patch import _bind_method_to_module
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    model = RMS_MODELS["llama"]()
    expected = forward(patch_model(RMS_MODELS["llama"](), "prmsnorm", p=0.25, strategy="direct"))
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            _bind_method_to_module(module, "extra_repr", LigerRMSNorm.extra_repr)

            def same(self: nn.Module, x: Tensor) -> Tensor:
                return type(self).forward(self, x)

            _bind_method_to_module(module, "forward", same)
    patch_model(model, "prmsnorm", p=0.25, strategy="direct")
    torch.testing.assert_close(forward(model), expected)
    unpatch_model(model)
    assert "forward" in model.model.norm.__dict__


def test_a_forward_that_computes_something_else_is_kept() -> None:
    model = MODELS["gpt2"]()
    norm = model.transformer.h[0].ln_1
    norm.forward = MethodType(lambda self, x: torch.tanh(type(self).forward(self, x)), norm)
    out = forward(model)
    patch_model(model, strategy="direct", include="*.h.1.*")
    assert type(norm) is nn.LayerNorm
    unpatch_model(model)
    site = plan_patch(model, strategy="direct").sites[0]
    assert (site.name, site.verdict) == ("transformer.h.0.ln_1", "kept")
    assert "neither LayerNorm nor RMSNorm" in site.reason
    assert torch.equal(forward(model), out)


@pytest.mark.parametrize("before", [True, False])
def test_compiled_models(before: bool) -> None:
    expected = forward(patch_model(MODELS["gpt2"](), strategy="direct"))
    model = MODELS["gpt2"]()
    compiled = torch.compile(model, backend="eager")
    if before:
        compiled(**TOKENS)
    assert patch_model(compiled, strategy="direct") is compiled
    assert type(model.transformer.ln_f) is RMSNorm
    with torch.no_grad():
        torch.testing.assert_close(compiled(**TOKENS)[0], expected)
    assert {site.name for site in patch_report(model).sites} >= {"transformer.ln_f"}
    unpatch_model(compiled)
    assert type(model.transformer.ln_f) is nn.LayerNorm


def test_compiled_blocks_have_plain_names_in_patterns() -> None:
    model = MODELS["gpt2"]()
    model.transformer.h[0] = torch.compile(model.transformer.h[0], backend="eager")
    patch_model(model, strategy="direct", include="transformer.h.0.ln_*")
    assert sum(type(m) is RMSNorm for m in model.modules()) == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("nested", [True, False])
def test_the_fused_transformer_encoder_path_is_left(nested: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 20, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = nn.TransformerEncoder(layer, 2) if nested else layer
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.eval()
    x = torch.randn(3, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
    kwargs = {"src_key_padding_mask": mask}
    with torch.no_grad():
        layer_norm = model(x, **kwargs)
        patch_model(model, strategy="direct")
        fast = model(x, **kwargs)
    slow = model(x, **kwargs).detach()  # with grad, the fused path is never taken
    keep = ~mask
    torch.testing.assert_close(fast[keep], slow[keep])
    assert not torch.allclose(fast[keep], layer_norm[keep], atol=1e-2)
    unpatch_model(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x, **kwargs), layer_norm)


@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_adapters_before_and_after(first: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=["c_attn"],
        modules_to_save=["ln_f"],
        init_lora_weights=False,
        fan_in_fan_out=True,
    )

    def adapt(model: nn.Module) -> nn.Module:
        torch.manual_seed(1)
        return peft.get_peft_model(model, config).eval()

    expected = forward(adapt(patch_model(MODELS["gpt2"](), strategy="direct")))
    model = MODELS["gpt2"]()
    if first == "patch":
        model = adapt(patch_model(model, strategy="direct"))
    else:
        model = patch_model(adapt(model), strategy="direct")
    torch.testing.assert_close(forward(model), expected)
    with model.disable_adapter():
        torch.testing.assert_close(
            forward(model), forward(patch_model(MODELS["gpt2"](), strategy="direct"))
        )


def test_the_callers_modes_do_not_matter() -> None:
    wanted = plan_patch(MODELS["gpt2"]())
    assert wanted.count("exact") == 5
    under_inference, under_autocast, elsewhere = (MODELS["gpt2"]() for _ in range(3))
    with torch.inference_mode():
        patch_model(under_inference)
    with torch.autocast("cpu", torch.bfloat16):
        patch_model(under_autocast)
    with torch.device("meta"):  # stands for an accelerator as the default device
        patch_model(elsewhere)
    before = MODELS["gpt2"]()(**TOKENS).logits
    for model in (under_inference, under_autocast, elsewhere):
        assert patch_report(model).sites == wanted.sites
        assert (model(**TOKENS).logits - before).abs().max() < 1e-4
    model = unpatch_model(under_inference)
    assert torch.equal(model(**TOKENS).logits, before)


def test_weights_that_went_elsewhere_are_not_put_back(tmp_path: Path) -> None:
    """Their memory is not there to be compared: reading it would end the process."""
    inputs = {"input": torch.randn(3, 6)}
    gone = patch_model(nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), inputs=inputs).to("meta")
    with pytest.raises(PatchError, match=r"0.bias was folded .* sharded, quantised or offloaded"):
        unpatch_model(gone)
    sharded = patch_model(nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), inputs=inputs)
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(PatchError, match=r"0.bias was folded .* sharded"):
            unpatch_model(sharded)
        assert patch_report(sharded).sites[0].verdict == "exact"
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_packed_weights_stay_as_they_are() -> None:
    x = torch.randn(3, 6)

    def packed() -> nn.Module:
        torch.manual_seed(2)
        net = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(6, 6), nn.LayerNorm(6))))
        return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)

    with pytest.raises(PatchError, match="none of the 3 norm sites can be exact"):
        patch_model(packed(), strategy="exact", inputs={"input": x})
    sites = patch_report(patch_model(packed(), inputs={"input": x})).sites
    assert [site.verdict for site in sites] == ["approximate"] * 3


def test_sharded_models_are_refused() -> None:
    class FSDPModule:
        pass

    class FSDPLinear(FSDPModule, nn.Linear):
        pass

    model = nn.Sequential(FSDPLinear(4, 4), nn.LayerNorm(4))
    with pytest.raises(PatchError, match="0 is already sharded by FSDP: patch the model first"):
        patch_model(model, strategy="direct")


def test_the_record_lives_on_the_model_alone() -> None:
    one, two = MODELS["gpt2"](), MODELS["gpt2"]()
    patch_model(one, strategy="direct")
    assert classes_of(two)["transformer.ln_f"] is nn.LayerNorm
    assert unwrap(two) is two
    assert two.config.model_type == "gpt2"
