"""What a norm computes (`NormSpec`), and how that is found out (`check`): by running the module.

A copy of the module with parameters of our own runs on inputs of our own, and its output is
compared with every reading there is: LayerNorm or RMSNorm, weight stored as `w` or `w - 1`, each
value eps may have, each layout, each order of casting.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..fields import Count, Epsilon, Finite

Forward = Callable[[Any, Tensor], Any]

_EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps")
# For formulas with a constant in them; the last is what F.rms_norm takes for `eps=None`.
_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12, torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class NormSpec:
    r"""What one normalisation module computes.

    `layernorm`: $y = (x - \bar x) / \sqrt{\mathrm{var}(x) + \epsilon} \cdot (o + w) + b$;
    `rmsnorm`: the same without $\bar x$, with the mean of squares for the variance.

    Attributes:
        kind: `"layernorm"` (centres) or `"rmsnorm"` (does not).
        normalized_shape: sizes of the normalised axes; one entry for nearly every model, none
            where the module does not say: it then takes whatever the last axis has.
        eps: inside the square root; None is that of the dtype in which x is computed.
        weight_offset: `o`, 1.0 for classes that store `w - 1` (Gemma, Nemotron).
        casting: `"gemma"`: everything in float32, one cast to x's dtype at the end.
            `"llama"`: the normalised value is cast to x's dtype *before* the weight multiplies
            it, and the result has the dtype PyTorch promotes the two to.
        returns_weight_dtype: only with `"llama"`: the cast is to the weight's dtype instead, which
            the result then has (T5: its stream is float32 in a float16 model).
        channels_first: the norm runs over axis 1 of `(N, C, ...)` instead of the last axis.
        autocast_float32: runs in float32 under CUDA autocast and returns float32, as
            `F.layer_norm` does.

    The weight may have more axes than `normalized_shape`, `(heads, hidden)`: one weight per head.
    """

    kind: Literal["layernorm", "rmsnorm"]
    normalized_shape: tuple[Count, ...]
    eps: Epsilon | None
    weight_offset: Finite = 0.0
    casting: Literal["gemma", "llama"] = "gemma"
    returns_weight_dtype: bool = False
    channels_first: bool = False
    autocast_float32: bool = False

    def eps_for(self, dtype: torch.dtype) -> float:
        """`eps` of a computation in `dtype`."""
        return torch.finfo(dtype).eps if self.eps is None else self.eps

    def compute(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """The formula in plain PyTorch, outside autocast; float64 stays float64."""
        if self.channels_first:
            last = replace(self, channels_first=False)
            return last.compute(x.movedim(1, -1), weight, bias).movedim(-1, 1)
        dims = tuple(range(-max(1, len(self.normalized_shape)), 0))
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind == "layernorm":
            y = y - y.mean(dims, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(dims, keepdim=True) + self.eps_for(y.dtype))
        if self.casting == "llama":
            by_weight = self.returns_weight_dtype and weight is not None
            y = y.to(weight.dtype if by_weight else x.dtype)  # type: ignore[union-attr]
            y = y if weight is None else y * (weight + self.weight_offset)
            return y if bias is None else y + bias
        y = y if weight is None else y * (weight.to(y.dtype) + self.weight_offset)
        y = y if bias is None else y + bias.to(y.dtype)
        return y.to(x.dtype)


@dataclass(frozen=True)
class Unreadable:
    """A norm that `RMSNorm` cannot stand in for; `reason` says why, in one line."""

    reason: str


def check(module: nn.Module, forward: Forward) -> NormSpec | Unreadable:
    """What `forward` computes on the leaf `module`, which has no tensors but weight and bias."""
    cpu = torch.device("cpu")
    devices = {p.device for p in module._parameters.values() if p is not None}
    # Kernels of other libraries may run on an accelerator only, where the module then is.
    for device in (cpu, *(devices - {cpu, torch.device("meta")})):
        with _undisturbed(device):
            probe = _Probe(module, forward, device)
            outputs, failures = probe.outputs()
            for layout, y in outputs:
                for spec in probe.readings(layout):
                    if _gaps(y, probe.formula(spec, torch.float32, torch.float32)).max() < 1e-5:
                        return _with_casting(probe, layout, _with_eps(probe, layout, spec))
            if outputs:
                return Unreadable("it computes neither LayerNorm nor RMSNorm of its input")
    return Unreadable(f"its forward failed on a test input ({failures[0]})")


def eps_attributes(module: nn.Module) -> list[float]:
    values = (getattr(module, name, None) for name in _EPS_NAMES)
    return [float(value) for value in values if isinstance(value, (int, float))]


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    # DeepSpeed's ZeRO-3 leaves an empty tensor behind, with the real shape beside it.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class _Layout(NamedTuple):
    """A shape of input: is axis 1 the normalised one, and the sizes of the other axes."""

    channels_first: bool
    others: tuple[int, ...]


class _Probe:
    """A copy of a module, with parameters and inputs of its own to run it on."""

    def __init__(self, module: nn.Module, forward: Forward, device: torch.device):
        self.module, self.forward = module, forward
        parameters = {name: p for name, p in module._parameters.items() if p is not None}
        generator = torch.Generator("cpu").manual_seed(0)

        def random(name: str, low: int) -> Tensor | None:
            if name not in parameters:
                return None
            # In steps of 1/32, so that `1 + w` is as exact in bfloat16 as `w` is.
            steps = torch.randint(low, 41, shape_of(parameters[name]), generator=generator)
            return steps.to(device, torch.float32) / 32

        self.weight, self.bias = random("weight", 8), random("bias", -40)
        affine = self.weight if self.weight is not None else self.bias
        declared = getattr(module, "normalized_shape", None)
        declared = [declared] if isinstance(declared, int) else declared
        shapes = [tuple(declared)] if isinstance(declared, (tuple, list)) else []
        if affine is not None:
            shapes += [tuple(affine.shape[-1:]), tuple(affine.shape)]
        self.shapes = list(dict.fromkeys(shapes)) or [()]

        # Standardised, so that no row is ill-conditioned; then with an offset (shows centring), at
        # every scale (shows eps and its place somewhere), and unequal from head to head.
        core = tuple(affine.shape) if affine is not None else self.shapes[0] or (24,)
        rows = 8 * max(2, 256 // core[-1])
        x = torch.randn(rows, *core, generator=generator, dtype=torch.float64)
        if core[-1] > 1:
            x = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
        scales = torch.logspace(1, -7, rows, dtype=torch.float64).view(-1, *[1] * len(core))
        heads = torch.rand(rows, *core[:-1], 1, generator=generator, dtype=torch.float64) + 0.5
        self.x = ((x + 0.75) * scales * heads).to(device, torch.float32)

        self.layouts = [_Layout(False, (2, -1)), _Layout(False, (2, 4, -1))]
        if len(core) == 1:
            self.layouts += [_Layout(True, (2, 4, -1)), _Layout(True, (2, -1))]

    def run(self, layout: _Layout, dtype: torch.dtype, weight_dtype: torch.dtype) -> Tensor:
        """The module's output on `x` in `dtype`, with the features last."""
        clone = object.__new__(type(self.module))
        vars(clone).update(vars(self.module))
        vars(clone)["_parameters"] = {
            name: None if value is None else nn.Parameter(value.to(weight_dtype), False)
            for name, value in (("weight", self.weight), ("bias", self.bias))
            if name in self.module._parameters
        }
        x = self.x.to(dtype, copy=True).reshape(*layout.others, *self.x.shape[1:])
        y = self.forward(clone, x.movedim(-1, 1).contiguous() if layout.channels_first else x)
        if not isinstance(y, Tensor):
            raise TypeError(f"it returned a {type(y).__name__}")
        y = y.movedim(1, -1) if layout.channels_first else y
        if y.shape != x.shape:
            raise ValueError(f"input of shape {tuple(x.shape)} gave {tuple(y.shape)}")
        return y.reshape(self.x.shape)

    def outputs(self) -> tuple[list[tuple[_Layout, Tensor]], list[str]]:
        """The output for each layout that the module takes, and why it does not take the others."""
        found, failures = [], []
        for layout in self.layouts:
            try:
                found.append((layout, self.run(layout, torch.float32, torch.float32)))
            except Exception as error:  # whatever it is: not a forward for such an input
                failures.append(f"{type(error).__name__}: {error}".splitlines()[0])
        return found, failures

    def formula(self, spec: NormSpec, dtype: torch.dtype, weight_dtype: torch.dtype) -> Tensor:
        """What `run` returns if `spec` is right."""
        x = self.x.to(dtype)
        x = x.float() if spec.autocast_float32 else x
        affine = (None if t is None else t.to(weight_dtype) for t in (self.weight, self.bias))
        return replace(spec, channels_first=False).compute(x, *affine)

    def readings(self, layout: _Layout) -> Iterator[NormSpec]:
        kinds: tuple[Literal["layernorm", "rmsnorm"], ...] = ("layernorm", "rmsnorm")
        offsets = (0.0,) if self.weight is None else (0.0, 1.0)
        eps_values = dict.fromkeys([*eps_attributes(self.module), *_USUAL_EPS])
        for shape, kind, offset, eps in product(self.shapes, kinds, offsets, eps_values):
            yield NormSpec(kind, shape, eps, offset, channels_first=layout.channels_first)


