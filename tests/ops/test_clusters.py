"""Clusters: asked for, tried on the device, and given up without a wrong number.

The interpreter runs the same tiles as one program; what a cluster adds is the compiler's, which
needs Triton 3.8 and a GPU: scripts/gpu_check.py has the checks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch

from hf_rmsnorm.ops import reference, triton_backend, triton_clusters
from hf_rmsnorm.ops.triton_layout import (
    BACKWARD_PART,
    FORWARD_PART,
    Tile,
    backward_limits,
    row_tile,
)
from hf_rmsnorm.ops.triton_layout import forward_limits as limits_of_forward

BF16, FP32 = torch.bfloat16, torch.float32
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_backend, "_REDUCE_COLUMNS", 1024)  # fewer programs to interpret
    monkeypatch.setattr(triton_clusters, "_TRIED", ((3, 5000), (1, 20000)))
    triton_clusters.clusters_work.cache_clear()
    yield
    triton_clusters.clusters_work.cache_clear()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Kernels and their `num_ctas`; the launches go without it where there are no clusters."""
    found: list[tuple[str, int]] = []
    launch = triton_backend.launch

    def recorded(kernel, grid, *args, num_ctas=1, **constants):
        found.append((kernel.__name__, num_ctas))
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(triton_backend, "launch", recorded)
    return found


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, and a device with all that is needed, as far as it says."""
    monkeypatch.setenv("HF_RMSNORM_CLUSTERS", "1")
    monkeypatch.setattr(triton_clusters, "what_lacks", lambda device: None)


def test_which_rows_are_split() -> None:
    forward, backward = limits_of_forward(BF16, FP32), backward_limits(BF16, FP32, 1)
    assert {
        n: row_tile(n, 2, forward, FORWARD_PART) for n in (16384, 20000, 32768, 131072, 300000)
    } == {
        16384: Tile(1, 16384, 1, 16),
        20000: Tile(1, 8192, 3, 16, 2),
        32768: Tile(1, 32768, 1, 16, 2),
        131072: Tile(1, 131072, 1, 16, 8),
        300000: None,
    }
    assert {
        n: row_tile(n, 2, backward, BACKWARD_PART) for n in (4096, 5120, 8192, 65536, 262144)
    } == {
        4096: Tile(1, 4096, 1, 8),
        5120: Tile(1, 2048, 3, 4, 2),
        8192: Tile(1, 8192, 1, 8, 2),
        65536: Tile(1, 65536, 1, 16, 8),
        262144: None,
    }


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_a_row_of_a_cluster(launched: list, dtype: torch.dtype) -> None:
    formula = reference.Formula(6000, 1e-5, 1.0, True)
    x, residual, dy, dsummed = torch.randn(4, 2, 20000, device=DEVICE).to(dtype)
    weight, bias = torch.randn(2, 20000, device=DEVICE).to(dtype)
    results = []
    for backend, chosen in ((triton_backend, {"clusters": True}), (reference, {})):
        y, summed, rstd = backend.forward(
            x, residual, weight, bias, formula, save_rstd=True, **chosen
        )
        grads = backend.backward(
            *(dy, dsummed, summed, weight, rstd, formula),
            **{"weight_grad": True, "bias_grad": dtype, **chosen},
        )
        results.append((y, summed, rstd, *grads))
    for got, expected in zip(*results, strict=True):
        # the interpreter cuts to bfloat16 where hardware rounds
        exact = {"rtol": 2e-5, "atol": 2e-5} if dtype == FP32 else {"rtol": 3e-2, "atol": 3e-2}
        torch.testing.assert_close(got, expected, **exact)
    assert launched == [("forward_tile", 2), ("backward_rows", 8), ("reduce_partials", 1)]


def test_not_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(device: torch.device) -> str | None:
        raise AssertionError("was looked for")

    monkeypatch.delenv("HF_RMSNORM_CLUSTERS", raising=False)
    monkeypatch.setattr(triton_clusters, "what_lacks", lacks)
    assert not triton_clusters.clusters_work(DEVICE)


@pytest.mark.parametrize(
    ("device", "capability", "version", "reason"),
    [
        ("cpu", (9, 0), "3.9.0", "a feature of NVIDIA GPUs"),
        ("cuda", (8, 0), "3.9.0", "the compute capability is 8.0, not 9 or 10"),
        ("cuda", (12, 0), "3.9.0", "the compute capability is 12.0, not 9 or 10"),
        ("cuda", (9, 0), "3.7.1", "Triton is 3.7.1; clusters need 3.8"),
        ("cuda", (9, 0), "3.10.0+git1234", None),
        ("cuda", (10, 0), "3.8.0", None),
    ],
)
def test_what_they_need(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    capability: tuple[int, int],
    version: str,
    reason: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton_clusters.triton, "__version__", version)
    found = triton_clusters.what_lacks(torch.device(device))
    assert reason in found if reason else found is None


@pytest.mark.usefixtures("able")
def test_a_device_is_tried_once(launched: list) -> None:
    state = torch.get_rng_state()
    assert triton_clusters.clusters_work(DEVICE)
    tried = [name for name, ctas in launched if ctas > 1]
    assert tried == ["backward_rows", "forward_tile", "backward_rows"]
    assert triton_clusters.clusters_work(DEVICE) and len(launched) == 6
    assert torch.equal(state, torch.get_rng_state())


def broken(num_ctas: int) -> None:
    raise RuntimeError("PassManager::run failed")


def wrong(num_ctas: int) -> None:
    """Nothing is launched, so that what a test finds is what torch.empty left."""


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize(
    ("launch", "reason"),
    [(broken, "RuntimeError: PassManager::run failed"), (wrong, "dx of 3 rows of 5000 is off by")],
)
def test_what_fails_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    launch: Callable[[int], None],
    reason: str,
) -> None:
    kept, ctas = triton_backend.launch, []

    def in_clusters(kernel, grid, *args, num_ctas=1, **constants):
        ctas.append(num_ctas)
        if num_ctas > 1:
            launch(num_ctas)
        else:
            kept(kernel, grid, *args, **constants)

    monkeypatch.setattr(triton_backend, "launch", in_clusters)
    x = torch.randn(2, 5000, device=DEVICE)
    formula = reference.Formula(5000, 1e-5, 0.0, False)
    with caplog.at_level(logging.WARNING, logger=triton_clusters.__name__):
        for _ in range(2):
            ctas.clear()
            y, _, rstd = triton_backend.forward(x, None, None, None, formula, save_rstd=True)
            dx, *_ = triton_backend.backward(
                y, None, x, None, rstd, formula, weight_grad=False, bias_grad=None
            )
    assert ctas == [1, 1], "tried again"
    expected, *_ = reference.backward(
        y, None, x, None, rstd, formula, weight_grad=False, bias_grad=None
    )
    torch.testing.assert_close(dx, expected)
    (line,) = caplog.messages
    assert line.startswith("HF_RMSNORM_CLUSTERS=1 has no effect on") and reason in line
