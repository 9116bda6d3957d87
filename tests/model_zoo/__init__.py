"""Tiny random models of many architectures, every dimension a different size.

Distinct sizes, because a mask as wide as the hidden size looks like a weight. Random norm weights
and biases, because freshly initialised ones (1 and 0) make post-norm models look convertible.

`ZOO` maps names to builders; `build(name)` gives the model, `inputs_for(name, model)` its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hf_rmsnorm.probing.inputs import SHAPES, make_inputs

from .audio import AUDIO
from .decoders import DECODERS
from .encoder_decoders import ENCODER_DECODERS
from .encoders import ENCODERS
from .multimodal import MULTIMODAL
from .sizes import Builders, P, V
from .vision import VISION

ZOO: Builders = {**DECODERS, **ENCODER_DECODERS, **ENCODERS, **VISION, **MULTIMODAL, **AUDIO}


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter values that no symmetry survives, at a scale where each matters.

    Transformers initialises some so small (1e-10) that an output does not depend on them.
    """
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if is_norm or parameter.numel() == max(parameter.shape, default=1):
                parameter.data.copy_(0.3 * noise + ("bias" not in name))
            else:
                fan_in = parameter.numel() / parameter.shape[0]
                parameter.data.copy_(noise * max(0.1, fan_in**-0.5))
    return model


def _perceiver(model: nn.Module, batch: int, tokens: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"inputs": torch.randn(batch, tokens, 30, generator=generator)}


def _perceiver_mlm(model: nn.Module, batch: int, tokens: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"inputs": torch.randint(6, V, (batch, P), generator=generator)}


def _ids(model: nn.Module, batch: int, tokens: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, V, (2 * batch, tokens + 7), generator=generator)}


def _decision(model: nn.Module, batch: int, tokens: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "states": torch.randn(batch, tokens, 5, generator=generator),
        "actions": torch.randn(batch, tokens, 4, generator=generator),
        "rewards": torch.randn(batch, tokens, 1, generator=generator),
        "returns_to_go": torch.randn(batch, tokens, 1, generator=generator),
        "timesteps": torch.arange(tokens).expand(batch, -1),
        "attention_mask": torch.ones(batch, tokens),
    }


# What cannot be guessed from a signature and a config.
INPUTS: dict[str, Callable[[nn.Module, int, int, int], dict[str, Any]]] = {
    "canine": _ids,
    "decision-transformer": _decision,
    "musicgen-decoder": _ids,
    "perceiver": _perceiver,
    "perceiver-mlm": _perceiver_mlm,
}


def inputs_for(
    name: str, model: nn.Module, shapes: Sequence[tuple[int, int]] = SHAPES, seed: int = 0
) -> list[dict[str, Any]]:
    """Probe inputs: made by the package, except for the few models where users pass their own."""
    if name not in INPUTS:
        return make_inputs(model, shapes, seed)
    return [INPUTS[name](model, b, n, seed + i) for i, (b, n) in enumerate(shapes)]


def build(name: str) -> nn.Module:
    """The model in eval mode and float32, the same on every call."""
    model = ZOO[name]()
    randomise(model)
    return model.eval()
