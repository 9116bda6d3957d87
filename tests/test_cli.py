"""The command line, run in process on tiny checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import hf_rmsnorm
from hf_rmsnorm import PatchError, PatchPlan
from hf_rmsnorm.cli import main
from hf_rmsnorm.ops import cpu_autograd

QUICKSTART = Path(__file__).parents[1] / "scripts/results/quickstart"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        vocab_size=53, n_embd=24, n_layer=2, n_head=2, n_positions=16, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_inspect_prints_the_plan(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint)]) == 0
    table = capsys.readouterr().out
    assert "5 norm sites -> rmsnorm, strategy auto: 5 exact" in table
    assert "transformer.h.*.ln_1" in table and "transformer.wte" in table
    assert main(["inspect", str(checkpoint), "--json", "--norm", "prmsnorm", "--p", "0.5"]) == 0
    plan = PatchPlan.from_json(capsys.readouterr().out)
    assert plan.p == 0.5 and plan.count("approximate") == 5
    assert main(["inspect", str(checkpoint), "--random-weights", "--strategy", "exact"]) == 0
    assert "5 exact" in capsys.readouterr().out


def test_patch_then_verify(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = checkpoint.parent / "patched"
    assert main(["patch", str(checkpoint), str(out)]) == 0
    assert "written to" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["model_type"] == "gpt2"
    assert main(["verify", str(checkpoint), str(out)]) == 0
    assert "within" in capsys.readouterr().out
    (out / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    (out / "pytorch_model.bin").write_text("old")
    (out / "thesis.txt").write_text("not of a checkpoint")
    assert main(["patch", str(checkpoint), str(out), "--overwrite"]) == 0
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "Mine.\n" in card and "- hf_rmsnorm" in card
    assert not (out / "pytorch_model.bin").exists()
    assert (out / "thesis.txt").read_text() == "not of a checkpoint"
    direct = checkpoint.parent / "direct"
    assert main(["patch", str(checkpoint), str(direct), "--strategy", "direct"]) == 0
    assert main(["verify", str(checkpoint), str(direct)]) == 1
    assert "OVER" in capsys.readouterr().out


def test_models_that_cannot_be_compared(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = transformers.GPT2LMHeadModel.from_pretrained(checkpoint)
    model.resize_token_embeddings(31, mean_resizing=False)
    other = checkpoint.parent / "other"
    model.save_pretrained(other)
    for pair, message in (
        ((checkpoint, other), "the second cannot run on the first's inputs (IndexError"),
        ((other, checkpoint), "their outputs have shapes [("),
    ):
        capsys.readouterr()
        assert main(["verify", *map(str, pair)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len([x for x in lines if not x.startswith("[")]) == 1 and message in lines[-1]
        assert f"{pair[0]} and {pair[1]} cannot be compared" in lines[-1]


def test_the_only_copy_of_the_unpatched_model_is_not_replaced(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = checkpoint.parent / "link"
    link.symlink_to(checkpoint)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    around = checkpoint.parent
    for source, out in (
        (checkpoint, checkpoint),
        (checkpoint, link),
        (link, checkpoint),
        (checkpoint, around),
    ):
        assert main(["patch", str(source), str(out), "--overwrite"]) == 2
        assert f"{out} holds the unpatched model" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert sorted(path.name for path in around.iterdir()) == ["link", "model"]
    inside = checkpoint / "patched"
    assert main(["patch", str(checkpoint), str(inside), "--strategy", "direct"]) == 0


@pytest.mark.parametrize("out", [".", "sub/..", "../here", "link"])
def test_any_spelling_of_the_target_is_written_and_replaced(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    here = checkpoint.parent / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    if out == "sub/..":  # what is in the folder, but for a checkpoint, stays
        (here / "sub").mkdir()
        (here / "config.json").write_text('{"model_type": "gpt2"}')
    if out == "link":
        (here / "link").symlink_to(checkpoint.parent / "elsewhere")
    flags = ["--overwrite"] if out == "sub/.." else []
    assert main(["patch", str(checkpoint), out, *flags]) == 0
    assert main(["verify", str(checkpoint), out]) == 0
    (Path(out) / "thesis.txt").write_text("mine")
    assert main(["patch", str(checkpoint), out, "--overwrite", "--strategy", "direct"]) == 0
    assert main(["verify", str(checkpoint), out]) == 1
    assert (Path(out) / "thesis.txt").read_text() == "mine"
    assert (here / "sub").is_dir() == (out == "sub/..")
    assert not [path for path in (*here.iterdir(), *here.parent.iterdir()) if ".hf_" in path.name]


def test_a_config_of_something_else_is_not_replaced(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = checkpoint.parent / "app"
    app.mkdir()
    for text in ('{"port": 8080}', "[1, 2]", "{"):
        (app / "config.json").write_text(text)
        assert main(["patch", str(checkpoint), str(app), "--overwrite"]) == 2
        assert f"{app}" in capsys.readouterr().err
        assert {path.name: path.read_text() for path in app.iterdir()} == {"config.json": text}


def test_a_folder_that_is_not_there(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    there = str(checkpoint)
    for argv in (
        ["inspect", "./nope"],
        ["inspect", "./nope", "--random-weights"],
        ["inspect", "runs/nope/model"],
        ["inspect", "~/nope"],
        ["patch", f"{there}/nope", "out"],
        ["verify", there, "../nope"],
    ):
        assert main(argv) == 2
        assert f" {argv[2] if argv[0] == 'verify' else argv[1]} does not exist" in (
            capsys.readouterr().err
        )
    with pytest.raises(PatchError, match=r"^/nonexistent/x does not exist$"):
        hf_rmsnorm.from_pretrained("/nonexistent/x")
    assert main(["inspect", "./model"]) == main(["inspect", "model"]) == 0


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = [sys.executable, "-m", "hf_rmsnorm", "env"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_a_tokenizer_is_copied_and_none_made_up(checkpoint: Path) -> None:
    from tokenizers import Tokenizer, models

    out = checkpoint.parent / "patched"
    assert main(["patch", str(checkpoint), str(out), "--strategy", "direct"]) == 0
    assert not [path.name for path in out.iterdir() if "token" in path.name]
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(53)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    tokenizer.save_pretrained(checkpoint)
    assert main(["patch", str(checkpoint), str(out), "--overwrite"]) == 0
    again = transformers.AutoTokenizer.from_pretrained(out)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_errors_have_status_two_and_leave_folders_alone(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = checkpoint.parent / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    cases = [
        (["patch", str(checkpoint), str(full)], "exists and is not empty"),
        (["patch", str(checkpoint), str(full), "--overwrite"], "(it has no config.json)"),
        (["inspect", str(full)], "is not a checkpoint"),
        (["inspect", str(checkpoint), "--p", "0.5"], "p=0.5 has no meaning"),
        (["inspect", str(checkpoint), "--include", "x*"], "matches no norm site"),
        (
            ["patch", str(checkpoint), f"{full}/new", "--norm", "prmsnorm", "--p", "2"],
            "p must be a share",
        ),
    ]
    for argv, message in cases:
        assert main(argv) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in full.iterdir()] == ["notes.txt"]
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["full", "model"]
    with pytest.raises(SystemExit) as usage:
        main(["inspect", str(checkpoint), "--norm", "rms"])
    assert usage.value.code == 2


def test_env_names_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out and "kernels on cpu: hf_rmsnorm.ops." in out
    assert f"calls on cpu: {cpu_autograd.status()}\n" in out


def test_patching_a_patched_checkpoint_says_so(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = checkpoint.parent / "patched"
    assert main(["patch", str(checkpoint), str(out)]) == 0
    assert main(["inspect", str(out)]) == 2
    assert "is hf_rmsnorm's RMSNorm already" in capsys.readouterr().err


def test_card_of_a_checkpoint_and_of_a_run(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = checkpoint.parent / "patched"
    flags = ["--norm", "prmsnorm", "--p", "0.0625"]
    assert main(["patch", str(checkpoint), str(out), *flags]) == 0
    capsys.readouterr()
    assert main(["card", str(out), "--base-model", "some/gpt2"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "README.md")
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "some/gpt2" and "Not measured" in card.text
    assert main(["card", str(QUICKSTART), "--checkpoint", str(out)]) == 0
    assert "4.1427" in (out / "README.md").read_text()
    assert ModelCard.load(out / "README.md").data.base_model == "some/gpt2"
    other = checkpoint.parent / "other.md"
    assert main(["card", str(QUICKSTART), "--arm", "rmsnorm", "--out", str(other)]) == 0
    assert "quickstart" in other.read_text()
    capsys.readouterr()
    errors = [
        (["card", str(QUICKSTART)], "has several arms"),
        (["card", str(QUICKSTART), "--arm", "rmsnorm"], "kept no checkpoint"),
        (["card", str(QUICKSTART), "--arm", "rms", "--out", "x.md"], "has no arm 'rms'"),
        (["card", str(checkpoint)], "no usable 'hf_rmsnorm' record"),
        (["card", str(checkpoint.parent)], "is not the folder of a run"),
        (["card", str(checkpoint), "--checkpoint", str(out)], "is not the folder of a run"),
        (["push", str(checkpoint.parent), "some/model"], "has no weights"),
    ]
    for argv, message in errors:
        assert main(argv) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0]


def test_weights_that_are_missing_are_named(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    del weights["transformer.h.1.mlp.c_fc.bias"]
    save_file(weights, path, {"format": "pt"})
    out = checkpoint.parent / "out"
    for argv in (["inspect", str(checkpoint)], ["patch", str(checkpoint), str(out)]):
        assert main(argv) == 2
        assert "transformer.h.1.mlp.c_fc.bias among them" in capsys.readouterr().err
        assert not out.exists()
    assert main(["inspect", str(checkpoint), "--new-weights", "*.c_fc.bias"]) == 0


def test_what_lies_beside_the_weights_comes_along(checkpoint: Path, tmp_path: Path) -> None:
    source, out = checkpoint, tmp_path / "out"
    kept = {
        "modules.json": "[]",
        "1_Pooling/config.json": "{}",
        "2_Dense/model.safetensors": "weights of its own",
        "LICENSE": "free",
        "chat_template.jinja": "{{ messages }}",
    }
    left = {
        "onnx/model.onnx": "the unpatched model",
        "pytorch_model.bin": "the unpatched model, again",
        "optimizer.pt": "of a training",
        "checkpoint-3/trainer_state.json": "{}",
        ".cache/notes": "hidden",
    }
    for name, text in {**kept, **left}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    assert main(["patch", str(source), str(out)]) == 0
    assert all((out / name).read_text() == text for name, text in kept.items())
    assert not [name for name in left if (out / name).exists()]
    assert (out / "config.json").is_file() and (out / "hf_rmsnorm_plan.json").is_file()


def test_warnings_are_said(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--norm", "prmsnorm", "--p", "0.5"]
    assert main(["patch", str(checkpoint), str(tmp_path / "out"), *arguments]) == 0
    said = capsys.readouterr().err
    stages = ("loading", "probing the model", "looking for norms", "verifying on copies", "writing")
    assert all(stage in said for stage in stages)
    assert "norm sites were changed approximately" in said
    assert main(["inspect", str(checkpoint), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"hf_rmsnorm {hf_rmsnorm.__version__}\n"
