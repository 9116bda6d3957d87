"""Inputs to probe a model with, made from its forward's signature and its config.

Only attribute names are looked at, so this imports no Transformers and works on look-alikes. What
it cannot make, the user passes as `inputs=`.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError

_VOCABULARIES = ("vocab_size", "src_vocab_size", "tgt_vocab_size", "input_vocab_size", "n_tokens")
SHAPES = ((2, 8), (1, 5))  # (batch, tokens) of the two inputs
_FRAMES = 2
LARGE = 2**17  # numbers in an input whose size the model fixes: one example of it will do


class Maker:
    """Makes one input: `batch` examples of `length` tokens."""

    def __init__(self, model: nn.Module, batch: int, length: int, seed: int):
        self.model = model
        self.config = getattr(model, "config", None)
        self.parameters = parameters_of(model)
        self.generator = torch.Generator().manual_seed(seed)
        self.batch = batch
        limits = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
        known = [self.read(name) for name in limits]
        self.length = min([length, *(n for n in known if isinstance(n, int) and n > 0)])

    def read(self, *names: str, default: Any = None) -> Any:
        """The first of these settings in the config or, breadth first, in the configs inside it."""
        for name in names:
            for config in _configs(self.config):
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return default

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def tokens(self) -> Tensor:
        """Ids of ordinary tokens: special ones switch things off."""
        ids = self.integers(0, 1 << 30, self.batch, self.length)
        return self.ordinary_ids()[ids % len(self.ordinary_ids())]

    def text(self) -> Tensor:
        """Tokens; beside images, with an end of the text: models like CLIP read the text there."""
        ids, end = self.tokens(), self.read("eos_token_id")
        known = isinstance(end, int) and 0 <= end < self.vocabulary()
        if known and "pixel_values" in self.parameters and self.length > 1:
            ids[:, -2] = end
        return ids

    def vocabulary(self) -> int:
        known = itertools.product(_configs(self.config), _VOCABULARIES)
        sizes = [n for c, name in known if isinstance(n := getattr(c, name, None), int)]
        with suppress(AttributeError, NotImplementedError):
            sizes.append(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        if not sizes:
            raise PatchError(_message(self.model, "its vocabulary's size is not in its config"))
        return min(sizes)

    def ordinary_ids(self) -> Tensor:
        special = set()
        for config in _configs(self.config):
            for name, value in vars(config).items():
                if name.endswith(("_token_id", "_token_index", "_token")):
                    special.update(value if isinstance(value, list) else [value])
        ids = [i for i in range(min(self.vocabulary(), 4096)) if i not in special]
        return torch.tensor(ids[min(3, len(ids) - 1) :])

    def mask(self) -> Tensor:
        """1 for tokens. Where there are several examples the last one is padded, by no more than a
        token: in a short attention window more would leave nothing to attend to."""
        mask = torch.ones(self.batch, self.length, dtype=torch.long)
        mask[1:, -1] = 0
        return mask

    def pair(self, value: Any) -> tuple[int, int]:
        if isinstance(value, dict):
            value = (value.get("height"), value.get("width"))
        return (value[0], value[1]) if isinstance(value, Sequence) else (value, value)

    def image_size(self) -> tuple[int, int]:
        return self.pair(self.read("image_size", "crop_size", "input_size", default=64))

    def patches(self) -> int:
        (height, width), patch = self.image_size(), self.pair(self.read("patch_size", default=1))
        frames = self.frames() // self.read("tubelet_size", default=1) if self.frames() else 1
        return (height // patch[0]) * (width // patch[1]) * frames

    def frames(self) -> int:
        return self.read("num_frames", "frames_per_clip", default=0)

    def pixel_values(self) -> Tensor:
        channels = self.read("num_channels", "in_channels", "in_chans", default=3)
        if self.grid():  # patches in a row, from every image
            size, _ = self.pair(self.read("patch_size"))
            depth = self.read("temporal_patch_size", default=1)
            rows = self.batch * self.grid()[1] * self.grid()[2]
            return self.floats(rows, channels * depth * size * size)
        several = self.frames() or ("pixel_attention_mask" in self.parameters)
        return self.floats(
            self.batch, *([int(several)] if several else []), channels, *self.image_size()
        )

    def grid(self) -> tuple[int, ...]:
        """Frames, rows and columns of patches per image, for models that take images as patches."""
        if "image_grid_thw" not in self.parameters:
            return ()
        side = 2 * self.read("spatial_merge_size", default=1)
        return (1, side, side + self.read("spatial_merge_size", default=1))

    def pixel_values_videos(self) -> Tensor:
        channels = self.read("num_channels", "in_channels", "in_chans", default=3)
        return self.floats(self.batch, self.frames() or _FRAMES, channels, *self.image_size())

    def bool_masked_pos(self) -> Tensor:
        row = torch.arange(self.patches()) % 2 == 0
        return row.expand(self.batch, -1)

    def input_values(self) -> Tensor:
        if self.read("conv_stride") is not None or self.read("max_length") is None:
            strides = self.read("conv_stride", default=[64, 3, 2])
            return self.floats(self.batch, math.prod(strides) * (self.length + 8) + 400)
        bins = self.read("num_mel_bins")
        return self.floats(self.batch, self.read("max_length"), bins)

    def input_features(self) -> Tensor:
        channels = self.read("input_feat_per_channel", "feature_projection_input_dim")
        if channels is not None:
            return self.floats(self.batch, 4 * self.length, channels)
        bins = self.read("num_mel_bins", default=80)
        frames = self.read("max_source_positions", default=2 * self.length)
        return self.floats(self.batch, bins, 2 * frames)

    def bbox(self) -> Tensor:
        top = self.read("max_2d_position_embeddings", default=1024)
        corners = self.integers(0, top // 2, self.batch, self.length, 2)
        return torch.cat([corners, corners + self.integers(0, top // 2, 1, 1, 2)], dim=-1)

    def image_tokens(self) -> int:
        """How many of the text's tokens stand for the image."""
        if self.grid():
            return math.prod(self.grid()) // self.read("spatial_merge_size", default=1) ** 2
        known = ("image_seq_length", "mm_tokens_per_image", "num_query_tokens")
        return self.read(*known) or self.patches() // self.read("scale_factor", default=1) ** 2

    def make(self) -> dict[str, Any]:
        takes = self.parameters.keys()
        text_decoder = bool(self.read("is_encoder_decoder")) or "decoder_input_ids" in takes
        main = getattr(self.model, "main_input_name", "input_ids")
        images = "pixel_values" in takes
        found: dict[str, Any] = {}
        if "input_ids" in takes and (main == "input_ids" or images):
            found["input_ids"] = self.text()
            if "attention_mask" in takes:
                found["attention_mask"] = self.mask()
            types = self.read("type_vocab_size", default=0)
            if "token_type_ids" in takes and types > 1:
                found["token_type_ids"] = self.integers(0, types, self.batch, self.length)
        makers: dict[str, Callable[[], Tensor]] = {
            "pixel_values": self.pixel_values,
            "pixel_values_videos": self.pixel_values_videos,
            "input_values": self.input_values,
            "input_features": self.input_features,
        }
        for name, make in makers.items():
            if name in takes and (name == main or name == "pixel_values"):
                found[name] = make()
        if "pixel_values" in found and self.grid():
            found["image_grid_thw"] = torch.tensor([self.grid()] * self.batch)
        if "bbox" in takes:
            found["bbox"] = self.bbox()
        masked = self.parameters.get("bool_masked_pos")
        if masked and (masked.default is masked.empty or self.read("use_mask_token")):
            found["bool_masked_pos"] = self.bool_masked_pos()
        if "decoder_input_ids" in takes and text_decoder:
            found["decoder_input_ids"] = self.tokens()
        if "past_values" in takes:
            channels = self.read("num_input_channels", default=1)
            found["past_values"] = self.floats(
                self.batch, self.read("context_length", default=32), channels
            )
        self._place_image(found)
        return found

    def _place_image(self, found: dict[str, Any]) -> None:
        """Give the image its tokens, where the model wants them in the text."""
        token = self.read("image_token_id", "image_token_index")
        if token is None or "pixel_values" not in found or "input_ids" not in found:
            return
        image = torch.full((self.batch, self.image_tokens()), token)
        found["input_ids"] = torch.cat([image, found["input_ids"]], dim=1)
        if "attention_mask" in found:
            found["attention_mask"] = torch.cat(
                [torch.ones_like(image), found["attention_mask"]], dim=1
            )
        found.pop("token_type_ids", None)
        if "mm_token_type_ids" in self.parameters:
            found["mm_token_type_ids"] = (found["input_ids"] == token).long()


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What the model's forward takes; of PEFT's wrappers that take anything, the model inside."""
    found = inspect.signature(model.forward).parameters
    base = getattr(model, "get_base_model", None)
    wraps = all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in found.values())
    return parameters_of(base()) if base and wraps and base() is not model else found


def _configs(config: Any) -> Iterator[Any]:
    queue = [config]
    while queue:
        current = queue.pop(0)
        if current is not None:
            yield current
            inner = vars(current).values() if hasattr(current, "__dict__") else ()
            queue += [value for value in inner if hasattr(value, "model_type")]


def _message(model: nn.Module, problem: str) -> str:
    arguments = ", ".join(
        name for name in inspect.signature(model.forward).parameters if name != "self"
    )
    return (
        f"No probe inputs could be made for {type(model).__name__}: {problem}. Pass inputs= with "
        f"a dict of its forward's keyword arguments (it takes {arguments}), or a list of dicts."
    )


def _floats(inputs: Mapping[str, Any]) -> int:
    tensors = [x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]
    return sum(tensor.numel() for tensor in tensors)


def make_inputs(
    model: nn.Module, shapes: Sequence[tuple[int, int]] = SHAPES, seed: int = 0
) -> list[dict[str, Any]]:
    """Inputs of different batch, length and content, as keyword arguments of `model.forward`.

    Text, images, audio, video and their combinations; decoder tokens for encoder-decoders; padding
    where there are several examples. Sizes come from `model.config`.

    Args:
        shapes: `(batch, tokens)` of each input.

    Raises:
        PatchError: nothing suitable, with what to pass as `inputs=`.

    Example:
        >>> class Config:
        ...     vocab_size = 50
        >>> class Model(nn.Module):
        ...     config = Config()
        ...     def forward(self, input_ids, attention_mask=None): ...
        >>> [{k: tuple(v.shape) for k, v in i.items()} for i in make_inputs(Model())][1]
        {'input_ids': (1, 5), 'attention_mask': (1, 5)}
    """
    found = []
    for i, (batch, length) in enumerate(shapes):
        maker = Maker(model, batch, length, seed + i)
        with torch.device("cpu"):  # whatever the caller's default is
            inputs = maker.make()
            if batch > 1 and _floats(inputs) > LARGE:
                inputs = Maker(model, 1, length, seed + i).make()
        if not inputs:
            raise PatchError(_message(model, "its forward takes none of the usual inputs"))
        missing = [
            name
            for name, p in maker.parameters.items()
            if p.default is p.empty
            and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            and name not in inputs
        ]
        if missing:
            raise PatchError(_message(model, f"its forward requires {', '.join(missing)}"))
        found.append(inputs)
    return found
