"""Norms that read the output of a norm: the mean of a bias absorbed, and the extra hidden unit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import model_zoo
import pytest
import torch
import transformers
from torch import Tensor, nn

import hf_rmsnorm
from hf_rmsnorm import (
    PatchError,
    PatchPlan,
    RMSNorm,
    apply_plan,
    fit_plan,
    fold_shard,
    patch_model,
    patch_report,
    plan_patch,
    unpatch_model,
)
from hf_rmsnorm.cli import main
from hf_rmsnorm.patching import on_patched
from hf_rmsnorm.patching.config import resolve_inputs
from hf_rmsnorm.patching.verify import verify
from hf_rmsnorm.probing import relative_change, run_outputs

SIZES: dict[str, dict[str, Any]] = {
    "bert": {"intermediate_size": 56, "num_hidden_layers": 3},
    "roberta": {"intermediate_size": 56, "num_hidden_layers": 3, "pad_token_id": 1},
    "electra": {"intermediate_size": 56, "num_hidden_layers": 3, "embedding_size": 28},
    "distilbert": {"hidden_dim": 56, "n_layers": 3, "dim": 36, "n_heads": 3},
    "bart": {
        "d_model": 36,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_ffn_dim": 56,
        "decoder_ffn_dim": 52,
        "encoder_attention_heads": 3,
        "decoder_attention_heads": 3,
    },
}
FFN_NORMS = {"bert": 3, "roberta": 3, "electra": 3, "distilbert": 3, "bart": 5}
MODELS = sorted(SIZES)

pytestmark = pytest.mark.filterwarnings("ignore:.*changed approximately:UserWarning")


def randomise(model: nn.Module) -> nn.Module:
    """Norms as trained ones are; the mean of one bias is large."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.1 * torch.randn_like(parameter)
            if "norm" in name.lower():
                parameter.copy_(noise + (1.0 if name.endswith("weight") else 0.0))
                if "1." in name and name.endswith("bias"):
                    parameter.add_(0.2)
            else:
                parameter.add_(noise)
    return model.eval()


def build(model_type: str, auto: str = "AutoModel", **changes: Any) -> nn.Module:
    torch.manual_seed(13)
    common = {"hidden_size": 36, "num_attention_heads": 3} if "bert" in model_type else {}
    if model_type == "electra":
        common = {"hidden_size": 36, "num_attention_heads": 3}
    if model_type == "distilbert":
        common = {}
    config = transformers.AutoConfig.for_model(
        model_type,
        vocab_size=53,
        max_position_embeddings=20,
        **{**common, **SIZES[model_type], **changes},
    )
    cls = getattr(transformers, auto)
    return randomise(cls.from_config(config, attn_implementation="eager"))


def moved(model: nn.Module, plan: PatchPlan) -> float:
    """Root mean square of what `plan` does to the outputs, over that of the outputs."""
    inputs = resolve_inputs(model, None)
    twin = copy.deepcopy(model).double()
    before = run_outputs(twin, inputs)
    apply_plan(twin, plan)
    after = run_outputs(twin, inputs)
    change = sum((a - b).square().sum() for a, b in zip(after, before, strict=True))
    return float(change / sum(b.square().sum() for b in before)) ** 0.5


def same(model: nn.Module, original: nn.Module) -> bool:
    mine, theirs = model.state_dict(), original.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def outputs(model: nn.Module) -> list[Tensor]:
    return run_outputs(model, resolve_inputs(model, None))


def leftovers(plan: PatchPlan) -> dict[str, float]:
    return {s.name: s.leftover for s in plan.sites if s.leftover is not None}


