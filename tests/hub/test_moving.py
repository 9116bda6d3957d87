"""Files come into their place wholly or not at all, whatever ends the process, and none is lost."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import NoReturn

import pytest
from harness.injecting import Injected, Lines

from hf_rmsnorm import PatchError
from hf_rmsnorm.hub.folders import check_folder, move_into
from hf_rmsnorm.hub.moving import JOURNAL, LOCK, recover, staging, write_file

OLD = {
    "config.json": '{"model_type": "gpt2", "n": 1}',
    "model.safetensors": "old",
    "pytorch_model.bin": "older",
    "README.md": "old",
    "thesis.txt": "mine",
}
NEW = {"config.json": '{"model_type": "gpt2"}', "model.safetensors": "new", "README.md": "new"}
AFTER = {**NEW, "thesis.txt": "mine"}  # the .bin is stale


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "a [model]"
    folder.mkdir()
    fill(folder, OLD)
    return folder


def fill(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


def found(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def save(target: Path) -> None:
    with staging(target) as staged:
        fill(staged, NEW)
        move_into(staged, target)


def left_over(target: Path) -> list[str]:
    return [path.name for path in target.parent.iterdir() if path != target]


def clear(target: Path) -> None:
    """A folder that was made and no more is given a minute, as one of another process."""
    for name in left_over(target):
        (target.parent / name).rmdir()


def test_an_interrupted_move_is_taken_back(target: Path) -> None:
    at = 0
    while True:
        at += 1
        try:
            with Lines(at) as lines:
                save(target)
        except Injected:
            if found(target) != OLD:
                assert found(target) == AFTER, lines.where  # all was moved by then
                fill(target, OLD)
            recover(target)
            clear(target)
        else:
            break
    assert found(target) == AFTER and at > 40


def kill(_: str) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")
@pytest.mark.parametrize("then", ["load", "save"])
def test_a_move_that_was_killed_is_finished_by_the_next_load_or_save(
    target: Path, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, halves = 0, 0
    while True:
        at += 1
        for path in target.iterdir():
            path.unlink()
        fill(target, OLD)
        child = os.fork()
        if not child:
            with Lines(at, kill):
                save(target)
            os._exit(0)
        if not os.waitpid(child, 0)[1]:
            break
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if then == "save":
                recover(target)
            if not (target / "config.json").exists():
                halves += 1
                with pytest.raises(PatchError, match="is damaged"):  # the weights are no weights
                    check_folder(target)
            assert found(target) in (OLD, AFTER), at
            save(target)
        assert not said or "it is finished now" in str(said[0].message)
        assert found(target) == AFTER
        clear(target)
    assert at > 40 and (halves > 5 or then == "save")


def test_saves_under_way_and_folders_of_others_are_left_alone(target: Path) -> None:
    other = target.parent / f".{target.name}.hf_rmsnorm.other"
    with staging(target) as staged:
        recover(target)
        save(target)
        assert staged.is_dir()
    other.mkdir()
    (other / LOCK).touch()
    (other / JOURNAL).write_text('{"old": [], "new": ["../../x"]}')
    (target / "config.json").unlink()
    with pytest.raises(PatchError, match=r"cannot be finished .names outside.*has the new files"):
        check_folder(target)
    assert other.is_dir()


def test_a_move_that_cannot_be_taken_back_keeps_the_files(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="no more"), staging(target) as staged:
        fill(staged, NEW)
        monkeypatch.setattr(Path, "replace", _fails_after(4))
        move_into(staged, target)
    monkeypatch.undo()
    assert not (target / "config.json").exists()
    with pytest.warns(UserWarning, match="it is finished now"):
        recover(target)
    assert found(target) == AFTER and not left_over(target)


def _fails_after(count: int) -> object:
    native, calls = Path.replace, iter(range(count))

    def replace(self: Path, other: Path) -> Path:
        if next(calls, None) is None:
            raise OSError("no more")
        return native(self, other)

    return replace


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("README.md", "README.md.partial", ".README.md.partial"):
        (folder / name).symlink_to(secret)
    write_file(folder / "README.md", "card")
    assert secret.read_text() == "secret" and (folder / "README.md").read_text() == "card"
    assert not (folder / "README.md").is_symlink() and len(list(folder.iterdir())) == 3
    assert (folder / "README.md").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now
