"""Builds the CPU kernel with the system's C compiler, once, and loads it: see build_cache.py."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

from . import build_cache
from .build_cache import StillBuilding, Unavailable

logger = logging.getLogger(__name__)

_SOURCES = [Path(__file__).with_name(name) for name in ("rms_norm.c", "rms_norm_rows.h")]
_TRIAL = Path(__file__).with_name("cpu_trial.py")
_BASE_FLAGS = ["-O2", "-fPIC", "-shared", "-Wno-psabi"]
_ANY_CPU = [["-fopenmp"], []]
_EXTRA_FLAGS = [["-march=native", "-fopenmp"], ["-march=native"], *_ANY_CPU]
# It takes about two. Beyond, the compiler hangs: this process goes on with plain PyTorch.
WAIT_SECONDS = 20.0

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
    except Exception as error:  # a norm must not fail for want of a compiler, whatever it wants
        logger.warning("CPU kernel unavailable, plain PyTorch is used instead: %s", error)
        return None


def _load_or_build() -> ctypes.CDLL:
    compiler = next(filter(None, map(shutil.which, _compilers())), None)
    if compiler is None:
        raise Unavailable("no C compiler (cc, gcc or clang) on PATH; install one or set CC")
    extras = _EXTRA_FLAGS if build_cache.cpu() else _ANY_CPU
    commands = [[compiler, *_BASE_FLAGS, *extra, str(_SOURCES[0]), "-lm"] for extra in extras]
    parts = *(s.read_bytes() for s in (*_SOURCES, _TRIAL)), repr(commands).encode()
    stem = f"rms_norm-{build_cache.fingerprint(compiler, *parts)}"
    trial = [sys.executable, "-I", str(_TRIAL)]
    try:
        where = build_cache.folder()
        path = build_cache.find(where, stem)
        path = path or build_cache.build(where, stem, commands, trial, wait=WAIT_SECONDS)
        return ctypes.CDLL(str(path))
    except StillBuilding:
        raise
    except (OSError, Unavailable) as error:  # no such folder, a full disk, mounted noexec
        logger.info("CPU kernel not kept for the next process: %s", error)
    with tempfile.TemporaryDirectory() as own:
        path = build_cache.build(
            Path(own), stem, commands, trial, wait=WAIT_SECONDS, limit=WAIT_SECONDS
        )
        return ctypes.CDLL(str(path))


def _compilers() -> list[str]:
    return [c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c]


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