def without_absorbs(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> PatchPlan:
    with monkeypatch.context() as patch:
        patch.setattr("hf_rmsnorm.patching.decide.improve", lambda *args, **kwargs: args[3])
        return plan_patch(model)


@pytest.mark.parametrize("model_type", MODELS)
def test_absorbing_is_exact_and_lowers_what_is_left(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(model_type)
    original = copy.deepcopy(model)
    plan, plain = plan_patch(model), without_absorbs(model, monkeypatch)
    assert plan.absorbs and not plain.absorbs and same(model, original)
    assert PatchPlan.from_json(plan.to_json()) == plan
    assert "mean moved from a norm's bias" in str(plan)

    before, after = leftovers(plain), leftovers(plan)
    changed = {name for name in before if after[name] != before[name]}
    assert all(after[name] < before[name] for name in changed)
    assert len(changed) >= len(plan.absorbs)
    error = moved(model, plan)
    assert error < 0.3 * moved(model, plain)
    assert error < 0.5 * moved(model, plan_patch(model, strategy="direct"))

    patch_model(model)
    measured = patch_report(model).measured
    assert measured and measured.exact_part < 1e-12
    assert measured.exact_part_own < 5 * measured.rounding
    biases = [model.get_parameter(absorb.bias) for absorb in plan.absorbs]
    assert max(bias.mean().abs().item() for bias in biases) < 1e-7
    assert same(unpatch_model(model), original)


@pytest.mark.parametrize("model_type", MODELS)
def test_the_extra_unit_makes_norms_after_feed_forward_blocks_exact(model_type: str) -> None:
    model = build(model_type)
    original, before = copy.deepcopy(model), outputs(model)
    approximate = plan_patch(model)
    plan = plan_patch(model, post_norm="extra_neuron")
    assert len(plan.widens) == FFN_NORMS[model_type] and same(model, original)
    gained = plan.count("exact") - approximate.count("exact")
    assert gained == FFN_NORMS[model_type]
    assert PatchPlan.from_json(plan.to_json()) == plan
    assert "intermediate size + 1" in str(plan)
    assert moved(model, plan) < moved(model, approximate)

    measured = verify(model, plan, resolve_inputs(model, None), apply_plan)
    assert measured.exact_part < 1e-9 and measured.precision == "float64"
    assert measured.exact_part_own < 5 * measured.rounding

    patch_model(model, post_norm="extra_neuron", strategy="exact")
    exact = [s.name for s in patch_report(model).sites if s.verdict == "exact"]
    assert all(type(model.get_submodule(name)) is RMSNorm for name in exact)
    up = model.get_submodule(plan.widens[0].up)
    assert up.out_features == up.weight.shape[0] == len(up.bias)
    assert up.weight.shape[0] == original.get_submodule(plan.widens[0].up).out_features + 1
    assert up.weight.requires_grad and up.weight.dtype == torch.float32
    assert relative_change(before, outputs(model)) < 5e-6
    unpatch_model(model)
    assert same(model, original)
    assert repr(model) == repr(original)


# unusual ways to read a norm; ProphetNet runs in float32 only
@pytest.mark.parametrize("name", ["bloom-post", "fnet", "funnel", "marian", "prophetnet"])
def test_other_architectures_stay_equal(name: str) -> None:
    model = model_zoo.build(name)
    original = copy.deepcopy(model)
    plan = plan_patch(model, post_norm="extra_neuron", inputs=model_zoo.inputs_for(name, model))
    assert plan.widens and plan.precision == ("float32" if name == "prophetnet" else "float64")
    fresh = model_zoo.inputs_for(name, model, ((3, 11), (1, 7)), seed=50)
    assert verify(model, plan, fresh, apply_plan).exact_part < 1e-6
    apply_plan(model, plan)
    assert same(unpatch_model(model), original)


def test_conv1d_blocks_get_a_unit_too() -> None:
    torch.manual_seed(2)
    config = transformers.OpenAIGPTConfig(
        vocab_size=53, n_embd=36, n_layer=2, n_head=3, n_positions=20
    )
    model = randomise(transformers.OpenAIGPTModel(config))
    plan = plan_patch(model, post_norm="extra_neuron")
    assert [w.up_axis for w in plan.widens] == [1, 1]
    original = copy.deepcopy(model)
    patch_model(model, post_norm="extra_neuron")
    assert model.h[0].mlp.c_fc.nf == 4 * 36 + 1
    assert same(unpatch_model(model), original) and model.h[0].mlp.c_fc.nf == 4 * 36


@pytest.mark.parametrize(
    "model_type,auto", [("bert", "AutoModelForMaskedLM"), ("bart", "AutoModel")]
)
def test_widened_checkpoints_load_widened(model_type: str, auto: str, tmp_path: Path) -> None:
    model = patch_model(build(model_type, auto), post_norm="extra_neuron")
    model.save_pretrained(tmp_path / "first")
    eager = {"attn_implementation": "eager"}
    again = hf_rmsnorm.from_pretrained(tmp_path / "first", **eager).eval()
    assert all(map(torch.equal, outputs(again), outputs(model)))
    again.save_pretrained(tmp_path / "second")
    auto_class = getattr(transformers, auto)
    third = auto_class.from_pretrained(tmp_path / "second", **eager).eval()
    assert all(map(torch.equal, outputs(third), outputs(model)))

    original = build(model_type, auto)
    loaded = hf_rmsnorm.from_pretrained(tmp_path / "first", **eager).eval()
    unpatch_model(loaded)  # LayerNorm and the stock shapes on folded weights: the same function
    assert loaded.state_dict().keys() == original.state_dict().keys()
    assert relative_change(outputs(original), outputs(loaded)) < 5e-6


def test_the_base_model_of_a_widened_checkpoint_loads(tmp_path: Path) -> None:
    model = patch_model(build("bert", "AutoModelForMaskedLM"), post_norm="extra_neuron")
    model.save_pretrained(tmp_path)
    tokens = {"input_ids": torch.tensor([[5, 9, 2, 40]])}
    base = transformers.AutoModel.from_pretrained(
        tmp_path, add_pooling_layer=False, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        assert torch.equal(base(**tokens)[0], model.bert(**tokens)[0])


def test_shared_blocks_are_widened_once() -> None:
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=53,
        embedding_size=28,
        hidden_size=36,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=20,
    )
    model = randomise(transformers.AlbertModel(config))
    plan = plan_patch(model, post_norm="extra_neuron")
    assert len(plan.widens) == 1
    verify(model, plan, resolve_inputs(model, None), apply_plan)


@pytest.mark.parametrize("activation", ["silu", "quick_gelu", "tanh"])
def test_blocks_that_bend_large_values_are_left_alone(activation: str) -> None:
    model = build("bert", hidden_act=activation)
    plan = plan_patch(model, post_norm="extra_neuron")
    assert not plan.widens
    site = next(s for s in plan.sites if s.name == "encoder.layer.1.output.LayerNorm")
    assert site.verdict == "approximate"
    assert "no extra neuron" in site.reason and "values from 8 to 24" in site.reason
    assert plan.absorbs == plan_patch(model).absorbs


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "gelu"])
def test_blocks_that_pass_large_values_on_get_a_unit(activation: str) -> None:
    plan = plan_patch(build("bert", hidden_act=activation), post_norm="extra_neuron")
    assert len(plan.widens) == 3


