"""What only the CPU backend has: a build, a cache, threads."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from norm_truth import run

from hf_rmsnorm import functional, ops
from hf_rmsnorm.ops import cpu_backend, cpu_build, reference

has_compiler = pytest.mark.skipif(cpu_build.library() is None, reason="no C compiler here")


@has_compiler
def test_a_nan_of_any_payload_stays_nan_in_bfloat16() -> None:
    """Rounding by adding to the bits would carry 0x7fffffff over into minus zero."""
    weight = torch.full((40,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    y = functional.rms_norm(torch.randn(3, 40).bfloat16(), weight)
    assert y.dtype == torch.bfloat16 and y.isnan().all()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_RMSNORM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@has_compiler
def test_cpu_tensors_use_the_kernel() -> None:
    assert ops.backend_for(torch.ones(1)) is cpu_backend
    assert ops.backend_for(torch.ones(0, 3)) is reference
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        assert cpu_backend._kernel("forward", dtype, dtype, compute) is not None


@has_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("hidden", [1024, 1003])
@pytest.mark.parametrize("mebibytes", [9, 33])
def test_outputs_too_large_for_the_caches(dtype: torch.dtype, hidden: int, mebibytes: int) -> None:
    """Written in other ways, where rows are aligned: each row's result is the same."""
    rows = mebibytes * 2**20 // (hidden * dtype.itemsize)
    x, residual, dy, dsummed = torch.randn(4, rows, hidden).to(dtype)
    weight = torch.randn(hidden).to(dtype)

    def norm(x, residual):
        return functional.add_rms_norm(x, residual, weight, p=0.7)

    whole = run(norm, [x, residual], [dy, dsummed])
    for part in (slice(0, 5), slice(rows - 3, rows)):
        few = run(norm, [x[part], residual[part]], [dy[part], dsummed[part]])
        for a, b in zip(whole, few, strict=True):
            assert torch.equal(a[part], b)


@has_compiler
@pytest.mark.parametrize("p", [1.0, 0.3])
def test_results_do_not_depend_on_the_number_of_threads(p: float) -> None:
    x, residual = torch.randn(2, 1111, 96)
    weight, bias = torch.randn(2, 96)
    assert x.numel() >= cpu_build.PARALLEL_ELEMENTS
    cotangents = list(torch.randn(2, 1111, 96))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            run(
                lambda *t: functional.add_rms_norm(*t, p=p),
                [x, residual, weight, bias],
                cotangents,
            )
        )
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@has_compiler
def test_build_is_kept(empty_cache: Path) -> None:
    cpu_build._load_or_build()
    kept = {f.name: f.stat().st_mtime_ns for f in empty_cache.iterdir()}
    cpu_build._load_or_build()
    assert {f.name: f.stat().st_mtime_ns for f in empty_cache.iterdir()} == kept
    assert sorted(Path(name).suffix for name in kept) == [".lock", ".so"]


@has_compiler
def test_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_RMSNORM_CACHE", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.INFO, logger="hf_rmsnorm"):
        assert isinstance(cpu_build._load_or_build(), ctypes.CDLL)
    assert "not kept for the next process" in caplog.text


@pytest.mark.usefixtures("empty_cache")
def test_no_compiler_is_said_and_survived(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert cpu_build.library.__wrapped__() is None
    assert "no C compiler" in caplog.text
    monkeypatch.setattr(cpu_build, "library", lambda: None)
    assert ops._for_device_type.__wrapped__("cpu") is reference


def test_a_compiler_that_fails_is_said_and_survived(
    empty_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = tmp_path / "brokencc"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert cpu_build.library.__wrapped__() is None
    assert "it is broken" in caplog.text
    assert not list(empty_cache.glob("*.so"))


@has_compiler
@pytest.mark.launch
def test_processes_that_build_at_once(empty_cache: Path) -> None:
    code = (
        "import torch; from hf_rmsnorm import functional; from hf_rmsnorm.ops import cpu_backend;"
        "x = torch.ones(2, 5); y = functional.rms_norm(x, eps=0.0); assert torch.equal(x, y);"
        "assert cpu_backend._kernel('forward', *[torch.float32] * 3)"
    )
    env = dict(os.environ) | {"PYTHONPATH": str(Path(__file__).parents[2]), "CXX": "false"}
    started = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(3)]
    assert [p.wait() for p in started] == [0, 0, 0]
    assert len(list(empty_cache.glob("*.so"))) == 1
