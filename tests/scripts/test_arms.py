"""`NAME[:strategy][:p]`, the table of norms, and what the baselines compute."""

from __future__ import annotations

import pytest
import torch
from harness import arms, baselines
from harness.arms import Arm
from harness.errors import ScriptError
from torch import nn


@pytest.mark.parametrize(
    ("text", "arm", "name"),
    [
        ("layernorm", Arm("layernorm"), "layernorm"),
        ("rmsnorm", Arm("rmsnorm", "auto"), "rmsnorm"),
        ("rmsnorm:direct", Arm("rmsnorm", "direct"), "rmsnorm:direct"),
        ("prmsnorm", Arm("prmsnorm", "auto", 0.0625), "prmsnorm:0.0625"),
        ("prmsnorm:direct:0.5", Arm("prmsnorm", "direct", 0.5), "prmsnorm:direct:0.5"),
        ("prmsnorm:0.5:direct", Arm("prmsnorm", "direct", 0.5), "prmsnorm:direct:0.5"),
        ("none", Arm("none"), "none"),
    ],
)
def test_parse(text: str, arm: Arm, name: str) -> None:
    assert Arm.parse(text) == arm
    assert str(arm) == name
    assert Arm.parse(str(arm)) == arm


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("batchnorm", "unknown norm 'batchnorm'"),
        ("rmsnorm:exactly", "'exactly' is neither a strategy"),
        ("rmsnorm:0.5", "has no p"),
        ("prmsnorm:0", "outside"),
        ("prmsnorm:1.5", "outside"),
        ("prmsnorm:-1", "outside"),
        ("prmsnorm:nan", "outside"),
        ("layernorm:direct", "patches nothing"),
    ],
)
def test_parse_refuses(text: str, complaint: str) -> None:
    with pytest.raises(ScriptError, match=complaint):
        Arm.parse(text)


def test_control_comes_first_and_no_arm_twice() -> None:
    parsed = arms.parse_arms(["rmsnorm", "layernorm", "prmsnorm"])
    assert [str(arm) for arm in parsed] == ["layernorm", "rmsnorm", "prmsnorm:0.0625"]
    assert str(arms.parse_arms(["rmsnorm"])[0]) == "layernorm"
    with pytest.raises(ScriptError, match="twice"):
        arms.parse_arms(["prmsnorm", "prmsnorm:0.0625"])


def test_baselines_replace_every_layer_norm() -> None:
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6, eps=0.5), nn.Linear(6, 3))
        nn.init.normal_(layers[1].weight)
        nn.init.normal_(layers[1].bias)
        return layers

    x, original = torch.randn(5, 4), network()
    hidden = original[0](x)
    unscaled = hidden / (hidden.square().sum(-1, keepdim=True) + 0.5).sqrt()
    expected = original[2](unscaled * original[1].weight + original[1].bias)
    torch.testing.assert_close(baselines.replace_norms(network(), "l2norm")(x), expected)
    torch.testing.assert_close(
        baselines.replace_norms(network(), "none")(x), original[2](original[0](x))
    )