class PostNorm(nn.Module):
    """Two post-norm feed-forward blocks, and whatever a test adds to what is returned."""

    def __init__(self, extra: Callable[[PostNorm, Tensor], Tensor] | None = None, glu: str = ""):
        super().__init__()
        self.embedding = nn.Embedding(29, 12)
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(3))
        hidden = 40 if glu == "fused" else 20
        self.ups = nn.ModuleList(nn.Linear(12, hidden) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(12, hidden) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(20, 12) for _ in range(2))
        self.head = nn.Linear(12, 7)
        self.table = nn.Parameter(torch.randn(12, 7))
        self.extra, self.glu = extra, glu

    def block(self, i: int, y: Tensor) -> Tensor:
        hidden = self.ups[i](y)
        if self.glu == "fused":
            left, right = hidden.chunk(2, dim=-1)
            hidden = left * right.relu()
        elif self.glu:
            hidden = hidden * self.gates[i](y).relu()
        return self.downs[i](hidden.relu())

    def forward(self, ids: Tensor) -> Tensor:
        y = self.norms[0](self.embedding(ids))
        z = self.norms[1](y + self.block(0, y))
        out = self.head(self.norms[2](z + self.block(1, z)))
        return out if self.extra is None else out + self.extra(self, z)


TOY = [
    {"ids": torch.randint(0, 29, shape, generator=torch.Generator().manual_seed(1))}
    for shape in ((3, 6), (1, 4))
]


