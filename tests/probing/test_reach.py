"""`exact` is a claim about the paths that were run: optional branches are run, or named."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from model_zoo import build, randomise
from torch import Tensor, nn

from hf_rmsnorm import PatchError, patch_model, patch_report, plan_patch
from hf_rmsnorm.probing import plain_copy, relative_change, run_outputs

IDS = torch.tensor([[5, 9, 12, 40, 11, 7], [13, 8, 21, 6, 30, 41]])


def vit_for_masks() -> nn.Module:
    return transformers.ViTForMaskedImageModeling(
        transformers.ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=40,
            image_size=32,
            patch_size=8,
            encoder_stride=8,
        )
    )


def gpt2(**config: Any) -> nn.Module:
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3, "vocab_size": 57, "n_positions": 32}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ends, **config))


def _masked(generator: torch.Generator) -> dict[str, Any]:
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels, "bool_masked_pos": torch.rand(2, 16, generator=generator) > 0.5}


def _states(generator: torch.Generator) -> dict[str, Any]:
    return {
        "input_ids": IDS,
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator),
    }


def _languages(generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": IDS, "lang_ids": torch.tensor([1, 0])}


OPTIONAL: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], dict[str, Any]]]] = {
    "masked positions": (vit_for_masks, _masked),
    "an encoder's states": (functools.partial(gpt2, add_cross_attention=True), _states),
    "languages": (functools.partial(build, "xmod-pre"), _languages),
}


@pytest.mark.parametrize("kind", OPTIONAL)
def test_optional_branches_are_probed(kind: str) -> None:
    make, inputs_of = OPTIONAL[kind]
    model = randomise(make()).eval()
    inputs = [inputs_of(torch.Generator().manual_seed(3))]
    before = run_outputs(plain_copy(model, torch.float64), inputs)
    patch_model(model, strategy="exact")  # no warning
    plan = patch_report(model).plan
    assert plan.count("exact") > len(plan.sites) / 2 and not plan.unreached
    after = run_outputs(plain_copy(model, torch.float64), inputs)
    assert relative_change(before, after) < 1e-6  # the folds are rounded to float32


def test_a_branch_of_training_is_probed() -> None:
    """The vector that stands for masked frames of audio, which only training puts in."""
    model = build("wav2vec2-stable")
    plan = plan_patch(model)
    assert not plan.unreached and plan.reached == (66, 66)
    assert not model.training


class Optional(nn.Module):
    """Writes its argument `image` to the stream, if there is one."""

    def __init__(self, narrow: bool = False) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(7, 12), nn.Linear(5, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)
        self.unused = nn.Linear(12, 2)  # reads features, but writes none

    def forward(self, x: Tensor, image: Tensor | None = None) -> Any:
        stream = self.text(x)
        if image is not None:
            stream = stream + self.image(image)
        return self.head(self.norm(stream))


TEXT = {"x": torch.randn(4, 7, generator=torch.Generator().manual_seed(0))}
BOTH = {**TEXT, "image": torch.randn(4, 5, generator=torch.Generator().manual_seed(1))}


def test_what_no_input_reached_is_named() -> None:
    model = randomise(Optional())
    with pytest.warns(UserWarning, match=r"1 of 1 .* paths probed alone: .* image.bias, image.w"):
        patch_model(model, inputs=TEXT)
    report = patch_report(model)
    assert report.plan.unreached == ("image.bias", "image.weight")
    assert report.plan.reached == (6, 10)
    assert "reached 6 of 10 parameters and buffers; pass inputs= that reach image.bias" in str(
        report
    )
    assert "1 exact (1 on the paths probed alone)" in report.plan.summary()
    (site,) = report.sites
    assert site.verdict == "exact" and site.unproven
    assert site.reason.startswith("exact on the paths probed; image.bias was never reached: pass")


def test_a_strategy_of_exact_keeps_what_is_not_proven() -> None:
    model = randomise(Optional())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(PatchError, match=r"image.bias was never reached: pass inputs="):
        patch_model(model, inputs=TEXT, strategy="exact")
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_inputs_that_reach_it_prove_it() -> None:
    model = randomise(Optional()).double()
    before = model(**BOTH_64)
    patch_model(model, inputs=[TEXT, BOTH], strategy="exact")
    assert not patch_report(model).plan.unreached
    assert relative_change([before], [model(**BOTH_64)]) < 1e-12


BOTH_64 = {name: x.double() for name, x in BOTH.items()}


class Dropped(Optional):
    """Computes what it does not return: no path leads from there to a stream."""

    def forward(self, x: Tensor, image: Tensor | None = None) -> Any:
        stream = self.text(x)
        self.image(x[:, :5])
        return self.head(self.norm(stream))


def test_what_is_computed_and_dropped_is_reached() -> None:
    plan = plan_patch(randomise(Dropped()), inputs=TEXT)
    assert not plan.unreached and not plan.sites[0].unproven


class Routed(nn.Module):
    """Experts by number and by key, of which inputs choose one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(7, 12) for _ in range(3))
        self.tongues = nn.ModuleDict({name: nn.Linear(7, 12) for name in ("en", "de")})
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, x: Tensor, expert: int = 0, tongue: str = "en") -> Tensor:
        return self.head(self.norm(self.experts[expert](x) + self.tongues[tongue](x)))


