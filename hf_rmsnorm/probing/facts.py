"""What a probe finds, as plain data: which weights to centre, where to subtract a mean, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fold:
    r"""Centre a parameter: $p \leftarrow p - \bar p$ along one axis.

    The axis is viewed as `(outer, size, inner)` and the mean is taken over `size`, so that the
    heads of a fused projection are blocks. For a plain writer, `size == tensor.shape[axis]`.

    Attributes:
        parameter: its name in `named_parameters()` or `named_buffers()`.
        axis: counted from the front.
        size: features of the norm this serves.
        inner: the innermost length of the view; `outer` follows from the tensor.
        blocks: the `(outer, inner)` positions to centre; None for all.
        aliases: further names of the same tensor (tied weights).
    """

    parameter: str
    axis: int
    size: int
    inner: int = 1
    blocks: tuple[tuple[int, int], ...] | None = None
    aliases: tuple[str, ...] = ()

    def mask(self, tensor: Tensor) -> Tensor | None:
        """1 where a block is centred, shaped to broadcast against `self.view(tensor)`."""
        if self.blocks is None:
            return None
        outer = tensor.shape[self.axis] // (self.size * self.inner)
        mask = torch.zeros(outer, 1, self.inner, dtype=tensor.dtype, device=tensor.device)
        for i, j in self.blocks:
            mask[i, 0, j] = 1
        return mask.reshape(mask.shape + (1,) * (tensor.ndim - self.axis - 1))

    def view(self, tensor: Tensor) -> Tensor:
        """The tensor with `axis` split into `(outer, size, inner)`."""
        return tensor.unflatten(self.axis, (-1, self.size, self.inner))


@dataclass(frozen=True)
class LayerScale:
    r"""Absorb a per-feature scale: $W \leftarrow \lambda W$, then $\lambda \leftarrow 1$.

    Only then can its writers be centred. `writers` are `(parameter, axis)`.
    """

    parameter: str
    writers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Center:
    """Subtract the mean over `axis` at a module's port, on every call.

    Attributes:
        module: name in `named_modules()`.
        side: `"input"` or `"output"`.
        key: for an input, the position in `args` or the keyword; for an output, the item of a tuple
            or the field of a mapping, None where the output is the tensor itself.
        serves: the norms that become exact through it.
    """

    module: str
    side: Literal["input", "output"]
    key: int | str | None = None
    axis: int = -1
    serves: tuple[str, ...] = ()

    def __str__(self) -> str:
        key = "" if self.key is None else f"[{self.key!r}]"
        return f"the {self.side}{key} of {self.module}"


@dataclass(frozen=True)
class ProbeResult:
    """What `probe` found. Apply `layerscales`, then `folds` in order, then `centers`.

    Attributes:
        exact: norm -> why its input mean is zero after the folds and centres.
        kept: norm -> why it is not.
        leftover: norm -> largest |mean| / rms at its input, after folds and centres.
        folds: also those that serve kept norms only: they move no output, but shrink the leftover.
        assumed: parameters never reached, folded like their reached siblings (idle experts).
        uncalled: norms the probe inputs never reached.
        moved: outputs not held equal (sub-model outputs, hidden states) that the folds change.
        dtype: what the probe computed in.
    """

    exact: dict[str, str]
    kept: dict[str, str]
    leftover: dict[str, float]
    folds: tuple[Fold, ...] = ()
    centers: tuple[Center, ...] = ()
    layerscales: tuple[LayerScale, ...] = ()
    assumed: tuple[str, ...] = ()
    uncalled: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    dtype: str = "float64"


def fold_tensor(tensor: Tensor, fold: Fold) -> Tensor:
    r"""$p - \mathrm{mean}(p)$ over the fold's blocks, computed in float64 and cast back."""
    view = fold.view(tensor.detach().double())
    mean = view.mean(fold.axis + 1, keepdim=True)
    mask = fold.mask(tensor)
    return (view - (mean if mask is None else mean * mask)).reshape(tensor.shape).to(tensor.dtype)


def scale_tensor(tensor: Tensor, scale: Tensor, axis: int) -> Tensor:
    r"""$\lambda_j\, p_j$ along `axis`, computed in float64 and cast back."""
    shape = [1] * tensor.ndim
    shape[axis] = -1
    scaled = tensor.detach().double() * scale.detach().double().reshape(shape)
    return scaled.to(tensor.dtype)
