"""The benchmarks, at sizes that say nothing about speed: what they time, refuse and leave out."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, read

from hf_rmsnorm import functional
from hf_rmsnorm.ops import cpu_autograd, shortcut

FAST = ["--rounds", "2", "--block_seconds", "0.0005"]
OPS = ["--rows", "5", "--hidden", "24", *FAST]
MODELS = ["--width", "32", "--layers", "1", "--batch", "2", "--length", "7", "--vocabulary", "61"]


def test_ops(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import bench_ops

    out = tmp_path / "ops.json"
    names = ["F.rms_norm", "rms_norm", "rms_norm, p=1/16", "Liger", "quack"]
    flags = ["--out", str(out), "--plots", str(tmp_path), "--providers", *names]
    bench_ops.main(["--cpu", *OPS, *flags])
    document = read(out)
    timed = {"F.layer_norm", "F.rms_norm", "rms_norm", "rms_norm, p=1/16", "copy"}
    found = {(row["op"], row["pass"], row["provider"]) for row in document["rows"]}
    passes = ("forward", "backward", "both")
    assert found == set(itertools.product(("norm", "add_norm"), passes, timed))
    assert document["without"] == {
        "Liger": "has no CPU kernels",
        "quack": "not installed (No module named 'quack')",
    }
    for row in document["rows"]:
        moves = bench_ops.MOVES[row["op"]][row["pass"]]
        seconds = row["us_p50"] / 1e6
        assert row["gb_per_s"] == pytest.approx(moves * 5 * 24 * 4 / seconds / 1e9)
        assert row["us_p10"] <= row["us_p50"] <= row["us_p90"]
        if row["provider"] == "copy":
            assert row["percent_of_copy"] == pytest.approx(100)
    assert (tmp_path / "ops-float32-eager.png").stat().st_size > 10_000
    assert all(goal["status"] == "not measured" for goal in document["goals"])
    assert "without Liger: has no CPU kernels" in capsys.readouterr().out


def test_ops_compiled_pass_the_same_check() -> None:
    from harness import norms

    torch._dynamo.reset()
    functions, _ = norms.available("add_norm", torch.device("cpu"), ["compiled F.rms_norm"])
    inputs, cotangents = random_inputs("add_norm")
    name = "compiled F.rms_norm"
    norms.check(name, functions[name], inputs, cotangents)


def random_inputs(op: str, dtype: torch.dtype = torch.float32) -> tuple[list, list]:
    from harness.op_trials import Shape, inputs_of

    return inputs_of(Shape(op, 37, 24, str(dtype)[6:]), torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", ["norm", "add_norm"])
def test_the_gate_passes_what_is_right(op: str, dtype: torch.dtype) -> None:
    from harness import norms

    inputs, cotangents = random_inputs(op, dtype)
    functions, _ = norms.available(op, torch.device("cpu"), None)
    for name, function in functions.items():
        if "compiled" not in name:
            norms.check(name, function, inputs, cotangents)


class Skewed(torch.autograd.Function):
    """The identity, with a gradient that is off by a little."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        return dy * (1 + 1e-4)


