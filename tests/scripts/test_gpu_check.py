"""gpu_check.py without a GPU: its checks in Triton's interpreter, and how it survives bad ones."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read

from hf_rmsnorm import ops
from hf_rmsnorm.ops import triton_backend

# A stand-in for kernel_checks.py, with four checks of which the third behaves as it is told to.
WORKER = """
import json, os, signal, sys
def say(**line): print(json.dumps(line), flush=True)
done = int(sys.argv[sys.argv.index("--done") + 1])
names = ["a", "b", "c", "d"][done:]
say(checks=[["g", name] for name in names])
for name in names:
    say(group="g", check=name, status="started")
    if name == "c":
        BEHAVE
    say(group="g", check=name, status="passed")
"""
BEHAVIOURS = {
    "nothing": "pass",
    "crash": "print('CUDA error: illegal address', file=sys.stderr); os._exit(3)",
    "hang": "signal.pause()",
    "never starts": "pass",
}


def worker_of(folder: Path, behaviour: str):
    from harness.children import Child, Worker, environment

    script = folder / "worker.py"
    text = WORKER.replace("BEHAVE", BEHAVIOURS[behaviour])
    script.write_text("raise SystemExit('no driver')" if behaviour == "never starts" else text)
    return Worker(Child((str(script),), environment(interpret=False), folder / "log"))


@pytest.mark.launch
@pytest.mark.parametrize(
    ("behaviour", "statuses"),
    [
        ("nothing", ["passed", "passed", "passed", "passed"]),
        ("crash", ["passed", "passed", "failed", "passed"]),
        ("hang", ["passed", "passed", "not run", "not run"]),
        ("never starts", ["failed"]),
    ],
)
def test_one_bad_check_leaves_the_others(
    tmp_path: Path, behaviour: str, statuses: list[str]
) -> None:
    from harness.benchmark import Deadline
    from harness.children import run_workers

    worker = worker_of(tmp_path, behaviour)
    results = run_workers([worker], Deadline(1.0 if behaviour == "hang" else 60.0))
    assert [line["status"] for line in results] == statuses
    assert worker.running.status is not None, "a process was left behind"
    reasons = [line.get("why", "") for line in results]
    if behaviour == "crash":
        assert reasons[2] == "the process ended with status 3: CUDA error: illegal address"
    if behaviour == "never starts":
        assert "no driver" in reasons[0]
    if behaviour == "hang":
        assert reasons[2] == "no time left"


def run_checks(checks: list, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """In this process; what `run` replaces is put back."""
    from harness import kernel_checks

    monkeypatch.setattr(ops, "backend_for", ops.backend_for)
    monkeypatch.setattr(ops.shortcut, "call", ops.shortcut.call)
    monkeypatch.setattr(triton_backend, "launch", triton_backend.launch)
    lines = list(kernel_checks.run(checks, "cpu"))
    torch.use_deterministic_algorithms(True)  # as conftest had it
    return [line for line in lines if line["status"] != "started"]


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.kernel_checks import Check
    from harness.kernel_grid import VARIANTS, case

    forward = triton_backend.forward

    def skewed(x, residual, weight, bias, formula, **more):
        return forward(x, residual, weight, bias, formula._replace(eps=2 * formula.eps), **more)

    run = lambda: case(5, 24, torch.float32, VARIANTS["plain"], "cpu")  # noqa: E731
    (right,) = run_checks([Check("g", "right", run)], monkeypatch)
    assert right["status"] == "passed" and right["what"] and 0 < right["share_of_limit"] <= 1
    assert {"forward_tile", "backward_rows"} <= set(right["kernels"])
    monkeypatch.setattr(triton_backend, "forward", skewed)
    (wrong,) = run_checks([Check("g", "wrong", run)], monkeypatch)
    assert wrong["status"] == "failed"
    assert wrong["why"].startswith("Wrong: ") and "PyTorch's own" in wrong["why"]


def test_a_check_that_runs_no_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.gpu_behaviour import Skipped
    from harness.kernel_checks import Check

    def absent() -> None:
        raise Skipped("takes 21 GiB, 3 are free")

    idle, skipped = run_checks(
        [Check("g", "idle", lambda: None), Check("g", "absent", absent)], monkeypatch
    )
    assert idle["status"] == "failed" and idle["why"] == "no Triton kernel ran"
    assert skipped["status"] == "skipped" and skipped["why"] == "takes 21 GiB, 3 are free"


def test_every_variant_meets_every_dtype_on_a_gpu() -> None:
    from harness import kernel_checks
    from harness.kernel_grid import VARIANTS

    checks = kernel_checks.on_gpu()
    names = [(check.group, check.name) for check in checks]
    assert len(names) == len(set(names))
    widths = [name.split(" ", 2)[1:] for group, name in names if group == "widths"]
    for dtype in ("bfloat16", "float32", "float16"):
        assert {variant for kind, variant in widths if kind == dtype} == set(VARIANTS)


@pytest.mark.launch
def test_the_command_on_a_cpu(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "scripts/gpu_check.sh"), str(tmp_path)]
    flags = ["--cpu", "--parts", "correctness", "ops"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    document = read(tmp_path / "gpu_check.json")
    assert document["passed"] and not document["broken"] and document["failed"] == 0
    assert {line["status"] for line in document["correctness"]} == {"passed"}
    assert len(document["correctness"]) >= 15
    assert {goal["status"] for goal in document["goals"]} == {"not measured"}
    assert read(tmp_path / "ops.json")["rows"]
    assert {"date", "device", "versions", "git"} <= set(document["environment"])
    assert done.stdout.splitlines()[-1].startswith("PASSED")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture) -> None:
    import gpu_check

    with pytest.raises(SystemExit) as stop:
        gpu_check.main([])
    assert stop.value.code == 2
    assert "no GPU here; --cpu checks this script itself" in capsys.readouterr().err


def test_no_time_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import gpu_check

    assert gpu_check.main([str(tmp_path), "--cpu", "--seconds", "1"]) == 1
    broken = read(tmp_path / "gpu_check.json")["broken"]
    assert "correctness: no time left" in broken and "correctness: no check passed" in broken
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAILED")
