"""`hf-rmsnorm push`, against a stand-in for the Hub: what arrives, and what never leaves."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hub_server import TOKEN, Repo, running_hub
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from hf_rmsnorm import PatchError, patch_model
from hf_rmsnorm.cli import main
from hf_rmsnorm.hub.card_merge import BEGIN
from hf_rmsnorm.hub.push import push

# Calls the command line several times, each with an environment of its own, in one process; then,
# if asked to, a model's own push_to_hub.
DRIVER = """
import contextlib, io, json, os, sys
from hf_rmsnorm.cli import main
answers = []
for argv, environment in json.loads(sys.argv[1]):
    os.environ.pop("HF_TOKEN", None)
    os.environ.update(environment)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(argv)
    answers.append([status, out.getvalue(), err.getvalue().splitlines()[-1:]])
if len(sys.argv) > 2:
    from hf_rmsnorm import from_pretrained
    os.environ["HF_TOKEN"] = sys.argv[4]
    from_pretrained(sys.argv[2]).push_to_hub(sys.argv[3], tags=["fun"])
print("ANSWERS" + json.dumps(answers))
"""


def gpt2() -> torch.nn.Module:
    torch.manual_seed(4)
    config = transformers.GPT2Config(
        vocab_size=53, n_embd=24, n_layer=2, n_head=2, n_positions=16, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each kind: patched, exactly patched, and plain."""
    folder = tmp_path_factory.mktemp("saved")
    found = {name: folder / name for name in ("own", "stock", "plain")}
    patch_model(gpt2(), "prmsnorm", p=0.25, strategy="direct").save_pretrained(found["own"])
    patch_model(gpt2(), "rmsnorm").save_pretrained(found["stock"])
    gpt2().save_pretrained(found["plain"])
    return folder


