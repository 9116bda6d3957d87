"""How each norm class is read: what it computes, in terms `RMSNorm` understands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NormSpec:
    r"""What one normalisation module computes.

    `layernorm`: $y = (x - \bar x) / \sqrt{\mathrm{var}(x) + \epsilon} \cdot (o + w) + b$;
    `rmsnorm`: the same without $\bar x$, with the mean of squares for the variance.

    Attributes:
        kind: `"layernorm"` (centres) or `"rmsnorm"` (does not).
        normalized_shape: sizes of the normalised axes; one entry for nearly every model.
        eps: inside the square root.
        weight_offset: `o`, 1.0 for classes that store `w - 1` (Gemma, Nemotron).
        casting: `"gemma"`: everything in float32, one cast to x's dtype at the end.
            `"llama"`: the normalised value is cast to x's dtype *before* the weight multiplies
            it, and the result has the dtype PyTorch promotes the two to.
        channels_first: the norm runs over axis 1 of `(N, C, ...)` instead of the last axis.
        autocast_float32: runs in float32 under CUDA autocast and returns float32, as
            `F.layer_norm` does.
    """

    kind: Literal["layernorm", "rmsnorm"]
    normalized_shape: tuple[int, ...]
    eps: float
    weight_offset: float = 0.0
    casting: Literal["gemma", "llama"] = "gemma"
    channels_first: bool = False
    autocast_float32: bool = False
