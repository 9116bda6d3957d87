"""A private copy of a model, whatever other libraries have hung on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Settings of a Transformers config that leave out shortcuts and extras.
_PLAIN: dict[str, Any] = {
    "_attn_implementation": "eager",
    "_experts_implementation": "eager",
    "use_cache": False,
    "output_hidden_states": False,
    "output_attentions": False,
}


def plain_copy(model: nn.Module, dtype: torch.dtype, *, every_adapter: bool = False) -> nn.Module:
    """A copy in eval mode and `dtype`, on one device, with plain attention and experts and without
    a cache: fused ones exist for some dtypes only. Where a model has no such settings it is copied
    as it is.

    Args:
        every_adapter: with all of PEFT's adapters active and none merged, so that a weight of an
            adapter that is switched off is a weight of the copy like any other.
    """
    # Plain tensors are cast on their way, which saves a second copy of the model.
    memo: dict[int, Any] = {}
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point():
            value = tensor.detach().to(dtype, copy=True)
            memo[id(tensor)] = nn.Parameter(value) if type(tensor) is nn.Parameter else value
    twin = copy_without_hooks(model, memo)
    places = [t.device for t in tensors if t.is_floating_point()] or [torch.device("cpu")]
    nn.Module.to(twin.eval(), places[0], dtype)
    for module in twin.modules():
        config = getattr(module, "config", None)
        for key, setting in _PLAIN.items():
            if getattr(config, key, None) is not None:
                setattr(config, key, setting)
    if every_adapter:
        for layer in _adapter_layers(twin):
            _activate_all(layer)
    return twin


def copy_without_hooks(model: nn.Module, memo: dict[int, Any]) -> Any:
    """`copy.deepcopy`, without what accelerate hung on the modules."""
    for module in model.modules():
        if (hook := vars(module).get("_hf_hook")) is not None:
            memo[id(hook)] = hook  # holds weights, and is dropped
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        _own_methods(module)
    return twin


def _own_methods(module: nn.Module) -> None:
    """Take off what accelerate hung on a module: its methods act on the module it was copied from,
    and move inputs to where that one's weights are."""
    own = vars(module)
    if own.pop("_hf_hook", None) is not None:
        own.pop("forward", None)
        forward = own.pop("_old_forward", None)
        if getattr(forward, "__func__", None) is not type(module).forward:
            own["forward"] = forward  # of another library, which accelerate found there
    for name in [name for name in own if name != "forward" and callable(own[name])]:
        if callable(getattr(nn.Module, name, None)):
            del own[name]


def _adapter_layers(model: nn.Module) -> Iterator[Any]:
    """Layers of PEFT, of which a model may have several adapters, told by what they offer."""
    for module in model.modules():
        if getattr(type(module), "adapter_layer_names", ()) and hasattr(module, "set_adapter"):
            yield module


@torch.no_grad()
def _activate_all(layer: Any) -> None:
    if layer.merged:
        layer.unmerge()
    layer.enable_adapters(True)
    names: dict[str, None] = {}
    for part in layer.adapter_layer_names:
        names |= dict.fromkeys(getattr(layer, part, None) or ())
    active = layer.active_adapters
    try:
        layer.set_adapter(list(names))
    except Exception:  # kinds of which one at a time can be active
        layer.set_adapter(active)


def elements(module: nn.Module) -> int:
    """Entries of all tensors of a module, shared ones once."""
    found = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() for tensor in found.values())
