"""The workbench: a float64 copy of a model that can be run, watched and changed freely."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..recipes import NormSpec

# Outputs that show the inside of a model: conversion centres the stream, so they move by design.
INTERNAL_OUTPUTS = (
    "hidden_states",
    "attentions",
    "past_key_values",
    "_model_output",
    "_outputs",
)


@dataclass(frozen=True)
class Tolerance:
    """How small is zero, per arithmetic. Measured separations: no true value lies near these."""

    symmetry: float  # |sum of the gradient| / (sqrt(n) |gradient|)
    mean: float  # |mean| / rms at a norm's input
    moved: float  # relative change of an output under a shift
    shifts: tuple[float, ...]  # in units of a parameter's own spread


TOLERANCES = {
    torch.float64: Tolerance(1e-7, 1e-7, 1e-6, (300.0, -300.0, 3.0, 3e4, -3e4)),
    torch.float32: Tolerance(1e-5, 1e-5, 1e-3, (10.0, -10.0, 3.0)),
}


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def named_outputs(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every float tensor in a model's output, however nested, with the path to it."""
    if is_float(output):
        yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from named_outputs(value, f"{name}.{key}" if name else str(key))
    elif isinstance(output, (list, tuple)):
        for i, value in enumerate(output):
            yield from named_outputs(value, f"{name}[{i}]")


def is_internal(name: str) -> bool:
    parts = name.replace("[", ".").split(".")
    return any(part.endswith(INTERNAL_OUTPUTS) for part in parts)


