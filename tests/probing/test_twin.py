"""Plans found on a thin twin, against those found on the model itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from model_zoo import randomise
from torch import Tensor, nn

from hf_rmsnorm import (
    PatchError,
    PatchPlan,
    VerificationError,
    patch_model,
    patch_report,
    plan_patch,
    unpatch_model,
)

LAYERS = 7
IDS = torch.tensor([[5, 9, 12, 40, 11, 7], [13, 8, 21, 6, 30, 41]])
BERT = {
    "vocab_size": 57,
    "hidden_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 41,
    "pad_token_id": 0,
}
BART = {
    "vocab_size": 57,
    "d_model": 24,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 44,
    "pad_token_id": 0,
}
IMAGE = {**BERT, "image_size": 16, "patch_size": 4}


def of(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(3)
        made = getattr(transformers, config)(**settings)
        return randomise(getattr(transformers, name)(made)).eval()

    return make


def gpt2(layers: int = LAYERS) -> nn.Module:
    sizes = {"n_embd": 24, "n_layer": layers, "n_head": 3, "vocab_size": 57, "n_positions": 32}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return of("GPT2LMHeadModel", "GPT2Config", **sizes, **ends)()


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "pre-norm, tied": (gpt2, "3 of 7 layers of transformer.h"),
    "parallel": (of("GPTNeoXForCausalLM", "GPTNeoXConfig", **BERT), "3 of 7 layers of gpt_neox.l"),
    "local and global": (
        of(
            "GPTNeoForCausalLM",
            "GPTNeoConfig",
            vocab_size=57,
            hidden_size=24,
            num_layers=8,
            num_heads=3,
            attention_types=[[["global", "local"], 4]],
            max_position_embeddings=41,
        ),
        "6 of 8 layers of transformer.h",
    ),
    "layer scale": (
        of("BeitForImageClassification", "BeitConfig", **IMAGE, layer_scale_init_value=0.3),
        "4 of 7 layers of beit.layers",
    ),
    "post-norm": (of("BertForMaskedLM", "BertConfig", **BERT), "3 of 7 layers of bert.encoder.la"),
    "first layer differs": (
        of("ModernBertModel", "ModernBertConfig", **{**BERT, "num_hidden_layers": 13}),
        "of 13 layers of layers",
    ),
    "encoder and decoder": (
        of("WhisperForConditionalGeneration", "WhisperConfig", **BART, max_source_positions=15),
        "3 of 7 layers of model.encoder.layers, 3 of 7 layers of model.decoder.layers",
    ),
    "some experts": (
        of(
            "NllbMoeForConditionalGeneration",
            "NllbMoeConfig",
            **BART,
            num_experts=4,
            encoder_sparse_step=2,
            decoder_sparse_step=2,
        ),
        "6 of 7 layers of model.encoder.layers",
    ),
}


def content(plan: PatchPlan) -> dict[str, Any]:
    """All but the numbers that were measured, and which biases were worth moving by them."""
    return {
        "sites": {
            s.name: (s.verdict, re.sub(r", \S+ up to [-.e0-9]+", "", s.reason), s.spec, s.mean_free)
            for s in plan.sites
        },
        "folds": set(plan.folds),
        "scales": {(s.parameter, frozenset(s.writers)) for s in plan.layerscales},
        "centers": {(c.module, c.side, c.key, frozenset(c.serves)) for c in plan.centers},
        "unreached": set(plan.unreached),
        "assumed": set(plan.assumed),
    }


@pytest.mark.parametrize("kind", MODELS)
def test_a_twins_plan_is_the_models(kind: str) -> None:
    make, cut = MODELS[kind]
    model = make()
    found = plan_patch(model, twin="always")
    assert cut in found.twin and f"of a thin twin ({found.twin})" in str(found)
    wanted = plan_patch(model, twin="never")
    assert not wanted.twin
    assert content(found) == content(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_whole_model_is_verified_where_it_is(dtype: torch.dtype) -> None:
    model = gpt2().to(dtype).train()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    before = model.eval()(IDS).logits
    patch_model(model.train(), twin="always")
    assert model.training
    report = patch_report(model)
    assert report.plan.count("exact") == 2 * LAYERS + 1 and report.plan.twin
    measured = report.measured
    assert measured is not None and measured.exact_part < 1e-12
    limit = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float64: 1e-12}[dtype]
    after = model.eval()(IDS).logits
    assert 0 < (after - before).abs().max() / before.abs().max() < limit
    assert measured.change < limit
    unpatch_model(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(IDS).logits, before)


def test_approximate_norms_are_changed_after_the_exact_part_held() -> None:
    model = MODELS["post-norm"][0]()
    before = model(IDS).logits
    with pytest.warns(UserWarning, match="approximately"):
        patch_model(model, twin="always")
    measured = patch_report(model).measured
    assert measured is not None and measured.exact_part_own < 1e-4 < measured.change
    moved = ((model(IDS).logits - before).abs().max() / before.abs().max()).item()
    assert 0.1 * measured.change < moved < 10 * measured.change
    unpatch_model(model)
    assert torch.equal(model(IDS).logits, before)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.also: Callable[[Tensor], Tensor] = torch.zeros_like

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu()) + self.also(x)


class Stack(nn.Module):
    """A stack of blocks, called in one of several ways."""

    def __init__(self, how: str = "each"):
        super().__init__()
        self.how, self.num_layers, self.scales = how, LAYERS, [1.0] * LAYERS
        self.first, self.final = nn.Linear(7, 12), nn.LayerNorm(12)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.how == "each":
            for block in self.blocks:
                x = block(x)
        elif self.how == "counted":
            for i in range(self.num_layers):
                x = self.blocks[i](x) * self.scales[i]
        else:  # by numbers in its code
            for i in (0, 3, 6, 5, 4, 2, 1):
                x = self.blocks[i](x)
        return self.head(self.final(x))


X = {"x": torch.randn(4, 7, generator=torch.Generator().manual_seed(0))}


def test_layers_counted_by_settings_are_counted_anew() -> None:
    plan = plan_patch(randomise(Stack("counted")), inputs=X, twin="always")
    assert plan.twin == "3 of 7 layers of blocks" and plan.count("exact") == LAYERS + 1


def test_a_model_that_does_not_run_with_fewer_layers_is_probed_whole() -> None:
    plan = plan_patch(randomise(Stack("by number")), inputs=X, twin="always")
    assert not plan.twin and plan.count("exact") == LAYERS + 1


def test_sites_left_out_in_some_layers_are_not_guessed() -> None:
    plan = plan_patch(randomise(Stack()), inputs=X, twin="always", exclude="blocks.3.*")
    assert not plan.twin
    assert {s.name: s.verdict for s in plan.sites}["blocks.3.norm"] == "kept"


class Raw(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.down(self.up(x).relu())


def test_a_layer_of_another_class_is_a_kind_of_its_own() -> None:
    model = Stack()
    model.blocks[3] = Raw()
    found = plan_patch(randomise(model), inputs=X, twin="always")
    assert found.twin == "5 of 7 layers of blocks"
    assert content(found) == content(plan_patch(model, inputs=X, twin="never"))


def test_a_hook_makes_a_layer_another_kind() -> None:
    model = randomise(Stack())
    model.blocks[3].register_forward_hook(
        lambda module, args, y: y * (1 + args[0].mean(-1)[:, None])
    )
    found = plan_patch(model, inputs=X, twin="always")
    assert found.twin == "5 of 7 layers of blocks"
    assert content(found) == content(plan_patch(model, inputs=X, twin="never"))


def test_a_layer_that_is_not_what_it_seems_is_found_out() -> None:
    model = randomise(Stack())
    model.blocks[3].also = lambda x: x * x.mean(-1, keepdim=True)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    before = model(**X)
    with pytest.raises(VerificationError, match=r'though not those of a thin twin.*twin="never"'):
        patch_model(model, inputs=X, twin="always")
    assert type(model.final) is nn.LayerNorm
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(**X), before)


def test_broken_weights_in_a_layer_that_the_twin_lacks_are_named() -> None:
    model = randomise(Stack())
    model.blocks[4].up.weight.data[2, 3] = torch.nan
    with pytest.raises(PatchError, match=r"blocks.4.up.weight has entries that are nan"):
        patch_model(model, inputs=X, twin="always")
    assert type(model.final) is nn.LayerNorm


def test_originals_need_not_be_kept() -> None:
    model = randomise(Stack())
    before = model(**X)
    patch_model(model, inputs=X, keep_originals=False)
    assert (model(**X) - before).abs().max() < 1e-4
    with pytest.raises(PatchError, match=r"keep_originals=False.*cannot be unpatched"):
        unpatch_model(model)
    assert patch_report(model).plan.count("exact") == LAYERS + 1


def test_a_twin_is_chosen_by_what_it_spares() -> None:
    assert not plan_patch(gpt2(), twin="auto").twin
    with pytest.raises(PatchError, match="twin must be one of auto, never, always; got 3"):
        plan_patch(gpt2(), twin=3)  # type: ignore[arg-type]
