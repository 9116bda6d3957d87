"""What `triton_launch.launch` must hold, on a stub driver. Run as a script: the interpreter, which
the tests' own process uses, would replace the compiler.

The last line of stdout is a JSON object: name of the check -> traceback, empty where it held.
"""

import json
import sys
import threading
import traceback
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from bench_launch import launches_of
from harness.stub_driver import StubDriver
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import JITFunction

from hf_rmsnorm.ops import triton_launch
from hf_rmsnorm.ops.triton_launch import launch

driver = StubDriver()


@triton.jit(do_not_specialize=["n_rows"])
def scaled(p_x, p_scale, p_y, n_rows, stride, FACTOR: tl.constexpr, BN: tl.constexpr = 32):
    row = tl.program_id(0)
    cols = tl.arange(0, BN)
    b_x = tl.load(p_x + row * stride + cols).to(tl.float32) * FACTOR
    if p_scale is not None:
        b_x *= tl.load(p_scale + cols)
    tl.store(p_y + row * BN + cols, b_x, mask=row < n_rows)


BUFFER = torch.randn(4096)
X, SCALE, Y = BUFFER[:1024], BUFFER[1024:1056], BUFFER[2048:3072]
PLAIN = (X, SCALE, Y, 5, 32)

# Each differs from PLAIN in one thing that Triton compiles another kernel for.
VARIANTS = {
    "plain": (PLAIN, {"FACTOR": 2.0}),
    "x not aligned": ((BUFFER[1:], *PLAIN[1:]), {"FACTOR": 2.0}),
    "scale not aligned": ((X, BUFFER[1025:], *PLAIN[2:]), {"FACTOR": 2.0}),
    "x bfloat16": ((X.bfloat16(), *PLAIN[1:]), {"FACTOR": 2.0}),
    "y float16": ((X, SCALE, Y.half(), 5, 32), {"FACTOR": 2.0}),
    "no scale": ((X, None, *PLAIN[2:]), {"FACTOR": 2.0}),
    "stride 1": ((*PLAIN[:4], 1), {"FACTOR": 2.0}),
    "stride odd": ((*PLAIN[:4], 33), {"FACTOR": 2.0}),
    "stride 64 bit": ((*PLAIN[:4], 2**31), {"FACTOR": 2.0}),
    "rows 64 bit": ((*PLAIN[:3], 2**31 + 5, 32), {"FACTOR": 2.0}),
    "factor": (PLAIN, {"FACTOR": 3.0}),
    "columns": (PLAIN, {"FACTOR": 2.0, "BN": 16}),
    "warps": (PLAIN, {"FACTOR": 2.0, "num_warps": 1}),
}
# These share PLAIN's kernel: other values of what is no specialisation.
SAME_KERNEL = {
    "another row count": (*PLAIN[:3], 1, 32),
    "another stride": (*PLAIN[:4], 64),
    "other tensors": (Y, SCALE, X, 5, 32),
}


@contextmanager
def no_jit():
    """`JITFunction.run` must not be entered."""
    original = JITFunction.run

    def run(self, *args, **kwargs):
        raise AssertionError("a second launch went through JITFunction.run")

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original


def raw(args):
    """What the launcher reads from its arguments: tensors as pointers, empty hooks as none."""

    def value(arg):
        if isinstance(arg, torch.Tensor):
            return arg.data_ptr()
        if isinstance(arg, triton.knobs.HookChain):
            return [*arg.calls] or None
        return arg

    head, seen, tail = args[:6], args[6], args[7:]
    watched = any(map(value, tail[:2]))
    return (*head, dict(seen.data) if watched else None, *map(value, tail))


def recorded(run):
    driver.calls.clear()
    run()
    (call,) = driver.calls
    return raw(call)


def both(kernel, grid, args, constants):
    """The launcher's arguments on Triton's path and on ours, where ours is known already."""
    jit = recorded(lambda: kernel[grid](*args, **constants))
    launch(kernel, grid, *args, **constants)
    with no_jit():
        direct = recorded(lambda: launch(kernel, grid, *args, **constants))
    return jit, direct


def check_every_kernel_of_the_backend_gets_the_same_arguments():
    for dtype, rows, hidden in (
        (torch.float32, 5, 40),
        (torch.bfloat16, 3, 768),
        (torch.bfloat16, 2, 20480),
    ):
        launches = launches_of(rows, hidden, dtype)
        assert len(launches) >= 3
        for kernel, grid, args, constants in launches:
            jit, direct = both(kernel, grid, args, constants)
            assert jit == direct, kernel.__name__
            assert len(direct) == 9 + len(kernel.params)


