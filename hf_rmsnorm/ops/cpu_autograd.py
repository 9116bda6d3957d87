"""Builds and loads cpu_autograd.cpp, which makes a call on the CPU as light as one of F.layer_norm.

PyTorch's headers take some 20 seconds to compile. The first process to want the result starts that
beside its own work, at low priority, and goes on through Python; it and every later process switch
over when the result is in the cache. Both ways call the same kernels: results are bitwise equal.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cpu_build, reference
from .reference import Formula

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
_NAMESPACE = "hf_rmsnorm_cpu"
_ABANDONED_SECONDS = 600

# "rms_norm" and "add_rms_norm", as soon as they are loaded
operators: dict[str, Any] = {}


@functools.cache
def start() -> threading.Thread:
    """Loads the result, or has it built; `operators` has it when it is there."""
    thread = threading.Thread(target=_load_or_build, name="hf_rmsnorm build", daemon=True)
    target = _target()
    if target is not None and not target.exists():
        thread.start()
        return thread
    thread.run()
    return thread


def finish() -> bool:
    """Waits for `start`; whether the result is in use now."""
    thread = start()
    if thread.ident is not None:
        thread.join()
    return bool(operators)


def _load_or_build() -> None:
    target = _target()
    if target is None:
        return
    if not target.exists():
        said = _build(target)
        if not target.exists():
            logger.info("CPU calls go through Python: %s", said.strip()[-500:])
            return
    try:
        _load(target)
    except (OSError, AttributeError) as error:
        logger.info("CPU calls go through Python: %s cannot be used: %s", target, error)
        target.unlink(missing_ok=True)  # the next process builds it again


@functools.cache
def _compiler() -> str | None:
    wanted = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next(filter(None, map(shutil.which, filter(None, wanted))), None)


def _target() -> Path | None:
    """Where the result is kept; None where it cannot be made or kept."""
    compiler = _compiler()
    if compiler is None or cpu_build.library() is None:
        return None
    folder = cpu_build.cache_dir()
    if not os.access(folder, os.W_OK):
        return None
    parts = repr((torch.__version__, torch.__file__, _flags())).encode(), _SOURCE.read_bytes()
    return folder / f"autograd-{cpu_build.fingerprint(compiler, *parts)}.so"


def _flags() -> list[str]:
    root = Path(torch.__file__).parent
    return [
        *("-O1", "-std=c++20", "-fPIC", "-shared"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{root / 'include'}",
        f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
        f"-L{root / 'lib'}",
        *("-ltorch_cpu", "-lc10"),
    ]


def _build(target: Path) -> str:
    """Compiles beside `target`, then renames; outlives this process. Returns what was said."""
    lock = target.with_suffix(".building")
    if not _taken(lock):
        while not target.exists() and _is_held(lock):
            time.sleep(0.2)
        return "another process that was building it failed"
    handle, partial = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    source, *libraries = str(_SOURCE), *_flags()
    command = shlex.join([str(_compiler()), source, *libraries, "-o", partial])
    steps = (
        f"nice -n 19 {command} && mv {shlex.quote(partial)} {shlex.quote(str(target))}; "
        f"rm -f {shlex.quote(partial)} {shlex.quote(str(lock))}"
    )
    logger.info("building %s in the background, once", target)
    done = subprocess.run(
        ["/bin/sh", "-c", steps],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    return done.stderr


def _is_held(lock: Path) -> bool:
    """Whether a process is building; a lock that was left behind long ago says nothing."""
    try:
        return time.time() - lock.stat().st_mtime < _ABANDONED_SECONDS
    except FileNotFoundError:
        return False


def _taken(lock: Path) -> bool:
    """Whether the lock is ours now."""
    if not _is_held(lock):
        lock.unlink(missing_ok=True)
    try:
        lock.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _load(target: Path) -> None:
    torch.ops.load_library(str(target))
    library, kernels = ctypes.CDLL(str(target)), cpu_build.library()
    number, text, pointer = ctypes.c_int64, ctypes.c_char_p, ctypes.c_void_p
    library.hf_rmsnorm_settings.argtypes = [number] * 3
    library.hf_rmsnorm_kernels.argtypes = [text, text, pointer, pointer]
    library.hf_rmsnorm_settings(
        cpu_build.PARALLEL_ELEMENTS, cpu_build.MAX_BLOCKS, cpu_build.BLOCK_ROWS
    )
    for pair in cpu_build.PAIRS:
        functions = [getattr(kernels, f"{way}_{pair}", None) for way in ("forward", "backward")]
        addresses = [f and ctypes.cast(f, pointer).value for f in functions]
        library.hf_rmsnorm_kernels(*pair.encode().split(b"_"), *addresses)
    _reference_backward()
    found = getattr(torch.ops, _NAMESPACE)
    operators.update({name: getattr(found, name).default for name in ("add_rms_norm", "rms_norm")})


@functools.cache
def _reference_backward() -> torch.library.Library:
    """Gives the C++ side `reference.backward`, also for vmap, old and new."""

    def backward(
        dy: Tensor,
        dsummed: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        k: int,
        eps: float,
        offset: float,
        llama: bool,
        weight_grad: bool,
        bias_grad: torch.dtype | None,
    ) -> list[Tensor]:
        formula = Formula(k, eps, offset, llama)
        wanted: dict[str, Any] = {"weight_grad": weight_grad, "bias_grad": bias_grad}
        found = reference.backward(dy, dsummed, x, weight, None, formula, **wanted)
        return [t for t in found if t is not None]

    library = torch.library.Library(_NAMESPACE, "IMPL")
    for key in ("CompositeImplicitAutograd", "FuncTorchBatched", "Batched"):
        library.impl("reference_backward", backward, key)
    return library
