"""Compiled libraries that are kept for later processes: what may be loaded, and who builds.

They are in `$HF_RMSNORM_CACHE`, else `$XDG_CACHE_HOME/hf_rmsnorm`, else `~/.cache/hf_rmsnorm`, each
under a name made of everything it depends on and of its own content. One that was cut short,
changed, or left there by somebody else is never loaded: a library runs whatever is in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

# A compiler that has not finished by then is stopped.
BUILD_SECONDS = 600.0

_BUILDER = Path(__file__).with_name("build_process.py")
# What /proc/cpuinfo says of the instructions a CPU has, on x86, Arm, POWER, RISC-V and Z.
_CPU_KEYS = ("vendor_id", "cpu", "model", "flags", "features", "isa", "uarch", "machine")


class Unavailable(Exception):
    """Says why there is no library."""


class StillBuilding(Unavailable):
    """It takes too long to wait for."""


def folder() -> Path:
    """The cache, made if it is not there: for this user alone.

    Raises:
        Unavailable: nobody says where it is, or others could change what is in it.
        OSError: it cannot be made.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if own := os.environ.get("HF_RMSNORM_CACHE"):
        path = Path(own).absolute()
    elif base.is_absolute():  # others are to be ignored, says the XDG specification
        path = base / "hf_rmsnorm"
    else:
        try:
            path = Path.home() / ".cache" / "hf_rmsnorm"
        except RuntimeError as error:  # no HOME, and no such user
            raise Unavailable(f"there is no cache folder: {error}") from error
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if not own and found.st_uid == _user() and found.st_mode & 0o077:
        path.chmod(0o700)  # made by an earlier version
        found = path.stat()
    is_ours = found.st_uid in (0, _user())
    if not is_ours or (found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX):
        whose = "others can write into it" if is_ours else "it belongs to another user"
        raise Unavailable(f"{path} is not used: {whose}; set HF_RMSNORM_CACHE to a folder of yours")
    return path


def find(where: Path, stem: str) -> Path | None:
    """The library called `stem`, whole and safe to load; one that is damaged is thrown away."""
    for path in sorted(where.glob(f"{stem}-*.so")):
        problem = _problem(path)
        if problem is None:
            return path
        logger.info("%s is not used: %s", path, problem)
        if problem == _DAMAGED:
            with contextlib.suppress(OSError):
                path.unlink()
    return None


_DAMAGED = "it is damaged"


def _problem(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_uid not in (0, _user()):
                return "it belongs to another user"
            if found.st_mode & 0o022:
                return "others can write it"
            digest = hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        return str(error)
    return None if path.stem.endswith(f"-{digest}") else _DAMAGED


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0  # Windows says 0 of every file


def build(
    where: Path,
    stem: str,
    commands: Sequence[Sequence[str]],
    trial: Sequence[str],
    *,
    wait: float | None = None,
    limit: float = BUILD_SECONDS,
    nice: int = 0,
) -> Path:
    """Has the library built in `where`; if another process is at it, waits for that one.

    A process of its own builds, and goes on if this one ends. Only what passed its trial gets its
    name, so no other process ever sees half of a library.

    Args:
        commands: compilers with their arguments, tried in turn; `-o` and a path are added.
        trial: a program that is called with that path, and fails if the library is no good.
        wait: seconds after its start in which a build must end. It goes on nevertheless.
        limit: seconds after which it is stopped.
        nice: added to the niceness of the process.

    Raises:
        StillBuilding: `wait` is over.
        Unavailable: the build failed.
        OSError: nothing can be written in `where`.
    """
    try:
        import fcntl
    except ImportError:
        raise Unavailable("this system has no fcntl") from None
    python = _python()
    lock = os.open(where / f"{stem}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        # The builder inherits the lock: it is held as long as that lives, and never stale.
        while not _taken(lock, fcntl):
            if wait is not None and time.time() - os.fstat(lock).st_mtime > wait:
                raise StillBuilding(_slow(wait, where))
            time.sleep(0.05)
        if path := find(where, stem):
            return path
        os.utime(lock)
        job = {
            "where": str(where),
            "stem": stem,
            "commands": [list(command) for command in commands],
            "trial": list(trial),
            "limit": limit,
            "nice": nice,
        }
        builder = subprocess.Popen(
            [python, "-I", str(_BUILDER), json.dumps(job)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            start_new_session=True,  # Ctrl-C is for this process
        )
    finally:
        os.close(lock)
    try:
        said, _ = builder.communicate(timeout=wait)
    except subprocess.TimeoutExpired:
        threading.Thread(target=builder.communicate, daemon=True).start()  # takes its status
        raise StillBuilding(_slow(wait, where)) from None
    if path := find(where, stem):
        return path
    text = said.decode(errors="replace").strip()[-500:]
    raise Unavailable(text or f"the process that builds ended with status {builder.returncode}")


def _slow(wait: float | None, where: Path) -> str:
    return f"the compiler takes more than {wait:g} s; a later process will find it in {where}"


def _taken(lock: int, fcntl: object) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # type: ignore[attr-defined]
    except BlockingIOError:
        return False
    except OSError:  # not on this file system: two may build at once, which does no harm
        pass
    return True


def _python() -> str:
    """The interpreter; a program that has Python inside would be started a second time."""
    path = sys.executable
    if getattr(sys, "frozen", False) or not Path(path or "").name.startswith(("python", "pypy")):
        raise Unavailable(f"no Python interpreter to build with, only {path!r}")
    return path


def fingerprint(compiler: str, *parts: bytes) -> str:
    """Changes with `parts`, the compiler and the kind of CPU: code is made for that one."""
    status = Path(compiler).resolve().stat()
    built_by = repr((compiler, status.st_size, status.st_mtime_ns)).encode()
    runs_on = "\n".join([platform.machine(), *cpu()]).encode()
    return hashlib.sha256(b"\0".join([*parts, built_by, runs_on])).hexdigest()[:20]


def cpu() -> list[str]:
    """What tells this kind of CPU from others; nothing where the system does not say."""
    lines: list[str] = []
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as file:
        for line in file:
            if not line.strip() and lines:  # the next processor
                break
            key = line.split(":")[0].strip().lower()
            if key.startswith(_CPU_KEYS) and "mhz" not in key:
                lines.append(line.strip())
    return lines
