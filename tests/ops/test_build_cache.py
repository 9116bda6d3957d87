"""Compiled libraries: what is loaded, who builds, and that nothing of it takes a process down."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_rmsnorm.ops import build_cache, cpu_build

pytestmark = pytest.mark.skipif(cpu_build.library() is None, reason="no C compiler here")

TRIAL = [sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1]).ready()"]
ROOT = Path(__file__).parents[2]
CODE = """
import torch
from hf_rmsnorm import functional
from hf_rmsnorm.ops import cpu_build
x = torch.randn(3, 40, dtype=torch.float64)
expected = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
torch.testing.assert_close(functional.rms_norm(x), expected)
torch.testing.assert_close(functional.rms_norm(x), expected)
print("kernel" if cpu_build.library() else "reference")
"""


def compiler() -> str:
    return next(filter(None, map(shutil.which, cpu_build._compilers())))


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    source = tmp_path / "ready.c"
    source.write_text("int ready(void) { return 1; }\n")
    return [compiler(), "-shared", "-fPIC", str(source)]


@pytest.fixture
def where(tmp_path: Path) -> Path:
    (tmp_path / "kept").mkdir()
    return tmp_path / "kept"


def process(cache: Path, *before: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A first norm, in a process that `before` starts."""
    settings = {"PYTHONPATH": str(ROOT), "HF_RMSNORM_CACHE": str(cache), "CXX": "false"}
    return subprocess.run(
        [*before, sys.executable, "-c", CODE],
        env=dict(os.environ) | settings | env,
        capture_output=True,
        text=True,
        check=False,
    )


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 6),
    "empty": lambda path: os.truncate(path, 0),
    "one bit": flip,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "another's content": lambda path: path.write_bytes(Path(sys.executable).read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_never_loaded_but_built_again(
    damage: str, where: Path, command: list[str]
) -> None:
    built = build_cache.build(where, "lib", [command], TRIAL)
    assert build_cache.find(where, "lib") == built
    DAMAGES[damage](built)
    assert build_cache.find(where, "lib") is None
    assert not built.exists()
    assert build_cache.build(where, "lib", [command], TRIAL) == built
    assert not list(where.glob("partial-*"))


@pytest.mark.launch
def test_a_kernel_cut_short_does_not_kill_the_next_process(tmp_path: Path) -> None:
    for kept in build_cache.folder().glob("rms_norm-*.so"):
        shutil.copy(kept, tmp_path)
    for kept in tmp_path.glob("*.so"):
        os.truncate(kept, 20000)
    done = process(tmp_path)
    assert done.stdout == "kernel\n", done.stderr


def test_only_files_of_this_user_that_others_cannot_write(
    where: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build_cache.build(where, "lib", [command], TRIAL)
    assert built.stat().st_mode & 0o777 == 0o644
    for mode in (0o664, 0o646):
        built.chmod(mode)
        assert build_cache.find(where, "lib") is None
    built.chmod(0o600)
    assert build_cache.find(where, "lib") == built
    if os.geteuid() == 0:
        os.chown(built, 1234, 1234)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert build_cache.find(where, "lib") is None
    assert built.exists()


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_RMSNORM_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    at_home = tmp_path / "home" / ".cache" / "hf_rmsnorm"
    for base, expected in (
        ("relative", at_home),
        ("", at_home),
        (str(tmp_path / "base"), tmp_path / "base" / "hf_rmsnorm"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert build_cache.folder() == expected
        assert expected.stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "relative").exists()
    at_home.chmod(0o775)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert build_cache.folder() == at_home
    assert at_home.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_change_is_not_used(
    where: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_RMSNORM_CACHE", str(where))
    where.chmod(0o755)
    assert build_cache.folder() == where
    where.chmod(0o777)
    with pytest.raises(build_cache.Unavailable, match="others can write"):
        build_cache.folder()
    assert where.stat().st_mode & 0o777 == 0o777
    where.chmod(0o1777)
    assert build_cache.folder() == where
    if os.geteuid() == 0:
        where.chmod(0o755)
        os.chown(where, 1234, 1234)
        link = where.with_name("link")
        link.symlink_to(where)
        monkeypatch.setenv("HF_RMSNORM_CACHE", str(link))
        with pytest.raises(build_cache.Unavailable, match="another user"):
            build_cache.folder()


def test_no_home_and_no_such_user(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("HF_RMSNORM_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(build_cache.Unavailable, match="no cache folder"):
        build_cache.folder()
    with caplog.at_level(logging.INFO, logger="hf_rmsnorm"):
        assert cpu_build.library.__wrapped__() is not None
    assert caplog.text.count("not kept for the next process") == 1


HANGS = "echo $$ > {pid}; sleep 300 & wait"


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill_builders(where: Path) -> None:
    for entry in Path("/proc").glob("[0-9]*"):
        words = (entry / "cmdline").read_bytes()
        if b"build_process.py" in words and str(where).encode() in words:
            os.kill(int(entry.name), signal.SIGKILL)


def test_a_compiler_that_hangs_holds_nobody_up(
    where: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HF_RMSNORM_CACHE", str(where))
    monkeypatch.setenv("CC", script(tmp_path / "slowcc", HANGS.format(pid=tmp_path / "pid")))
    monkeypatch.setattr(cpu_build, "WAIT_SECONDS", 1.0)
    start = time.monotonic()
    assert cpu_build.library.__wrapped__() is None
    assert time.monotonic() - start < 10
    start = time.monotonic()
    assert cpu_build.library.__wrapped__() is None  # as the next process would
    assert time.monotonic() - start < 0.5
    assert caplog.text.count("plain PyTorch is used instead") == 2
    kill_builders(where)
    os.killpg(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_compiler_that_hangs_is_stopped_with_all_that_it_started(
    where: Path, tmp_path: Path
) -> None:
    hangs = script(tmp_path / "slowcc", HANGS.format(pid=tmp_path / "pid"))
    with pytest.raises(build_cache.Unavailable, match="was stopped: it takes more than 1 s"):
        build_cache.build(where, "lib", [[hangs]], TRIAL, limit=1.0)
    assert not is_alive(int((tmp_path / "pid").read_text()))
    assert not list(where.glob("partial-*"))


def test_a_builder_that_was_killed_leaves_no_lock(
    where: Path, tmp_path: Path, command: list[str]
) -> None:
    hangs = script(tmp_path / "slowcc", HANGS.format(pid=tmp_path / "pid"))
    for other in ([hangs], command):
        with pytest.raises(build_cache.StillBuilding):
            build_cache.build(where, "lib", [other], TRIAL, wait=1.0)
    kill_builders(where)
    os.killpg(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert build_cache.build(where, "lib", [command], TRIAL, wait=5.0).exists()


CRASHES = {
    "an instruction that is not there": ("__builtin_trap();", "status -"),
    "memory that is not there": ("*(volatile int *)8 = 1;", "status -11"),
    "wrong results": ("", "wrong results from forward_f32_f32"),
}


@pytest.mark.parametrize("crash", CRASHES)
def test_a_kernel_that_crashes_is_not_used(
    crash: str, where: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, said = CRASHES[crash]
    source = tmp_path / "crash.c"
    source.write_text(
        f"void forward_f32_f32(void) {{ {body} }}\nvoid backward_f32_f32(void) {{}}\n"
    )
    text = f'for last; do :; done; {compiler()} -shared -fPIC {source} -o "$last"'
    monkeypatch.setenv("HF_RMSNORM_CACHE", str(where))
    monkeypatch.setenv("CC", script(tmp_path / "badcc", text))
    with pytest.raises(build_cache.Unavailable, match=said):
        cpu_build._load_or_build()
    assert not list(where.glob("*.so"))


def test_a_library_is_for_one_kind_of_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    here = build_cache.fingerprint(compiler())
    assert here == build_cache.fingerprint(compiler())
    assert any(line.startswith(("flags", "Features")) for line in build_cache.cpu())
    monkeypatch.setattr(build_cache, "cpu", lambda: ["flags: sse"])
    assert build_cache.fingerprint(compiler()) != here


@pytest.mark.launch
def test_a_full_disk(tmp_path: Path) -> None:
    """No file can grow beyond 4 KiB, in any folder."""
    done = process(tmp_path / "cache", "sh", "-c", 'ulimit -f 8; exec "$@"', "sh")
    assert done.returncode == 0 and done.stdout == "reference\n", done.stderr
    assert done.stderr.count("plain PyTorch is used instead") == 1
    assert not list((tmp_path / "cache").glob("*.so"))