def toy(*args: Any, **kwargs: Any) -> PostNorm:
    model = PostNorm(*args, **kwargs)
    randomise(model)
    with torch.no_grad():
        for norm in model.norms:
            norm.bias.add_(0.2)
    return model


def biases(plan: PatchPlan) -> set[str]:
    return {absorb.bias for absorb in plan.absorbs}


def test_a_plain_post_norm_network_absorbs_both_biases() -> None:
    assert biases(plan_patch(toy(), inputs=TOY)) == {"norms.0.bias", "norms.1.bias"}


RAW: dict[str, Callable[[PostNorm, Tensor], Tensor]] = {
    "read without a bias": lambda m, z: z @ m.table,
    "multiplied": lambda m, z: (z * z).sum(-1, keepdim=True),
    "argmax": lambda m, z: torch.cat([z, z * 0 + 0.5], -1).argmax(-1, keepdim=True).double(),
    "a threshold": lambda m, z: (z > 0.3).sum(-1, keepdim=True).double(),
    "a branch on the mean": lambda m, z: z.new_ones(1) * float(z.mean() > 2),
    "a distant ReLU": lambda m, z: (z - 100).relu().sum(-1, keepdim=True),
    "a reader of two things": lambda m, z: m.head(z),
}


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("post_norm", [None, "extra_neuron"])
def test_other_readers_keep_the_bias_as_it_is(name: str, post_norm: str | None) -> None:
    model = toy(RAW[name])
    plan = plan_patch(model, inputs=TOY, post_norm=post_norm)
    assert "norms.1.bias" not in biases(plan)
    verify(model, plan, TOY, apply_plan)


def test_tied_and_missing_biases_stay() -> None:
    tied = toy()
    tied.ups[1].bias = tied.ups[0].bias
    assert not plan_patch(tied, inputs=TOY).absorbs
    shared = toy()
    shared.norms[1].bias = shared.norms[0].bias
    assert not plan_patch(shared, inputs=TOY).absorbs
    bare = toy()
    bare.ups[1].bias = None
    assert biases(plan_patch(bare, inputs=TOY)) == {"norms.0.bias"}


@pytest.mark.parametrize("glu", ["split", "fused"])
def test_gated_blocks_are_left_alone(glu: str) -> None:
    model = toy(glu=glu)
    plan = plan_patch(model, inputs=TOY, post_norm="extra_neuron")
    assert not plan.widens
    assert "no extra neuron: no plain feed-forward block" in plan.sites[1].reason
    verify(model, plan, TOY, apply_plan)


def test_a_norm_inside_the_block_refuses_the_unit() -> None:
    model = toy()
    model.ups[1] = nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20))
    plan = plan_patch(model, inputs=TOY, post_norm="extra_neuron")
    assert [widen.up for widen in plan.widens] == ["ups.0"]


@pytest.mark.parametrize("gain", [0.7, 0.0])
def test_units_exist_for_equal_gains_and_for_none(gain: float) -> None:
    model = toy()
    with torch.no_grad():
        model.norms[1].weight.fill_(gain)
    plan = plan_patch(model, inputs=TOY, post_norm="extra_neuron")
    assert len(plan.widens) == 2
    assert verify(model, plan, TOY, apply_plan).exact_part < 1e-12


def test_float64_models_are_held_to_the_float64_tolerance() -> None:
    model = build("bart").double()
    patch_model(model, post_norm="extra_neuron")
    measured = patch_report(model).measured
    assert measured and measured.rounding == 0 and measured.exact_part_own < 1e-12


