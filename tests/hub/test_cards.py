"""Model cards: what they say, and that they leave the text and metadata of others alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_rmsnorm import PatchError
from hf_rmsnorm.hub.cards import BEGIN, END, write_card

SITE = {
    "name": "h.*.ln_1",
    "base": True,
    "class_name": "LayerNorm",
    "verdict": "approximate",
    "reason": "centring dropped, |mean|/rms up to 0.1",
    "spec": None,
    "mean_free": False,
    "leftover": None,
}
RECORD: dict[str, Any] = {
    "version": 1,
    "norm": "rmsnorm",
    "p": 1.0,
    "strategy": "auto",
    "sites": [SITE, {**SITE, "name": "ln_f", "verdict": "exact", "reason": "folded"}],
    "centers": [],
    "widens": [],
}
OWN = {
    "model_type": "hf_rmsnorm",
    "base_model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "hf_rmsnorm": RECORD,
}
STOCK = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "hf_rmsnorm": RECORD}


def folder(path: Path, config: dict[str, Any], readme: str | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if readme is not None:
        (path / "README.md").write_bytes(readme.encode())
    return path


def metadata(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---")[1])


def test_the_own_format_says_what_loads_it_and_what_does_not(tmp_path: Path) -> None:
    text = write_card(folder(tmp_path, OWN)).read_text()
    assert metadata(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf_rmsnorm", "rmsnorm", "custom_code"],
    }
    assert 'AutoModelForCausalLM.from_pretrained("path_or_repo")' in text
    assert "**Loaded wrongly:** `GPT2LMHeadModel.from_pretrained`" in text
    assert "trust_remote_code" not in text, "there is no modeling file beside these weights"
    assert "| `h.*.ln_1` | `LayerNorm` | approximate | centring dropped, \\|mean\\|/rms" in text
    assert "Not measured" in text
    config = {**OWN, "auto_map": {"AutoModelForCausalLM": "modeling_hf_rmsnorm.GPT2LMHeadModel"}}
    assert "trust_remote_code=True" in write_card(folder(tmp_path, config)).read_text()


def test_the_stock_format_needs_no_package(tmp_path: Path) -> None:
    text = write_card(folder(tmp_path, STOCK)).read_text()
    assert metadata(text)["tags"] == ["hf_rmsnorm", "rmsnorm"]
    assert "import hf_rmsnorm" not in text and "Loaded wrongly" not in text
    assert "whatever reads those reads it" in text


USERS = """---
# chosen with care
license: mit
language: no
tags:
- fun
# old, to be looked at
- prmsnorm
base_model: someone/else
---
# Mine

Text of mine.
"""


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_a_card_is_merged_and_twice_is_once(tmp_path: Path, line_break: str) -> None:
    theirs = USERS.replace("\n", line_break)
    path = write_card(folder(tmp_path, OWN, theirs))
    text = path.read_bytes().decode()
    assert text.count(line_break) == text.count("\n")
    for kept in ("# chosen with care", "license: mit", "language: no", "base_model: someone/else"):
        assert kept + line_break in text
    assert metadata(text)["tags"] == ["fun", "hf_rmsnorm", "rmsnorm", "custom_code"]
    assert metadata(text)["library_name"] == "transformers"
    assert f"# Mine{2 * line_break}Text of mine.{2 * line_break}{BEGIN}" in text
    assert write_card(tmp_path).read_bytes().decode() == text
    after = text.replace(END, END + line_break + "and after").encode()
    path.write_bytes(after)
    assert write_card(tmp_path).read_bytes() == after
    write_card(folder(tmp_path, STOCK))
    changed = path.read_bytes().decode()
    assert metadata(changed)["tags"] == ["fun", "hf_rmsnorm", "rmsnorm"]
    assert "Loaded wrongly" not in changed and changed.count(BEGIN) == 1
    assert changed.endswith("and after" + line_break) and "Text of mine." in changed


@pytest.mark.parametrize(
    "readme",
    [
        "",
        "just text\n",
        "---\n---\n",
        "---\n{license: mit, tags: [a, b]}\n---\ntext",
        "---\ntags: hf\n---\n",
        "---\nlicense: mit # why not\ndescription: |\n  a\n\n  b\n---\ntext --- more\n\n---\n",
    ],
)
def test_odd_cards_are_merged_too(tmp_path: Path, readme: str) -> None:
    text = write_card(folder(tmp_path, OWN, readme)).read_text()
    before = metadata(readme) if readme.startswith("---") else {}
    for key, value in (before or {}).items():
        assert key == "tags" or metadata(text)[key] == value
    assert "hf_rmsnorm" in ModelCard(text).data.tags
    assert ("# why not" in readme) == ("# why not" in text)
    assert write_card(tmp_path).read_text() == text


@pytest.mark.parametrize(
    ("config", "readme", "message"),
    [
        (None, None, "no config.json"),
        ("{", None, "config.json is not JSON"),
        ({"model_type": "gpt2"}, None, "no 'hf_rmsnorm' record"),
        ({**OWN, "hf_rmsnorm": {**RECORD, "version": 99}}, None, "update the package"),
        (OWN, "---\na: [\n---\n", "cannot be read as a model card"),
        (OWN, "---\n- a\n---\n", "cannot be read as a model card"),
        (OWN, "text\n" + BEGIN + " -->\n", "once each"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    tmp_path: Path, config: Any, readme: str | None, message: str
) -> None:
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(PatchError, match=message):
        write_card(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