@pytest.fixture
def folders(saved: Path, tmp_path: Path) -> dict[str, Path]:
    """Copies, to be damaged."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return {path.name: path for path in tmp_path.iterdir()}


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def run(
    cases: list[tuple[list[str], dict[str, str]]], endpoint: str, home: Path, *push_to_hub: str
) -> list[tuple[int, str, str]]:
    """Exit status, output and last line of the errors of each call."""
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(cases), *push_to_hub],
        env={**kept, **hub},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ANSWERS" in done.stdout, done.stderr
    answers = json.loads(done.stdout.rpartition("ANSWERS")[2])
    return [(status, out.strip(), "".join(err)) for status, out, err in answers]


@pytest.mark.launch
def test_what_arrives_is_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    own, token = folders["own"], {"HF_TOKEN": TOKEN}
    (own / "sub").mkdir()
    (own / "sub" / "notes.txt").write_text("mine\n")
    (own / "optimizer.pt").write_bytes(b"\0" * 99)
    before = files(own)
    plain = ["push", str(folders["plain"]), "tester/plain", "--revision", "second", "--private"]
    with running_hub() as hub:
        hub.repos["tester/known"] = Repo({})
        hub.repos["tester/known"].branches["main"]["README.md"] = b"---\nlicense: mit\n---\nMine.\n"
        answers = run(
            [
                (["push", str(own), "tester/own", "--commit_message", "First"], token),
                (["push", str(own), "tester/own", "--exclude", "*.pt", "sub/*"], token),
                (["push", str(folders["stock"]), "tester/stock"], token),
                (plain, token),
                (plain, token),
                (["push", str(own), "tester/own"], {}),
                (["push", str(own), "tester/own"], {"HF_TOKEN": "hf_wrong"}),
            ],
            hub.url,
            tmp_path / "home",
            *(str(own), "tester/known", TOKEN),
        )
    assert [status for status, _, _ in answers[:5]] == [0] * 5, answers
    assert answers[0][1] == f"{hub.url}/tester/own/commit/{1:040x}"
    assert hub.repos["tester/own"].branches["main"] == before == files(own)
    assert hub.repos["tester/own"].messages == ["First", "Upload own"]
    assert hub.repos["tester/stock"].branches["main"] == files(folders["stock"])
    assert hub.repos["tester/plain"].branches["second"] == files(folders["plain"])
    assert hub.repos["tester/plain"].branches["main"] == {}
    assert hub.repos["tester/plain"].settings["visibility"] == "private"
    assert any(method == "PUT" for method, _ in hub.requests), "the weights went the LFS way"

    no_token, refused = answers[5:]
    assert (no_token[0], refused[0]) == (2, 2)
    assert no_token[2].startswith("hf-rmsnorm push: there is no token to upload with")
    assert refused[2].startswith(f"hf-rmsnorm push: {hub.url} refused: ") and "401" in refused[2]

    known = hub.repos["tester/known"].branches["main"]
    card = known["README.md"].decode()
    assert "license: mit\n" in card and "Mine.\n" in card and BEGIN in card and "- fun\n" in card
    assert known["model.safetensors"] == before["model.safetensors"]


@pytest.mark.parametrize("offline", [False, True], ids=["no server", "offline"])
def test_no_network_is_one_line(
    folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    offline: bool,
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # not listening: connections are refused
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert main(["push", str(folders["plain"]), "tester/plain"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"hf-rmsnorm push: cannot reach {endpoint}: ")
    assert ("offline" in error.lower()) == offline


def test_a_card_that_lost_our_section_gets_it_back(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folders["own"] / "README.md"
    path.write_text("---\nlicense: mit\n---\n# By somebody's trainer\n")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", "nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "nowhere")
    with pytest.raises(PermissionError, match="no token"):
        push(folders["own"], "tester/own")
    text = path.read_text()
    assert "license: mit" in text and "# By somebody's trainer" in text and BEGIN in text
    before = files(folders["plain"])
    with pytest.raises(PermissionError, match="no token"):
        push(folders["plain"], "tester/plain")
    assert files(folders["plain"]) == before, "an unpatched model's card is not ours to write"


def drop(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


GARBLED = {
    ("create-html", "create"): b"<html>",
    ("create-list", "create"): b"[]",
    ("create-else", "create"): b'{"url": 7}',
    ("create-none", "create"): b"null",
    ("pre-html", "preupload"): b"<html>",
    ("pre-none", "preupload"): b"null",
    ("pre-else", "preupload"): b'{"files": [7]}',
    ("commit-html", "commit"): b"<html>",
    ("commit-list", "commit"): b"[1]",
    ("commit-else", "commit"): b'{"commitOid": {}}',
}


@pytest.mark.launch
def test_answers_of_something_else_than_a_hub(folders: dict[str, Path], tmp_path: Path) -> None:
    calls = [(["push", str(folders["plain"]), f"tester/{name}"], {"HF_TOKEN": TOKEN})
             for name, _ in GARBLED]  # fmt: skip
    with running_hub() as hub:
        hub.garbled = GARBLED
        answers = run(calls, hub.url, tmp_path / "home")
        for (status, _, error), case in zip(answers, GARBLED, strict=True):
            assert status == 2 and f"{hub.url} gave an answer that is no Hub's" in error, case


def test_cards_that_cannot_be_read(folders: dict[str, Path]) -> None:
    (folders["own"] / "README.md").write_bytes(b"\xff\xfe card")
    with pytest.raises(PatchError, match=r"README.md cannot be read as a model card"):
        push(folders["own"], "tester/x")
    (folders["plain"] / "README.md").write_text("---\ntags:\n- 7\nbase_model: 3\n---\n")
    with pytest.raises(PatchError, match=r"README.md is not a valid model card|no name on the Hub"):
        push(folders["plain"], "tester/x")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_record(folder: Path) -> None:
    record = json.loads((folder / "config.json").read_text())["hf_rmsnorm"]
    edit_config(folder, hf_rmsnorm={**record, "p": 0.5})


def train_as_layernorm(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.0.mlp.c_proj.weight"] += 0.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_card(folder: Path, old: str, new: str) -> None:
    path = folder / "README.md"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


DAMAGE = {
    "no config": ("own", lambda f: drop(f, "config.json"), "no config.json"),
    "no weights": ("own", lambda f: drop(f, "*.safetensors"), "has no weights"),
    "no code": ("own", lambda f: drop(f, "*.py"), "modeling_hf_rmsnorm.py is missing"),
    "half a file": ("own", lambda f: cut(f / "model.safetensors"), "model.safetensors is damaged"),
    "lost weight": ("plain", lose_a_weight, "h.1.mlp.c_fc.weight among them"),
    "lost patched weight": ("own", lose_a_weight, "h.1.mlp.c_fc.weight among them"),
    "other shape": ("plain", lambda f: edit_config(f, n_positions=17), "random numbers"),
    "edited record": ("own", edit_record, "was edited since"),
    "no record": ("own", lambda f: edit_config(f, hf_rmsnorm=None), "no usable 'hf_rmsnorm'"),
    "trained since": ("stock", train_as_layernorm, "is not centred"),
    "card not YAML": (
        "own",
        lambda f: edit_card(f, "tags:", "tags: ["),
        "README.md is not a valid model card",
    ),
    "card of another": ("own", lambda f: edit_card(f, "- prmsnorm\n", ""), "lacks the tags prms"),
    "base is a path": (
        "own",
        lambda f: edit_card(f, "tags:", "base_model: ../a/b/c\ntags:"),
        "base_model is no name on the Hub",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_would_not_load_is_not_sent(
    folders: dict[str, Path], case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, damage, message = DAMAGE[case]
    damage(folders[kind])
    assert main(["push", str(folders[kind]), "tester/x"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-rmsnorm push: ") and message in error


def test_names_that_cannot_be(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a/b/c"):
        push(folders["own"], "a/b/c")
    with pytest.raises(PatchError, match="is not a folder"):
        push(tmp_path / "nowhere", "tester/x")
