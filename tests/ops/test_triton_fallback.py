"""Where Triton can build no kernel, norms are computed by the reference, and it is said once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_rmsnorm import functional, ops
from hf_rmsnorm.ops import reference, triton_backend, triton_fallback

ROOT = Path(__file__).parents[2]

# With a driver that compiles a real kernel and then, as a real one does, its launcher in C.
CODE = """
import sys
import torch
from hf_rmsnorm import functional, ops
from hf_rmsnorm.ops import triton_backend, triton_fallback

if sys.argv[1] == "stub":
    sys.path.insert(0, "scripts")
    from harness.stub_driver import StubDriver
    from triton.runtime.build import compile_module_from_src

    driver = StubDriver()
    driver.launcher_cls = lambda *_: compile_module_from_src("#include <Python.h>", "launcher")
    driver.activate()

launch, tries = triton_backend.launch, []
def counted(kernel, *args, **constants):
    tries.append(kernel)
    launch(kernel, *args, **constants)
triton_backend.launch = counted
ops.backend_for = lambda x: triton_fallback
ops.shortcut.call = ops.shortcut.none
torch.manual_seed(0)
x, residual, dy = torch.randn(3, 5, 24, dtype=torch.float64).unbind()
weight, bias = torch.randn(2, 24, dtype=torch.float64)
leaves = [t.float().requires_grad_() for t in (x, residual, weight, bias)]
wide = [t.double().detach().requires_grad_() for t in leaves]
total = wide[0] + wide[1]
expected = total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * wide[2] + wide[3]
for _ in range(3):
    normed, summed = functional.add_rms_norm(*leaves)
    torch.testing.assert_close(normed.double(), expected, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(normed, leaves, dy.float())
    for a, b in zip(found, torch.autograd.grad(expected, wide, dy, retain_graph=True)):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
print(len(tries))
print(ops.status("cpu"))
"""


@pytest.mark.launch
@pytest.mark.parametrize(
    ("driver", "compiler", "reason"),
    [
        ("none", "cc", "RuntimeError: 0 active drivers"),
        ("stub", "", "RuntimeError: Failed to find C compiler"),
        ("stub", "no-header", "CalledProcessError: "),
        ("stub", "no-folder", "Error: "),
    ],
)
def test_what_cannot_be_built(tmp_path: Path, driver: str, compiler: str, reason: str) -> None:
    broken = tmp_path / "no-header"
    broken.write_text("#!/bin/sh\necho Python.h: No such file or directory >&2\nexit 1\n")
    broken.chmod(0o755)
    (tmp_path / "file").touch()
    cache = tmp_path / ("file/below" if compiler == "no-folder" else "cache")
    settings = {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    if compiler in ("", "no-header"):
        settings |= {"PATH": "", "CC": str(broken) if compiler else ""}
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "CC")} | settings
    done = subprocess.run(
        [sys.executable, "-c", CODE, driver],
        env={k: v for k, v in env.items() if k != "CC" or v},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    tries, status = done.stdout.splitlines()
    assert tries == "2", "one for each direction"
    assert status.startswith("hf_rmsnorm.ops.triton_fallback; plain PyTorch for some: ")
    assert done.stderr.count("plain PyTorch is used instead: ") == 1
    assert reason in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access", 700),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_says_nothing_of_a_kernel_is_raised(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(triton_backend, "launch", launch)
    monkeypatch.setattr(ops, "backend_for", lambda x: triton_fallback)
    monkeypatch.setattr(ops.shortcut, "call", ops.shortcut.none)
    with pytest.raises(type(error)):
        functional.rms_norm(torch.randn(3, 8))
    assert not triton_fallback.failed


def test_only_what_failed_is_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    launch, widths = triton_backend.launch, []

    def narrow(kernel, grid, *args, **constants):
        widths.append(constants["N"])
        if constants["N"] > 50:
            raise RuntimeError("too wide for this device")
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(triton_backend, "launch", narrow)
    monkeypatch.setattr(triton_fallback, "failed", {})
    for hidden in (64, 40, 64, 40):
        x = torch.randn(3, hidden)
        formula = reference.Formula(hidden, 1e-5, 0.0, False)
        y, *_ = triton_fallback.forward(x, None, None, None, formula, save_rstd=False)
        torch.testing.assert_close(y, reference.normalise(x, None, None, formula)[0])
    assert widths == [64, 40, 40]
