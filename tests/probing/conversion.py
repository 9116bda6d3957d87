"""Does what a `ProbeResult` says by the shortest route: a check independent of the package."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_rmsnorm.probing import Center, ProbeResult, fold_tensor, scale_tensor
from hf_rmsnorm.recipes import NormSpec


def rms_norm(module: nn.Module, spec: NormSpec, x: Tensor) -> Tensor:
    """RMSNorm in at least float32, with the parameters of the LayerNorm it replaces."""
    axis = 1 if spec.channels_first else -1
    y = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(axis, -1)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + spec.eps)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is not None:
        y = y * (weight + spec.weight_offset)
    if bias is not None:
        y = y + bias
    return y.movedim(-1, axis).to(x.dtype)


def _centre(x: Tensor, axis: int) -> Tensor:
    return x - x.mean(axis, keepdim=True)


@dataclass
class _Swapped:
    """A norm's new forward: an object, so that copies of the model take it along."""

    module: nn.Module
    spec: NormSpec

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(self.module, self.spec, x)


@dataclass
class _Before:
    center: Center

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key, axis = self.center.key, self.center.axis
        if isinstance(key, int):
            return (*args[:key], _centre(args[key], axis), *args[key + 1 :]), kwargs
        return args, {**kwargs, key: _centre(kwargs[key], axis)}


@dataclass
class _After:
    center: Center

    def __call__(self, _: nn.Module, args: Any, output: Any) -> Any:
        key, axis = self.center.key, self.center.axis
        if key is None:
            return _centre(output, axis)
        if isinstance(output, tuple):
            return tuple(_centre(x, axis) if i == key else x for i, x in enumerate(output))
        output[key] = _centre(output[key], axis)
        return output


def convert(model: nn.Module, norms: Mapping[str, NormSpec], result: ProbeResult) -> nn.Module:
    """A float64 copy: scales absorbed, weights folded, exact norms swapped, centres attached."""
    model = copy.deepcopy(model).double()
    leaves = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for scale in result.layerscales:
        factor = leaves[scale.parameter]
        for name, axis in scale.writers:
            leaves[name].data = scale_tensor(leaves[name], factor, axis)
        factor.data = torch.ones_like(factor)
    for fold in result.folds:
        leaves[fold.parameter].data = fold_tensor(leaves[fold.parameter], fold)
    for name in result.exact:
        model.get_submodule(name).forward = _Swapped(model.get_submodule(name), norms[name])
    for center in result.centers:
        module = model.get_submodule(center.module)
        if center.side == "input":
            module.register_forward_pre_hook(_Before(center), with_kwargs=True)
        else:
            module.register_forward_hook(_After(center))
    return model
