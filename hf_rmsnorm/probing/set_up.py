"""Setting up a `Bench`: the copy, what to run it on, and noise where weights are all alike."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..recipes import NormSpec
from .copies import elements, plain_copy
from .outputs import Outputs, are_sound, cast_inputs, is_named, model_place
from .reach import beyond, touching
from .workbench import TOLERANCES, Bench, norm_axis, reference_norm

# Makes further inputs, given the lengths that the weights out of reach have.
More = Callable[[Sequence[int]], Iterable[Mapping[str, Any]]]

NOISE = 0.1  # relative to a constant weight
NOISE_OF_ZERO = 0.02


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
    hold: Sequence[str],
) -> Bench:
    twin = plain_copy(model, dtype, every_adapter=True).requires_grad_(False)
    device = model_place(twin)[1]
    cast = [cast_inputs(kwargs, dtype, device) for kwargs in inputs]
    bench = Bench(
        twin, dict(norms), cast, dtype, device, hold=tuple(hold), frozen=_overlapping(model)
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


def fits(model: nn.Module, dtype: torch.dtype, free: float) -> bool:
    """Whether a probe of `model` in `dtype` needs no more than `free` bytes: a copy, and as much
    again and a half for gradients on their way and shifted weights (measured on GPT-2)."""
    return 2.5 * elements(model) * dtype.itemsize <= free


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
    model: nn.Module,
    norms: Mapping[str, NormSpec],
    inputs: list[Mapping[str, Any]],
    more: More | None = None,
    hold: Sequence[str] = (),
) -> Bench:
    """A bench in float64, or in float32 where the model does not fit or cannot run in float64.

    The first run also lets models that rescale their weights in their first eval forward do so.

    Args:
        inputs: those of `more` that reach further weights are added to it.
        hold: patterns of outputs to hold beside the main ones.
    """
    problem = ""
    for dtype in TOLERANCES:
        if dtype == torch.float64 and not fits(model, dtype, free_bytes(model_place(model)[1])):
            continue
        try:
            bench = _bench(model, norms, inputs, dtype, hold)
            bench.before = [_first_run(bench, i) for i in range(len(inputs))]
        except Exception as error:  # a model's own forward may raise anything
            problem = f"{type(error).__name__}: {error}"
            continue
        outputs = [x for held, _ in bench.before for x in held.values()]
        if not outputs:
            raise PatchError("The model's forward returned no floating-point tensor to compare.")
        if are_sound(outputs):
            _check_hold(bench)
            if more is not None:
                _reach_more(bench, inputs, more)
            _add_noise(bench)
            return bench
        require_finite(model)
        problem = "its outputs are not finite"
    raise PatchError(
        f"{type(model).__name__} could not be run on the probe inputs: {problem}\n"
        "Pass inputs= with keyword arguments its forward accepts."
    )


def require_finite(model: nn.Module) -> None:
    """`PatchError` that names the first weight with entries that are nan or inf."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise PatchError(
                f"{name} has entries that are nan or inf, so nothing finite comes out of this "
                f"{type(model).__name__} to compare: load sound weights, or use "
                'strategy="direct", which runs nothing'
            )


@torch.no_grad()
def _first_run(bench: Bench, which: int) -> tuple[Outputs, Outputs]:
    """Run the model, noting the norms' widths and what weights are read."""
    called: set[str] = set()

    def watch(name: str, x: Tensor) -> None:
        called.add(name)
        bench.widths[name].add(x.shape[norm_axis(bench.norms[name], x)])

    with bench.watching(watch), touching(bench.leaves(), bench.touched):
        (found,) = bench.run(which)
    bench.called.append(called)
    return found


def _check_hold(bench: Bench) -> None:
    names = {name for outputs in bench.before for part in outputs for name in part}
    for pattern in bench.hold:
        if not any(is_named(name, pattern) for name in names):
            raise PatchError(
                f"hold pattern {pattern!r} matches no output of the {type(bench.model).__name__}; "
                f"it returned {', '.join(sorted(names))}"
            )


def _reach_more(bench: Bench, inputs: list[Mapping[str, Any]], more: More) -> None:
    """Add inputs to the bench as long as weights are out of reach that might matter."""
    missing = beyond(bench, bench.leaves().keys() - bench.touched)
    if not missing:
        return
    leaves = bench.leaves()
    for kwargs in more(sorted({length for name in missing for length in leaves[name].shape})):
        touched, widths = set(bench.touched), {n: set(sizes) for n, sizes in bench.widths.items()}
        bench.inputs.append(cast_inputs(kwargs, bench.dtype, bench.device))
        try:
            found = _first_run(bench, len(bench.inputs) - 1)
            sound = are_sound(found[0].values())
        except Exception:  # this model does not take such inputs
            sound = False
        if sound and bench.touched & missing:
            bench.before.append(found)
            inputs.append(kwargs)
            missing = beyond(bench, bench.leaves().keys() - bench.touched)
        else:
            bench.inputs.pop()
            del bench.called[len(bench.inputs) :]
            bench.touched = touched
            bench.widths.clear()
            bench.widths.update(widths)
        if not missing:
            return


@torch.no_grad()
def _add_noise(bench: Bench) -> None:
    """Noise on every parameter whose entries are all the same."""
    generator = torch.Generator().manual_seed(8)
    parameters = dict(bench.model.named_parameters())
    noisy: dict[str, Tensor] = {}
    for name, leaf in bench.leaves().items():
        if name in parameters and leaf.numel() > 1 and bool((leaf == leaf.flatten()[0]).all()):
            value = leaf.flatten()[0].abs().item()
            noise = torch.randn(leaf.shape, generator=generator, device="cpu", dtype=torch.float64)
            noisy[name] = leaf + noise.to(leaf) * (NOISE * value if value else NOISE_OF_ZERO)
    if not noisy:
        return
    leaves = bench.leaves()
    given = {name: leaves[name].data for name in noisy}
    bench.assign(noisy)
    before = bench.run()
    if are_sound(x for held, _ in before for x in held.values()):
        bench.given, bench.given_before, bench.before = given, bench.before, before
    else:
        bench.assign(given)
