"""finetune_clm.py from its command line to what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import BLOCK, Assets, Script, read
from harness import data, models
from harness.args import DataArguments, ModelArguments
from harness.arms import NORMS
from huggingface_hub import ModelCard

import hf_rmsnorm
from hf_rmsnorm import cli

pytestmark = pytest.mark.filterwarnings("ignore:.*changed approximately:UserWarning")


def reload_loss(folder: Path, assets: Assets) -> float:
    """Validation loss of a saved model, computed by the model itself."""
    tokenizer = models.load_tokenizer(ModelArguments(model_name_or_path=str(folder)))
    args = DataArguments(
        train_file=str(assets.text), cache_dir=str(assets.folder / "cache"), max_eval_samples=6
    )
    blocks = data.load_data(args, tokenizer, BLOCK).validation
    model = hf_rmsnorm.from_pretrained(str(folder)).eval()
    ids = torch.stack([blocks[i]["input_ids"] for i in range(len(blocks))])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize(
    "flags",
    [
        ["--norm", "layernorm"],
        ["--norm", "rmsnorm"],
        ["--norm", "rmsnorm", "--strategy", "direct", "--exclude", "*ln_f"],
        ["--norm", "prmsnorm", "--p", "0.25"],
    ],
    ids=" ".join,
)
def test_trained_model_is_saved_and_loads_as_what_it_is(
    finetune: Script, assets: Assets, tmp_path: Path, flags: list[str]
) -> None:
    out = tmp_path / "out"
    assert finetune(*flags, "--output_dir", str(out), "--max_train_steps", "4",
                    "--learning_rate", "1e-2") == 0  # fmt: skip
    found = read(out / "all_results.json")
    assert found["eval_loss"] < found["eval_loss_before_training"]
    assert reload_loss(out, assets) == pytest.approx(found["eval_loss"], rel=1e-5)
    assert found["steps"] == len(found["history"]) == 4
    assert found["tokens"] == 4 * 8 * (BLOCK - 1)
    assert found["num_processes"] == 1
    assert found["peak_memory_bytes"] is None, "not measured on a CPU"
    assert found["timing"]["step_s_p10"] <= found["timing"]["step_s_p90"]
    assert found["environment"]["versions"]["torch"] == torch.__version__
    patched = found["patch"]
    assert (patched is None) == (flags[1] == "layernorm")
    if patched:
        kept = [site["name"] for site in patched["sites"] if site["verdict"] == "kept"]
        assert kept == (["transformer.ln_f"] if "--exclude" in flags else [])
    assert (out / "README.md").exists() == (patched is not None)


def test_the_card_has_the_run_and_the_unpatched_model(
    finetune: Script, assets: Assets, tmp_path: Path
) -> None:
    out, control = tmp_path / "out", tmp_path / "control"
    flags = ["--max_train_steps", "3"]
    patched = ["--norm", "prmsnorm", "--p", "0.25"]
    assert finetune(*patched, *flags, "--output_dir", str(out)) == 0
    assert finetune(*flags, "--output_dir", str(control)) == 0
    found = read(out / "all_results.json")
    assert (
        found["eval_unpatched"]["loss"]
        == read(control / "all_results.json")["evaluations"][0]["loss"]
    )
    card = ModelCard.load(out / "README.md")
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["loss, layernorm (unpatched), before training"] == found["eval_unpatched"]["loss"]
    assert values["loss, prmsnorm:0.25, before training"] == found["evaluations"][0]["loss"]
    assert values["perplexity, prmsnorm:0.25, after 3 steps"] == found["perplexity"]
    assert len(values) == 9
    assert found["environment"]["date"] in card.text and "`text.txt`" in card.text
    assert "not measured" in card.text, "the control was not trained beside it"
    folder = str(assets.checkpoint.parent)
    assert folder not in card.text.replace(found["environment"]["command"], "")
    assert card.data.base_model is None, "a folder is no name on the Hub"
    assert cli.main(["card", str(out)]) == 0
    assert ModelCard.load(out / "README.md").content == card.content


@pytest.mark.parametrize("norm", list(NORMS))
def test_every_norm_learns_from_scratch(finetune: Script, tmp_path: Path, norm: str) -> None:
    out = tmp_path / "out"
    status = finetune("--norm", norm, "--output_dir", str(out), "--max_train_steps", "20",
                      "--learning_rate", "1e-2", start="scratch")  # fmt: skip
    assert status == 0
    found = read(out / "all_results.json")
    assert found["eval_loss"] < 0.9 * found["eval_loss_before_training"]
    if NORMS[norm].from_scratch_only:
        assert (out / f"baseline-{norm}.safetensors").is_file()
        assert not (out / "config.json").exists(), "nothing that would load as LayerNorm"


def test_mixed_precision_and_trackers(finetune: Script, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--mixed_precision", "bf16", "--with_tracking", "--report_to", "tensorboard"]
    assert finetune(*flags, "--output_dir", str(out), "--max_train_steps", "2") == 0
    assert read(out / "all_results.json")["environment"]["mixed_precision"] == "bf16"
    assert list(out.glob("**/events.out.tfevents*"))


@dataclass(frozen=True)
class Refusal:
    """Flags that are wrong, and what the message must say about them."""

    message: str
    flags: str
    start: str = "checkpoint"
    data: bool = True


# {empty}, {short}, ... are the files that the test below makes.
REFUSALS = {
    "unknown norm": Refusal("invalid choice: 'batchnorm'", "--norm batchnorm"),
    "p of 0": Refusal("p=0 is outside (0, 1]", "--norm prmsnorm --p 0"),
    "p over 1": Refusal("p=1.5 is outside (0, 1]", "--norm prmsnorm --p 1.5"),
    "p for rmsnorm": Refusal("has no p", "--norm rmsnorm --p 0.5"),
    "strategy for the control": Refusal("patches nothing", "--strategy direct"),
    "nothing exact": Refusal("exact", "--norm prmsnorm --strategy exact"),
    "nothing included": Refusal("ln_7", "--norm rmsnorm --strategy direct --include *ln_7"),
    "nothing excluded": Refusal("ln_7", "--norm rmsnorm --strategy direct --exclude *ln_7"),
    "include for the control": Refusal("patches nothing", "--include *ln_1"),
    "baseline on a trained model": Refusal("from scratch", "--norm none"),
    "no data": Refusal("found neither", "", data=False),
    "data twice": Refusal("found both", "--dataset_name some/name"),
    "missing file": Refusal("does not exist", "--train_file nowhere.txt", data=False),
    "folder for a file": Refusal("is a folder", "--train_file {tmp}", data=False),
    "unknown kind of file": Refusal("'.py'", "--train_file {here}", data=False),
    "empty file": Refusal("empty.txt is empty", "--train_file {empty}", data=False),
    "empty validation file": Refusal("empty.txt is empty", "--validation_file {empty}"),
    "short text": Refusal("short.txt has", "--train_file {short}", data=False),
    "column of numbers": Refusal("does not hold text", "--train_file {numbers}", data=False),
    "broken json": Refusal("broken.json", "--train_file {broken}", data=False),
    "no such column": Refusal("no column 'body'", "--text_column_name body"),
    "large batch": Refusal("do not fill one batch", "--per_device_train_batch_size 9999"),
    "block over the maximum": Refusal("maximum of 32", "--block_size 33"),
    "block of one token": Refusal("leaves no token", "--block_size 1"),
    "no model": Refusal("no model", "", start=""),
    "not a checkpoint": Refusal("no config.json", "--model_name_or_path {tmp}", start=""),
    "no such folder": Refusal("does not exist", "--model_name_or_path ./nowhere", start=""),
    "no weights": Refusal(
        "weightless", "--model_name_or_path {weightless} --tokenizer_name {tokenizer}", start=""
    ),
    "no tokenizer": Refusal("no tokenizer", "--model_name_or_path {weightless}", start=""),
    "two starts": Refusal("one or the other", "--config_name gpt2"),
    "scratch without tokenizer": Refusal("needs --tokenizer_name", "--config_name gpt2", start=""),
    "unknown override": Refusal("n_layerz", "--config_overrides n_layerz=1", start="scratch"),
    "odd interval": Refusal("--checkpointing_steps often", "--checkpointing_steps often"),
    "no steps": Refusal("must be at least 1", "--max_train_steps 0"),
    "negative rate": Refusal("--learning_rate is -1.0; it must be", "--learning_rate -1"),
    "negative warm-up": Refusal("--num_warmup_steps is -2; it must be", "--num_warmup_steps -2"),
    "no such tracker": Refusal("is not installed", "--with_tracking --report_to aim"),
    "unknown flag": Refusal("unrecognized arguments", "--norms rmsnorm"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_before_anything_is_written(
    finetune: Script,
    assets: Assets,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    case: str,
) -> None:
    contents = {
        "empty.txt": "",
        "short.txt": "a norm\n",
        "numbers.jsonl": '{"text": 1}\n',
        "broken.json": '{"text": ',
        "weightless/config.json": (assets.checkpoint / "config.json").read_text(),
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    places = {name.split(".")[0].split("/")[0]: tmp_path / name for name in contents}
    places |= {"weightless": tmp_path / "weightless", "tokenizer": assets.tokenizer}
    places |= {"tmp": tmp_path, "here": Path(__file__)}

    refusal = REFUSALS[case]
    flags = [flag.format(**places) for flag in refusal.flags.split()]
    out = tmp_path / "out"
    status = finetune(*flags, "--output_dir", str(out), start=refusal.start, data=refusal.data)
    assert status == 2
    assert refusal.message in capsys.readouterr().err
    assert not out.exists(), "nothing half-written"


def test_full_output_folder_is_left_alone(
    finetune: Script, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    assert finetune("--output_dir", str(tmp_path), "--max_train_steps", "1") == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    again = ["--overwrite_output_dir", "--max_train_steps", "1"]
    assert finetune("--output_dir", str(tmp_path), *again) == 0
    assert (tmp_path / "all_results.json").is_file()
    assert (tmp_path / "mine.txt").read_text() == "precious"