def split_outputs(output: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`(held, internal)`: the outputs conversion must not move, and those that show the stream."""
    found = dict(named_outputs(output))
    held = {name: x for name, x in found.items() if not is_internal(name)}
    if not held:
        return found, {}
    return held, {name: x for name, x in found.items() if name not in held}


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers in every run: some models sample in eval, too."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        yield


def cast_inputs(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The same inputs with every float tensor in `dtype`, everything on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {k: cast_inputs(v, dtype, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(cast_inputs(v, dtype, device) for v in value)
    return value


def model_place(model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of a model's first float tensor."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    raise PatchError("The model has no floating-point parameter: there is nothing to convert.")


def run_outputs(model: nn.Module, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """The outputs conversion must not move, for each of the inputs in turn, seeded, without gradients.

    Leaves out `hidden_states`, `attentions`, `past_key_values` and the outputs of sub-models, unless
    the model returns nothing else. Float inputs are cast to the model's dtype.
    """
    dtype, device = model_place(model)
    found: list[Tensor] = []
    for kwargs in inputs:
        with torch.no_grad(), seeded(device):
            held, _ = split_outputs(model(**cast_inputs(kwargs, dtype, device)))
        found += held.values()
    return found


def relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    r"""$\max_k \max|a_k - b_k| / \max|b_k|$ over the finite entries; inf where these differ."""
    if len(before) != len(after):
        return float("inf")
    worst = 0.0
    for b, a in zip(before, after, strict=True):
        if a.shape != b.shape:
            return float("inf")
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            return float("inf")
        b, a = b[finite].double(), a[finite].double()
        if b.numel() and (delta := (a - b).abs().max().item()) > 0:
            worst = max(worst, delta / max(b.abs().max().item(), 1e-300))
    return worst


def norm_axis(spec: NormSpec, x: Tensor) -> int:
    return 1 if spec.channels_first and x.ndim > 2 else x.ndim - 1


def reference_norm(module: nn.Module, spec: NormSpec, x: Tensor) -> Tensor:
    """LayerNorm without casts in between: they would round away large shifts of the mean."""
    dtype, axis = x.dtype, norm_axis(spec, x)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
    y = x.to(dtype).movedim(axis, -1)
    y = nn.functional.layer_norm(y, y.shape[-1:], eps=spec.eps)
    if weight is not None:
        y = y * (weight + spec.weight_offset)
    if bias is not None:
        y = y + bias
    return y.movedim(-1, axis)


Watcher = Callable[[str, Tensor], None]


@dataclass
class Bench:
    """A private copy of the model in eval mode, its LayerNorms computed by `reference_norm`.

    `watchers` see every LayerNorm's name and input during a run.
    """

    model: nn.Module
    norms: dict[str, NormSpec]
    inputs: list[dict[str, Any]]
    dtype: torch.dtype
    device: torch.device
    watchers: list[Watcher] = field(default_factory=list)

    @property
    def tolerance(self) -> Tolerance:
        return TOLERANCES[self.dtype]

    @property
    def sizes(self) -> list[int]:
        return sorted({spec.normalized_shape[0] for spec in self.norms.values()})

    def leaves(self) -> dict[str, Tensor]:
        """Every float tensor a checkpoint stores, once, except batch statistics."""
        found = dict(self.model.named_parameters())
        for path, module in self.model.named_modules():
            hidden = module._non_persistent_buffers_set | {"running_mean", "running_var"}
            for name, buffer in module.named_buffers(recurse=False):
                if name not in hidden and not any(buffer is other for other in found.values()):
                    found[f"{path}.{name}" if path else name] = buffer
        return {name: tensor for name, tensor in found.items() if is_float(tensor)}

    def run(self, *, internal: bool = False) -> list[Tensor]:
        """The held outputs (or the internal ones) on every input, with whatever gradients are on."""
        found: list[Tensor] = []
        for kwargs in self.inputs:
            with seeded(self.device):
                found += split_outputs(self.model(**kwargs))[internal].values()
        return found

    @torch.no_grad()
    def measure(self) -> list[Tensor]:
        return self.run()

    @contextmanager
    def watching(self, watcher: Watcher) -> Iterator[None]:
        self.watchers.append(watcher)
        try:
            yield
        finally:
            self.watchers.remove(watcher)

    @contextmanager
    def replaced(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Give leaves other values for a while; the old ones come back bit by bit."""
        leaves = self.leaves()
        saved = {name: leaves[name].data for name in tensors}
        try:
            for name, tensor in tensors.items():
                leaves[name].data = tensor
            yield
        finally:
            for name, tensor in saved.items():
                leaves[name].data = tensor

    def means(self) -> tuple[dict[str, float], list[str]]:
        r"""Largest $|\bar x| / \mathrm{rms}(x)$ over the rows of each norm's input, and the norms in call order.

        A norm whose input is zero everywhere has no entry.
        """
        worst: dict[str, float] = {}
        order: dict[str, None] = {}

        def watch(name: str, x: Tensor) -> None:
            order[name] = None
            axis = norm_axis(self.norms[name], x)
            mean, rms = x.mean(axis), x.square().mean(axis).sqrt()
            if (top := rms.max().item()) > 0:
                ratio = (mean.abs() / rms.clamp(min=1e-6 * top)).max().item()
                worst[name] = max(worst.get(name, 0.0), ratio)

        with self.watching(watch):
            self.measure()
        return worst, list(order)


def _quiet_settings(model: nn.Module) -> None:
    """Plain attention and experts, no cache: what one forward computes without shortcuts."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for key, value in (
            ("_attn_implementation", "eager"),
            ("_experts_implementation", "eager"),
            ("use_cache", False),
            ("output_hidden_states", False),
            ("output_attentions", False),
        ):
            if getattr(config, key, None) is not None:
                setattr(config, key, value)


def _bench(
    model: nn.Module,
    norms: Mapping[str, NormSpec],
    inputs: Sequence[Mapping[str, Any]],
    dtype: torch.dtype,
) -> Bench:
    twin = copy.deepcopy(model).eval().to(dtype)
    twin.requires_grad_(False)
    _quiet_settings(twin)
    device = model_place(twin)[1]
    bench = Bench(
        twin, dict(norms), [cast_inputs(dict(i), dtype, device) for i in inputs], dtype, device
    )

    def forward(name: str, module: nn.Module, spec: NormSpec, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        for watcher in bench.watchers:
            watcher(name, x)
        return reference_norm(module, spec, x)

    for name, spec in norms.items():
        module = twin.get_submodule(name)
        module.forward = functools.partial(forward, name, module, spec)  # type: ignore[method-assign]
    return bench


def make_bench(
    model: nn.Module, norms: Mapping[str, NormSpec], inputs: Sequence[Mapping[str, Any]]
) -> Bench:
    """A bench in float64, or in float32 where the model cannot run in float64.

    The warm-up run also lets models that rescale their weights in the first eval forward do so.
    """
    problem = ""
    for dtype in (torch.float64, torch.float32):
        try:
            bench = _bench(model, norms, inputs, dtype)
            outputs = bench.measure()
        except Exception as error:  # whatever a model's own forward may raise
            problem = f"{type(error).__name__}: {error}"
            continue
        if not outputs:
            raise PatchError("The model's forward returned no floating-point tensor to compare.")
        if all(x.isfinite().any() and not x.isnan().any() for x in outputs):
            return bench
        problem = "its outputs are not finite"
    raise PatchError(
        f"{type(model).__name__} could not be run on the probe inputs: {problem}\n"
        "Pass inputs= with keyword arguments its forward accepts."
    )
