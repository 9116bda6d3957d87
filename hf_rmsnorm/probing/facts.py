"""What a probe finds, as plain data: which weights to centre, where to subtract a mean, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..fields import Axis, Count, Name


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

    parameter: Name
    axis: Axis
    size: Count
    inner: Count = 1
    blocks: tuple[tuple[Axis, Axis], ...] | None = None
    aliases: tuple[Name, ...] = ()

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

    parameter: Name
    writers: tuple[tuple[Name, Axis], ...]


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
class Absorb:
    r"""Give the mean of a norm's bias to the weights that read the norm.

    $b \leftarrow b - \bar b$, and $c \leftarrow c + \bar b\, W 1$ for each reader $W y + c$. Where
    else the norm's output goes, a sum that other norms read, a LayerNorm does not see the shift.

    Attributes:
        bias: the norm's.
        readers: `(weight, axis, bias)` of each; `axis` is the weight's axis of outputs.
    """

    bias: Name
    readers: tuple[tuple[Name, Axis, Name], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that change; the one that says by how much comes last."""
        return (*(bias for _, _, bias in self.readers), self.bias)


@dataclass(frozen=True)
class Widen:
    r"""One more hidden unit in a feed-forward block: the norm after it needs no centring then.

    That norm reads $y + W_2\,\phi(W_1 y + b_1) + b_2$, and $y = g \odot n + b$ comes from the norm
    before. The unit is $\phi(s \bar y + 16)$, which GELU and ReLU leave at $s \bar y + 16$ as long
    as $|s \bar y| \le 8$; its column $-1/s$, with $16/s$ added to $b_2$, takes $\bar y$ off each
    feature. Since $n$ has no mean and $\lVert n \rVert \le \sqrt d$, by Cauchy-Schwarz
    $|\bar y| \le \lVert g - \bar g \rVert / \sqrt d + |\bar b|$, which gives $s$.

    Attributes:
        norm: the norm before; empty where a checkpoint brings the unit's weights.
        up, down: modules with a `weight` and a `bias`.
        up_axis, down_axis: the axis of hidden units in each weight.
    """

    norm: str
    up: Name
    up_axis: Axis
    down: Name
    down_axis: Axis

    @property
    def grown(self) -> dict[str, int]:
        """The tensors that get one more entry, and along which axis."""
        return {
            f"{self.up}.weight": self.up_axis,
            f"{self.up}.bias": 0,
            f"{self.down}.weight": self.down_axis,
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that change."""
        return (*self.grown, f"{self.down}.bias")


@dataclass(frozen=True)
class ProbeResult:
    """What `probe` found.

    Apply `absorbs`, `layerscales`, `folds` in order, `widens`, then `centers`.

    Attributes:
        exact: norm -> why its input mean is zero after the folds and centres.
        kept: norm -> why it is not.
        leftover: norm -> largest |mean| / rms at its input, after folds and centres.
        folds: also those that serve kept norms only: they move no output, but shrink the leftover.
        assumed: parameters never reached, folded like their reached siblings (idle experts).
        uncalled: norms the probe inputs never reached.
        unproven: norm -> a parameter that the inputs never reached and that may write to what it
            reads: `exact` is then said of the paths probed alone.
        unreached: all parameters and buffers of that kind.
        reached: how many parameters and buffers the inputs reached, and of how many.
        moved: outputs not held equal (sub-model outputs, hidden states) that the folds change.
        dtype: what the probe computed in.
    """

    exact: dict[str, str]
    kept: dict[str, str]
    leftover: dict[str, float]
    folds: tuple[Fold, ...] = ()
    centers: tuple[Center, ...] = ()
    layerscales: tuple[LayerScale, ...] = ()
    absorbs: tuple[Absorb, ...] = ()
    widens: tuple[Widen, ...] = ()
    assumed: tuple[str, ...] = ()
    uncalled: tuple[str, ...] = ()
    unproven: dict[str, str] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()
    reached: tuple[int, int] | None = None
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


def shift_term(
    absorb: Absorb, name: str, find: Callable[[str], Tensor], shift: Tensor | float
) -> Tensor | float:
    """What to add to the tensor `name` when the norm's bias is shifted by `shift` and its readers
    make up for it; in float64."""
    for weight, axis, bias in absorb.readers:
        if bias == name:
            w = find(weight).detach().double()
            return -shift * w.sum([i for i in range(w.ndim) if i != axis])
    return shift


def extended(tensor: Tensor, axis: int, units: int = 1) -> Tensor:
    """The tensor with zeros appended along `axis`."""
    shape = list(tensor.shape)
    shape[axis] = units
    return torch.cat([tensor.detach(), tensor.new_zeros(shape)], axis)


OFFSET = 16.0  # of the extra unit: the middle of its linear range, 8 to 24
RANGE = 8.0
MARGIN = 1 / 32  # of the gain's size, for rounding and for an `n` whose centring was dropped


def with_unit(widen: Widen, name: str, value: Tensor, find: Callable[[str], Tensor]) -> Tensor:
    """`value`, the tensor `name` in float64 and extended already, with the extra unit's weights."""
    gain = find(f"{widen.norm}.weight").detach().double()
    bias = find(f"{widen.norm}.bias").detach().double()
    bound = gain.std(correction=0) + bias.mean().abs() + MARGIN * gain.square().mean().sqrt()
    scale = RANGE / bound.clamp(min=torch.finfo(torch.float32).tiny)
    if name not in widen.grown:
        return value + OFFSET / scale
    entry = {
        f"{widen.up}.weight": scale / gain.numel(),
        f"{widen.up}.bias": torch.full_like(scale, OFFSET),
        f"{widen.down}.weight": -1 / scale,
    }[name]
    value = value.clone()
    value.select(widen.grown[name], -1).copy_(entry)
    return value
