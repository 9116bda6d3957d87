from __future__ import annotations

import pytest
import torch
from model_zoo import build
from torch import nn

from hf_rmsnorm.errors import PatchError
from hf_rmsnorm.probing.inputs import make_inputs


def shapes(name: str) -> list[dict[str, tuple[int, ...]]]:
    return [{k: tuple(v.shape) for k, v in i.items()} for i in make_inputs(build(name))]


def test_text():
    first, second = shapes("gpt2")
    assert first["input_ids"] == (2, 8) and second["input_ids"] == (1, 5)
    ids, mask = (make_inputs(build("gpt2"))[0][k] for k in ("input_ids", "attention_mask"))
    assert ids.max() < 97 and mask.sum() == 15, "one token of padding"


def test_special_tokens_are_avoided():
    ids = torch.cat([i["input_ids"].flatten() for i in make_inputs(build("bart"), ((40, 40),))])
    assert not set(ids.tolist()) & {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bart", {"input_ids": (2, 8), "decoder_input_ids": (2, 8), "attention_mask": (2, 8)}),
        ("bert", {"input_ids": (2, 8), "token_type_ids": (2, 8), "attention_mask": (2, 8)}),
        ("vit", {"pixel_values": (2, 3, 20, 20)}),
        ("yolos", {"pixel_values": (2, 3, 20, 24)}),
        ("videomae", {"pixel_values": (2, 4, 3, 20, 20)}),
        ("whisper", {"input_features": (2, 10, 26), "decoder_input_ids": (2, 8)}),
        ("ast", {"input_values": (2, 26, 14)}),
        ("beit-mim", {"pixel_values": (2, 3, 20, 20), "bool_masked_pos": (2, 25)}),
        (
            "llava-neox",
            {"input_ids": (2, 33), "attention_mask": (2, 33), "pixel_values": (2, 3, 20, 20)},
        ),
    ],
)
def test_each_kind(name, expected):
    assert shapes(name)[0] == expected


def test_inputs_do_not_disturb_the_random_state():
    model = build("clip")
    state = torch.get_rng_state()
    first, again = make_inputs(model), make_inputs(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x[k], y[k]) for x, y in zip(first, again, strict=True) for k in x)


class Config:
    vocab_size = 20


def test_what_cannot_be_made_is_named():
    class Odd(nn.Module):
        config = Config()

        def forward(self, input_ids, graph): ...

    with pytest.raises(
        PatchError, match=r"Odd: its forward requires graph.*takes input_ids, graph"
    ):
        make_inputs(Odd())


def test_a_plain_module_says_how_to_pass_inputs():
    with pytest.raises(PatchError, match=r"takes none of the usual inputs.*Pass inputs="):
        make_inputs(nn.Linear(2, 2))


def test_a_vocabulary_of_unknown_size():
    class NoConfig(nn.Module):
        def forward(self, input_ids): ...

    with pytest.raises(PatchError, match="vocabulary"):
        make_inputs(NoConfig())


def test_short_position_tables_are_respected():
    class Short(nn.Module):
        config = type("C", (), {"vocab_size": 20, "max_position_embeddings": 4})()

        def forward(self, input_ids, attention_mask=None): ...

    assert make_inputs(Short())[0]["input_ids"].shape == (2, 4)
