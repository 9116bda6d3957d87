"""compare.py: fair, resumable, and a report that says what results.json says."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Assets, Script, read
from harness import report
from harness.results import quantile, spread, step_times, write_json

pytestmark = pytest.mark.filterwarnings("ignore:.*changed approximately:UserWarning")

FLAGS = [
    *("--arms", "rmsnorm:direct", "prmsnorm:direct:1", "prmsnorm:direct:0.1"),
    *("--max_train_steps", "6", "--eval_steps", "3", "--learning_rate", "1e-2"),
    *("--per_device_train_batch_size", "4"),
    *("--throughput_rounds", "2", "--throughput_steps", "2"),
]
ARMS = ["layernorm", "rmsnorm:direct", "prmsnorm:direct:1", "prmsnorm:direct:0.1"]


@pytest.fixture
def compared(compare: Script, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    assert compare(*FLAGS, "--seeds", "0", "1", "--output_dir", str(out)) == 0
    return out


def cells(table: str) -> dict[str, list[str]]:
    """Rows of a Markdown table by their first cell."""
    lines = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


def numbers(cell: str) -> list[float]:
    """`median [min, max]`, or one number if all are the same."""
    found = [float(part) for part in re.findall(r"[-+.0-9]+", cell)]
    return found * 3 if len(found) == 1 else found


def test_comparison(compared: Path, compare: Script, capsys: pytest.CaptureFixture) -> None:
    results = read(compared / "results.json")
    assert [arm["name"] for arm in results["arms"]] == ARMS
    runs = {(run["arm"]["name"], run["seed"]): run for run in results["runs"]}
    assert set(runs) == {(arm, seed) for arm in ARMS for seed in (0, 1)}

    # pRMSNorm that reads all features is RMSNorm: same start, same batches, same masks or not?
    for seed in (0, 1):
        ours, theirs = runs["prmsnorm:direct:1", seed], runs["rmsnorm:direct", seed]
        for mine, other in zip(ours["history"], theirs["history"], strict=True):
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert mine["lr"] == other["lr"]
    for arm in ARMS:
        first, second = runs[arm, 0], runs[arm, 1]
        assert first["before"] == second["before"], "the same start"
        assert first["history"] != second["history"], "but other batches"
        assert [point["step"] for point in first["evaluations"]] == [0, 3, 6]
        assert first["after"]["loss"] < first["before"]["loss"]
    assert runs["prmsnorm:direct:0.1", 0]["before"] != runs["layernorm", 0]["before"]

    assert_report_says_what_the_results_say(compared, results)
    for plot in ("loss_vs_steps.png", "loss_vs_time.png", "throughput.png"):
        content = (compared / plot).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000
        assert f"({plot})" in (compared / "report.md").read_text()

    # A second call with a further seed trains that one only, and one with other settings nothing.
    capsys.readouterr()
    kept = {path: path.stat().st_mtime_ns for path in (compared / "runs").iterdir()}
    assert compare(*FLAGS, "--seeds", "0", "1", "2", "--output_dir", str(compared)) == 0
    assert capsys.readouterr().out.count("done before") == len(kept) + 1
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert len(read(compared / "results.json")["runs"]) == 3 * len(ARMS)
    other = ["--weight_decay", "0.5", "--output_dir", str(compared)]
    assert compare(*FLAGS, "--seeds", "0", *other) == 2
    message = capsys.readouterr().err.splitlines()
    assert "other settings" in message[0]
    assert message[1:] == ["  training.weight_decay: stored 0.0, now 0.5"]
    assert len(read(compared / "results.json")["runs"]) == 3 * len(ARMS)
    assert compare(*FLAGS, "--seeds", "0", *other, "--overwrite", "--throughput_rounds", "0") == 0
    assert len(list((compared / "runs").iterdir())) == len(ARMS)
    assert read(compared / "results.json")["throughput"] is None


def assert_report_says_what_the_results_say(folder: Path, results: dict[str, Any]) -> None:
    text = (folder / "report.md").read_text()
    tables = [part for part in text.split("\n\n") if part.startswith("| arm")]
    assert len(tables) == 3
    quality, training, inference = map(cells, tables)
    assert list(quality) == list(training) == list(inference) == ARMS
    for row in results["quality"]:
        shown = quality[row["arm"]]
        columns = ("loss_before", "loss_after", "loss_difference", "perplexity_after",
                   "token_accuracy_after")  # fmt: skip
        for column, cell in zip(columns, shown[1:], strict=True):
            if column == "loss_difference" and row["arm"] == "layernorm":
                assert cell == ""
                continue
            expected = [row[column][key] for key in ("median", "min", "max")]
            assert numbers(cell) == pytest.approx(expected, abs=0.0051)
    for mode, table in (("training", training), ("inference", inference)):
        for arm in ARMS:
            row = results["throughput"][arm][mode]
            speed, ratio, times, peak = table[arm]
            assert float(speed) == round(row["tokens_per_s"])
            assert peak == "not measured" and row["peak_memory_bytes"] is None
            expected = [1000 * row[f"step_s_p{q}"] for q in (10, 50, 90)]
            assert [float(part) for part in times.split("/")] == pytest.approx(expected, abs=0.051)
            expected = [row["speed_ratio"][key] for key in ("median", "min", "max")]
            assert numbers(ratio) == pytest.approx(expected, abs=0.00051)
            assert row["steps"] == 4
    for name in ("torch", "transformers"):
        assert f"{name} {results['environment']['versions'][name]}" in text


def test_other_weights_at_the_same_place_are_noticed(
    compare: Script, assets: Assets, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(assets.checkpoint, model)
    flags = [
        *("--model_name_or_path", str(model), "--output_dir", str(out), "--seeds", "0"),
        *("--arms", "layernorm", "--max_train_steps", "1", "--throughput_rounds", "0"),
    ]
    assert compare(*flags, start="") == 0
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    assert compare(*flags, start="") == 2
    assert "weights: stored" in capsys.readouterr().err


def test_quality_rows_pair_the_seeds() -> None:
    def run(arm: str, seed: int, before: float, after: float | None) -> dict[str, Any]:
        scores = [
            {"loss": loss, "perplexity": None if loss is None else math.exp(loss),
             "token_accuracy": 0.5}
            for loss in (before, after)
        ]  # fmt: skip
        return {"arm": {"name": arm}, "seed": seed, "patch": None,
                "before": scores[0], "after": scores[1]}  # fmt: skip

    control, patched, lost = report.quality_rows([
        run("layernorm", 0, 3.0, 2.0), run("layernorm", 1, 3.0, 1.0), run("layernorm", 2, 3.0, 1.5),
        run("rmsnorm", 2, 3.5, 1.4), run("rmsnorm", 0, 3.5, 2.2), run("rmsnorm", 1, 3.5, 1.3),
        run("none", 0, 9.0, None), run("none", 1, 9.0, 8.0), run("none", 2, 9.0, 8.0),
    ])  # fmt: skip
    assert control["loss_after"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    expected = {"median": 0.2, "min": -0.1, "max": 0.3}
    assert patched["loss_difference"] == pytest.approx(expected)
    assert lost["loss_after"] is None and lost["loss_difference"] is None
    assert cells(report.quality_table([control, patched, lost]))["none"][2] == "diverged"


def test_statistics() -> None:
    assert quantile([1, 2, 3, 4, 5], 0.5) == 3
    assert quantile([0, 10], 0.1) == pytest.approx(1)
    assert spread([3.0, 1.0, 2.0]) == {"median": 2, "min": 1, "max": 3}
    assert spread([1.0, math.nan]) is spread([None]) is None
    timing = step_times([0.1, 0.2, 0.4], tokens_per_step=10)
    assert timing["tokens_per_s"] == 50 and timing["steps"] == 3


def test_json_is_written_whole_and_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    write_json(path, {"loss": math.nan, "runs": [{"loss": math.inf}, 1.5]})
    assert read(path) == {"loss": None, "runs": [{"loss": None}, 1.5]}
    with pytest.raises(TypeError):
        write_json(path, {"loss": object()})
    assert read(path)["runs"][1] == 1.5, "the old file survives"


def test_from_scratch_with_the_papers_baselines(compare: Script, tmp_path: Path) -> None:
    flags = ["--arms", "rmsnorm:direct", "none", "l2norm", "--seeds", "0", "1",
             "--max_train_steps", "2", "--throughput_rounds", "0"]  # fmt: skip
    assert compare(*flags, "--output_dir", str(tmp_path / "out"), start="scratch") == 0
    runs = read(tmp_path / "out" / "results.json")["runs"]
    starts = {(run["arm"]["name"], run["seed"]): run["before"]["loss"] for run in runs}
    assert starts["layernorm", 0] != starts["layernorm", 1], "initial weights depend on the seed"
    assert abs(starts["layernorm", 0] - starts["rmsnorm:direct", 0]) < 0.05, "not on the arm"
    assert not (tmp_path / "out" / "loss_vs_time.png").exists()


@pytest.mark.parametrize(
    ("message", "flags"),
    [
        ("unknown norm", ["--arms", "rmsnorm", "batchnorm"]),
        ("twice", ["--arms", "rmsnorm", "rmsnorm:auto"]),
        ("from scratch", ["--arms", "none"]),
        ("a seed is given twice", ["--seeds", "1", "1"]),
        ("--throughput_steps", ["--throughput_steps", "0"]),
        ("ln_7", ["--arms", "rmsnorm:direct", "--include", "*ln_7"]),
        ("maximum of 32", ["--block_size", "64"]),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    compare: Script,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    message: str,
    flags: list[str],
) -> None:
    out = tmp_path / "out"
    assert compare(*flags, "--output_dir", str(out)) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_folder_of_something_else_is_left_alone(
    compare: Script, assets: Assets, capsys: pytest.CaptureFixture
) -> None:
    before = sorted(assets.checkpoint.iterdir())
    assert compare("--output_dir", str(assets.checkpoint), "--overwrite") == 2
    assert "holds something else" in capsys.readouterr().err
    assert sorted(assets.checkpoint.iterdir()) == before
