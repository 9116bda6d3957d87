"""Files that come into their place wholly or not at all, whatever ends the process."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import PatchError

LOCK, JOURNAL = "lock", "moving.json"


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A new folder on the file system of `target`, gone at the end.

    What earlier saves into `target` left behind when they were killed is put in its place or
    removed first. A lock that ends with the process tells those from saves under way.
    """
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    inside = target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK))
    place = target if inside else target.parent
    beside = Path(tempfile.mkdtemp(dir=place, prefix=_prefix(target)))
    try:
        with FileLock(beside / LOCK):
            staged = beside / "staged"
            staged.mkdir()
            yield staged
    finally:
        if not (beside / JOURNAL).exists():  # else it holds files that were not moved back
            _remove(beside)


def move(staged: Path, target: Path, old: list[str], new: list[str]) -> None:
    """Move the files `old` out of `target` and `new` from `staged` into it, in these orders.

    What is to be moved is written down before: should this be killed, `recover` finishes it.

    Args:
        staged: from `staging`.
    """
    journal = staged.parent / JOURNAL
    moves = _Moves(staged.parent, target, old, new)
    try:
        moves.write()
        moves.do()
        journal.unlink()
    except BaseException:
        moves.take_back()
        journal.unlink(missing_ok=True)
        raise


@dataclass
class _Moves:
    """Renames from `target` to `backup` and from `staged` to `target`.

    Where the files are shows what was done of them: they can be begun again and taken back from
    anywhere.
    """

    beside: Path
    target: Path
    old: list[str]
    new: list[str]

    def write(self) -> None:
        text = json.dumps({"old": self.old, "new": self.new})
        (self.beside / "backup").mkdir()
        (self.beside / f"{JOURNAL}.new").write_text(text, encoding="utf-8")
        (self.beside / f"{JOURNAL}.new").replace(self.beside / JOURNAL)

    def do(self) -> None:
        staged, backup = self.beside / "staged", self.beside / "backup"
        for name in self.old:
            is_old = name not in self.new or _is_there(staged / name)
            if is_old and not _is_there(backup / name) and _is_there(self.target / name):
                (self.target / name).replace(backup / name)
        for name in self.new:
            if _is_there(staged / name):
                (staged / name).replace(self.target / name)

    def take_back(self) -> None:
        staged, backup = self.beside / "staged", self.beside / "backup"
        for name in reversed(self.new):
            if not _is_there(staged / name):
                (self.target / name).replace(staged / name)
        for name in reversed(self.old):
            if _is_there(backup / name):
                (backup / name).replace(self.target / name)


def recover(target: Path, wait: float = 0) -> None:
    """Finish what moved files into `target` when it was killed, and remove what such saves left.

    Args:
        wait: seconds for a process that is moving files there right now.

    Raises:
        PatchError: files could not be moved, or that process takes longer.
    """
    target = target.resolve()
    found: list[Path] = []
    for place in (target.parent, target):
        with suppress(OSError):  # not there, or not ours to look into
            found += [path for path in place.iterdir() if path.name.startswith(_prefix(target))]
    for path in found:
        with suppress(FileNotFoundError):  # another process was faster
            _take_over(path, target, wait)


def _take_over(beside: Path, target: Path, wait: float) -> None:
    status = beside.lstat()
    own = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    if beside.is_symlink() or not beside.is_dir() or not own:
        return
    if not (beside / LOCK).exists():  # made a moment ago, or half removed
        if any(beside.iterdir()) or time.time() - status.st_mtime > 60:
            _remove(beside)
        return
    is_moving = (beside / JOURNAL).exists()
    try:
        with FileLock(beside / LOCK, timeout=wait if is_moving else 0):
            if (beside / JOURNAL).exists():
                _finish(beside, target)
        _remove(beside)
    except Timeout:
        if is_moving and wait:
            raise PatchError(
                f"another process is moving a checkpoint into {target}: wait for it ({beside})"
            ) from None


def _remove(beside: Path) -> None:
    """The lock last: what has none is empty, or can go."""
    with suppress(OSError):
        for path in sorted(beside.iterdir(), key=lambda path: path.name == LOCK):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        beside.rmdir()


def _finish(beside: Path, target: Path) -> None:
    try:
        names = json.loads((beside / JOURNAL).read_text(encoding="utf-8"))
        old, new = names["old"], names["new"]
        if any(Path(name).name != name for name in (*old, *new)):
            raise ValueError("names outside the folder")
        _Moves(beside, target, old, new).do()
        (beside / JOURNAL).unlink()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PatchError(
            f"a save into {target} was killed while its files were moved in, and cannot be "
            f"finished ({error}): {beside} has the new files in staged, the old ones in backup"
        ) from None
    warnings.warn(
        f"a save into {target} was killed while its files were moved in: it is finished now",
        stacklevel=2,
    )


def _prefix(target: Path) -> str:
    return f".{target.name}.hf_rmsnorm."


def _is_there(path: Path) -> bool:
    return os.path.lexists(path)


def write_file(path: Path, text: str) -> Path:
    """Write `path`, whole or not at all. Nothing that lies there is written into, nor what a
    symbolic link leads to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    try:
        with os.fdopen(os.open(fresh, flags, 0o666), "w", newline="", encoding="utf-8") as file:
            file.write(text)
        return fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
