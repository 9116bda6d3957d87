"""`read_norm` and `find_norms`: every norm class of transformers, and norms that mislead."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator
from types import MethodType, ModuleType
from typing import Any

import norm_classes
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from hf_rmsnorm import PartialRMSNorm, RMSNorm, recipes
from hf_rmsnorm.recipes import NormSpec, Unreadable, find_norms, read_norm

HIDDEN = norm_classes.HIDDEN


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def modules() -> list[ModuleType]:
    found, missing = norm_classes.import_norm_modules()
    assert len(found) > 200 and not missing
    return found


@pytest.fixture(scope="module")
def classes(modules: list[ModuleType]) -> dict[str, type[nn.Module]]:
    return norm_classes.norm_classes(modules)


@pytest.fixture(scope="module")
def built(classes: dict[str, type[nn.Module]]) -> dict[str, nn.Module]:
    """An instance of every class that can be built."""
    instances = {name: norm_classes.build(cls) for name, cls in classes.items()}
    return {name: module for name, module in instances.items() if module is not None}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "_readings", {})


def readable(module: nn.Module) -> NormSpec:
    reading = read_norm(module)
    assert isinstance(reading, NormSpec), f"{type(module).__name__}: {reading}"
    return reading


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def input_for(module: nn.Module, spec: NormSpec, scale: float = 1.0) -> Tensor:
    """A random input of the module's layout, whose mean over the features is far from 0."""
    weight = getattr(module, "weight", None)
    core = tuple(weight.shape) if weight is not None else spec.normalized_shape or (HIDDEN,)
    generator = torch.Generator().manual_seed(1)
    if not spec.channels_first:
        return scale * (torch.randn(5, 7, *core, generator=generator) + 1.5)
    spatial = (7,) if "SqueezeBert" in type(module).__name__ else (4, 3)
    return scale * (torch.randn(5, *core, *spatial, generator=generator) + 1.5)


