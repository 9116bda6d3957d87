"""Inputs for the branches that a model takes only when asked: masked positions, the states of an
encoder, images beside text, training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from . import Training
from .inputs import SHAPES, Maker

# Which have no branch of their own, or show the inside of the model.
_PLAIN = ("return_dict", "output_", "use_cache", "inputs_embeds", "head_mask", "past_key_values")


def optional_inputs(
    model: nn.Module, base: dict[str, Any], lengths: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Further inputs that `model.forward` might take, likely ones first; some may be wrong.

    Args:
        base: what all of them start from.
        lengths: of the axes of weights that `base` does not reach: the features of what is
            missing, such as another model's states, is likely one of them.
    """
    maker = Maker(model, *SHAPES[0], seed=100)
    names = [
        name
        for name, parameter in maker.parameters.items()
        if name not in base
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and not name.startswith(_PLAIN)
    ]
    with torch.device("cpu"):  # whatever the caller's default is
        values = [(name, value) for name in names for value in _values(maker, name, lengths)]
        labels = list(_labels(maker, base)) if "labels" in names else []
    yield from ({**base, name: value} for name, value in values)
    yield Training(base)
    yield from (Training({**base, "labels": value}) for value in labels)


def _values(maker: Maker, name: str, lengths: Sequence[int]) -> Iterator[Tensor]:
    """What the argument called `name` could be."""
    batch, length = maker.batch, maker.length
    known = {
        "bool_masked_pos": maker.bool_masked_pos,
        "pixel_values": maker.pixel_values,
        "pixel_values_videos": maker.pixel_values_videos,
        "input_features": maker.input_features,
        "input_values": maker.input_values,
        "decoder_input_ids": maker.tokens,
        "input_ids": maker.tokens,
        "bbox": maker.bbox,
    }
    if name in known:
        try:
            yield known[name]()
        except (PatchError, TypeError, ZeroDivisionError):  # not in this model's config
            return
    elif name.endswith(("_states", "_embeds", "_embeddings", "_features")):
        for features in lengths:
            yield maker.floats(batch, length + 3, features)
    elif name.endswith(("_ids", "_id")):
        for shape in ((batch,), (batch, length)):
            yield maker.integers(0, 2, *shape)


def _labels(maker: Maker, base: dict[str, Any]) -> Iterator[Tensor]:
    if (tokens := base.get("decoder_input_ids", base.get("input_ids"))) is not None:
        yield tokens
    yield maker.integers(0, 2, maker.batch)
