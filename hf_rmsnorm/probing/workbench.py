"""The workbench: a float64 copy of a model that can be run, watched and changed freely."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..recipes import NormSpec
from .outputs import Outputs, call, is_float, relative_change, seeded, split_outputs

Watcher = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Tolerance:
    """How small is zero, per arithmetic. In the study, no true value lies near any of these."""

    symmetry: float  # |sum of the gradient| / (sqrt(n) |gradient|)
    mean: float  # |mean| / rms at a norm's input
    moved: float  # relative change of an output under a shift
    rounding: float  # relative change of an output under an exact rewriting
    shifts: tuple[
        tuple[float, int | None], ...
    ]  # in units of a tensor's spread; which input, or all


TOLERANCES = {
    torch.float64: Tolerance(1e-7, 1e-7, 1e-6, 1e-9, ((300.0, None), (-3e4, 0), (3.0, 1))),
    torch.float32: Tolerance(1e-5, 1e-5, 1e-3, 1e-4, ((10.0, None), (-10.0, None), (3.0, None))),
}


def norm_axis(spec: NormSpec, x: Tensor) -> int:
    return 1 if spec.channels_first and x.ndim > 2 else x.ndim - 1


def reference_norm(module: nn.Module, spec: NormSpec, x: Tensor) -> Tensor:
    """LayerNorm without casts in between: they would round away large shifts of the mean."""
    dtype, axis = x.dtype, norm_axis(spec, x)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    y = x.to(dtype).movedim(axis, -1)
    y = nn.functional.layer_norm(y, y.shape[-1:], eps=spec.eps_for(y.dtype))
    if weight is not None:
        y = y * (weight + spec.weight_offset)
    if bias is not None:
        y = y + bias
    return y.movedim(-1, axis)


@dataclass
class Bench:
    """A private copy of the model in eval mode, its LayerNorms computed by `reference_norm`.

    Weights that are all alike, as zero biases and gains of one are before any training, have been
    given noise: a verdict must not rest on them. `as_given` takes the noise away for a while.

    Attributes:
        hold: patterns of outputs to hold beside the main ones.
        watchers: see every LayerNorm's name and input during a run.
        before: the outputs that must not move, `(held, internal)` per input.
        frozen: parameters that share memory without being one tensor: changing one changes both.
        widths: each norm's numbers of features.
        called: the norms that each input reaches.
        touched: leaves that some operation of a run read.
        given: the values of the leaves that have noise now, as they were.
        given_before: `before`, without the noise.
    """

    model: nn.Module
    norms: dict[str, NormSpec]
    inputs: list[dict[str, Any]]
    dtype: torch.dtype
    device: torch.device
    hold: tuple[str, ...] = ()
    watchers: list[Watcher] = field(default_factory=list)
    before: list[tuple[Outputs, Outputs]] = field(default_factory=list)
    frozen: frozenset[str] = frozenset()
    widths: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    called: list[set[str]] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    given: dict[str, Tensor] = field(default_factory=dict)
    given_before: list[tuple[Outputs, Outputs]] = field(default_factory=list)

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.dtype]

    @property
    def sizes(self) -> list[int]:
        """The numbers of features the norms were seen to normalise."""
        return sorted(set().union(*self.widths.values()))

    def leaves(self) -> dict[str, Tensor]:
        """Every float tensor a checkpoint stores, once, except batch statistics and `frozen`."""
        found = dict(self.model.named_parameters())
        seen = {id(tensor) for tensor in found.values()}
        for path, module in self.model.named_modules():
            hidden = module._non_persistent_buffers_set | {"running_mean", "running_var"}
            for name, buffer in module.named_buffers(recurse=False):
                if name not in hidden and id(buffer) not in seen:
                    found[f"{path}.{name}" if path else name] = buffer
                    seen.add(id(buffer))
        return {n: x for n, x in found.items() if is_float(x) and n not in self.frozen}

    def run(self, which: int | None = None) -> list[tuple[Outputs, Outputs]]:
        """`(held, internal)` outputs on every input, or on one of them."""
        found = []
        for kwargs in self.inputs if which is None else [self.inputs[which % len(self.inputs)]]:
            with seeded(self.device):
                found.append(split_outputs(call(self.model, kwargs), self.hold))
        return found

    @torch.no_grad()
    def changes(self, which: int | None = None) -> tuple[float, list[str]]:
        """How far the held outputs are from those of the model as given; which internals moved."""
        before = self.before if which is None else [self.before[which % len(self.inputs)]]
        worst, moved = 0.0, dict[str, None]()
        for b, a in zip(before, self.run(which), strict=True):
            worst = max(worst, relative_change([*b[0].values()], [*a[0].values()]))
            for name in b[1].keys() & a[1].keys():
                if relative_change([b[1][name]], [a[1][name]]) > self.tolerance.moved:
                    moved[name] = None
        return worst, sorted(moved)

    def change(self, which: int | None = None) -> float:
        return self.changes(which)[0]

    @contextmanager
    def watching(self, watcher: Watcher) -> Iterator[None]:
        self.watchers.append(watcher)
        try:
            yield
        finally:
            self.watchers.remove(watcher)

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        leaves = self.leaves()
        for name, tensor in tensors.items():
            leaves[name].data = tensor

    @contextmanager
    def replaced(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Give leaves other values for a while; the old ones come back bit by bit."""
        leaves = self.leaves()
        saved = {name: leaves[name].data for name in tensors}
        try:
            self.assign(tensors)
            yield
        finally:
            self.assign(saved)

    def rewrite(self, rule: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> None:
        """Assign what `rule` makes of the leaves; of those as given, too."""
        if self.given:
            with self.replaced(self.given):
                as_given = dict(rule(self.leaves()))
        self.assign(rule(self.leaves()))
        if self.given:
            self.given.update(as_given)

    @contextmanager
    def as_given(self) -> Iterator[None]:
        """The model's own weights, where they are all alike, in place of those with noise."""
        if not self.given:
            yield
            return
        noisy = self.before
        with self.replaced(self.given):
            self.before = self.given_before
            try:
                yield
            finally:
                self.before = noisy

    @contextmanager
    def measuring(self) -> Iterator[dict[str, float]]:
        r"""Collects the largest $|\bar x| / \mathrm{rms}(x)$ of a row of each norm's inputs, in the
        order of the calls. Where all of an input is zero there is no saying: inf."""
        worst: dict[str, float] = {}

        def watch(name: str, x: Tensor) -> None:
            x = x.detach()
            if not x.numel():
                return
            axis = norm_axis(self.norms[name], x)
            mean, rms = x.mean(axis), x.square().mean(axis).sqrt()
            top = rms.max().item()
            ratio = (mean.abs() / rms.clamp(min=1e-6 * top)).max().item() if top else math.inf
            worst[name] = max(worst.get(name, 0.0), ratio)

        with self.watching(watch):
            yield worst

    @torch.no_grad()
    def means(self, which: int | None = None) -> dict[str, float]:
        with self.measuring() as worst:
            self.run(which)
        return worst

    def smallest(self, norms: set[str]) -> int | None:
        """The input with the fewest numbers in it, of those that reach all of `norms`."""
        sizes = {
            i: sum(x.numel() for x in kwargs.values() if isinstance(x, Tensor))
            for i, kwargs in enumerate(self.inputs)
            if norms <= self.called[i]
        }
        return min(sizes, key=sizes.__getitem__, default=None)