def expected(spec: NormSpec, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The formula in float64, rounded only where the spec says so."""
    if spec.channels_first:
        x = x.movedim(1, -1)
    dims = [-1 - i for i in range(len(spec.normalized_shape) or 1)]
    wide = x.double()
    if spec.kind == "layernorm":
        variance, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
        normed = (wide - mean) / (variance + spec.eps).sqrt()
    else:
        normed = wide / (wide**2).mean(dims, keepdim=True).add(spec.eps).sqrt()
    result = x.dtype
    if spec.casting == "llama":
        affine = weight if weight is not None else bias
        result = x.dtype if affine is None else torch.promote_types(x.dtype, affine.dtype)
        if spec.returns_weight_dtype:
            result = affine.dtype if affine is not None else x.dtype
        normed = normed.to(result if spec.returns_weight_dtype else x.dtype).double()
    if weight is not None:
        normed = normed * (weight.double() + spec.weight_offset)
        if spec.casting == "llama" and bias is not None:
            normed = normed.to(result).double()
    if bias is not None:
        normed = normed + bias.double()
    normed = normed.to(result)
    return normed.movedim(-1, 1) if spec.channels_first else normed


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# --- every class of transformers ---------------------------------------------------------------

# class: (kind, weight_offset, casting, returns_weight_dtype, channels_first, autocast_float32)
LN = ("layernorm", 0.0, "gemma", False, False, True)
LN_FIRST = ("layernorm", 0.0, "gemma", False, True, True)
LN_OWN = ("layernorm", 0.0, "gemma", False, False, False)
LLAMA = ("rmsnorm", 0.0, "llama", False, False, False)
T5 = ("rmsnorm", 0.0, "llama", True, False, False)
OLMO2 = ("rmsnorm", 0.0, "gemma", False, False, False)
GEMMA = ("rmsnorm", 1.0, "gemma", False, False, False)


def each(pinned: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), pinned)


PINNED = {
    # subclasses of nn.LayerNorm, all 31 but the two refused ones
    **each(
        LN,
        """ConvNextLayerNorm ConvNextV2LayerNorm DINOv3ConvNextLayerNorm SamLayerNorm Sam2LayerNorm
        SamHQLayerNorm Sam2VideoLayerNorm Sam3TrackerLayerNorm Sam3TrackerVideoLayerNorm
        EdgeTamLayerNorm EdgeTamVideoLayerNorm RfDetrLayerNorm LwDetrLayerNorm SegGptLayerNorm
        GotOcr2LayerNorm SLANeXtLayerNorm PPFormulaNetLayerNorm DeepseekVLHybridLayerNorm
        DeepseekOcr2SamLayerNorm UnlimitedOcrSamLayerNorm""",
    ),
    **each(
        LN_FIRST, "EomtLayerNorm2d EomtDinov3LayerNorm2d VideomtLayerNorm2d SqueezeBertLayerNorm"
    ),
    **each(LN_OWN, "EsmcLayerNorm EsmFold2LayerNorm"),
    "ChameleonLayerNorm": ("layernorm", 0.0, "llama", False, False, True),
    "NemotronLayerNorm1P": ("layernorm", 1.0, "gemma", False, False, False),
    "VideoPrismLayerNorm": ("layernorm", 1.0, "gemma", False, False, True),
    # LayerNorms written out
    **each(LN_OWN, "CohereLayerNorm Cohere2LayerNorm Cohere2MoeLayerNorm CohereCompassLayerNorm"),
    **each(LN_OWN, "EsmFoldLayerNorm OlmoLayerNorm"),
    "DebertaLayerNorm": ("layernorm", 0.0, "llama", False, False, False),
    "VitDetLayerNorm": ("layernorm", 0.0, "llama", False, True, True),
    # RMSNorms, some of them called LayerNorm
    **each(
        LLAMA,
        """LlamaRMSNorm MistralRMSNorm Qwen2RMSNorm Qwen3RMSNorm Phi3RMSNorm MixtralRMSNorm
        DeepseekV3RMSNorm Mamba2RMSNorm OlmoeRMSNorm EuroBertRMSNorm Llama4TextRMSNorm
        CpmAntLayerNorm ImageGPTLayerNorm xLSTMRMSNorm""",
    ),
    **each(
        T5,
        """T5LayerNorm MT5LayerNorm UMT5LayerNorm LongT5LayerNorm UdopLayerNorm IdeficsRMSNorm
        Pix2StructLayerNorm SwitchTransformersLayerNorm Kosmos2_5LayerNorm Pop2PianoLayerNorm""",
    ),
    **each(
        OLMO2,
        """Olmo2RMSNorm GptOssRMSNorm FlexOlmoRMSNorm AfmoeRMSNorm HeliumRMSNorm NemotronHRMSNorm
        MoshiRMSNorm Gemma3nRMSNorm Gemma4RMSNorm DiffusionGemmaRMSNorm""",
    ),
    **each(  # without a weight
        OLMO2,
        """NanoChatRMSNorm Llama4TextL2Norm HrmTextRMSNorm EsmFold2RMSNorm
        DeepseekV4UnweightedRMSNorm""",
    ),
    **each(
        GEMMA,
        """GemmaRMSNorm Gemma2RMSNorm Gemma3RMSNorm T5GemmaRMSNorm VaultGemmaRMSNorm
        RecurrentGemmaRMSNorm Qwen3NextRMSNorm Qwen3_5RMSNorm MiniMaxM3VLRMSNorm
        MuseSparkTextCenteredRMSNorm Qwen4ExpTextRMSNorm""",
    ),
}

# the reasons for what must stay
REFUSED = {
    "PocketTTSFlowLayerNorm": "jvp",
    "GradiumPhononTTSFlowLayerNorm": "jvp",
    "PocketTTSTimestepNorm": "jvp",
    "FalconMambaWeightlessRMSNorm": "buffer",
    "HYV4UnweightedRMSNorm": "test input",
    "MuseSparkTextInputScaledRMSNorm": "neither",
    "xLSTMMultiHeadLayerNorm": "test input",
    "ZayaQKNorm": "temp",
    **each(
        "gate",
        """BambaRMSNormGated Zamba2RMSNormGated FalconH1RMSNormGated Qwen3NextRMSNormGated
        KimiLinearRMSNormGated MambaRMSNormGated""",
    ),
}

# in bfloat16 they round at every step, or round the inverse root, or `1 + w`
ROUNDS_MORE = {
    "ImageGPTLayerNorm",
    "VitDetLayerNorm",
    "CpmAntLayerNorm",
    "VideoPrismLayerNorm",
    "NemotronLayerNorm1P",
    "MuseSparkTextCenteredRMSNorm",
    "DeepseekV4UnweightedRMSNorm",
    "Glm5NextTextUnweightedRMSNorm",
    "Inkling2UnweightedRMSNorm",
}


def test_pinned_classes_are_read_as_their_source_says(built: dict[str, nn.Module]) -> None:
    def facts(spec: NormSpec) -> tuple[Any, ...]:
        early = (spec.casting, spec.returns_weight_dtype)
        return (spec.kind, spec.weight_offset, *early, spec.channels_first, spec.autocast_float32)

    readings = {name: readable(built[name]) for name in PINNED}
    assert {name: facts(spec) for name, spec in readings.items()} == PINNED


def test_pinned_refusals(built: dict[str, nn.Module]) -> None:
    for name, word in REFUSED.items():
        reading = read_norm(built[name])
        assert isinstance(reading, Unreadable) and word in reading.reason, (name, reading)
        assert "\n" not in reading.reason


def test_every_reading_reproduces_the_class(built: dict[str, nn.Module]) -> None:
    read = Counter[str]()
    wrong: list[tuple[str, str, float]] = []
    for name, original in built.items():
        spec = read_norm(original)
        if not isinstance(spec, NormSpec):
            continue
        read[spec.kind] += 1
        module = randomised(copy.deepcopy(original))
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        for scale in (1.0, math.sqrt(spec.eps)):
            x = input_for(module, spec, scale)
            error = relative_error(module(x), expected(spec, x, weight, bias))
            if not error < 2e-6:
                wrong.append((name, f"float32 at scale {scale}", error))
            moved = relative_error(module(x + scale), module(x))
            if (moved < 1e-4) != (spec.kind == "layernorm"):
                wrong.append((name, f"{spec.kind}, but a shift of its input moves it", moved))
        x = input_for(module, spec).bfloat16()
        if name != "EsmFold2LayerNorm":  # takes float32 weights only
            module.bfloat16()
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        y, truth = module(x), expected(spec, x, weight, bias)
        unequal = (y != truth).float().mean().item()
        if y.dtype != truth.dtype or not relative_error(y, truth) < 2**-7:
            wrong.append((name, f"bfloat16 {y.dtype}", relative_error(y, truth)))
        elif unequal > 0.02 and name not in ROUNDS_MORE:
            wrong.append((name, "bfloat16, share of unequal entries", unequal))
    assert not wrong
    assert read["layernorm"] >= 37 and read["rmsnorm"] >= 199


def test_no_layernorm_is_overlooked(built: dict[str, nn.Module]) -> None:
    """What ignores both a shift and a scale of each token is a norm site, whatever its name."""
    overlooked = []
    for name, module in built.items():
        if list(module.children()) or read_norm(module) is not None:
            continue
        randomised(module)
        for shape, axis in (((5, 7, HIDDEN), 2), ((5, HIDDEN, 4, 3), 1), ((5, HIDDEN, 7), 1)):
            x = torch.randn(shape) + 1.5
            factor = x.narrow(axis, 0, 1).abs() + 1.0
            try:
                moved = relative_error(module(x * factor + factor), module(x))
            except (RuntimeError, ValueError, TypeError):  # not a layout of this module
                continue
            if moved < 1e-4:
                overlooked.append(name)
    assert not overlooked


def test_what_cannot_be_built_is_no_norm_site(
    classes: dict[str, type[nn.Module]], built: dict[str, nn.Module]
) -> None:
    unbuilt = {n for n in classes if not n.endswith(("GroupNorm", "StableLayerNorm"))} - set(built)
    # blocks around an nn.LayerNorm, and a GroupNorm modulated by a second input
    assert unbuilt == {"DbrxNormAttentionNorm", "ConvDropoutLayerNorm", "Emu3VQVAESpatialNorm"}


# --- torch's own, and shapes -------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [2, 3, 24, 769, 12288])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_of_any_width(hidden: int, bias: bool) -> None:
    spec = readable(nn.LayerNorm(hidden, eps=3e-4, bias=bias))
    assert spec == NormSpec("layernorm", (hidden,), 3e-4, autocast_float32=True)


def test_layer_norm_of_one_feature() -> None:
    assert readable(nn.LayerNorm(1)).kind == "layernorm"
    assert isinstance(read_norm(nn.LayerNorm(1, bias=False)), Unreadable)  # the constant 0


def test_layer_norm_without_parameters_and_over_two_axes() -> None:
    assert readable(nn.LayerNorm(24, elementwise_affine=False)).normalized_shape == (24,)
    assert readable(nn.LayerNorm((3, 8))).normalized_shape == (3, 8)


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm_of_torch(eps: float | None, affine: bool) -> None:
    spec = readable(nn.RMSNorm(24, eps, elementwise_affine=affine))
    assert spec == NormSpec("rmsnorm", (24,), eps, autocast_float32=True)


class WithEps(nn.Module):
    """Says in code, not in an attribute, what eps is."""

    def __init__(self, eps_of: Callable[[torch.dtype], float]):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(24))
        type(self).eps_of = staticmethod(eps_of)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps_of(wide.dtype))
        return (y * self.weight).to(x.dtype)


@pytest.mark.parametrize(
    ("eps_of", "eps"),
    [
        (lambda dtype: torch.finfo(dtype).eps, None),
        (lambda dtype: torch.finfo(torch.float32).eps, torch.finfo(torch.float32).eps),
    ],
)
def test_an_eps_that_follows_the_dtype_is_told_from_one_that_does_not(eps_of, eps) -> None:
    class OwnNorm(WithEps):
        pass

    assert readable(OwnNorm(eps_of)).eps == eps


def test_a_weight_of_two_axes_is_per_head_or_for_both(classes: dict[str, type[nn.Module]]) -> None:
    class BothNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.weight.shape, self.weight, eps=1e-5)

    assert readable(BothNorm()).normalized_shape == (3, 8)
    for name in ("CohereLayerNorm", "ChameleonLayerNorm"):
        assert readable(classes[name]((3, 8))).normalized_shape == (8,)


def test_options_of_transformers_classes(classes: dict[str, type[nn.Module]]) -> None:
    first = classes["ConvNextLayerNorm"](24, data_format="channels_first")
    assert readable(first).channels_first
    assert readable(classes["Gemma3nRMSNorm"](24, with_scale=False)).normalized_shape == ()
    grouped = read_norm(classes["Qwen4ExpTextRMSNorm"](24, group_size=8))
    assert isinstance(grouped, Unreadable) and "neither" in grouped.reason
    one_group = classes["Qwen4ExpTextRMSNorm"](24, group_size=24)
    assert readable(one_group).weight_offset == 1.0


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        nn.GroupNorm(2, 8),
        nn.InstanceNorm1d(8, affine=True),
        nn.LocalResponseNorm(2),
        nn.CosineSimilarity(),
        nn.Sequential(nn.LayerNorm(8)),
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_not_a_norm(module: nn.Module) -> None:
    assert read_norm(module) is None
    assert all(isinstance(m, nn.LayerNorm) for m in map(module.get_submodule, find_norms(module)))


@pytest.mark.parametrize("module", [RMSNorm(24, eps=1e-3), PartialRMSNorm(24, eps=1e-3, p=0.25)])
def test_our_own_modules_say_what_they_are(module: nn.Module) -> None:
    spec = readable(module)
    assert (spec.kind, spec.normalized_shape, spec.eps) == ("rmsnorm", (24,), 1e-3)


# --- names and attributes that mislead ---------------------------------------------------------


class Odd(nn.LayerNorm):
    """A LayerNorm whose forward is given by the test."""

    formula: Callable[[Any, Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x)


def odd(formula: Callable[[Any, Tensor], Tensor], **kwargs: Any) -> nn.Module:
    """An `nn.LayerNorm` subclass called FooRMSNorm that computes `formula(self, x)`."""
    return type("FooRMSNorm", (Odd,), {"formula": formula})(HIDDEN, **kwargs)


def layer_norm(m: Any, x: Tensor, **changed: Any) -> Tensor:
    arguments = {"weight": m.weight, "bias": m.bias, "eps": m.eps, **changed}
    return F.layer_norm(x, (HIDDEN,), **arguments)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def test_the_formula_decides_not_the_name() -> None:
    assert readable(odd(layer_norm)).kind == "layernorm"
    assert readable(odd(lambda m, x: layer_norm(m, x, weight=m.weight + 1))).weight_offset == 1.0

    class Norm(nn.Module):  # nanoGPT's way: a constant in the formula
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(HIDDEN))
            self.bias = None

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)

    assert readable(Norm()) == NormSpec("layernorm", (HIDDEN,), 1e-5, autocast_float32=True)


def test_the_eps_of_the_formula_counts_not_the_attribute() -> None:
    spec = readable(odd(lambda m, x: layer_norm(m, x, eps=1e-6), eps=1e-5))
    assert spec.eps == 1e-6


@pytest.mark.parametrize(
    "formula",
    [
        lambda m, x: layer_norm(m, x, bias=None),
        lambda m, x: layer_norm(m, x, weight=None),
        lambda m, x: layer_norm(m, x, weight=m.weight.square()),
        lambda m, x: layer_norm(m, x, eps=2e-4),
        lambda m, x: layer_norm(m, x).tanh(),
        lambda m, x: layer_norm(m, x).clamp(-3, 3),
        lambda m, x: layer_norm(m, x) + 1e-3 * x,
        lambda m, x: layer_norm(m, x.roll(1, -1)),
        lambda m, x: layer_norm(m, x.mT.contiguous().view_as(x)),
        lambda m, x: centred(x) / (x.std(-1, keepdim=True) + m.eps) * m.weight + m.bias,
        lambda m, x: centred(x) / x.var(-1, keepdim=True).add(m.eps).sqrt() * m.weight + m.bias,
        lambda m, x: F.normalize(x, dim=-1) * m.weight + m.bias,
        lambda m, x: F.group_norm(x.flatten(0, -2), 4, m.weight, m.bias, m.eps).view_as(x),
        lambda m, x: layer_norm(m, x.bfloat16()).float(),
    ],
)
def test_a_formula_that_is_not_a_norms_is_refused(formula: Callable[[Any, Tensor], Tensor]) -> None:
    for eps in (1e-5, 1e-12):
        reading = read_norm(odd(formula, eps=eps))
        assert isinstance(reading, Unreadable) and "neither" in reading.reason


@pytest.mark.parametrize(
    ("module", "word"),
    [
        (odd(lambda m, x: layer_norm(m, x).float()), "bfloat16"),
        (odd(lambda m, x: layer_norm(m, x).sum(-1)), "gave"),
        (odd(lambda m, x: (layer_norm(m, x), x)), "returned a tuple"),
        (odd(lambda m, x: x * float("nan")), "neither"),
    ],
)
def test_other_reasons(module: nn.Module, word: str) -> None:
    reading = read_norm(module)
    assert isinstance(reading, Unreadable) and word in reading.reason


def test_an_error_in_the_forward_is_the_reason() -> None:
    def formula(m: Any, x: Tensor) -> Tensor:
        raise RuntimeError("no GPU here\nand more")

    reading = read_norm(odd(formula))
    assert reading == Unreadable("its forward failed on a test input (RuntimeError: no GPU here)")


def test_other_parameter_names_and_shapes_are_refused() -> None:
    class ScaleNorm(nn.Module):
        def __init__(self, **parameters: Tensor) -> None:
            super().__init__()
            for name, value in parameters.items():
                self.register_parameter(name, nn.Parameter(value))

        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:])

    for parameters, word in (
        ({"gamma": torch.ones(8)}, "gamma"),
        ({"weight": torch.tensor(1.0)}, "shapes"),
        ({"weight": torch.ones(8), "bias": torch.ones(4)}, "shapes"),
        ({"weight": torch.ones(0)}, "shapes"),
    ):
        reading = read_norm(ScaleNorm(**parameters))
        assert isinstance(reading, Unreadable) and word in reading.reason
    module = nn.LayerNorm(8)
    nn.utils.parametrizations.weight_norm(module, dim=None)
    reading = read_norm(module)
    assert isinstance(reading, Unreadable) and "parametrizations" in reading.reason


def test_a_norm_under_another_name_is_found_by_its_eps() -> None:
    class Rescale(nn.Module):
        def __init__(self, power: float) -> None:
            super().__init__()
            self.eps, self.power = 1e-3, power
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).pow(self.power)

    assert readable(Rescale(-0.5)).eps == 1e-3
    assert read_norm(Rescale(-1.0)) is None


# --- what is on top of the module --------------------------------------------------------------


def test_the_forward_that_other_libraries_left_on_the_instance_is_the_one_read(
    classes: dict[str, type[nn.Module]],
) -> None:
    module = classes["LlamaRMSNorm"](24)
    module.eps = 1e-3
    module.forward = MethodType(classes["GemmaRMSNorm"].forward, module)
    module._norm = MethodType(classes["GemmaRMSNorm"]._norm, module)
    assert readable(module).weight_offset == 1.0
    assert readable(copy.deepcopy(module)).weight_offset == 1.0

    module.forward = nn.LayerNorm(24).forward
    reading = read_norm(module)
    assert isinstance(reading, Unreadable) and "replaced" in reading.reason


def test_accelerate_hooks_and_offloaded_parameters() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24), nn.LayerNorm(24, eps=1e-3))
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model[0].weight.is_meta and "forward" in vars(model[0])
    assert {name: spec.eps for name, spec in find_norms(model).items()} == {"0": 1e-5, "2": 1e-3}


def test_liger_on_the_instance_is_not_read_as_what_it_hides() -> None:
    patching = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    module = transformers.models.llama.modeling_llama.LlamaRMSNorm(24)
    patching._patch_rms_norm_module(module, offset=1.0, casting_mode="gemma")
    reading = read_norm(module)
    if torch.cuda.is_available():
        module.cuda()
        assert readable(module).weight_offset == 1.0
    else:
        assert isinstance(reading, Unreadable) and "failed" in reading.reason


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "NemotronLayerNorm1P", "EomtLayerNorm2d"])
def test_the_callers_context_changes_nothing(
    name: str, classes: dict[str, type[nn.Module]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = classes[name](24)
    usual = readable(module)

    def again() -> NormSpec:
        recipes._readings.clear()
        return readable(module)

    with torch.device("meta"):
        assert again() == usual
    with torch.autocast("cpu", torch.bfloat16):
        assert again() == usual
        assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        assert again() == usual
    for dtype in (torch.float64, torch.bfloat16):
        monkeypatch.setattr(module, "training", not module.training)
        torch.set_default_dtype(dtype)
        try:
            assert again() == usual
        finally:
            torch.set_default_dtype(torch.float32)
    assert not torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled("cpu")


def test_modules_on_the_meta_device_and_in_half_precision(
    classes: dict[str, type[nn.Module]],
) -> None:
    for name in ("LlamaRMSNorm", "ConvNextLayerNorm", "DebertaLayerNorm"):
        usual = readable(classes[name](24))
        assert readable(classes[name](24).to("meta")) == usual
        assert readable(classes[name](24).half()) == usual


def test_reading_changes_neither_the_module_nor_the_random_state() -> None:
    class CountingNorm(nn.RMSNorm):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y = super().forward(x)
            x.zero_()
            return y

    module = randomised(CountingNorm(24))
    hooked: list[object] = []
    module.register_forward_hook(lambda *args: hooked.append(args))
    before, state = copy.deepcopy(vars(module)), torch.get_rng_state()
    weight = module.weight
    assert readable(module).kind == "rmsnorm"
    assert torch.equal(torch.get_rng_state(), state)
    assert module.weight is weight and torch.equal(weight, before["_parameters"]["weight"])
    assert vars(module).keys() == before.keys() and not hooked and module.calls == 0


# --- whole models ------------------------------------------------------------------------------


def test_equal_norms_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    check = recipes.check
    monkeypatch.setattr(recipes, "check", lambda *args: calls.append(args) or check(*args))
    model = nn.ModuleList([nn.LayerNorm(24) for _ in range(50)])
    model.extend([nn.LayerNorm(24, eps=1e-3), nn.LayerNorm(12), nn.LayerNorm(24, bias=False)])
    found = find_norms(model)
    assert len(found) == 53 and len(calls) == 4
    assert [readable(model[i]).eps for i in (0, 50)] == [1e-5, 1e-3]


def test_find_norms_names_each_module_once_by_its_real_path() -> None:
    shared = nn.LayerNorm(24)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Sequential(nn.RMSNorm(24))})
    found = find_norms(torch.compile(model, backend="eager"))
    assert list(found) == ["_orig_mod.a", "_orig_mod.c.0"]
    assert find_norms(shared).keys() == {""}


def test_find_norms_in_a_model() -> None:
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=31, n_positions=8)
    found = find_norms(transformers.GPT2LMHeadModel(config))
    names = [f"transformer.h.{i}.ln_{j}" for i in (0, 1) for j in (1, 2)] + ["transformer.ln_f"]
    assert found == dict.fromkeys(names, NormSpec("layernorm", (32,), 1e-5, autocast_float32=True))


def test_norm_spec_computes_its_formula_in_float64() -> None:
    x = torch.randn(5, 24, 4, 3, dtype=torch.float64)
    weight, bias = torch.randn(2, 24, dtype=torch.float64)
    for kind in ("layernorm", "rmsnorm"):
        spec = NormSpec(kind, (24,), 1e-3, weight_offset=1.0, channels_first=True)
        error = relative_error(spec.compute(x, weight, bias), expected(spec, x, weight, bias))
        assert error < 1e-15
