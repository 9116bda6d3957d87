"""A package that is missing ends a script with a line that says so, before it does anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

NEEDED = {
    "bench_launch": ["triton"],
    "bench_models": ["hf_rmsnorm"],
    "bench_ops": ["torch"],
    "compare": ["matplotlib", "evaluate"],
    "finetune_clm": ["accelerate"],
}


@pytest.mark.launch
@pytest.mark.parametrize(
    ("script", "package"), [(s, package) for s, needed in NEEDED.items() for package in needed]
)
def test_it_says_what_is_missing(tmp_path: Path, script: str, package: str) -> None:
    (tmp_path / f"{package}.py").write_text(
        f"raise ModuleNotFoundError({f'No module named {package!r}'!r}, name={package!r})"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--help"],
        env=dict(os.environ) | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    extra = "." if package == "hf_rmsnorm" else '".[scripts]"'
    assert done.stderr.splitlines()[-1] == (
        f"error: {script}.py needs {package}, which is not installed: pip install {extra}"
    )
    assert "Traceback" not in done.stderr and done.stdout == "" and done.returncode == 1


def test_every_script_takes_part() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        assert path.read_text().count("\nimport harness  # noqa: F401") == 1, path
