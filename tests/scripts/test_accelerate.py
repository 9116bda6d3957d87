"""What starts other processes: two ranks, accelerate's trap, the set-up's complaints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Assets, common_flags, read, weights

pytestmark = pytest.mark.launch

ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
TWO_RANKS = [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
             "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
FINETUNE = str(ROOT / "scripts" / "finetune_clm.py")


def launch(*command: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_ranks_are_one_rank_with_twice_the_batch(assets: Assets, tmp_path: Path) -> None:
    flags = [
        *common_flags(assets, "scratch"),
        *("--config_overrides", "n_layer=1,n_embd=32,n_head=2,n_positions=32,resid_pdrop=0.0,"
          "embd_pdrop=0.0,attn_pdrop=0.0"),
        *("--norm", "rmsnorm", "--strategy", "direct", "--max_train_samples", "27"),
        *("--gradient_accumulation_steps", "2", "--max_train_steps", "5"),
        *("--learning_rate", "1e-2", "--max_eval_samples", "5"),
    ]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    done = launch(sys.executable, FINETUNE, *flags, "--per_device_train_batch_size", "4",
                  "--output_dir", str(one))  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = launch(*TWO_RANKS, "--main_process_port", free_port(), FINETUNE, *flags,
                  "--per_device_train_batch_size", "2", "--output_dir", str(two))  # fmt: skip
    assert done.returncode == 0, done.stderr

    ours, theirs = read(two / "all_results.json"), read(one / "all_results.json")
    assert (ours["num_processes"], theirs["num_processes"]) == (2, 1), "two ranks really ran"
    assert ours["tokens"] == theirs["tokens"]
    assert len(ours["history"]) == 5
    for mine, other in zip(ours["history"], theirs["history"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert mine["lr"] == other["lr"]
    # Five validation blocks on two ranks: the padding of the last batch is not counted.
    for mine, other in zip(ours["evaluations"], theirs["evaluations"], strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    mine, other = weights(two), weights(one)
    assert mine.keys() == other.keys()
    for name, value in other.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-5)


def test_compare_on_two_ranks(assets: Assets, tmp_path: Path) -> None:
    flags = [*common_flags(assets), "--arms", "prmsnorm:direct:0.5", "--seeds", "0",
             "--max_train_steps", "2", "--per_device_train_batch_size", "2",
             "--throughput_rounds", "1", "--throughput_steps", "1"]  # fmt: skip
    out = tmp_path / "out"
    script = str(ROOT / "scripts" / "compare.py")
    done = launch(*TWO_RANKS, "--main_process_port", free_port(), script, *flags,
                  "--output_dir", str(out))  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = read(out / "results.json")
    assert results["environment"]["num_processes"] == 2
    assert len(results["runs"]) == 2
    assert done.stdout.count("report:") == 1


def test_warns_when_accelerate_starts_fewer_processes_than_asked(
    assets: Assets, tmp_path: Path
) -> None:
    done = launch(*ACCELERATE, "--cpu", "--num_processes", "2", "--num_machines", "1",
                  "--mixed_precision", "no", "--dynamo_backend", "no", FINETUNE,
                  *common_flags(assets), "--config_name", "", "--block_size", "99",
                  "--output_dir", str(tmp_path / "out"))  # fmt: skip
    assert "asked for 2 processes, but 1 runs" in done.stderr
    assert "--multi_gpu" in done.stderr
    assert "maximum of 32" in done.stderr, "and the request was refused after that"


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("exit 1", "too old"),
        ('case "$*" in *venv*) exit 1;; *--version*) echo Python 3.12;; esac', "python3-venv"),
    ],
)
def test_set_up_says_what_is_missing(tmp_path: Path, script: str, complaint: str) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    (tmp_path / "constraints.txt").touch()
    (tmp_path / "pyproject.toml").touch()
    helper = ROOT / "scripts" / "harness" / "setup_env.sh"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source {helper}; set_up scripts"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert complaint in done.stderr
    assert not (tmp_path / ".venv").exists()