def check_each_specialisation_has_its_own_kernel():
    triton_launch._bound.clear()
    found = {}
    for _ in range(2):  # known and unknown ones, in turns
        for name, (args, constants) in VARIANTS.items():
            jit, direct = both(scaled, (3, 2), args, constants)
            assert jit == direct, name
            assert found.setdefault(name, direct) == direct
    kernels = {name: call[4] for name, call in found.items()}
    assert len(set(kernels.values())) == len(triton_launch._bound) == len(VARIANTS), kernels
    plain = found["plain"][4]
    for name, args in SAME_KERNEL.items():
        launch(scaled, (3,), *args, FACTOR=2.0)
        with no_jit():
            direct = recorded(lambda args=args: launch(scaled, (3,), *args, FACTOR=2.0))
        assert direct[4] == plain and direct[9 : 9 + 5] == raw((0,) * 9 + args)[9:], name


def check_devices_have_their_own_kernels():
    launch(scaled, (1,), *PLAIN, FACTOR=2.0)
    driver.device = 1
    try:
        jit, direct = both(scaled, (1,), PLAIN, {"FACTOR": 2.0})
    finally:
        driver.device = 0
    assert jit == direct and direct[3] == 1001 and "@1#" in direct[4]


class OnDevice:
    """A tensor of another device, as far as a launch can see."""

    dtype, device = torch.float32, torch.device("cuda", 3)

    def data_ptr(self):
        return 4096


def check_the_device_of_the_tensors_is_made_current():
    @contextmanager
    def on_device(device):
        before, driver.device = driver.device, device.index
        try:
            yield
        finally:
            driver.device = before

    original, triton_launch._on_device = triton_launch._on_device, on_device
    try:
        tensor = OnDevice()
        args = (tensor, None, tensor, 5, 32)
        for _ in range(2):
            call = recorded(lambda: launch(scaled, (1,), *args, FACTOR=2.0))
            assert call[3] == 1003 and "@3#" in call[4] and driver.device == 0
    finally:
        triton_launch._on_device = original


def check_profilers_see_every_launch():
    seen = []

    def enter(metadata):
        seen.append(metadata.get()["name"])

    chains = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    for chain in chains:
        chain.add(enter)
        try:
            jit, direct = both(scaled, (2,), PLAIN, {"FACTOR": 2.0})
            assert jit == direct
            assert direct[6]["name"] == "scaled" and [enter] in direct[7:9]
        finally:
            chain.remove(enter)
    jit, direct = both(scaled, (2,), PLAIN, {"FACTOR": 2.0})
    assert jit == direct and direct[6:9] == (None, None, None)


def check_what_changes_compilation_goes_through_triton():
    entered = []
    original = JITFunction.run

    def run(self, *args, **kwargs):
        entered.append(self)
        return original(self, *args, **kwargs)

    launch(scaled, (1,), *PLAIN, FACTOR=2.0)
    JITFunction.run = run
    switches = [
        (triton.knobs.runtime, "debug", True),
        (triton_launch, "_KNOWN_TRITON", False),
        (scaled, "pre_run_hooks", [lambda *args, **kwargs: None]),
    ]
    try:
        for owner, name, value in switches:
            before = getattr(owner, name)
            setattr(owner, name, value)
            try:
                launch(scaled, (1,), *PLAIN, FACTOR=2.0)
            finally:
                setattr(owner, name, before)
            assert len(entered) == 1, name
            entered.clear()
        launch(scaled, (1,), *PLAIN, FACTOR=2.0)
        assert not entered
    finally:
        JITFunction.run = original


class NoOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"a launch ran {func}")


def check_a_launch_runs_no_operator():
    """Nothing that a CUDA graph's capture would record, refuse or wait for."""
    launch(scaled, (1,), *PLAIN, FACTOR=2.0)
    with no_jit(), NoOperators():
        launch(scaled, (1,), *PLAIN, FACTOR=2.0)


def check_threads():
    expected = {name: both(scaled, (3,), *case)[0] for name, case in VARIANTS.items()}
    triton_launch._bound.clear()
    driver.calls.clear()
    problems = []

    def work(start):
        try:
            for i in range(300):
                name = list(VARIANTS)[(start + i) % len(VARIANTS)]
                args, constants = VARIANTS[name]
                launch(scaled, (3,), *args, **constants)
        except Exception:
            problems.append(traceback.format_exc())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not problems, problems[0]
    calls = [raw(call) for call in driver.calls]
    assert len(calls) == 1200
    assert all(call in expected.values() for call in calls)
    for name, case in VARIANTS.items():
        assert both(scaled, (3,), *case)[1] == expected[name], name


def main() -> dict[str, str]:
    driver.activate()
    results = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
    return results


if __name__ == "__main__":
    print(json.dumps(main()))
