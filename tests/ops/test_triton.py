"""What only the Triton backend has: loops over wide rows, tiles, and what the compiler makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from norm_truth import eager_norm, run

from hf_rmsnorm import functional, ops
from hf_rmsnorm.ops import triton_backend

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`functional` on Triton; the names of the kernels launched."""
    names: list[str] = []
    launch = triton_backend.launch

    def recorded(kernel, grid, *args, **constants):
        names.append(kernel.__name__)
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(triton_backend, "launch", recorded)
    monkeypatch.setattr(ops, "backend_for", lambda x: triton_backend)
    return names


@pytest.mark.parametrize("p", [1.0, 0.07])
@pytest.mark.parametrize("hidden", [300, 257, 512])
def test_rows_wider_than_the_registers(
    launches: list[str], monkeypatch: pytest.MonkeyPatch, hidden: int, p: float
) -> None:
    """The loops, at widths the interpreter is quick with: the limits are lowered instead."""
    for name, value in {
        "_FORWARD_ROW_BYTES": 256,
        "_BACKWARD_ROW_BYTES": 256,
        "_LOOP_COLUMNS": 128,
        "_TILE_COLUMNS": 64,
    }.items():
        monkeypatch.setattr(triton_backend, name, value)
    x, residual = torch.randn(2, 5, 3, hidden, device=DEVICE)
    weight, bias = torch.randn(2, hidden, device=DEVICE)
    cotangents = list(torch.randn(2, 5, 3, hidden, device=DEVICE))
    got = run(
        lambda *t: functional.add_rms_norm(*t, p=p, weight_offset=1.0),
        [x, residual, weight, bias],
        cotangents,
    )
    k = functional.statistic_size(hidden, p)

    def expected(x, r, w, b):
        return eager_norm(x + r, w, b, eps=1e-5, k=k, offset=1.0, casting="gemma"), x + r

    for a, b in zip(got, run(expected, [x, residual, weight, bias], cotangents), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    assert launches == ["forward_loop", "backward_pull", "backward_columns", "reduce_partials"]


def test_a_row_of_131072(launches: list[str]) -> None:
    x, dy = torch.randn(2, 1, 131072, device=DEVICE)
    got = run(functional.rms_norm, [x, None, None], [dy])
    settings = {"eps": 1e-5, "k": 131072, "offset": 0.0, "casting": "gemma"}
    expected = run(lambda *t: eager_norm(*t, **settings), [x, None, None], [dy])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert launches == ["forward_loop", "backward_pull", "backward_columns"]


def test_tiles_cover_every_width_and_follow_from_it_alone() -> None:
    for hidden in (1, 7, 16, 17, 512, 513, 768, 5120, 8192):
        tile = triton_backend.row_tile(hidden, limit=triton_backend._BACKWARD_ROW_BYTES)
        assert tile is not None and tile.columns >= hidden
        assert tile.rows == 1 or hidden <= 512
    assert triton_backend.row_tile(8193, limit=triton_backend._BACKWARD_ROW_BYTES) is None
    assert triton_backend.row_tile(8192, 8, limit=triton_backend._BACKWARD_ROW_BYTES) is None


# one width of every tile, and ragged ones
BFLOAT16 = [7, 64, 128, 256, 512, 768, 2048, 4096, 5120, 12288, 131072]
AOT_CASES = {
    90: [f"bfloat16:{n}" for n in BFLOAT16] + ["float32:512", "float32:8192", "float32:16384"],
    80: ["bfloat16:512", "bfloat16:8192", "bfloat16:131072", "float32:768"],
}


@pytest.mark.launch
@pytest.mark.parametrize("capability", AOT_CASES)
def test_compiled_kernels_hold_what_they_promise(capability: int, tmp_path: Path) -> None:
    """Needs no GPU, but a process of its own: the interpreter replaces the compiler."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("aot_compile.py")
    done = subprocess.run(
        [sys.executable, str(script), str(capability), *AOT_CASES[capability]],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert {r["kernel"] for r in report} == {
        "forward_tile",
        "forward_loop",
        "backward_tile",
        "backward_pull",
        "backward_columns",
        "reduce_partials",
    }
    for r in report:
        assert r["stack"] == r["local_loads"] == r["local_stores"] == 0, f"spills: {r}"
        assert r["f64"] == 0, f"float64 arithmetic: {r}"
        assert r["mul_s32"] == 0, f"a 32-bit product may be a row offset: {r}"
        if r["hidden"] > 512 and r["kernel"] == "forward_tile":
            assert r["vector_loads"] == r["loads"], f"loads narrower than 128 bits: {r}"
        if r["hidden"] > 512 and r["kernel"] in ("backward_tile", "backward_columns"):
            resident = triton_backend._RESIDENT_WARPS
            assert r["registers"] * 32 * resident <= 65536, f"fewer resident than planned: {r}"