FAULTS = {
    "y": lambda x, w, b: functional.rms_norm(x, w, eps=1e-3),
    "dx": lambda x, w, b: functional.rms_norm(Skewed.apply(x), w),
    "dw": lambda x, w, b: functional.rms_norm(x, Skewed.apply(w)),
    "y is off by nan": lambda x, w, b: functional.rms_norm(x, w) * float("nan"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_the_gate_names_what_is_wrong(what: str) -> None:
    from harness import norms

    inputs, cotangents = random_inputs("norm")
    with pytest.raises(norms.Wrong, match=f"^{what}"):
        norms.check("rms_norm", FAULTS[what], inputs, cotangents)


def test_a_wrong_kernel_of_ours_is_never_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench_ops
    from harness import norms

    fault = norms.Provider(lambda op, device: FAULTS["y"])
    monkeypatch.setitem(norms.PROVIDERS, "rms_norm", fault)
    out = tmp_path / "ops.json"
    flags = ["--ops", "norm", "--providers", "rms_norm", "F.rms_norm", "--out", str(out)]
    with pytest.raises(SystemExit, match=r"ours failed, .*: rms_norm at norm 5x24 float32"):
        bench_ops.main(["--cpu", *OPS, *flags])
    document = read(out)
    assert document["wrong"]["rms_norm at norm 5x24 float32"].startswith("y is off by")
    assert {row["provider"] for row in document["rows"]} == {"F.layer_norm", "F.rms_norm", "copy"}


def test_a_wrong_peer_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench_ops
    from harness import norms

    def broken(x: Any, w: Any, b: Any) -> Any:
        raise NotImplementedError("feature dimension\ntoo large")

    monkeypatch.setitem(
        norms.PROVIDERS, "F.rms_norm", norms.Provider(lambda op, device: FAULTS["dx"])
    )
    monkeypatch.setitem(norms.PROVIDERS, "Apex", norms.Provider(lambda op, device: broken))
    out = tmp_path / "ops.json"
    names = ["--providers", "F.rms_norm", "Apex", "--ops", "norm", "--passes", "forward"]
    bench_ops.main(["--cpu", *OPS, *names, "--out", str(out)])
    document = read(out)
    assert {row["provider"] for row in document["rows"]} == {"F.layer_norm", "copy"}
    reasons = document["without"]
    assert (
        reasons["Apex at norm 5x24 float32"] == "NotImplementedError: feature dimension too large"
    )
    assert reasons["F.rms_norm at norm 5x24 float32"].startswith("dx is off by")


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    import bench_models
    import bench_ops

    for script, flags in ((bench_ops, OPS), (bench_models, [*MODELS, *FAST, "--models", "gpt2"])):
        out = tmp_path / "late.json"
        script.main(["--cpu", *flags, "--max_seconds", "0", "--out", str(out)])
        document = read(out)
        assert document["rows"] == []
        assert set(document["skipped"].values()) == {"the 0 seconds are over"}


def test_models(tmp_path: Path) -> None:
    import bench_models

    out = tmp_path / "models.json"
    flags = ["--models", "gpt2", "llama", "whisper", "--precision", "fp32", "autocast"]
    files = ["--out", str(out), "--plots", str(tmp_path)]
    bench_models.main(["--cpu", *MODELS, *FAST, *flags, *files])
    document = read(out)
    cells = {(row["model"], row["precision"], row["mode"], row["arm"]) for row in document["rows"]}
    arms = {arm for arm in bench_models.ARMS if arm != bench_models.AUTOCAST_ARM}
    modes = ("training", "inference")
    models = ("gpt2", "llama", "whisper")
    assert cells >= set(itertools.product(models, ("fp32", "autocast"), modes, arms))
    moved = {(row["model"], row["arm"]): row["moved"] for row in document["rows"]}
    assert moved["gpt2", "rmsnorm"] < 1e-5 < 1e-2 < moved["gpt2", "rmsnorm direct"]
    assert moved["llama", "rmsnorm"] < 1e-5
    shares = {row["model"]: row.get("layer_norm_share") for row in document["rows"][::-1]}
    assert 0 < shares["gpt2"] < 1 and shares["llama"] == 0
    assert (tmp_path / "models.png").stat().st_size > 10_000


@pytest.mark.launch
def test_benchmarks_need_torch_and_transformers_alone(tmp_path: Path) -> None:
    """As on a machine that has a GPU and little else."""
    code = (
        "import sys\n"
        "absent = ('accelerate', 'matplotlib', 'tqdm', 'datasets', 'evaluate', 'peft')\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "import bench_ops, gpu_check, harness.kernel_checks\n"
        f"flags = ['--cpu', '--plots', {str(tmp_path)!r}]\n"
        f"bench_ops.main([*flags, *{OPS!r}, '--providers', 'rms_norm'])\n"
        "del sys.modules['tqdm']\n"  # transformers itself wants it
        "import bench_models\n"
        f"bench_models.main([*flags, *{MODELS!r}, *{FAST!r}, '--models', 'gpt2'])\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("no plots: ") == 2


def test_a_missed_goal_is_profiled() -> None:
    from harness.op_trials import profile_missed

    place = {"op": "norm", "rows": 7, "hidden": 24, "dtype": "float32", "pass": "both"}
    place["mode"] = "eager"
    rows = [row(24, name, us) | place for name, us in (("F.layer_norm", 5.0), ("F.rms_norm", 9.0))]
    rows += [row(24, "rms_norm", 6.0) | place, row(48, "F.rms_norm", 1.0)]
    found = profile_missed({"worst_place": place}, rows, torch.device("cpu"))
    assert set(found) == {"rms_norm", "F.layer_norm"}
    assert found["F.layer_norm"]["aten::native_layer_norm_backward"] > 0
    assert list(found["rms_norm"].values()) == sorted(found["rms_norm"].values(), reverse=True)


def row(hidden: int, provider: str, us: float, **other: Any) -> dict[str, Any]:
    given = {"op": "norm", "rows": 4096, "hidden": hidden, "dtype": "bfloat16", "pass": "backward"}
    given |= {"mode": "graph", "provider": provider, "us_p50": us, "percent_of_copy": 1000 / us}
    return given | other


def test_goals(capsys: pytest.CaptureFixture) -> None:
    from harness import goals

    rows = [row(n, "rms_norm", 10.0) for n in (4096, 8192, 16384)]
    rows += [row(n, "Liger", us) for n, us in ((4096, 1.0), (8192, 16.0), (16384, 12.0))]
    rows += [row(8192, "F.rms_norm", 15.5), row(8192, "compiled F.rms_norm", 9.0)]
    rows += [row(n, "rms_norm", 10.0, **{"pass": "forward"}) for n in (2048, 131072)]
    rows += [row(2048, "Liger", 9.9, **{"pass": "forward"})]
    rows += [row(2048, "rms_norm", 10.0, **{"pass": "forward"}, rows=64)]
    by_text = {goal["goal"]: goal for goal in goals.of_ops(rows, "cuda")}
    (backward,) = (g for text, g in by_text.items() if "Liger's and ATen's" in text)
    assert backward["status"] == "missed" and backward["worst"] == pytest.approx(1.2)
    assert backward["worst_at"] == "4096x16384" and backward["reached_at"] == 1
    assert backward["values"] == pytest.approx({"4096x8192": 1.55, "4096x16384": 1.2})
    (inductor,) = (g for text, g in by_text.items() if "Inductor" in text)
    assert inductor["worst"] == pytest.approx(0.9) and inductor["points"] == 1
    (peers,) = (g for text, g in by_text.items() if "fastest peer" in text)
    assert peers["status"] == "reached" and peers["worst"] == pytest.approx(0.99)
    (copy,) = (g for text, g in by_text.items() if text.startswith("forward, share of copy"))
    assert copy["status"] == "reached" and copy["values"] == {"4096x2048": 1.0}
    goals.show(list(by_text.values()))
    printed = capsys.readouterr().out
    assert "worst 1.20 at 4096x16384, missed by 20%; 1 of 2 points reach it" in printed
    assert {g["status"] for g in goals.of_ops(rows, "cpu")} == {"not measured"}


def test_goals_of_models() -> None:
    from harness import goals

    case = {"model": "gpt2", "width": 768, "precision": "autocast", "compiled": False}
    case |= {"mode": "training", "arm": "rmsnorm", "speed": {"median": 1.2}}
    full, shallow = case | {"layers": 12}, case | {"layers": 4, "speed": {"median": 1.0}}
    assert goals.of_models([full, shallow], "cuda")[0]["status"] == "reached"
    assert goals.of_models([shallow], "cuda")[0]["status"] == "not measured"
    assert goals.of_models([full], "cpu")[0]["status"] == "not measured"
    on_cpu = [shallow | {"precision": "fp32", "model": "vit", "speed": {"median": 0.97}}]
    training, inference = goals.of_models(on_cpu, "cpu")[1:]
    assert training["status"] == "missed" and inference["status"] == "not measured"


@pytest.mark.gpu
def test_ops_on_a_gpu(tmp_path: Path) -> None:
    import bench_ops

    out = tmp_path / "ops.json"
    names = ["--providers", "rms_norm", "F.rms_norm", "compiled F.rms_norm", "Liger"]
    bench_ops.main([*OPS, *names, "--dtype", "bfloat16", "--out", str(out)])
    assert {row["mode"] for row in read(out)["rows"]} == {"eager", "graph"}


@pytest.mark.skipif(not cpu_autograd.finish(), reason="no C++ compiler here")
def test_node(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import bench_node

    call, out = shortcut.call, tmp_path / "node.json"
    bench_node.main(["--only", "ops", *FAST, "--out", str(out)])
    assert shortcut.call is call
    rows = read(out)["rows"]
    assert len(rows) == 2 * 3 * 2 * 3
    assert {row["arm"] for row in rows} == {"F.layer_norm", "node", "no node"}
    assert all(row["best"] == 1.0 for row in rows if row["arm"] == "no node")
    assert "512 x 768, both" in capsys.readouterr().out


@pytest.mark.parametrize("decode", [False, True])
def test_the_models_of_bench_node_compute_the_same(decode: bool) -> None:
    import bench_node
    import transformers

    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3, "vocab_size": 61, "n_positions": 40}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    seen = []
    with torch.no_grad():
        tokens = torch.randint(61, (1, 9))
        arms = bench_node.model_arms(model, {"input_ids": tokens}, decode=decode)
        for run, _ in arms.values():
            for _ in range(2):  # the cache is as long as before
                seen.append(run())
    assert [uses for _, uses in arms.values()] == [False, True, False]
    for logits in seen:
        assert logits.shape[1] == (1 if decode else 9)
    torch.testing.assert_close(seen[2], seen[4])
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
