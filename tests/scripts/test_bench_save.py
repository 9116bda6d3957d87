"""bench_save.py at a size that says nothing about time: what it writes, times and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import read

TINY = ["--width", "24", "--layers", "2", "--length", "9", "--vocabulary", "53", "--rounds", "3"]


def test_each_format_in_each_mode(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import bench_save

    out, folder = tmp_path / "save.json", tmp_path / "disk"
    bench_save.main([*TINY, "--folder", str(folder), "--out", str(out)])
    document = read(out)
    rows = {(row["mode"], row["format"]): row for row in document["rows"]}
    formats = ("unpatched", "stock format", "own format")
    assert list(rows) == [(mode, name) for mode in ("cached", "synced") for name in formats]
    for (mode, name), row in rows.items():
        assert 0 < row["us_p10"] <= row["us_p50"] <= row["us_p90"]
        added = row["added"]
        assert -1 < added["min"] <= added["median"] <= added["max"]
        fastest = rows[mode, "unpatched"]["us_p10"]
        assert row["added_ms"] == pytest.approx((row["us_p10"] - fastest) / 1e3)
        assert row["added_p10"] == pytest.approx(1e3 * row["added_ms"] / fastest)
        if name == "unpatched":
            assert added == {"median": 0, "min": 0, "max": 0}
    written = document["written"]
    assert [written[name]["files"] for name in formats] == [3, 4, 5]
    assert written["stock format"]["bytes"] > written["unpatched"]["bytes"]
    assert document["environment"]["command"].startswith("script --width 24")
    assert list(folder.iterdir()) == [], "nothing is left behind"
    assert "cached   own format" in capsys.readouterr().out


def test_a_model_in_another_format_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench_save

    monkeypatch.setitem(bench_save.ARMS, "stock format", {"strategy": "direct"})
    with pytest.raises(SystemExit, match="stock format was written in the own format"):
        bench_save.main([*TINY, "--folder", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_what_is_timed_is_the_save_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_save
    from harness.benchmark import Call

    clock = iter(range(100))
    monkeypatch.setattr(bench_save.time, "perf_counter", lambda: next(clock))
    call = Call(run=lambda: next(clock), before=lambda: [next(clock) for _ in range(7)])
    assert bench_save.Saving().block(call, 3) == 2
