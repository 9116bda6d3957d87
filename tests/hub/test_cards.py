"""Model cards: what they say, and that they leave the text and metadata of others alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modelcard import TrainingSummary

from hf_rmsnorm import PatchError, patch_model
from hf_rmsnorm.hub.card_merge import BEGIN, END
from hf_rmsnorm.hub.cards import make_card, save_card, write_card
from hf_rmsnorm.hub.records import digest
from hf_rmsnorm.hub.runs import read_run

ROOT = Path(__file__).parents[2]

SITE = {
    "name": "h.*.ln_1",
    "base": True,
    "class_name": "LayerNorm",
    "verdict": "approximate",
    "reason": "centring dropped, |mean|/rms up to 0.1",
    "spec": {"kind": "layernorm", "normalized_shape": [24], "eps": 1e-5},
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
    record = config["hf_rmsnorm"]
    signed = {**config, "hf_rmsnorm": {**record, "digest": digest(record)}}
    (path / "config.json").write_text(json.dumps(signed))
    if readme is not None:
        (path / "README.md").write_bytes(readme.encode())
    return path


def metadata(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.replace("\r\n", "\n").split("---\n")[1])


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
        ({"model_type": "gpt2"}, None, "no usable 'hf_rmsnorm' record"),
        ({**OWN, "hf_rmsnorm": {"version": 1}}, None, "no usable 'hf_rmsnorm' record"),
        ({**OWN, "hf_rmsnorm": {**RECORD, "digest": "0"}}, None, "was edited since"),
        (OWN, "---\na: [\n---\n", "cannot be read as a model card"),
        (OWN, "---\n- a\n---\n", "cannot be read as a model card"),
        (OWN, "---\nmodel-index: [1]\n---\n", "metadata is not as the Hub defines it"),
        (OWN, "---\ntags: [{a: 1}]\n---\n", "metadata is not as the Hub defines it"),
        (OWN, "text\n" + BEGIN + " -->\n", "once each"),
        (OWN, f"{END}\ntext\n{BEGIN} -->\n", "once each"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    tmp_path: Path, config: Any, readme: str | None, message: str
) -> None:
    if config is not None:
        if config is OWN:
            folder(tmp_path, config)
        else:
            text = config if isinstance(config, str) else json.dumps(config)
            (tmp_path / "config.json").write_text(text)
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(PatchError, match=message):
        write_card(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_odd_but_legal_configs(tmp_path: Path) -> None:
    empty = {**RECORD, "sites": []}
    configs: list[dict[str, Any]] = [
        {**OWN, "architectures": None},
        {**OWN, "base_model_type": "a_type_from_the_future"},
        {**STOCK, "architectures": ["SomebodysModel"]},
        {**OWN, "hf_rmsnorm": {**empty, "centers": [], "widens": []}},
        {**OWN, "hf_rmsnorm": {**empty, "sites": [{**SITE, "name": ""}]}},
        {**OWN, "hf_rmsnorm": {**RECORD, "norm": "prmsnorm", "p": 1 / 3}},
    ]
    for config in configs:
        text = write_card(folder(tmp_path, config)).read_text()
        assert "hf_rmsnorm" in metadata(text)["tags"]
        assert "None" not in text and "{{" not in text
    assert "prmsnorm" in metadata(text)["tags"] and "pRMSNorm (p = 0.333333)" in text
    centers = [{"name": "wte", "base": True, "side": "output", "key": None, "axis": -1}]
    widens = [{"name": "h.*.mlp.up", "base": True, "down": "h.*.mlp.down"}]
    widens[0] |= {"up_axis": 0, "down_axis": 1}
    more = {**RECORD, "centers": centers, "widens": widens}
    text = write_card(folder(tmp_path, {**OWN, "hf_rmsnorm": more})).read_text()
    assert "the mean at the output of `wte`" in text and "hidden unit each: `h.*.mlp.up`" in text


@pytest.mark.parametrize("odd", [END, BEGIN, "a\n\n# b", "<!-- c", "a\u2028b | `c`", "{{ 7 }}"])
def test_what_names_and_reasons_may_hold(tmp_path: Path, odd: str) -> None:
    plain = write_card(folder(tmp_path / "plain", OWN)).read_text()
    site = {**SITE, "name": f"h.{odd}", "class_name": odd, "reason": odd}
    center = {"name": odd, "base": True, "side": "output", "key": None, "axis": -1}
    record = {**RECORD, "sites": [site, RECORD["sites"][1]], "centers": [center]}
    config = {**OWN, "architectures": [odd], "hf_rmsnorm": record}
    path = write_card(folder(tmp_path / "odd", config, "Mine."), base_model="a/b")
    text = path.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `h.")]
    assert len(rows) == 1 and rows[0].replace("\\|", "").count("|") == 5
    assert text.count("<!--") == text.count("-->") == plain.count("<!--") == 2
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        line for line in plain.splitlines() if line.startswith("## ")
    ]
    assert write_card(tmp_path / "odd", base_model="a/b").read_text() == text, "found again"


def test_a_card_is_not_written_through_a_link(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    path = folder(tmp_path / "model", OWN)
    for name in ("README.md.partial", ".README.md.partial"):
        (path / name).symlink_to(secret)
    write_card(path)
    assert secret.read_text() == "secret" and "hf_rmsnorm" in (path / "README.md").read_text()


def test_a_card_that_trainer_wrote_over_ours_gets_the_section_back(tmp_path: Path) -> None:
    write_card(folder(tmp_path, OWN))
    summary = TrainingSummary(
        model_name="out",
        license="mit",
        tags=["generated_from_trainer"],
        finetuned_from="openai-community/gpt2",
        eval_results={"loss": 3.25},
        dataset_tags=["some/text"],
        dataset="Some text",
        dataset_metadata=[{"name": "Some text", "type": "some/text"}],
        tasks=["text-generation"],
        source="trainer",
    )
    trainers = summary.to_model_card()
    assert "3.25" in trainers
    text = write_card(folder(tmp_path, OWN, trainers)).read_text()
    body = trainers.partition("\n---\n")[2]
    assert body.rstrip() in text and text.count(BEGIN) == 1
    card, theirs = ModelCard(text), ModelCard(trainers)
    assert card.data.tags == ["generated_from_trainer", "hf_rmsnorm", "rmsnorm", "custom_code"]
    for key in ("base_model", "license", "model_name", "eval_results"):
        assert card.data.get(key) == theirs.data.get(key)


QUICKSTART = ROOT / "scripts/results/quickstart"


def test_a_run_brings_its_numbers_and_those_of_the_control(tmp_path: Path) -> None:
    results = json.loads((QUICKSTART / "results.json").read_text())
    record = {**RECORD, "norm": "prmsnorm", "p": 0.0625}
    path = write_card(
        folder(tmp_path, {**OWN, "hf_rmsnorm": record}), run=QUICKSTART, base_model="some/gpt2"
    )
    card = ModelCard.load(path)
    assert (card.data.base_model, card.data["base_model_relation"]) == ("some/gpt2", "finetune")
    found = {result.metric_name: result for result in card.data.eval_results}
    assert len(found) == len(card.data.eval_results) == 12
    rows = {row["arm"]: row for row in results["quality"]}
    for arm, label, mark in (
        ("layernorm", "layernorm (unpatched)", "unpatched"),
        ("prmsnorm:0.0625", "prmsnorm:0.0625", "patched"),
    ):
        for moment, when in (("before", "before training"), ("after", "after 60 steps")):
            for quality in ("loss", "perplexity", "token_accuracy"):
                result = found[f"{quality.replace('_', ' ')}, {label}, {when}"]
                spread = rows[arm][f"{quality}_{moment}"]
                assert result.metric_value == spread["median"]
                assert result.metric_args["hf_rmsnorm"] == mark
                assert result.metric_args["max"] == spread["max"]
    assert results["environment"]["command"] in card.text
    assert results["environment"]["date"] in card.text
    assert f"{results['throughput']['rmsnorm']['inference']['tokens_per_s']:.0f}" in card.text
    assert "its numbers are not of this folder's weights" in card.text.replace("\n", " ")
    write_card(tmp_path)  # as a save does: other weights may lie there now
    assert "Not measured" in path.read_text() and "model-index" not in path.read_text()


def test_results_of_others_survive_ours(tmp_path: Path) -> None:
    mine = {
        "name": "mine",
        "results": [
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": "Mine", "type": "text", "split": "validation"},
                "metrics": [{"type": "loss", "value": 1.5}],
            }
        ],
    }
    header = yaml.safe_dump({"model-index": [mine]}, sort_keys=False)
    path = write_card(folder(tmp_path, OWN, f"---\n{header}---\nMine.\n"), run=QUICKSTART)
    index = metadata(path.read_text())["model-index"]
    assert index[0]["name"] == "mine" and index[0]["results"][0] == mine["results"][0]
    assert len(index[0]["results"]) == 2
    once = path.read_bytes()
    assert write_card(tmp_path, run=QUICKSTART).read_bytes() == once
    write_card(tmp_path)
    assert metadata(path.read_text())["model-index"] == [mine]


def test_what_a_run_cannot_say(tmp_path: Path) -> None:
    checkpoint = folder(tmp_path, OWN)
    results = json.loads((QUICKSTART / "results.json").read_text())
    run = tmp_path / "run"
    run.mkdir()
    cases: list[tuple[Any, str | None, str]] = [
        (results, "rmsnorm:exact", "has no arm 'rmsnorm:exact'; it has layernorm, rmsnorm"),
        ({**results, "arms": results["arms"][:1] + results["arms"][3:]}, None, "belong together"),
        ({**results, "quality": None}, None, r"results\.json is not what"),
        ({**results, "environment": {"date": "now"}}, None, r"is not what .*'command'"),
        ([], None, r"results\.json is not what"),
    ]
    with pytest.raises(PatchError, match=r"it has no all_results\.json or results\.json"):
        write_card(checkpoint, run=run)
    with pytest.raises(PatchError, match="there is no"):
        write_card(checkpoint, run=run / "results.json")
    for content, arm, message in cases:
        (run / "results.json").write_text(json.dumps(content))
        with pytest.raises(PatchError, match=message):
            write_card(checkpoint, run=run, arm=arm)
    assert not (checkpoint / "README.md").exists()
    with pytest.raises(PatchError, match="several arms"):
        read_run(QUICKSTART)


def test_what_diverged_or_was_not_measured_is_said_so(tmp_path: Path) -> None:
    results = json.loads((QUICKSTART / "results.json").read_text())
    results["throughput"] = None
    for row in results["quality"]:
        if row["arm"] == "rmsnorm":
            row.update(loss_after=None, perplexity_after=None, loss_difference=None)
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = write_card(folder(tmp_path, OWN), run=tmp_path).read_text()
    assert "| **rmsnorm** | 9 exact | 4.2696 | diverged | diverged | diverged |" in text
    assert "Speed was not measured." in text
    assert "loss, rmsnorm, after" not in text and "loss, rmsnorm, before" in text


def test_the_committed_cards_are_those_of_their_runs(tmp_path: Path) -> None:
    arms = json.loads((QUICKSTART / "results.json").read_text())["arms"]
    patched = [arm["name"] for arm in arms if arm["strategy"]]
    folder = ROOT / "model_cards"
    names = {f"quickstart-{arm.replace(':', '-')}.md": arm for arm in patched}
    assert {path.name for path in folder.iterdir()} == {"README.md", *names}
    for name, arm in names.items():
        expected = save_card(tmp_path / name, make_card(None, read_run(QUICKSTART, arm)))
        assert (folder / name).read_text() == expected.read_text(), "see model_cards/README.md"
        card = ModelCard.load(folder / name)
        assert {result.metric_type for result in card.data.eval_results} == {
            "loss",
            "perplexity",
            "accuracy",
        }


def test_names_on_the_hub_become_metadata(tmp_path: Path) -> None:
    results = json.loads((QUICKSTART / "results.json").read_text())
    results["start"] = {"name": "some/gpt2", "is_local": False, "model_type": "gpt2"}
    results["data"] = {"dataset": "some/wikitext", "config": "raw-v1", "is_local": False}
    (tmp_path / "results.json").write_text(json.dumps(results))
    card = ModelCard.load(write_card(folder(tmp_path, OWN), run=tmp_path, start="not/this"))
    assert (card.data.base_model, card.data["base_model_relation"]) == ("some/gpt2", "finetune")
    assert card.data.datasets == ["some/wikitext"] and card.data.model_name == "gpt2-rmsnorm"
    result = card.data.eval_results[0]
    assert (result.dataset_type, result.dataset_config) == ("some/wikitext", "raw-v1")
    assert "`some/wikitext` (raw-v1)" in card.text and "`some/gpt2`" in card.text


def test_the_base_model_is_a_name_on_the_hub_and_the_users_to_correct(tmp_path: Path) -> None:
    checkpoint = folder(tmp_path / "model", OWN)
    for start in (None, "", str(checkpoint), "runs/of/mine"):
        card = ModelCard.load(write_card(checkpoint, start=start))
        assert card.data.base_model is None
    card = ModelCard.load(write_card(checkpoint, start="some/gpt2"))
    assert card.data.base_model == "some/gpt2"
    assert "base_model_relation" not in card.data, "nothing says that it was trained"
    assert "`base_model_relation` is left out" in card.text
    card = ModelCard.load(write_card(checkpoint, start="me/second"))
    assert card.data.base_model == "some/gpt2"
    card = ModelCard.load(write_card(checkpoint, base_model="right/one"))
    assert card.data.base_model == "right/one"


@pytest.mark.filterwarnings("ignore:.*changed approximately:UserWarning")
@pytest.mark.parametrize("strategy", ["direct", "auto"])
def test_what_the_card_says_of_the_native_class_is_true(tmp_path: Path, strategy: str) -> None:
    torch.manual_seed(6)
    config = GPT2Config(vocab_size=53, n_embd=24, n_layer=2, n_head=2, n_positions=16)
    config.bos_token_id = config.eos_token_id = 2
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tokens = torch.tensor([[5, 9, 2, 40, 11, 7]])
    patch_model(model, strategy=strategy).save_pretrained(tmp_path)
    wrongly = (
        "Loaded wrongly:** `GPT2LMHeadModel.from_pretrained`"
        in (tmp_path / "README.md").read_text()
    )
    native = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert type(native.transformer.ln_f) is nn.LayerNorm
    with torch.no_grad():
        outputs = native(tokens).logits, model(tokens).logits
    assert torch.allclose(*outputs, rtol=1e-4, atol=1e-5) != wrongly
    assert wrongly == (strategy == "direct")
