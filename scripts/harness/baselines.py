"""The baselines of the RMSNorm paper that no trained model can become: no norm, and L2 norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hf_rmsnorm
from harness.errors import ScriptError


class NoNorm(nn.Identity):
    """$y = x$."""


class L2Norm(nn.Module):
    r"""$y = x / \sqrt{\sum_i x_i^2 + \epsilon} \cdot w + b$: RMSNorm without its $\sqrt n$."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight: Tensor | None = getattr(norm, "weight", None)
        self.bias: Tensor | None = getattr(norm, "bias", None)
        self.eps = float(getattr(norm, "eps", getattr(norm, "variance_epsilon", 1e-5)))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        y = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            y = y * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)


def replace_norms(model: nn.Module, norm: str, **options: Any) -> nn.Module:
    """Replaces every LayerNorm site of `model` by `NoNorm` or `L2Norm`."""
    options.pop("inputs", None)  # nothing is probed: no site can be exact here
    plan = hf_rmsnorm.plan_patch(model, strategy="direct", **options)
    names = [site.name for site in plan.sites if site.verdict != "kept"]
    if not names:
        raise ScriptError(f"the model has no LayerNorm that {norm!r} could replace")
    for name in names:
        old = model.get_submodule(name)
        new = NoNorm() if norm == "none" else L2Norm(old)
        model.set_submodule(name, new.train(old.training))
    return model
