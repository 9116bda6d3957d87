"""Builds and loads cpu_autograd.cpp, which makes a call on the CPU as light as one of F.layer_norm.

PyTorch's headers take some 20 seconds to compile. The first process to want the result starts that
beside its own work, at low priority, and goes on through Python; it and every later process switch
over when the result is in the cache. Both ways call the same kernels: results are bitwise equal.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import logging
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from . import cpu_backend, cpu_build, reference, shortcut
from .reference import Formula

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
_HEADER = _SOURCE.with_name("cpu_tensors.h")
_ABANDONED_SECONDS = 600

# Why calls went through Python so far; the last one counts.
_reasons: list[str] = []


@functools.cache
def start() -> threading.Thread:
    """Loads the result, or has it built; `shortcut` has it when it is there."""
    target = _target()
    thread = threading.Thread(
        target=_load_or_build, args=(target,), name="hf_rmsnorm build", daemon=True
    )
    if target is not None and not target.exists():
        _through_python(f"the C++ part is being built, once, as {target}")
        thread.start()
        return thread
    thread.run()
    return thread


def finish() -> bool:
    """Waits for `start`; whether the result is in use now."""
    thread = start()
    if thread.ident is not None:
        thread.join()
    return _in_use()


def status() -> str:
    """How calls on the CPU go now, in words; has the C++ part built if it is not."""
    start()
    return "through C++" if _in_use() else f"through Python: {_reasons[-1]}"


def _in_use() -> bool:
    return shortcut.call is not shortcut.none


def _through_python(reason: str) -> None:
    _reasons.append(reason)
    logger.info("CPU calls go through Python: %s", reason)


def _load_or_build(target: Path | None) -> None:
    if target is None:
        return
    if not target.exists():
        said = _build(target)
        if not target.exists():
            _through_python(f"{_compiler()} failed: {said.strip()[-500:]}")
            return
    try:
        _load(target)
    except (ImportError, AttributeError) as error:
        _through_python(f"{target} cannot be used: {error}")
        target.unlink(missing_ok=True)  # the next process builds it again


@functools.cache
def _compiler() -> str | None:
    wanted = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next(filter(None, map(shutil.which, filter(None, wanted))), None)


def _target() -> Path | None:
    """Where the result is kept; None where it cannot be made or kept."""
    compiler, folder = _compiler(), cpu_build.cache_dir()
    headers = Path(sysconfig.get_path("include"))
    if cpu_build.library() is None:
        _through_python("there is no CPU kernel, which the C++ part calls")
    elif compiler is None:
        _through_python("no C++ compiler (c++, g++ or clang++) on PATH; install one or set CXX")
    elif not (headers / "Python.h").exists():
        _through_python(f"no Python.h in {headers}; install Python's headers (python3-dev)")
    elif not os.access(folder, os.W_OK):
        _through_python(f"{folder} cannot be written; set HF_RMSNORM_CACHE to another folder")
    else:
        parts = repr((torch.__version__, torch.__file__, sys.implementation.cache_tag, _flags()))
        sources = _SOURCE.read_bytes(), _HEADER.read_bytes()
        name = cpu_build.fingerprint(compiler, parts.encode(), *sources)
        return folder / f"autograd-{name}.so"
    return None


def _flags() -> list[str]:
    root = Path(torch.__file__).parent
    return [
        *("-O1", "-std=c++20", "-fPIC", "-shared"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{root / 'include'}",
        f"-I{sysconfig.get_path('include')}",
        f"-L{root / 'lib'}",
        *("-ltorch_python", "-ltorch_cpu", "-lc10"),
        *(("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()),
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
    loader = importlib.machinery.ExtensionFileLoader(_SOURCE.stem, str(target))
    spec = importlib.util.spec_from_file_location(loader.name, target, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.set_up(
        cpu_build.PARALLEL_ELEMENTS, cpu_build.MAX_BLOCKS, cpu_build.BLOCK_ROWS, _backward
    )
    kernels, dtypes = cpu_build.library(), {name: t for t, name in cpu_backend.NAMES.items()}
    for pair in cpu_build.PAIRS:
        names = [f"{way}_{pair}" for way in ("forward", "backward", "widen")]
        found = [getattr(kernels, name, None) for name in names]
        addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in found if f is not None]
        if addresses:  # no float16 from older compilers
            module.add_kernels(*(dtypes[name] for name in pair.split("_")), *addresses)
    shortcut.call = module.normalise


def _backward(
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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the C++ side calls for gradients that are no plain memory, or that need a graph."""
    return reference.backward(
        dy,
        dsummed,
        x,
        weight,
        None,
        Formula(k, eps, offset, llama),
        weight_grad=weight_grad,
        bias_grad=bias_grad,
    )
