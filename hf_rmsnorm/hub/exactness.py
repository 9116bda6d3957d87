"""Whether a patched model still computes what the stock architecture computes on its weights."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..changes import get_tensor
from ..plan import PatchPlan
from ..probing import Fold

WHOLE = 8192  # entries; tensors of no more are kept whole to compare, of larger ones
SAMPLE = 256  # entries
COLUMNS = 16  # of each folded tensor, whose means are computed again when saving
# What computing a mean costs, relative to the entries; float64's folds have no wider type, either.
SUMMING = {torch.float32: 1e-6, torch.float64: 1e-13}


def may_be_stock(plan: PatchPlan) -> bool:
    """Whether LayerNorm on the folded weights is the same function, as long as nothing is trained.

    A widened block has another shape than the config says, so it is never stock.
    """
    changed = [site for site in plan.sites if site.verdict != "kept"]
    return plan.p == 1 and not plan.widens and all(site.verdict == "exact" for site in changed)


class Evidence:
    """What an exact patch rests on, as it was when the patch was made.

    Besides centred weights, that may be norms with equal gains or absorbed scales: so no parameter
    may have changed. `holds` looks at a sample of each, and at autograd's counters of in-place
    writes (an optimizer's step is one; moving or casting the model is none).
    """

    def __init__(self, model: nn.Module, folds: Iterable[Fold]):
        parameters = dict(model.named_parameters())
        self.folds = tuple(folds)
        self.samples = {name: _sample(p) for name, p in parameters.items()}
        self.versions = {name: (weakref.ref(p), p._version) for name, p in parameters.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "versions": {}}  # a copy has its own parameters

    def holds(self, model: nn.Module, state_dict: Mapping[str, Any] | None) -> bool:
        """Whether the weights to save, `state_dict` or the model's own, are still those."""
        parameters = dict(model.named_parameters())
        if parameters.keys() != self.samples.keys():
            return False
        for name, (parameter, version) in self.versions.items():
            if parameter() is parameters[name] and parameters[name]._version != version:
                return False
        found: Mapping[str, Any] = parameters if state_dict is None else state_dict
        for name, sample in self.samples.items():
            tensor = found.get(name)
            if tensor is None or not _is_plain(tensor):
                return False
            now = _sample(tensor)
            if not torch.equal(sample.to(now.dtype), now):
                return False
        return not off_centre(model, self.folds, state_dict, COLUMNS)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor.data) is Tensor and tensor.is_floating_point() and not tensor.is_meta


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    # odd: no common factor with the width of most layers
    step = flat.numel() // SAMPLE | 1 if flat.numel() > WHOLE else 1
    return flat[::step].to("cpu", copy=True)


def off_centre(
    model: nn.Module,
    folds: Iterable[Fold],
    state_dict: Mapping[str, Any] | None = None,
    columns: int | None = None,
) -> list[str]:
    """The folded tensors whose mean over the features is more than rounding.

    Rounding gives each of `n` entries an independent error below half a unit in its last place, so
    their mean is off by about `eps * rms / sqrt(n)`; training moves it by far more.

    Args:
        columns: about how many means to look at per tensor, spread evenly; None is all.
    """
    found, given = [], state_dict or {}
    for fold in folds:
        names = (fold.parameter, *fold.aliases)
        tensor = next((given[name] for name in names if name in given), None)
        if tensor is None:
            tensor = get_tensor(model, fold.parameter)
        if not _is_plain(tensor) or not _is_centred(tensor, fold, columns):
            found.append(fold.parameter)
    return found


def _is_centred(tensor: Tensor, fold: Fold, columns: int | None) -> bool:
    if tensor.shape[fold.axis] % (fold.size * fold.inner):
        return False
    view, axis, mask = fold.view(tensor.detach()), fold.axis + 1, fold.mask(tensor)
    if columns is not None:
        most, other = max((size, i) for i, size in enumerate(view.shape) if i != axis)
        every = (*(slice(None),) * other, slice(None, None, max(1, most // columns)))
        view = view[every]
        mask = mask[every] if mask is not None and mask.shape[other] > 1 else mask
    wide = view.to(torch.promote_types(tensor.dtype, torch.float32))
    # as a product of matrices: by far the fastest way to sum over any axis
    mean = torch.tensordot(wide, wide.new_full((fold.size,), 1 / fold.size), ([axis], [0]))
    count = mean.numel()
    if mask is not None:
        mask = mask.squeeze(axis).expand_as(mean).to(mean.dtype)
        mean, count = mean * mask, int(mask.sum())
    unit = max(torch.finfo(tensor.dtype).eps, SUMMING[wide.dtype]) / fold.size
    allowed = (1 + 4 / math.sqrt(max(1, count))) * unit * wide.norm().item()
    return mean.norm().item() <= allowed