def _with_eps(probe: _Probe, layout: _Layout, spec: NormSpec) -> NormSpec:
    """`spec`, with None for the eps of float32 if float64 shows that it follows the dtype."""
    if spec.eps == torch.finfo(torch.float32).eps:
        by_dtype = replace(spec, eps=None)
        with suppress(Exception):  # a norm that takes no float64 never meets it
            y = probe.run(layout, torch.float64, torch.float64)
            found = [
                _gaps(y, probe.formula(s, torch.float64, torch.float64)).max()
                for s in (spec, by_dtype)
            ]
            return by_dtype if found[1] < found[0] else spec
    return spec


def _with_casting(probe: _Probe, layout: _Layout, spec: NormSpec) -> NormSpec | Unreadable:
    """`spec` completed by what shows in half precision only."""
    full, half = torch.float32, torch.bfloat16
    outputs: dict[tuple[torch.dtype, torch.dtype], Tensor] = {}
    for dtypes in ((half, half), (half, full), (full, half)):
        with suppress(Exception):  # a mix of dtypes that the module refuses cannot come up
            outputs[dtypes] = probe.run(layout, *dtypes)

    def misfit(spec: NormSpec) -> float:
        gaps = [_gaps(y, probe.formula(spec, *dtypes)) for dtypes, y in outputs.items()]
        return max((gap.mean().item() for gap in gaps), default=0.0)

    llama = replace(spec, casting="llama")
    spec = min((spec, llama, replace(llama, returns_weight_dtype=True)), key=misfit)
    if misfit(spec) > 2**-6:
        return Unreadable("its output in bfloat16 differs from a norm's in value or in dtype")
    with _cuda_autocast(), suppress(Exception):  # as above
        outputs = {(half, full): probe.run(layout, half, full)}
    return min((spec, replace(spec, autocast_float32=True)), key=misfit)