def test_siblings_vouch_for_what_was_not_reached() -> None:
    model = randomise(Routed()).double()
    other = {"x": TEXT["x"].double(), "expert": 2, "tongue": "de"}
    before = model(**other)
    patch_model(model, inputs=TEXT)
    plan = patch_report(model).plan
    assert not plan.unreached
    assert {"experts.2.weight", "tongues.de.bias"} <= set(plan.assumed)
    assert relative_change([before], [model(**other)]) < 1e-12


def test_side_outputs_that_move_are_said_once_and_can_be_held() -> None:
    with pytest.warns(UserWarning) as caught:
        patch_model(build("clip"))
    said = [str(w.message) for w in caught if "lose their mean" in str(w.message)]
    assert len(said) == 1 and "vision_model_output.last_hidden_state" in said[0]

    for hold in ("vision_model_output", ["vision_model_output.last*"], "all"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*changed approximately")
            model = patch_model(build("clip"), hold=hold)
        plan = patch_report(model).plan
        assert not plan.moved
        assert plan.count("exact") < len(plan.sites)  # what the output shows is read raw


def test_hidden_states_can_be_held() -> None:
    model = randomise(gpt2()).eval()
    before = model(IDS, output_hidden_states=True).hidden_states
    patch_model(model, strategy="exact", hold=["hidden_states"])
    sites = patch_report(model).sites
    assert sites[0].verdict == "kept" and "is also an output of the model" in sites[0].reason
    after = model(IDS, output_hidden_states=True).hidden_states
    assert relative_change(before, after) < 1e-5


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"hold": ["nowhere"]}, r"hold pattern 'nowhere' matches no output .* it returned logits"),
        ({"hold": "all", "strategy": "direct"}, 'strategy="direct" cannot promise'),
        ({"hold": [3]}, r'hold must be "all" or a list of patterns'),
    ],
)
def test_bad_holds(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PatchError, match=message):
        patch_model(gpt2(), **arguments)


@pytest.mark.parametrize("scale", [None, 0.0, 1.0])
def test_weights_that_are_all_alike_decide_nothing(scale: float | None) -> None:
    """Fresh biases are zero, fresh gains one; a verdict must not rest on that."""
    bert = transformers.BertConfig(
        vocab_size=57,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
    )
    for make in (gpt2, lambda: transformers.BertModel(bert)):
        fresh, trained = make().eval(), randomise(make()).eval()
        if scale is not None:  # vectors alone: a network of equal matrices computes nothing
            for parameter in fresh.parameters():
                if parameter.ndim == 1:
                    nn.init.constant_(parameter, scale)
        found, wanted = plan_patch(fresh), plan_patch(trained)
        assert [s.verdict for s in found.sites] == [s.verdict for s in wanted.sites]
        assert {f.parameter for f in found.folds} == {f.parameter for f in wanted.folds}
    if scale is None:
        assert all((site.leftover or 0) < 1e-7 for site in found.sites)  # of the weights as given


def test_what_is_zero_stays_zero() -> None:
    model = gpt2().eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    plan_patch(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
