"""What the probe promises besides exactness: purity, reasons, refusals, and each kind of writer."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict

import pytest
import torch
from conversion import convert
from model_zoo import build, inputs_for
from torch import Tensor, nn
from toys import FRESH, INPUTS, VOCAB, D, Toy

from hf_rmsnorm.errors import PatchError
from hf_rmsnorm.probing import plain_copy, probe, relative_change, rounding_gap, run_outputs
from hf_rmsnorm.probing.set_up import fits, free_bytes
from hf_rmsnorm.recipes import NormSpec, find_norms


def norms_of(model: nn.Module) -> dict[str, NormSpec]:
    return {n: s for n, s in find_norms(model).items() if isinstance(s, NormSpec)}


def probed(model: nn.Module, inputs=INPUTS):
    return probe(model, norms_of(model), inputs)


def probed_from_zoo(name: str):
    model = build(name)
    return probed(model, inputs_for(name, model))


def stays_equal(model: nn.Module, result, inputs=FRESH) -> bool:
    before = run_outputs(plain_copy(model, torch.float64), inputs)
    after = run_outputs(convert(model, norms_of(model), result), inputs)
    return relative_change(before, after) < 1e-9


@pytest.mark.parametrize("name", ["gpt2", "dinov2"])
def test_the_model_is_not_touched(name):
    model = build(name).train()
    model.config.use_cache = True
    before = copy.deepcopy(model.state_dict())
    config = model.config.to_dict()
    attributes = {n: dict(vars(m)) for n, m in model.named_modules()}
    random_state = torch.get_rng_state()
    result = probed(model, inputs_for(name, model))
    assert result.folds
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random_state)
    for n, m in model.named_modules():
        assert vars(m).keys() == attributes[n].keys()
        assert not m._forward_hooks and not m._forward_pre_hooks


def test_the_result_is_plain_data():
    assert json.loads(json.dumps(asdict(probed_from_zoo("gpt2"))))


def test_the_same_question_gets_the_same_answer():
    assert probed_from_zoo("bloom") == probed_from_zoo("bloom")


def test_tied_parameters_name_their_aliases():
    model = Toy(["pre-norm mlp", "pre-norm mlp"])
    model.parts[1].inner[2].weight = model.parts[0].inner[2].weight
    (fold,) = [f for f in probed(model).folds if f.parameter == "parts.0.inner.2.weight"]
    assert fold.aliases == ("parts.1.inner.2.weight",)


def test_fused_projections_fold_by_block():
    """Persimmon normalises each head's query and key, but not its value."""
    result = probed_from_zoo("persimmon")
    fused = [f for f in result.folds if f.parameter.endswith("query_key_value.weight")]
    assert fused and all(f.size == 8 for f in fused)
    blocks = set(fused[0].blocks)
    assert len(blocks) == 6, "two of three blocks for each of three heads"


def test_layerscale_is_absorbed():
    model = Toy(["pre-norm layerscale"])
    result = probed(model)
    (scale,) = result.layerscales
    assert scale.parameter == "parts.0.inner.gamma"
    assert dict(scale.writers).keys() == {
        "parts.0.inner.inner.2.weight",
        "parts.0.inner.inner.2.bias",
    }
    assert not result.kept and stays_equal(model, result)


def test_idle_experts_fold_like_their_siblings_and_are_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](x) + self.experts[int(x.shape[0] > 50)](x)

    model = Toy(["pre-norm mlp"])
    model.parts[0].inner = Experts()
    result = probed(model)
    folded = {f.parameter for f in result.folds}
    idle = {f"parts.0.inner.experts.{i}.{p}" for i in (1, 2) for p in ("weight", "bias")}
    assert set(result.assumed) == idle <= folded
    assert stays_equal(model, result), "the fresh inputs do reach expert 1"


def test_a_table_read_without_gradients_folds():
    model = Toy(["pre-norm mlp"], table=True)
    result = probed(model)
    assert "positions" in {f.parameter for f in result.folds}
    assert not result.kept and stays_equal(model, result)


def test_a_buffer_that_is_not_saved_never_folds():
    model = Toy(["pre-norm mlp", "pre-norm mlp"], table=True)
    model.register_buffer("positions", model.positions, persistent=False)
    result = probed(model)
    assert "positions" not in {f.parameter for f in result.folds}
    assert len(result.centers) == 1 and stays_equal(model, result)


def test_parameters_that_share_memory_are_left_alone():
    model = Toy(["pre-norm mlp", "pre-norm mlp"])
    model.head.weight.data = model.tokens.weight.data
    result = probed(model)
    assert "tokens.weight" not in {f.parameter for f in result.folds}
    assert [str(c) for c in result.centers] == ["the output of tokens"]


