"""Whether a patched model still computes what the stock architecture computes on its weights."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..patching.changes import get_tensor
from ..patching.plan import PatchPlan
from ..probing import Fold
from .records import fold_rows

WHOLE = 8192  # entries; tensors of no more are kept whole to compare, of larger ones
SAMPLE = 1024  # entries
COLUMNS = 16  # of each folded tensor, whose means are computed
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
    may have changed. `unchanged` compares a sample of each, and looks at autograd's counters of
    in-place writes (an optimizer's step is one; moving or casting the model is none).
    """

    def __init__(self, model: nn.Module, folds: Iterable[Fold]):
        parameters = dict(model.named_parameters())
        self.folds = tuple(folds)
        self.fold_rows = fold_rows(model, self.folds)  # for the record
        self.centred = not off_centre(model, self.folds, COLUMNS)
        self.samples = {name: _sample(p) for name, p in parameters.items()}
        self.versions = {
            name: (weakref.ref(p), p._version)
            for name, p in parameters.items()
            if not p.is_inference()  # these have no counter
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "versions": {}}  # a copy has its own parameters

    @torch.no_grad()
    def unchanged(
        self, model: nn.Module, state_dict: Mapping[str, Any] | None
    ) -> frozenset[torch.dtype] | None:
        """The dtypes of the weights to save, `state_dict` or the model's own, if but for rounding
        to these they are what they were; else None."""
        parameters = dict(model.named_parameters())
        if not self.centred or parameters.keys() != self.samples.keys():
            return None
        for name, (parameter, version) in self.versions.items():
            if parameter() is parameters[name] and parameters[name]._version != version:
                return None
        found: Mapping[str, Any] = parameters if state_dict is None else state_dict
        groups: dict[Any, list[tuple[Tensor, Tensor]]] = {}  # few comparisons of many tensors
        for name, sample in self.samples.items():
            tensor = found.get(name)
            if tensor is None or not is_plain(tensor) or tensor.shape != parameters[name].shape:
                return None
            pair = sample, _entries(tensor)
            groups.setdefault((tensor.dtype, tensor.device), []).append(pair)
        for (dtype, _), pairs in groups.items():
            then, now = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
            if not torch.equal(then.to(dtype), now.cpu()):
                return None
        return frozenset(dtype for dtype, _ in groups)


def is_plain(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) or type(tensor.data) is Tensor
    return plain and tensor.is_floating_point() and not tensor.is_meta


@torch.no_grad()
def _sample(tensor: Tensor) -> Tensor:
    return _entries(tensor).to("cpu", copy=True)


def _entries(tensor: Tensor) -> Tensor:
    """All entries of a small tensor, some of a large one."""
    flat, count = tensor.reshape(-1), tensor.numel()
    if count <= WHOLE:
        return flat
    return flat[:: count // SAMPLE | 1]  # odd: no common factor with the width of most layers


def off_centre(model: nn.Module, folds: Iterable[Fold], columns: int | None = None) -> list[str]:
    """The folded tensors whose mean over the features is more than rounding.

    Rounding gives each of `n` entries an independent error below half a unit in its last place, so
    their mean is off by about `eps * rms / sqrt(n)`; training moves it by far more.

    Args:
        columns: about how many means to look at per tensor, spread evenly; None is all.
    """
    found = []
    groups: dict[Any, list[tuple[Fold, Tensor]]] = {}  # few operations for many tensors
    for fold in folds:
        tensor = get_tensor(model, fold.parameter)
        if not is_plain(tensor) or tensor.shape[fold.axis] % (fold.size * fold.inner):
            found.append(fold.parameter)
            continue
        kind = (tensor.shape, tensor.dtype, tensor.device)
        how = (fold.axis, fold.size, fold.inner, fold.blocks)
        groups.setdefault((*kind, *how), []).append((fold, tensor.detach()))
    for group in groups.values():
        fine = torch.finfo(group[0][1].dtype).eps
        centred = _are_centred([tensor for _, tensor in group], group[0][0], columns, fine)
        for (fold, tensor), ok in zip(group, centred, strict=True):
            coarse = fine if ok else _precision(tensor)
            if not ok and (coarse == fine or not _are_centred([tensor], fold, columns, coarse)[0]):
                found.append(fold.parameter)
    return found


def _precision(tensor: Tensor) -> float:
    """The eps of the narrowest dtype that has all its values: what was saved in half precision may
    be loaded in another."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)):
            return torch.finfo(dtype).eps
    return torch.finfo(tensor.dtype).eps


def _are_centred(
    tensors: list[Tensor], fold: Fold, columns: int | None, precision: float
) -> list[bool]:
    """The same for tensors of one shape and dtype, folded alike and rounded to `precision`."""
    first = tensors[0]
    if columns is not None and first.ndim > 1:
        most, other = max((size, i) for i, size in enumerate(first.shape) if i != fold.axis)
        every = (*(slice(None),) * other, slice(None, None, max(1, most // columns)))
        tensors = [tensor[every] for tensor in tensors]
    stack = torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]
    wide = stack.to(torch.promote_types(first.dtype, torch.float32))
    axis = fold.axis + 1
    # as a product of matrices: by far the fastest way to sum over any axis
    shares = wide.new_full((fold.size,), 1 / fold.size)
    view = wide.unflatten(axis, (-1, fold.size, fold.inner))
    mean = torch.tensordot(view, shares, ([axis + 1], [0]))
    count, mask = mean[0].numel(), fold.mask(tensors[0])
    if mask is not None:
        mask = mask.squeeze(1).expand_as(mean[0]).to(mean.dtype)
        mean, count = mean * mask, int(mask.sum())
    unit = max(precision, SUMMING[wide.dtype]) / fold.size
    allowed = (1 + 4 / math.sqrt(max(1, count))) * unit * wide.flatten(1).norm(dim=1)
    return (mean.flatten(1).norm(dim=1) <= allowed).tolist()
