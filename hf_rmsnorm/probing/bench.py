"""The workbench: a float64 copy of a model that can be run, watched and changed freely."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..recipes import NormSpec
from .outputs import (
    Outputs,
    cast_inputs,
    is_float,
    model_place,
    plain_copy,
    relative_change,
    seeded,
    split_outputs,
)

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

    `watchers` see every LayerNorm's name and input during a run. `before` holds the outputs of the
    model as given, `(held, internal)` per input; `widths` each norm's numbers of features;
    `frozen` are parameters that share memory without being one tensor: changing one changes both.
    """

    model: nn.Module
    norms: dict[str, NormSpec]
    inputs: list[dict[str, Any]]
    dtype: torch.dtype
    device: torch.device
    watchers: list[Watcher] = field(default_factory=list)
    before: list[tuple[Outputs, Outputs]] = field(default_factory=list)
    frozen: frozenset[str] = frozenset()
    widths: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

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
                found.append(split_outputs(self.model(**kwargs)))
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
    def means(self) -> dict[str, float]:
        with self.measuring() as worst:
            self.run()
        return worst


def _overlapping(model: nn.Module) -> frozenset[str]:
    """Names of tensors whose memory overlaps another's."""
    spans = []
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.layout == torch.strided and tensor.device.type != "meta" and tensor.numel():
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            extent = 1 + sum((size - 1) * stride for size, stride in steps)
            start = tensor.data_ptr()
            spans.append((str(tensor.device), start, start + extent * tensor.element_size(), name))
    found: set[str] = set()
    reach: tuple[str, int, str] = ("", 0, "")
    for device, start, end, name in sorted(spans):
        if device == reach[0] and start < reach[1]:
            found |= {name, reach[2]}
        if device != reach[0] or end > reach[1]:
            reach = (device, end, name)
    return frozenset(found)


def _bench(
    model: nn.Module,
    norms: Mapping[str, NormSpec],
    inputs: Sequence[Mapping[str, Any]],
    dtype: torch.dtype,
) -> Bench:
    twin = plain_copy(model, dtype).requires_grad_(False)
    device = model_place(twin)[1]
    cast = [cast_inputs(dict(kwargs), dtype, device) for kwargs in inputs]
    bench = Bench(twin, dict(norms), cast, dtype, device, frozen=_overlapping(model))

    def forward(name: str, module: nn.Module, spec: NormSpec, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        for watcher in bench.watchers:
            watcher(name, x)
        return reference_norm(module, spec, x)

    for name, spec in norms.items():
        module = twin.get_submodule(name)
        module.forward = functools.partial(forward, name, module, spec)  # type: ignore[method-assign]
    return bench


def fits(model: nn.Module, dtype: torch.dtype, free: float) -> bool:
    """Whether a probe of `model` in `dtype` needs no more than `free` bytes: a copy, and as much
    again and a half for gradients on their way and shifted weights (measured on GPT-2)."""
    elements = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    return 2.5 * elements * dtype.itemsize <= free


def free_bytes(device: torch.device) -> float:
    """Memory to be had on `device`; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    found = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return next(found, math.inf)


def make_bench(
    model: nn.Module, norms: Mapping[str, NormSpec], inputs: Sequence[Mapping[str, Any]]
) -> Bench:
    """A bench in float64, or in float32 where the model does not fit or cannot run in float64.

    The first run also lets models that rescale their weights in their first eval forward do so.
    """
    problem = ""
    for dtype in TOLERANCES:
        if dtype == torch.float64 and not fits(model, dtype, free_bytes(model_place(model)[1])):
            continue
        try:
            bench = _bench(model, norms, inputs, dtype)

            def watch(name: str, x: Tensor, bench: Bench = bench) -> None:
                bench.widths[name].add(x.shape[norm_axis(bench.norms[name], x)])

            with torch.no_grad(), bench.watching(watch):
                bench.before = bench.run()
        except Exception as error:  # a model's own forward may raise anything
            problem = f"{type(error).__name__}: {error}"
            continue
        outputs = [x for held, _ in bench.before for x in held.values()]
        if not outputs:
            raise PatchError("The model's forward returned no floating-point tensor to compare.")
        if all(x.isfinite().any() and not x.isnan().any() for x in outputs):
            return bench
        for name, parameter in model.named_parameters():
            if not parameter.isfinite().all():
                raise PatchError(
                    f"{name} has entries that are nan or inf, so nothing finite comes out of this "
                    f"{type(model).__name__} to compare: load sound weights, or use "
                    'strategy="direct", which runs nothing'
                )
        problem = "its outputs are not finite"
    raise PatchError(
        f"{type(model).__name__} could not be run on the probe inputs: {problem}\n"
        "Pass inputs= with keyword arguments its forward accepts."
    )
