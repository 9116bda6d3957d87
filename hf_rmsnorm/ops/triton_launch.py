"""Starting a Triton kernel: the one door from the backend to Triton's launcher.

`kernel[grid](...)` derives the specialisation of every argument anew in each call. Here that is
done once for each kind of arguments; from then on the compiled kernel's launcher is called with
what `JITFunction.run` would give it. Nothing is allocated or synchronised on the way, so launches
can be captured in a CUDA graph once each kernel has been compiled by a first call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver


class _Bound(NamedTuple):
    compiled: CompiledKernel  # also keeps the loaded binary alive
    run: Callable[..., None]
    function: Any
    metadata: Any
    rest: tuple[Any, ...]  # the parameters after the positional arguments, all constants


# The versions whose `JITFunction.run` was read: all four call the compiled kernel in the same way.
_KNOWN_TRITON = triton.__version__.startswith(("3.6.", "3.7.", "3.8.", "3.9."))

_bound: dict[tuple[Any, ...], _Bound] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)` on the device of the tensors.

    Args:
        grid: one to three sizes.
        args: tensors, ints and None for the first parameters of the kernel.
        constants: constexpr parameters and compiler options.
    """
    if not (_KNOWN_TRITON and isinstance(kernel, JITFunction)):
        with _on_device(_device(args)):
            kernel[grid](*args, **constants)
        return
    device: Any = None
    kinds: list[Any] = []
    values: list[Any] = []
    for arg in args:
        if arg is None:
            kinds.append(None)
            values.append(None)
        elif type(arg) is int:
            # finer than Triton, for which some parameters are not specialised
            kinds.append(-1 if arg == 1 else arg % 16 == 0)
            kinds.append(arg.bit_length() >> 5)
            values.append(arg)
        else:
            pointer = arg.data_ptr()
            kinds.append(arg.dtype)
            kinds.append(pointer % 16 == 0)
            values.append(pointer)
            if device is None:
                device = arg.device
    active = driver.active
    current = active.get_current_device()
    if device.index is not None and device.index != current:
        with _on_device(device):
            return launch(kernel, grid, *args, **constants)

    runtime = knobs.runtime
    if (
        runtime.debug
        or runtime.add_stages_inspection_hook is not None
        or knobs.compilation.instrumentation_mode
        or kernel.pre_run_hooks
    ):
        kernel[grid](*args, **constants)
        return
    key = (kernel.fn, current, *kinds, *constants, *constants.values())
    bound = _bound.get(key)
    if bound is None:
        _remember(key, kernel, kernel[grid](*args, **constants), args, constants)
        return
    stream = active.get_current_stream(current)
    enter, leave, seen = runtime.launch_enter_hook, runtime.launch_exit_hook, None
    if _has_calls(enter) or _has_calls(leave):
        seen = bound.compiled.launch_metadata(grid, stream, *args, *bound.rest)
    else:
        enter = leave = None
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    bound.run(
        *(x, y, z, stream, bound.function, bound.metadata, seen, enter, leave),
        *values,
        *bound.rest,
    )


def _remember(
    key: tuple[Any, ...],
    kernel: Any,
    compiled: Any,
    args: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """Keep what a later launch needs, unless Triton specialises on more than the key holds."""
    if not isinstance(compiled, CompiledKernel):  # compiled in the background
        return
    if compiled.metadata.target.backend != "cuda":  # AMD's looks at the size of the storage too
        return
    if any(param.is_constexpr for param in kernel.params[: len(args)]):
        return
    named = {k: v for k, v in constants.items() if k in kernel.signature.parameters}
    arguments = kernel.signature.bind(*args, **named)
    arguments.apply_defaults()
    rest = tuple(arguments.arguments.values())[len(args) :]
    _bound[key] = _Bound(compiled, compiled.run, compiled.function, compiled.packed_metadata, rest)


def _has_calls(hook: Any) -> bool:
    """Triton's own hooks are chains, empty until a profiler adds to them."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _device(args: tuple[Any, ...]) -> torch.device:
    return next(arg.device for arg in args if isinstance(arg, torch.Tensor))


def _on_device(device: torch.device) -> Any:
    """Makes it the current one; no change for the CPU, where Triton's interpreter runs."""
    return torch.accelerator.device_index(None if device.type == "cpu" else device.index)


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).gpu_subslice_count
    return 1
