"""`RMSNorm` and `PartialRMSNorm`: drop-in replacements for `torch.nn.LayerNorm`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import functional
from .errors import PatchError


class RMSNorm(nn.LayerNorm):
    r"""Root mean square layer normalisation (Zhang & Sennrich 2019, eq. 4).

    $$y = \frac{x}{\sqrt{\frac{1}{n}\sum_{i=1}^{n} x_i^2 + \epsilon}} \odot w + b$$

    over the last dimensions `normalized_shape`, with statistics in float32 (float64 for float64
    input). It takes the arguments of `torch.nn.LayerNorm` and is a subclass of it, so that weight
    decay groups, initialisers and state-dict keys (`weight`, `bias`) stay as they are.

    Args:
        normalized_shape: sizes of the last dimensions, as for `nn.LayerNorm`.
        eps: added to the mean of squares, inside the root; None as in `functional.rms_norm`.
        elementwise_affine: learn `weight` (and `bias`).
        bias: learn `bias` too.
        device, dtype: of the parameters.

    Shapes: `(..., *normalized_shape)` to the same shape.

    Attributes:
        autocast_output: the dtype of the output under `torch.autocast`. `"float32"`: as
            `nn.LayerNorm`, which is float32 for half precision input too, except on CPUs.
            `"input"`: x's. `"autocast"`: autocast's own. For layers that read the output in
            autocast's dtype, as Linear does, `"autocast"` gives the same result with less
            traffic. Bytes per element with a float32 x: 4 read + 2 written, instead of 4 + 4 and
            another 4 + 2 for each reader's cast; with a half precision x: 2 + 2 instead of 2 + 4
            and 4 + 2 for each reader. Float64 stays float64.

        marks_state: write `hf_rmsnorm_p` into state dicts, which `nn.LayerNorm` then refuses
            (unless `strict=False`): set by a patch that changes what the module computes.

    Example:
        >>> import torch
        >>> norm = RMSNorm(6)
        >>> norm(torch.ones(2, 6)).shape
        torch.Size([2, 6])
    """

    # Class-level defaults: a plain `nn.LayerNorm` becomes an `RMSNorm` by its class alone.
    p: float = 1.0
    weight_offset: float = 0.0
    casting: Literal["gemma", "llama"] = "gemma"
    channels_first: bool = False
    autocast_float32: bool = True
    autocast_output: Literal["float32", "input", "autocast"] = "float32"
    returns_weight_dtype: bool = False
    marks_state: bool = False

    is_hf_rmsnorm = True
    # A user's kernel mapping for nn.LayerNorm must not reach this subclass.
    kernel_condition = staticmethod(lambda module: False)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
        if not shape or any(size < 1 for size in shape):
            raise ValueError(
                f"normalized_shape must be one or more sizes of at least 1, got {normalized_shape}"
            )
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)  # type: ignore[arg-type]

    @property
    def variance_epsilon(self) -> float | None:
        """`eps` under the name Llama-like classes use for it."""
        return self.eps

    @variance_epsilon.setter
    def variance_epsilon(self, value: float) -> None:
        self.eps = value
        vars(self)["variance_epsilon"] = value  # for Liger's forward, after unpatch_model too

    def __setattr__(self, name: str, value: Any) -> None:
        # What Liger sets first on a norm that it takes over; its forward then goes past this.
        if name in ("offset", "hidden_size") and not self._may_be_taken_over(name, value):
            raise PatchError(
                f"Liger would not compute what {self} does. Keep it from the norms with "
                "rms_norm=False, layer_norm=False (for Trainer, in liger_kernel_config), or call "
                "unpatch_model first"
            )
        super().__setattr__(name, value)

    def _may_be_taken_over(self, name: str, value: Any) -> bool:
        """Whether a kernel of weight, eps and this offset computes the same; LayerNorm does not."""
        return (
            name == "offset"
            and value == self.weight_offset
            and self.p == 1.0
            and bool(self.eps)  # it takes 0 and None for "not given"
            and self.bias is None
            and (self.weight is None or self.weight.dim() == 1)
            and not (self.channels_first or self.returns_weight_dtype)
        )

    @property
    def hf_rmsnorm_p(self) -> Tensor:
        """`p` as state dicts have it; a scalar, which averages and casts leave what it is."""
        return torch.tensor(self.p, dtype=torch.float32)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # on meta, or alone, it is asked which tensors it wants to be given, not what it is
        here = any(not parameter.is_meta for parameter in self.parameters(recurse=False))
        if self.marks_state and here and prefix:
            destination[prefix + "hf_rmsnorm_p"] = self.hf_rmsnorm_p

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name != "hf_rmsnorm_p":  # transformers sets what was in the model's state dict
            super().register_parameter(name, param)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As `nn.LayerNorm`; with a mark or without, but not with one of another `p`."""
        mark = state_dict.pop(prefix + "hf_rmsnorm_p", None)
        found = float(mark) if isinstance(mark, Tensor) and not mark.is_meta else self.p
        if not math.isclose(found, self.p, rel_tol=1e-2):
            errors: list[str] = args[-1]
            errors.append(
                f"{prefix}weight was trained with p {found:g}, and this norm has p {self.p:g}: "
                "patch the model as the one that was saved"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, input: Tensor) -> Tensor:
        if self.channels_first:
            return self._normalize(input.movedim(1, -1)).movedim(-1, 1)
        return self._normalize(input)

    def _normalize(self, x: Tensor) -> Tensor:
        out: torch.dtype | None = None
        if torch._C._is_any_autocast_enabled():
            x, out = self._autocast(x)
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        dims = len(self.normalized_shape)
        if dims > 1:
            shape = x.shape
            if shape[-dims:] != tuple(self.normalized_shape):
                raise ValueError(
                    f"RMSNorm over {tuple(self.normalized_shape)} got input of shape {tuple(shape)}"
                )
            x = x.flatten(-dims)
            weight = None if weight is None else weight.flatten()
            bias = None if bias is None else bias.flatten()
        if weight is not None and (
            weight.dim() > 1 or (self.returns_weight_dtype and weight.dtype != x.dtype)
        ):
            y = self._in_steps(x.float() if out == torch.float32 else x, weight, bias)
            return y if out is None else y.to(out)
        y = functional.rms_norm(
            x,
            weight,
            bias,
            eps=self.eps,
            p=self.p,
            weight_offset=self.weight_offset,
            casting=self.casting,
            out_dtype=out,
        )
        return y.view(shape) if dims > 1 else y

    def _autocast(self, x: Tensor) -> tuple[Tensor, torch.dtype | None]:
        """What to normalise, and the output's dtype; None for what the formula says."""
        kind = x.device.type
        if kind == "cpu" and self.autocast_output == "float32":
            return x, None  # as autocast does to F.layer_norm there
        if (
            x.dtype == torch.float64
            or not torch.amp.is_autocast_available(kind)
            or not torch.is_autocast_enabled(kind)
        ):
            return x, None
        if self.autocast_output == "autocast":
            return x, torch.get_autocast_dtype(kind)
        if self.autocast_output == "input":
            return x, x.dtype
        if self.autocast_float32:  # as autocast does to F.layer_norm
            return (x.float(), None) if self.casting == "llama" else (x, torch.float32)
        return x, None

    def _in_steps(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """For weights of shape `(heads, hidden)`, and classes that return the weight's dtype."""
        dtype = weight.dtype if self.returns_weight_dtype else x.dtype
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        y = functional.rms_norm(wide, eps=self.eps, p=self.p)
        if self.casting == "llama":
            y = y.to(dtype)
            y = (weight + self.weight_offset if self.weight_offset else weight) * y
            return y if bias is None else y + bias
        y = y * (weight.to(y.dtype) + self.weight_offset)
        return (y if bias is None else y + bias.to(y.dtype)).to(dtype)

    def _statistic(self) -> str:
        if not self.normalized_shape:
            return ""
        size = functional.statistic_size(math.prod(self.normalized_shape), self.p)
        return f" (first {size} features)"

    def extra_repr(self) -> str:
        parts = [f"{tuple(self.normalized_shape)}", f"eps={self.eps}"]
        if self.p != 1.0:
            parts.append(f"p={self.p}{self._statistic()}")
        if self.elementwise_affine:
            parts.append(f"bias={self.bias is not None}")
        else:
            parts.append("elementwise_affine=False")
        for name in ("weight_offset", "casting", "channels_first", "autocast_output"):
            if getattr(self, name) != getattr(RMSNorm, name):
                parts.append(f"{name}={getattr(self, name)}")
        return ", ".join(parts)


class PartialRMSNorm(RMSNorm):
    r"""pRMSNorm: the statistic is estimated from the first `p` of the features (paper, sec. 4.1).

    $$y = \frac{x}{\sqrt{\frac{1}{k}\sum_{i=1}^{k} x_i^2 + \epsilon}} \odot w + b,
    \qquad k = \lceil n p \rceil$$

    All features are scaled; only the first `k` are measured.

    Args:
        p: share of the features in the statistic, in (0, 1]; the paper uses 0.0625.
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as for `RMSNorm`.

    Example:
        >>> PartialRMSNorm(96, p=0.0625, bias=False)
        PartialRMSNorm((96,), eps=1e-05, p=0.0625 (first 6 features), bias=False)
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        p: float = 0.0625,
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        functional.statistic_size(math.prod(self.normalized_shape), p)
        self.p = p


def subtract_mean(x: Tensor, axis: int = -1) -> Tensor:
    """`x - mean(x)` over `axis`, in float32 or better, in x's dtype again."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide - wide.mean(axis, keepdim=True)).to(x.dtype)