def _gaps(a: Tensor, b: Tensor) -> Tensor:
    """Differences, relative to the largest entry of their row; infinite if the dtypes differ."""
    if a.dtype != b.dtype:
        return torch.tensor(float("inf"))
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return ((a - b).abs() / b.abs().amax(1, keepdim=True)).nan_to_num(float("inf"))


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Without grad, autocast, warnings or a default device, whatever the caller has set."""
    with (
        torch.no_grad(),
        torch.device("cpu"),
        torch.autocast(device.type, enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _cuda_autocast() -> Iterator[None]:
    """On the CPU, what CUDA autocast does to the operations that norms are written in."""
    before = torch.is_autocast_enabled("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)
        with torch.autocast("cpu", torch.bfloat16), _Float32Operations():
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


class _Float32Operations(TorchFunctionMode):
    _AFFECTED = frozenset(
        getattr(owner, name)
        for owner, names in (
            (F, ("layer_norm", "rms_norm")),
            (torch, ("layer_norm", "rms_norm", "pow", "rsqrt")),
            (Tensor, ("pow", "rsqrt")),
        )
        for name in names
    )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # A norm that opts out of autocast does so for its input's device, or for CUDA by name.
        if (
            func in self._AFFECTED
            and torch.is_autocast_enabled("cuda")
            and torch.is_autocast_enabled("cpu")
        ):
            args = [a.float() if isinstance(a, Tensor) else a for a in args]
            kwargs = {k: a.float() if isinstance(a, Tensor) else a for k, a in kwargs.items()}
        return func(*args, **kwargs)
