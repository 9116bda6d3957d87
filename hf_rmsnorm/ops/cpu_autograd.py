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
import shutil
import sys
import sysconfig
import threading
from pathlib import Path

import torch
from torch import Tensor

from . import build_cache, cpu_backend, cpu_build, reference, shortcut
from .build_cache import Unavailable
from .reference import Formula

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
_HEADER = _SOURCE.with_name("cpu_tensors.h")

# Why calls went through Python so far; the last one counts.
_reasons: list[str] = []


@functools.cache
def start() -> threading.Thread:
    """Loads the result, or has it built; `shortcut` has it when it is there."""
    thread = threading.Thread(target=_load_or_build, name="hf_rmsnorm build", daemon=True)
    try:
        where, stem = _target()
        if build_cache.find(where, stem) is None:
            _through_python(f"the C++ part is being built, once, in {where}")
            thread.start()
            return thread
    except Exception as error:  # a norm must not fail for want of this
        _through_python(str(error))
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


def _load_or_build() -> None:
    path = None
    try:
        where, stem = _target()
        path = build_cache.find(where, stem)
        if path is None:
            command = [str(_compiler()), str(_SOURCE), *_flags()]
            path = build_cache.build(where, stem, [command], _trial(), nice=19)
        _load(path)
    except Exception as error:
        if path is None:
            advice = "; set HF_RMSNORM_CACHE to another folder" * isinstance(error, OSError)
            _through_python(f"{error}{advice}")
            return
        _through_python(f"{path} cannot be used: {error}")
        path.unlink(missing_ok=True)  # the next process builds it again


@functools.cache
def _compiler() -> str | None:
    wanted = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next(filter(None, map(shutil.which, filter(None, wanted))), None)


def _target() -> tuple[Path, str]:
    """Where the result is kept, and what its name begins with."""
    compiler, headers = _compiler(), Path(sysconfig.get_path("include"))
    if cpu_build.library() is None:
        raise Unavailable("there is no CPU kernel, which the C++ part calls")
    if compiler is None:
        raise Unavailable("no C++ compiler (c++, g++ or clang++) on PATH; install one or set CXX")
    if not (headers / "Python.h").exists():
        raise Unavailable(f"no Python.h in {headers}; install Python's headers (python3-dev)")
    parts = repr((torch.__version__, torch.__file__, sys.implementation.cache_tag, _flags()))
    sources = _SOURCE.read_bytes(), _HEADER.read_bytes()
    name = build_cache.fingerprint(compiler, parts.encode(), *sources)
    return build_cache.folder(), f"autograd-{name}"


def _trial() -> list[str]:
    """It rests on private headers of PyTorch: a process that may crash calls it first."""
    code = f"""
import sys
sys.path[:] = {sys.path!r}
from {__package__} import cpu_autograd
cpu_autograd.try_out(sys.argv[1])
"""
    return [sys.executable, "-c", code]


def try_out(path: str) -> None:
    """Loads what was built, and holds a forward and a backward pass against the reference."""
    _load(Path(path))
    formula = Formula(30, 1e-5, 0.5, False)
    for dtype in (torch.float32, torch.float64):
        x, residual, dy, dsummed = torch.randn(4, 5, 70, dtype=dtype)
        weight, bias = torch.randn(2, 70, dtype=dtype)
        leaves = x, residual, weight, bias
        for t in leaves:
            t.requires_grad_()
        found = shortcut.call(*leaves, lambda *_: formula, *[None] * 5)
        expected = reference.forward(*leaves, formula, save_rstd=False)[:2]
        gradients = [torch.autograd.grad(pair, leaves, (dy, dsummed)) for pair in (found, expected)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


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