def test_the_unit_holds_in_bfloat16() -> None:
    model = build("bert").bfloat16()
    truth = outputs(copy.deepcopy(model).float())
    own = relative_change(truth, outputs(model))
    patch_model(model, strategy="exact", post_norm="extra_neuron")
    assert relative_change(truth, outputs(model)) < 3 * own


def bert(layers: int) -> nn.Module:
    model = build("bert", num_hidden_layers=layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("LayerNorm.bias"):
                parameter.add_(0.2)
    return model


def test_a_twins_plan_carries_over_absorbs_and_units() -> None:
    model = bert(5)
    plan = plan_patch(bert(2), post_norm="extra_neuron")
    fitted = fit_plan(PatchPlan.from_json(plan.to_json()), model)
    direct = plan_patch(model, post_norm="extra_neuron")
    assert {(s.name, s.verdict) for s in fitted.sites} == {
        (s.name, s.verdict) for s in direct.sites
    }
    assert set(fitted.widens) == set(direct.widens) and len(fitted.widens) == 5
    assert set(fitted.absorbs) == set(direct.absorbs)
    assert "encoder.layer.3.output.LayerNorm.bias" in biases(fitted)
    assert "encoder.layer.4.output.LayerNorm.bias" not in biases(fitted)
    assert verify(model, fitted, resolve_inputs(model, None), apply_plan).exact_part < 1e-12

    whole = dict(model.state_dict())
    names = sorted(whole)
    by_shards = dict(whole)
    for part in (names[::3], names[1::3], names[2::3]):
        by_shards.update(fold_shard({name: whole[name] for name in part}, fitted, whole.get))
    apply_plan(model, fitted)
    expected = model.state_dict()
    assert all(torch.equal(by_shards[name], expected[name]) for name in by_shards)
    weight = fitted.widens[0].up + ".weight"
    with pytest.raises(PatchError, match="is needed to fold"):
        fold_shard({weight: whole[weight]}, fitted)


def test_twins_that_disagree_about_absorbs_are_refused() -> None:
    plan = plan_patch(bert(3), post_norm="extra_neuron")
    *rest, last = plan.absorbs
    uneven = replace(plan, absorbs=(*rest, replace(last, readers=last.readers[:1])))
    with pytest.raises(PatchError, match="twin disagree about"):
        fit_plan(uneven, bert(4))


def test_training_the_unit_keeps_the_patch() -> None:
    model = patch_model(build("bert"), post_norm="extra_neuron")
    with torch.no_grad():
        model.encoder.layer[1].intermediate.dense.weight[-1] += 1
    with pytest.raises(PatchError, match=r"intermediate\.dense\.weight was folded .* has changed"):
        unpatch_model(model)


def test_a_failure_on_the_way_leaves_shapes_alone() -> None:
    model = build("bert")
    original = copy.deepcopy(model)
    plan = plan_patch(model, post_norm="extra_neuron")

    def fail(model: nn.Module, plan: PatchPlan) -> None:
        raise RuntimeError

    on_patched.append(fail)
    try:
        with pytest.raises(RuntimeError):
            apply_plan(model, plan)
    finally:
        on_patched.remove(fail)
    assert same(model, original) and repr(model) == repr(original)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"post_norm": "neuron"}, "post_norm must be one of None, extra_neuron; got 'neuron'"),
        ({"post_norm": "extra_neuron", "strategy": "direct"}, 'which strategy="direct" never does'),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchError, match=message):
        patch_model(build("bert"), **arguments)


def test_the_command_line_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("bert").save_pretrained(tmp_path / "model")
    arguments = ["--post-norm", "extra_neuron", "--strategy", "exact"]
    assert main(["patch", str(tmp_path / "model"), str(tmp_path / "out"), *arguments]) == 0
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(record["hf_rmsnorm"]["widens"]) == 3 and record["intermediate_size"] == 56
    assert main(["verify", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    assert "within" in capsys.readouterr().out
