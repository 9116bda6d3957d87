"""Shared by all tests: where kernels run, what uninitialised memory holds, what needs a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

if HAS_GPU:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic mode, below
else:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which nothing did yet

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


def pytest_sessionstart() -> None:
    """Tests see what a user sees from the second process on."""
    from hf_rmsnorm.ops import cpu_autograd

    cpu_autograd.finish()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def nan_filled_empty() -> Iterator[None]:
    """`torch.empty*` holds NaN, so that reading what nobody wrote cannot pass unseen.

    PyTorch does the filling itself, in its deterministic mode.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
