"""Builds the CPU kernel with the system's C compiler, once, and loads it.

The library is kept in `$HF_RMSNORM_CACHE`, else `$XDG_CACHE_HOME/hf_rmsnorm`, else
`~/.cache/hf_rmsnorm`, under a name made of everything it depends on.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

_SOURCES = [Path(__file__).with_name(name) for name in ("rms_norm.c", "rms_norm_rows.h")]
_BASE_FLAGS = ["-O2", "-fPIC", "-shared", "-Wno-psabi"]
_EXTRA_FLAGS = [["-march=native", "-fopenmp"], ["-march=native"], ["-fopenmp"], []]

# dtypes of x, and of y and dy, that the kernel is compiled for; float16 needs a newer compiler
PAIRS = (
    *("f32_f32", "f32_bf16", "f32_f16", "bf16_bf16", "bf16_f32", "f16_f16", "f16_f32"),
    "f64_f64",
)
# Below this many elements, waking a second thread costs more than it saves.
PARALLEL_ELEMENTS = 65536
# Rows of partial sums of dweight and dbias: at most so many, each over at least so many rows.
MAX_BLOCKS, BLOCK_ROWS = 64, 16

_POINTERS_FORWARD, _POINTERS_BACKWARD = 7, 10
_SIZES_FORWARD, _SIZES_BACKWARD = 5, 6


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None, said once in the log, where it cannot be had."""
    try:
        return _typed(_load_or_build())
    except _Unavailable as error:
        logger.warning("CPU kernel unavailable, plain PyTorch is used instead: %s", error)
        return None


class _Unavailable(Exception):
    """Says why there is no CPU kernel."""


def cache_dir() -> Path:
    if own := os.environ.get("HF_RMSNORM_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hf_rmsnorm"


def _load_or_build() -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, _compilers())), None)
    if compiler is None:
        raise _Unavailable("no C compiler (cc, gcc or clang) on PATH; install one or set CC")
    parts = *(s.read_bytes() for s in _SOURCES), repr((_BASE_FLAGS, _EXTRA_FLAGS)).encode()
    name = f"rms_norm-{fingerprint(compiler, *parts)}.so"
    try:
        target = cache_dir() / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # not there yet, or damaged
            return ctypes.CDLL(str(target))
        return _build(compiler, target)
    except (OSError, RuntimeError) as error:  # no home folder, or one that cannot be written
        logger.info("CPU kernel not kept for the next process: %s", error)
    with tempfile.TemporaryDirectory() as own:
        return _build(compiler, Path(own) / name)


def _compilers() -> list[str]:
    return [c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c]


def fingerprint(compiler: str, *parts: bytes) -> str:
    """Changes with `parts`, the compiler and what this CPU can do."""
    status = Path(compiler).resolve().stat()
    built_by = repr((compiler, status.st_size, status.st_mtime_ns)).encode()
    runs_on = " ".join([platform.machine(), platform.processor(), *_cpu_features()]).encode()
    return hashlib.sha256(b"\0".join([*parts, built_by, runs_on])).hexdigest()[:20]


def _cpu_features() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return next((x.split() for x in lines if x.startswith(("flags", "Features"))), [])


def _build(compiler: str, target: Path) -> ctypes.CDLL:
    """Compiles beside `target`, tries the result, then renames: no process sees half of it."""
    logger.info("building the CPU kernel with %s, once", compiler)
    said = ""
    for extra in _EXTRA_FLAGS:
        handle, partial = tempfile.mkstemp(suffix=".so", dir=target.parent)
        os.close(handle)
        try:
            done = subprocess.run(
                [compiler, *_BASE_FLAGS, *extra, str(_SOURCES[0]), "-o", partial, "-lm"],
                capture_output=True,
                text=True,
                check=False,
            )
            said = done.stderr
            if done.returncode == 0:
                loaded = ctypes.CDLL(partial)
                Path(partial).replace(target)
                return loaded
        except OSError as error:
            said = str(error)
        finally:
            Path(partial).unlink(missing_ok=True)
    raise _Unavailable(f"{compiler} failed: {said.strip()[-500:]}")


def _typed(lib: ctypes.CDLL) -> ctypes.CDLL:
    p, n, d, i = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_double, ctypes.c_int
    for pair in PAIRS:
        for name, signature in (
            ("forward", [p] * _POINTERS_FORWARD + [n] * _SIZES_FORWARD + [d, d, i, i]),
            ("backward", [p] * _POINTERS_BACKWARD + [n] * _SIZES_BACKWARD + [d, i, n, i]),
        ):
            function = getattr(lib, f"{name}_{pair}", None)  # no float16 in older compilers
            if function is not None:
                function.argtypes, function.restype = signature, None
    return lib
