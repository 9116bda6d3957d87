"""What only the Triton backend has: tiles, kernels for wide rows, and what the compiler makes."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from norm_truth import eager_norm, run
from test_backends import VARIANTS, Backend, Variant, check

from hf_rmsnorm import functional, ops
from hf_rmsnorm.ops import reference, triton_backend, triton_tiles
from hf_rmsnorm.ops.triton_layout import Limits, Tile, backward_limits, forward_limits, row_tile

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# below each tile that is possible: every row is too wide for registers
NO_TILE = Limits(1, 1, 0, 16)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`functional` on Triton; the names of the kernels launched, and which part of the row."""
    names: list[str] = []
    launch = triton_backend.launch

    def recorded(kernel, grid, *args, **constants):
        names.append(kernel.__name__ + constants.get("PART", ""))
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(triton_backend, "launch", recorded)
    monkeypatch.setattr(ops, "backend_for", lambda x: triton_backend)
    monkeypatch.setattr(ops.shortcut, "call", ops.shortcut.none)
    return names


@pytest.fixture
def backend(launches: list[str]) -> Backend:
    return Backend(triton_backend, launches, DEVICE == "cpu", DEVICE)


@pytest.fixture
def wide_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for wide rows, at widths the interpreter is quick with."""
    for name, value in {
        "forward_limits": lambda *_: NO_TILE,
        "backward_limits": lambda *_: NO_TILE,
        "_LOOP_BYTES": 512,
        "_DOT_COLUMNS": 128,
        "_SHARED_COLUMNS": 64,
    }.items():
        monkeypatch.setattr(triton_backend, name, value)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.usefixtures("wide_rows")
def test_rows_wider_than_the_registers(backend: Backend, variant: str) -> None:
    v = VARIANTS[variant]
    check(backend, (2, 2, 300), torch.bfloat16 if v.strided else torch.float32, v)
    tail = [] if v.p == "1" else ["backward_rowstail"]
    sums = ["reduce_partials"] if v.weight or v.bias else []
    assert backend.calls == [
        *("forward_loop", "backward_dots", *tail, "backward_rowshead", *sums),
    ]


@pytest.mark.parametrize("hidden", [257, 384])
@pytest.mark.usefixtures("wide_rows")
def test_wide_rows_of_other_widths(backend: Backend, hidden: int) -> None:
    check(backend, (3, hidden), torch.float16, Variant(p="0.4", residual="same", offset=1.0))


@pytest.mark.parametrize("k", [1, 64, 65, 299])
@pytest.mark.usefixtures("wide_rows")
def test_the_statistic_may_end_anywhere_in_a_tile(backend: Backend, k: int) -> None:
    check(backend, (2, 300), torch.float32, Variant(p=str(k / 300 - 1e-5), residual="same"))
    assert ("backward_rowstail" in backend.calls) == (k <= 256)


# three tiles of 32, 64 and 128, three of a warp's width, a ragged row of several tiles
@pytest.mark.parametrize("hidden", [16, 96, 192, 384, 640, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_several_tiles(backend: Backend, dtype: torch.dtype, hidden: int) -> None:
    check(backend, (5, hidden), dtype, Variant(p="0.6", residual="same", casting="llama"))
    assert backend.calls == ["forward_tile", "backward_rowsrow", "reduce_partials"]


@pytest.mark.parametrize("rows", [1, 33, 301])
def test_programs_take_turns_over_the_rows(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """More rows than programs, fewer, and neither a multiple of the rows of a tile."""
    monkeypatch.setattr(triton_backend, "processors", lambda device: 3)
    check(backend, (rows, 256), torch.float32, Variant(casting="llama", p="0.3"))


# rows side by side, one of three tiles, and one of two parts
@pytest.mark.parametrize(("hidden", "wide"), [(40, False), (96, False), (700, False), (128, True)])
def test_a_row_does_not_depend_on_its_batch(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    launches: list[str],
    hidden: int,
    wide: bool,
) -> None:
    monkeypatch.setattr(triton_backend, "processors", lambda device: 3)  # may share a wide row
    monkeypatch.setattr(triton_backend, "_REDUCE_COLUMNS", 256)
    if wide:
        request.getfixturevalue("wide_rows")
    x, residual, *cotangents = torch.randn(4, 19, hidden, device=DEVICE).bfloat16()
    weight, bias = torch.randn(2, hidden, device=DEVICE).bfloat16()

    def results(rows: slice) -> list[torch.Tensor]:
        inputs = [x[rows], residual[rows], weight, bias]
        norm = functools.partial(functional.add_rms_norm, p=0.4)
        return run(norm, inputs, [c[rows] for c in cotangents])

    whole = results(slice(None))
    for rows in (slice(0, 1), slice(5, 19)):
        for name, got, all_rows in zip(("y", "sum", "dx"), results(rows), whole, strict=False):
            assert torch.equal(got, all_rows[rows]), (name, rows)
    assert all(torch.equal(a, b) for a, b in zip(whole, results(slice(None)), strict=True))


@pytest.mark.parametrize("hidden", [1, 7, 64, 96, 768, 4096, 5120, 12288, 16384, 50257, 131072])
def test_the_number_of_rows_chooses_nothing(monkeypatch: pytest.MonkeyPatch, hidden: int) -> None:
    """All row counts share their kernels: no result depends on it, and nothing compiles anew."""
    found: dict[int, list] = {}
    monkeypatch.setattr(triton_backend, "processors", lambda device: 132)
    monkeypatch.setattr(triton_backend, "shared_memory", lambda device: 228 * 1024)
    for rows in (1, 2, 33, 4096, 10**6):
        found[rows] = []
        monkeypatch.setattr(
            triton_backend,
            "launch",
            lambda kernel, grid, *args, to=found[rows], **constants: to.append((kernel, constants)),
        )
        x = torch.empty(rows, hidden, dtype=torch.bfloat16, device="meta")
        formula = reference.Formula(-(-hidden // 3), 1e-5, 0.0, False)
        y, summed, rstd = triton_backend.forward(x, x, x[0], x[0], formula, save_rstd=True)
        triton_backend.backward(
            *(y, y, summed, x[0], rstd, formula),
            weight_grad=True,
            bias_grad=torch.bfloat16,
        )
    assert len(found[1]) >= 3
    assert all(launched == found[1] for launched in found.values())
    for kernel, _ in found[1]:
        assert not hasattr(kernel, "configs"), "tuned at run time"


@triton.jit
def count_rows(p_rows, p_mask, p_zero, block, n_rows, BM: tl.constexpr):
    rows, m_rows = triton_tiles.select_rows(block, n_rows, BM)
    tl.store(p_rows + tl.arange(0, BM), rows)
    tl.store(p_mask + tl.arange(0, BM), m_rows.to(tl.int8))
    tl.store(p_zero + tl.arange(0, 1)[:, None], triton_tiles.zero_bits(n_rows))


@pytest.mark.parametrize("n_rows", [5, 2**31 - 1, 2**31, 2**33 + 5])
def test_rows_beyond_2_31(n_rows: int) -> None:
    block = (n_rows - 1) // 128
    rows = torch.empty(128, dtype=torch.int64, device=DEVICE)
    mask = torch.empty(128, dtype=torch.int8, device=DEVICE)
    zero = torch.empty(1, dtype=torch.int16, device=DEVICE)
    count_rows[(1,)](rows, mask, zero, block, n_rows, BM=128)
    expected = torch.arange(128, device=DEVICE) + block * 128
    assert torch.equal(rows, expected)
    assert torch.equal(mask.bool(), expected < n_rows)
    assert zero.item() == 0


@pytest.mark.usefixtures("wide_rows")
def test_programs_share_a_wide_row_where_rows_are_few(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_backend, "processors", lambda device: 7)
    launch, grids = triton_backend.launch, {}

    def recorded(kernel, grid, *args, **constants):
        grids[kernel.__name__] = grid
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(triton_backend, "launch", recorded)
    for rows, sharing in ((2, 3), (4, 1)):
        check(backend, (rows, 300), torch.float32, Variant(p="0.3", residual="same"))
        assert grids["forward_loop"] == (rows, sharing)


def test_no_rows() -> None:
    x = torch.empty(0, 96, device=DEVICE)
    weight, bias = torch.randn(2, 96, device=DEVICE)
    formula = reference.Formula(96, 1e-5, 0.0, False)
    y, _, rstd = triton_backend.forward(x, None, weight, bias, formula, save_rstd=True)
    assert y.shape == (0, 96)
    dx, dweight, dbias = triton_backend.backward(
        y, None, x, weight, rstd, formula, weight_grad=True, bias_grad=torch.float32
    )
    assert dx.shape == (0, 96)
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))


def test_a_row_of_131072(launches: list[str]) -> None:
    x, dy = torch.randn(2, 1, 131072, device=DEVICE)
    got = run(functional.rms_norm, [x, None, None], [dy])
    settings = {"eps": 1e-5, "k": 131072, "offset": 0.0, "casting": "gemma"}
    expected = run(lambda *t: eager_norm(*t, **settings), [x, None, None], [dy])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert launches == ["forward_loop", "backward_dots", "backward_rowshead"]


def test_partial_sums_stay_few_for_short_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    programs: dict[int, int] = {}
    x = torch.empty(0, 4096, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(triton_backend, "processors", lambda device: 100)
    for rows in (7, 1000, 2400, 10**6):
        monkeypatch.setattr(
            triton_backend,
            "launch",
            lambda kernel, grid, *args, rows=rows, **_: programs.setdefault(rows, grid[0]),
        )
        x = torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta")
        rstd = torch.empty(rows, 1, device="meta")
        triton_backend.backward(
            *(x, None, x, x[0], rstd, reference.Formula(4096, 1e-5, 0.0, False)),
            weight_grad=True,
            bias_grad=None,
        )
    assert programs == {7: 7, 1000: 100, 2400: 150, 10**6: 200}


def test_tiles_fit_their_widths() -> None:
    bfloat16 = torch.bfloat16, torch.float32
    forward = {
        n: row_tile(n, 2, forward_limits(*bfloat16))
        for n in (1, 64, 96, 768, 1024, 4096, 5120, 7168, 12288, 32768, 32769)
    }
    assert forward == {
        1: Tile(128, 16, 1, 4),
        64: Tile(32, 64, 1, 4),
        96: Tile(32, 32, 3, 4),
        768: Tile(4, 256, 3, 4),
        1024: Tile(2, 512, 2, 4),
        4096: Tile(1, 4096, 1, 8),
        5120: Tile(1, 1024, 5, 4),
        7168: Tile(1, 1024, 7, 4),
        12288: Tile(1, 4096, 3, 16),
        32768: Tile(1, 32768, 1, 32),
        32769: None,
    }
    all_limits = [
        *(forward_limits(*bfloat16), forward_limits(torch.float32, torch.float32)),
        *(backward_limits(*bfloat16, sums) for sums in range(3)),
        forward_limits(torch.float64, torch.float64),
    ]
    for limits in all_limits:
        for hidden in (*range(1, 600, 7), 769, 1280, 2560, 3000, 4097, 6144, 11008, 14336, 20480):
            for itemsize in (2, 4, 8):
                tile = row_tile(hidden, itemsize, limits)
                if tile is None:
                    assert hidden > 32 * limits.warps * limits.most
                    continue
                rows, columns, tiles, warps, _ = tile
                assert columns * (tiles - 1) < hidden <= columns * tiles or hidden < 16
                assert columns & (columns - 1) == rows & (rows - 1) == 0
                assert warps <= max(4, limits.warps)


# One of every kernel, part and kind of tile; the whole table takes minutes.
COMPILED = [
    *("90:bfloat16:7:plain", "90:bfloat16:64:full", "90:bfloat16:96:full"),
    *("90:bfloat16:768:full,frozen", "90:bfloat16:4096:full", "90:bfloat16:5120:plain"),
    *("90:bfloat16:7168:full", "90:bfloat16:12288:full", "90:bfloat16:16384:full,plain"),
    *("90:bfloat16:28672:plain", "90:bfloat16:65536:partial"),
    *("90:float32:768:plain", "90:float32:5120:plain", "90:float32:12288:full"),
    *("90:float32:65536:plain", "80:bfloat16:768:full", "80:bfloat16:5120:plain"),
    *("80:bfloat16:16384:plain", "80:bfloat16:65536:full"),
]


def compiled(tmp_path: Path, cases: list[str]) -> dict:
    """The report on `cases`: needs no GPU, but a process without the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("aot_compile.py")
    done = subprocess.run(
        [sys.executable, str(script), "--json", *cases],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.launch
def test_compiled_kernels_hold_what_they_promise(tmp_path: Path) -> None:
    """No spills, 128-bit accesses, enough in flight: `problems` in aot_compile.py."""
    found = compiled(tmp_path, COMPILED)
    assert {r["kernel"] for r in found["report"]} == {
        *("forward_tile", "forward_loop", "backward_dots", "reduce_partials"),
        *(f"backward_rows_{part}" for part in ("row", "tail", "head")),
    }
    assert not found["problems"], "\n".join(found["problems"])


@pytest.mark.launch
@pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8),
    reason=f"Triton {triton.__version__} compiles no clusters; 3.8 does",
)
def test_compiled_clusters_hold_what_they_promise(tmp_path: Path) -> None:
    cases = ["90c:bfloat16:8192:full", "90c:bfloat16:12288:plain", "90c:bfloat16:65536:full,plain"]
    found = compiled(tmp_path, cases)
    split = {r["hidden"] for r in found["report"] if r["tile"].count("x") == 3}
    assert split == {8192, 12288, 65536}
    assert not found["problems"], "\n".join(found["problems"])