def test_parameters_beside_each_other_in_memory_fold():
    """As slices of one file or one flat buffer do."""
    model = Toy(["pre-norm mlp"])
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for p in model.parameters():
        p.data = flat[start : start + p.numel()].view(p.shape)
        start += p.numel()
    result = probed(model)
    assert not result.kept and not result.centers


def test_a_norm_that_is_never_called_is_reported():
    model = Toy(["pre-norm mlp"])
    model.spare = nn.LayerNorm(D)
    result = probed(model)
    assert result.uncalled == ("spare",)
    assert result.kept == {"spare": "the probe inputs never reach it"}


def test_a_norm_of_zeros_is_kept():
    model = Toy(["norm alone"])
    model.parts[0].register_forward_pre_hook(lambda module, args: (0 * args[0],))
    assert probed(model).kept["parts.0"] == "its input is zero on the probe inputs"


@pytest.mark.parametrize(
    ("parts", "name", "reason"),
    [
        (
            ["post-norm mlp", "post-norm mlp"],
            "parts.1.norm",
            "reads the output of another norm, parts.0.norm",
        ),
        (["pre-norm mlp", "raw reader"], "parts.0.norm", "the stream it reads is also read"),
        (["activation"], "final", "reads the output of parts.0 (Tanh), which cannot be centred"),
    ],
)
def test_reasons(parts, name, reason):
    assert probed(Toy(parts)).kept[name].startswith(reason)


def test_a_stream_that_is_returned_is_kept():
    model = Toy(["pre-norm mlp"], final_norm=False)
    model.head = nn.Identity()
    assert probed(model).kept == {"parts.0.norm": "the stream it reads is also read without a norm"}


def test_outputs_that_show_the_stream_are_not_held_but_named():
    result = probed_from_zoo("clip")
    assert result.moved == ("vision_model_output.last_hidden_state",)


def test_rms_norms_and_odd_shapes_are_not_converted():
    model = nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6))
    assert probe(model, norms_of(model), [{"input": torch.randn(2, 6)}]).exact == {}
    spec = NormSpec("layernorm", (2, 6), 1e-5)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm((2, 6)))
    result = probe(model, {"1": spec}, [{"input": torch.randn(3, 2, 6)}])
    assert result.kept == {"1": "normalises over several axes"}


def test_a_forward_that_fails_says_what_to_pass():
    with pytest.raises(PatchError, match=r"(?s)Toy could not be run.*Pass inputs="):
        probed(Toy([]), [{"ids": torch.randn(2, 3)}])


def test_what_is_not_finite_is_named():
    class Overflows(Toy):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * float("inf")

    with pytest.raises(PatchError, match=r"(?s)could not be run.*outputs are not finite.*inputs="):
        probed(Overflows([]))
    for bad in (float("nan"), float("inf")):
        model = Toy(["pre-norm mlp"])
        model.head.weight.data[:, 2] = bad
        with pytest.raises(PatchError, match=r"^head\.weight has entries that are nan or inf"):
            probed(model)


def test_a_model_that_cannot_run_in_float64_is_probed_in_float32():
    class Float32Only(Toy):
        def forward(self, ids: Tensor) -> Tensor:
            if self.head.weight.dtype == torch.float64:
                raise RuntimeError("no float64 here")
            return super().forward(ids)

    model = Float32Only(["pre-norm mlp", "pre-norm heads"])
    result = probed(model)
    assert result.dtype == "float32" and not result.kept
    assert rounding_gap(model, INPUTS) is None
    after = run_outputs(convert(model, norms_of(model), result).float(), FRESH)
    assert relative_change(run_outputs(model, FRESH), after) < 1e-5


def test_a_model_too_big_for_float64_is_probed_in_float32():
    model = nn.Linear(1000, 1000, bias=False, device="meta")
    assert fits(model, torch.float64, 20e6) and not fits(model, torch.float64, 19e6)
    assert fits(model, torch.float32, 10e6)
    assert free_bytes(torch.device("cpu")) > 1e6


def test_half_precision_checkpoints_are_probed_in_float64():
    model = Toy(["pre-norm mlp"]).bfloat16()
    result = probed(model)
    assert result.dtype == "float64" and not result.kept
    assert model.head.weight.dtype == torch.bfloat16


def test_transformer_encoder_layers_without_their_fast_path():
    layer = nn.TransformerEncoderLayer(D, 2, 20, norm_first=True, batch_first=True)
    model = nn.Sequential(nn.Embedding(VOCAB, D), layer, nn.LayerNorm(D), nn.Linear(D, 5))
    result = probe(model, norms_of(model), [{"input": i["ids"]} for i in INPUTS])
    assert not result.kept
    assert torch.backends.mha.get_fastpath_enabled()
