"""A Triton driver for no device at all: kernels compile for a real one, launches are only noted.

For measuring and testing what happens on the host. Needs Triton's compiler, so `TRITON_INTERPRET`
must not be set.
"""

from __future__ import annotations

import itertools
from typing import Any

import triton
from triton.backends.compiler import GPUTarget


class StubDriver:
    """Stands in for `triton.backends.nvidia.driver.CudaDriver`.

    Attributes:
        device: what `get_current_device` answers.
        calls: the arguments of every launch while `recording`.
    """

    def __init__(self, capability: int = 90) -> None:
        self.device = 0
        self.recording = True
        self.calls: list[tuple[Any, ...]] = []
        self._loads = itertools.count()
        self.target = GPUTarget("cuda", capability, 32)
        self.utils = self
        self.launcher_cls = self._launcher

    def activate(self) -> None:
        triton.runtime.driver.set_active(self)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 1000 + device

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[str, str, int, int, int]:
        """Module, function, registers, spills, threads per block; every load has a new handle."""
        handle = f"{name}@{device}#{next(self._loads)}"
        return f"module {handle}", handle, 32, 0, 1024

    def unload_module(self, module: str) -> None:
        pass

    def _launcher(self, source: Any, metadata: Any) -> Any:
        """Where a real driver has a launcher in C for each compiled kernel."""
        calls = self.calls

        def run(*args: Any) -> None:
            if self.recording:
                calls.append(args)

        return run
