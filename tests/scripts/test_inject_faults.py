"""inject_faults.py at a small count of each part, and what it says of a fault."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import read
from harness.faults import PARTS
from harness.tallies import Tally

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks")


@pytest.mark.parametrize("part", PARTS)
def test_each_part_finds_nothing(part: str, tmp_path: Path, capsys: Any) -> None:
    import inject_faults

    out = tmp_path / "faults.json"
    argv = ["--parts", part, "--count", "24", "--seed", "5", "--json", str(out)]
    assert inject_faults.main(argv) == 0, capsys.readouterr().out
    found = read(out)[part]
    assert found["tries"] >= 24
    assert found["raw"] == found["half"] == found["random"] == found["lost"] == []
    assert "raw errors 0, half-done states 0" in capsys.readouterr().out


def test_what_is_not_typed_is_raw() -> None:
    def fail() -> None:
        raise KeyError("x")

    tally = Tally()
    assert tally.attempt("here", fail) is None
    assert tally.raw == ["here: KeyError('x')"] and tally.faults == 1


def test_a_fault_is_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    import inject_faults

    monkeypatch.setattr(inject_faults, "run", lambda *_: iter([(1, Tally(1, 0, lost=["a file"]))]))
    assert inject_faults.main(["--parts", "full disks"]) == 1
    with pytest.raises(SystemExit):
        inject_faults.main(["--count", "0"])
