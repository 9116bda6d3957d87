"""How each norm module is read: what it computes, in terms `RMSNorm` understands.

No class is known by name. A module that looks like a norm is run on test inputs, and its output is
compared with every reading there is: LayerNorm or RMSNorm, weight stored as `w` or `w - 1`, the
places an eps can come from, the layouts, the orders of casting. What fits no reading is refused
with a reason. A class that this gets wrong is added to `NOT_NORMS` or `REFUSED`.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class NormSpec:
    r"""What one normalisation module computes.

    `layernorm`: $y = (x - \bar x) / \sqrt{\mathrm{var}(x) + \epsilon} \cdot (o + w) + b$;
    `rmsnorm`: the same without $\bar x$, with the mean of squares for the variance.

    Attributes:
        kind: `"layernorm"` (centres) or `"rmsnorm"` (does not).
        normalized_shape: sizes of the normalised axes; one entry for nearly every model, none
            where the module does not say (no weight): it then takes whatever the last axis has.
        eps: inside the square root.
        weight_offset: `o`, 1.0 for classes that store `w - 1` (Gemma, Nemotron).
        casting: `"gemma"`: everything in float32, one cast to x's dtype at the end.
            `"llama"`: the normalised value is cast to x's dtype *before* the weight multiplies
            it, and the result has the dtype PyTorch promotes the two to.
        returns_weight_dtype: only with `"llama"`: the cast is to the weight's dtype instead of
            x's, so that the result has it (T5, whose stream is float32 in a float16 model).
        channels_first: the norm runs over axis 1 of `(N, C, ...)` instead of the last axis.
        autocast_float32: runs in float32 under CUDA autocast and returns float32, as
            `F.layer_norm` does.
    """

    kind: Literal["layernorm", "rmsnorm"]
    normalized_shape: tuple[int, ...]
    eps: float
    weight_offset: float = 0.0
    casting: Literal["gemma", "llama"] = "gemma"
    returns_weight_dtype: bool = False
    channels_first: bool = False
    autocast_float32: bool = False


@dataclass(frozen=True)
class Unreadable:
    """A norm that `RMSNorm` cannot stand in for; `reason` says why, in one line."""

    reason: str


# Class-name patterns of modules that have "norm" in their name and are no LayerNorm or RMSNorm.
NOT_NORMS = (
    "*BatchNorm*",
    "*GroupNorm*",
    "*InstanceNorm*",
    "*LocalResponseNorm",
    "*WeightNorm",
    "*SpectralNorm",
    "NoNorm",
)

# Class-name patterns of norms whose formula fits but which must stay, and why.
REFUSED = {
    "*TTSFlowLayerNorm": "its model differentiates it in forward mode (jvp)",
    "*TTSTimestepNorm": "its model differentiates it in forward mode (jvp)",
}

_EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps")
# For formulas with a constant in them; the last is what F.rms_norm takes for `eps=None`.
_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12, torch.finfo(torch.float32).eps)

_NAMED_NORM = re.compile(r"norm(?!al|ed|er)", re.IGNORECASE)
_MODULE_STATE = frozenset(vars(nn.Module())) - {"training"}
_HOOK_STATE = frozenset(("forward", "_old_forward", "_hf_hook", "_compiled_call_impl"))
_SIMPLE = (str, int, float, bool, type(None), tuple, list, torch.dtype)

Reading = NormSpec | Unreadable | None
Forward = Callable[[Any, Tensor], Any]
_readings: dict[Hashable, Reading] = {}


def find_norms(model: nn.Module) -> dict[str, NormSpec | Unreadable]:
    """Every norm of `model`, by module path; a module shared by several paths is listed once."""
    readings = ((name, read_norm(module)) for name, module in model.named_modules())
    return {name: reading for name, reading in readings if reading is not None}


def read_norm(module: nn.Module) -> Reading:
    """What `module` computes, checked by running its own forward on test inputs.

    The module is not touched: a copy with random parameters on the CPU is run, so modules on the
    meta device and offloaded ones are read too. Equal modules are checked once.

    Returns:
        A `NormSpec`, an `Unreadable` for a norm that computes something else, or None for a module
        that is no LayerNorm or RMSNorm at all, and for one that only contains such modules.
    """
    name = type(module).__name__
    if any(fnmatchcase(name, pattern) for pattern in NOT_NORMS):
        return None
    is_named = bool(_NAMED_NORM.search(name)) or isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    children = dict(module.named_children())
    if children:
        if not name.lower().endswith("norm") or any(map(_contains_norm, children.values())):
            return None
        return Unreadable(f"it contains other modules ({', '.join(children)})")
    if not is_named and not _eps_attributes(module):
        return None
    key = _key(module)
    reading = None if key is None else _readings.get(key)
    if reading is None:
        reading = _read(module)
        if key is not None:
            _readings[key] = reading
    return reading if is_named or isinstance(reading, NormSpec) else None


def _contains_norm(module: nn.Module) -> bool:
    return any(read_norm(child) is not None for child in module.modules())


def _eps_attributes(module: nn.Module) -> list[float]:
    values = (getattr(module, name, None) for name in _EPS_NAMES)
    return [float(value) for value in values if isinstance(value, (int, float))]


def _key(module: nn.Module) -> Hashable | None:
    """What a reading depends on; None if the module holds something that cannot be compared."""
    state = {k: v for k, v in vars(module).items() if k not in _MODULE_STATE | _HOOK_STATE}
    if not all(isinstance(value, _SIMPLE) for value in state.values()):
        return None
    tensors = [(k, None if p is None else _shape(p)) for k, p in module._parameters.items()]
    return type(module), _forward(module), repr(tensors), repr(list(module._buffers)), repr(state)


def _shape(parameter: Tensor) -> tuple[int, ...]:
    # DeepSpeed's ZeRO-3 leaves an empty tensor behind, with the real shape beside it.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _forward(module: nn.Module) -> Forward | None:
    """The function that runs when `module` is called, unbound; None if it cannot be told.

    Other libraries put a bound forward on the instance: Liger and `kernels` their own, accelerate's
    hooks a wrapper, with what it wraps beside it.
    """
    state = vars(module)
    bound = state.get("_old_forward" if "_hf_hook" in state else "forward")
    if bound is None:
        return type(module).forward
    return bound.__func__ if getattr(bound, "__self__", None) is module else None


def _read(module: nn.Module) -> NormSpec | Unreadable:
    """`read_norm` of a module that has no children, unconditionally and uncached."""
    for pattern, reason in REFUSED.items():
        if fnmatchcase(type(module).__name__, pattern):
            return Unreadable(reason)
    forward = _forward(module)
    if forward is None:
        return Unreadable("its forward was replaced by something that cannot be checked")
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    extra = [name for name in parameters if name not in ("weight", "bias")]
    extra += [name for name, buffer in module._buffers.items() if buffer is not None]
    if extra:
        return Unreadable(f"it holds {', '.join(extra)}; RMSNorm has a weight and a bias only")
    arguments = list(inspect.signature(forward).parameters)[2:]
    if arguments:
        return Unreadable(f"its forward takes more than its input: {', '.join(arguments)}")
    shapes = {_shape(p) for p in parameters.values()}
    if len(shapes) > 1 or () in shapes:
        return Unreadable(f"its parameters have the shapes {sorted(shapes)}")
    with _undisturbed():
        return _checked(_Probe(module, forward, parameters))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Whatever the caller has switched on: the check runs on the CPU, without grad or autocast."""
    with (
        torch.no_grad(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _cuda_autocast() -> Iterator[None]:
    """What CUDA autocast does to the operations that norms are written in, but on the CPU."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
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
        # A norm that opts out does so for the device type it expects or for the one it is on.
        if (
            func in self._AFFECTED
            and torch.is_autocast_enabled("cuda")
            and torch.is_autocast_enabled("cpu")
        ):
            args = [a.float() if isinstance(a, Tensor) else a for a in args]
            kwargs = {k: a.float() if isinstance(a, Tensor) else a for k, a in kwargs.items()}
        return func(*args, **kwargs)


class _Probe:
    """A copy of one leaf module, with parameters and inputs of its own to run it on."""

    def __init__(self, module: nn.Module, forward: Forward, parameters: Mapping[str, Tensor]):
        self.module, self.forward = module, forward
        # Forwards that other libraries put on an instance may run on an accelerator only.
        is_replaced = forward is not type(module).forward
        devices = {p.device for p in parameters.values() if p.device.type != "meta"}
        self.device = devices.pop() if is_replaced and devices else torch.device("cpu")

        generator = torch.Generator("cpu").manual_seed(0)

        def random(name: str, low: int) -> Tensor | None:
            if name not in parameters:
                return None
            # In steps of 1/32, so that `1 + w` is as exact in bfloat16 as `w` is.
            steps = torch.randint(low, 41, _shape(parameters[name]), generator=generator)
            return steps.to(self.device) / 32

        self.weight, self.bias = random("weight", 8), random("bias", -40)
        affine = self.weight if self.weight is not None else self.bias
        declared = getattr(module, "normalized_shape", None)
        shapes = [tuple(declared)] if isinstance(declared, (tuple, list)) else []
        if affine is not None:
            shapes += [tuple(affine.shape), tuple(affine.shape[-1:])]
        self.shapes = list(dict.fromkeys(shapes)) or [()]

        # Standardised, so that no row is ill-conditioned; then with an offset, which shows centring,
        # at every scale, so that eps and its place show somewhere, and unequal from head to head.
        core = tuple(affine.shape) if affine is not None else self.shapes[0] or (24,)
        rows = 8 * max(2, 256 // core[-1])
        x = torch.randn(rows, *core, generator=generator)
        if core[-1] > 1:
            x = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
        x = (x + 0.75) * torch.logspace(1, -7, rows).view(-1, *[1] * len(core))
        heads = torch.rand(rows, *core[:-1], 1, generator=generator) + 0.5
        self.x = (x * heads).to(self.device)

    def layouts(self) -> list[tuple[bool, tuple[int, ...]]]:
        """The inputs to try: is axis 1 the normalised one, and the sizes of the other axes."""
        last = [(False, (2, -1)), (False, (2, 4, -1))]
        return last if self.x.dim() > 2 else [*last, (True, (2, 4, -1)), (True, (2, -1))]

    def run(self, layout: tuple[bool, tuple[int, ...]], dtype: Any, weight_dtype: Any) -> Tensor:
        """The module's output on `x`, both in `dtype`, with the features last."""
        clone = object.__new__(type(self.module))
        vars(clone).update({k: v for k, v in vars(self.module).items() if k not in _HOOK_STATE})
        affine = {"weight": self.weight, "bias": self.bias}
        clone._parameters = {
            name: None if value is None else nn.Parameter(value.to(weight_dtype), False)
            for name, value in affine.items()
            if name in self.module._parameters
        }
        channels_first, others = layout
        x = self.x.to(dtype).reshape(*others, *self.x.shape[1:])
        y = self.forward(clone, x.movedim(-1, 1).contiguous() if channels_first else x)
        if not isinstance(y, Tensor):
            raise TypeError(f"it returned a {type(y).__name__}")
        if channels_first:
            y = y.movedim(1, -1)
        if y.shape != x.shape:
            raise ValueError(f"input of shape {tuple(x.shape)} gave {tuple(y.shape)}")
        return y.reshape(self.x.shape)

    def formula(self, spec: NormSpec, dtype: Any, weight_dtype: Any) -> Tensor:
        """What `spec` says the output on `x` is."""
        x = self.x.to(dtype)
        if spec.autocast_float32:
            x, dtype = x.float(), torch.float32
        dims = tuple(range(-max(1, len(spec.normalized_shape)), 0))
        y = x.float()
        if spec.kind == "layernorm":
            y = y - y.mean(dims, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(dims, keepdim=True) + spec.eps)
        rounds_early = spec.casting == "llama"
        if rounds_early and not spec.returns_weight_dtype:
            y = y.to(dtype)
        elif rounds_early:
            y = y.to(weight_dtype)
        if self.weight is not None:
            weight = self.weight.to(weight_dtype if rounds_early else torch.float32)
            y = y * (weight + spec.weight_offset)
        if self.bias is not None:
            y = y + self.bias.to(weight_dtype if rounds_early else torch.float32)
        return y if rounds_early else y.to(dtype)


def _checked(probe: _Probe) -> NormSpec | Unreadable:
    failures = []
    for layout in probe.layouts():
        try:
            y = probe.run(layout, torch.float32, torch.float32)
        except Exception as error:  # any exception means: not a forward for this input
            failures.append(f"{type(error).__name__}: {error}".splitlines()[0])
            continue
        for spec in _readings_of(probe, channels_first=layout[0]):
            if _gaps(y, probe.formula(spec, torch.float32, torch.float32)).max() < 1e-5:
                return _with_casting(probe, layout, spec)
    if len(failures) == len(probe.layouts()):
        return Unreadable(f"its forward failed on a test input ({failures[0]})")
    return Unreadable("it computes neither LayerNorm nor RMSNorm of its input")


def _readings_of(probe: _Probe, channels_first: bool) -> Iterator[NormSpec]:
    eps_values = dict.fromkeys([*_eps_attributes(probe.module), *_USUAL_EPS])
    offsets = (0.0,) if probe.weight is None else (0.0, 1.0)
    kinds: tuple[Literal["layernorm", "rmsnorm"], ...] = ("layernorm", "rmsnorm")
    for shape, kind, offset, eps in product(probe.shapes, kinds, offsets, eps_values):
        yield NormSpec(kind, shape, eps, offset, channels_first=channels_first)


def _with_casting(
    probe: _Probe, layout: tuple[bool, tuple[int, ...]], spec: NormSpec
) -> NormSpec | Unreadable:
    """`spec` completed by what shows in half precision, and only there."""
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
        return Unreadable("what it computes in bfloat16 is neither rounded nor typed as a norm's")

    with _cuda_autocast(), suppress(Exception):
        outputs = {(half, full): probe.run(layout, half, full)}
    return min((spec, replace(spec, autocast_float32=True)), key=misfit)


def _gaps(a: Tensor, b: Tensor) -> Tensor:
    """Differences, relative to the largest entry of their row; infinite if the dtypes differ."""
    if a.dtype != b.dtype:
        return torch.tensor(float("inf"))
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return ((a - b).abs() / b.abs().amax(1, keepdim=True)).nan_to_num(float("inf"))
