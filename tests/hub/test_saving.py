"""What `save_pretrained` writes: the format that says what the weights compute, wholly or not."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_zoo import build, inputs_for
from safetensors.torch import load_file, save_file
from tiny_models import TOKENS, config_of, contents, forward, gpt2, train
from torch import nn

import hf_rmsnorm
from hf_rmsnorm import PatchError, RMSNorm, apply_plan, patch_model, plan_patch, unpatch_model

CAUSAL = transformers.AutoModelForCausalLM


def is_stock(folder: Path) -> bool:
    return config_of(folder)["model_type"] != "hf_rmsnorm"


def saved_as_stock(model: Any, folder: Path, **kwargs: Any) -> bool:
    model.save_pretrained(folder, **kwargs)
    return is_stock(folder)


def test_an_exact_model_is_saved_as_the_stock_architecture(tmp_path: Path) -> None:
    model = gpt2()
    original = forward(model)
    patch_model(model)
    expected = forward(model)
    model.save_pretrained(tmp_path / "first")
    config = config_of(tmp_path / "first")
    assert config["model_type"] == "gpt2" and config["architectures"] == ["GPT2LMHeadModel"]
    assert "auto_map" not in config and "base_model_type" not in config
    assert not (tmp_path / "first" / "modeling_hf_rmsnorm.py").exists()
    plain = CAUSAL.from_pretrained(tmp_path / "first").eval()
    assert type(plain) is transformers.GPT2LMHeadModel
    assert type(plain.transformer.ln_f) is nn.LayerNorm
    torch.testing.assert_close(forward(plain), original)

    again = hf_rmsnorm.from_pretrained(tmp_path / "first").eval()
    assert type(again.transformer.ln_f) is RMSNorm
    assert torch.equal(forward(again), expected)
    again.save_pretrained(tmp_path / "second")
    assert contents(tmp_path / "second") == contents(tmp_path / "first")


def test_training_changes_the_format(tmp_path: Path) -> None:
    fresh = patch_model(gpt2())
    fresh.save_pretrained(tmp_path / "exact")
    for i, model in enumerate((fresh, hf_rmsnorm.from_pretrained(tmp_path / "exact"))):
        train(model, 1e-6)
        assert not saved_as_stock(model, tmp_path / str(i))
        for load in (CAUSAL.from_pretrained, hf_rmsnorm.from_pretrained):
            again = load(tmp_path / str(i)).eval()
            assert type(again.transformer.ln_f) is RMSNorm
            assert torch.equal(forward(again), forward(model))
        assert not saved_as_stock(again, tmp_path / "again"), "exact when patched, trained since"


@pytest.mark.parametrize("part", ["transformer.ln_f", "transformer.h.1.attn.c_attn"])
def test_training_any_part_changes_the_format(tmp_path: Path, part: str) -> None:
    model = patch_model(gpt2())
    model.requires_grad_(False).get_submodule(part).requires_grad_(True)
    train(model, 1e-6)
    assert not saved_as_stock(model, tmp_path / "model")


def test_writes_that_autograd_does_not_see_change_the_format(tmp_path: Path) -> None:
    model = patch_model(gpt2())
    weight = model.transformer.h[0].mlp.c_proj.weight
    weight.data += 1e-6 * torch.randn_like(weight)  # as some optimizers do
    assert not saved_as_stock(model, tmp_path / "model")
    model = patch_model(gpt2())
    model.transformer.ln_f.weight = nn.Parameter(model.transformer.ln_f.weight * 1.01)
    assert not saved_as_stock(model, tmp_path / "model")


def test_the_state_dict_that_is_passed_is_what_counts(tmp_path: Path) -> None:
    model = patch_model(gpt2())
    own = model.state_dict()
    assert saved_as_stock(model, tmp_path / "own", state_dict=dict(own))
    copies = {name: tensor.clone() for name, tensor in own.items()}
    assert saved_as_stock(model, tmp_path / "copies", state_dict=copies)
    trained = copy.deepcopy(model)
    train(trained)
    assert not saved_as_stock(model, tmp_path / "other", state_dict=trained.state_dict())
    again = hf_rmsnorm.from_pretrained(tmp_path / "other").eval()
    assert torch.equal(forward(again), forward(trained))
    averaged = {name: (own[name] + t) / 2 for name, t in trained.state_dict().items()}
    assert not saved_as_stock(model, tmp_path / "mean", state_dict=averaged)


def test_what_is_not_wholly_exact_is_not_stock(tmp_path: Path) -> None:
    for i, kwargs in enumerate(({"strategy": "direct"}, {"norm": "prmsnorm", "p": 0.5})):
        with pytest.warns() if "norm" in kwargs else _nothing():
            model = patch_model(gpt2(), **kwargs)
        assert not saved_as_stock(model, tmp_path / str(i))
    model = patch_model(gpt2(), strategy="exact", exclude="*.h.1.*")
    assert saved_as_stock(model, tmp_path / "kept")
    again = hf_rmsnorm.from_pretrained(tmp_path / "kept").eval()
    assert type(again.transformer.h[1].ln_1) is nn.LayerNorm
    assert torch.equal(forward(again), forward(model))
    assert not saved_as_stock(model.transformer, tmp_path / "part"), "the plan was for the whole"


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


def test_a_widened_model_is_not_stock(tmp_path: Path) -> None:
    model = build("bert")
    inputs = inputs_for("bert", model)
    with pytest.warns(UserWarning, match="approximately"):
        patch_model(model, post_norm="extra_neuron", inputs=inputs)
    assert not saved_as_stock(model, tmp_path / "model")
    again = hf_rmsnorm.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs[0])[0], model(**inputs[0])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_is_not_training(tmp_path: Path, dtype: torch.dtype) -> None:
    model = patch_model(gpt2()).to(dtype)
    assert saved_as_stock(model, tmp_path / "model")
    again = hf_rmsnorm.from_pretrained(tmp_path / "model").eval()
    assert again.dtype == dtype and torch.equal(forward(again), forward(model))
    assert saved_as_stock(again, tmp_path / "again")
    train(again, 1e-4)
    assert not saved_as_stock(again, tmp_path / "trained")


def test_a_checkpoint_that_a_stranger_trained_is_refused(tmp_path: Path) -> None:
    patch_model(gpt2()).save_pretrained(tmp_path / "model")
    plain = CAUSAL.from_pretrained(tmp_path / "model")
    train(plain)
    plain.save_pretrained(tmp_path / "trained")
    with pytest.raises(PatchError, match=r"trained/config\.json .* not centred") as error:
        hf_rmsnorm.from_pretrained(tmp_path / "trained")
    assert "AutoModel" in str(error.value) and "patch it again" in str(error.value)
    model = patch_model(CAUSAL.from_pretrained(tmp_path / "trained").eval())
    torch.testing.assert_close(forward(model), forward(plain))
    assert saved_as_stock(model, tmp_path / "again")


def test_a_checkpoint_whose_norms_alone_were_trained_is_refused(tmp_path: Path) -> None:
    patch_model(gpt2()).save_pretrained(tmp_path / "model")
    plain = CAUSAL.from_pretrained(tmp_path / "model").requires_grad_(False)
    plain.transformer.h[1].ln_2.requires_grad_(True)
    train(plain, 1e-4)
    plain.save_pretrained(tmp_path / "trained")
    with pytest.raises(PatchError, match="its norms' weights are others"):
        hf_rmsnorm.from_pretrained(tmp_path / "trained")


def test_an_exact_model_without_folds_is_stock_too(tmp_path: Path) -> None:
    model = gpt2()
    plan = replace(plan_patch(model), folds=())  # as of a model that was folded before
    patch_model(model).save_pretrained(tmp_path / "folded")
    folded = CAUSAL.from_pretrained(tmp_path / "folded").eval()
    apply_plan(folded, plan)
    assert saved_as_stock(folded, tmp_path / "again")
    again = hf_rmsnorm.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(forward(again), forward(model))


@pytest.mark.parametrize("name", ["vit-base", "phimoe"])
def test_architectures_with_weight_conversions(tmp_path: Path, name: str) -> None:
    model = build(name)
    inputs = inputs_for(name, model)
    for folder, kwargs in (("stock", {"inputs": inputs}), ("own", {"strategy": "direct"})):
        patched = patch_model(copy.deepcopy(model), **kwargs)
        assert saved_as_stock(patched, tmp_path / folder) == (folder == "stock")
        weights = patched.state_dict()
        for load in (hf_rmsnorm.from_pretrained, transformers.AutoModel.from_pretrained):
            if folder == "own" and load is not hf_rmsnorm.from_pretrained and name != "vit-base":
                continue
            loaded = load(tmp_path / folder).state_dict()
            prefix = "" if loaded.keys() <= weights.keys() else "model."
            assert loaded and all(torch.equal(loaded[k], weights[prefix + k]) for k in loaded)
        keys = load_file(tmp_path / folder / "model.safetensors").keys()
        assert keys != weights.keys(), "saved as the stock model saves: under its original names"


def test_shards_and_tied_weights(tmp_path: Path) -> None:
    for folder, patched in (
        ("stock", patch_model(gpt2())),
        ("own", patch_model(gpt2(), strategy="direct")),
    ):
        patched.save_pretrained(tmp_path / folder, max_shard_size="20KB")
        shards = sorted((tmp_path / folder).glob("*.safetensors"))
        assert len(shards) > 2 and "-of-" in shards[0].name
        again = hf_rmsnorm.from_pretrained(tmp_path / folder).eval()
        assert again.lm_head.weight is again.transformer.wte.weight
        assert torch.equal(forward(again), forward(patched))


def test_the_class_and_the_config_come_and_go_with_the_patch() -> None:
    model = gpt2()
    config = model.config
    patch_model(model, strategy="direct")
    for part in (model, model.transformer):
        assert isinstance(part, getattr(transformers, type(part).__name__))
        assert not type(part).is_custom_code()
    assert model.config.model_type == "gpt2", "generation and pipelines ask for it"
    assert str(model).startswith("GPT2LMHeadModel(")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and torch.equal(forward(twin), forward(model))
    unpatch_model(model)
    assert type(model) is transformers.GPT2LMHeadModel
    assert type(model.transformer) is transformers.GPT2Model
    assert type(model.config) is type(config) and model.config.to_dict() == config.to_dict()


def test_a_copy_of_an_exact_model_is_stock_too(tmp_path: Path) -> None:
    model = patch_model(gpt2())
    for i, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        assert saved_as_stock(twin, tmp_path / str(i))
        train(twin)
        assert not saved_as_stock(twin, tmp_path / f"trained{i}")
    assert saved_as_stock(model, tmp_path / "model")


def test_a_patch_that_fails_at_the_end_leaves_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2()
    plan = plan_patch(model, strategy="direct")
    before, config = forward(model), model.config

    def full(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr("hf_rmsnorm.hub.configs.config_class", full)
    with pytest.raises(MemoryError):
        apply_plan(model, plan)
    assert type(model) is transformers.GPT2LMHeadModel and type(model.config) is type(config)
    assert type(model.transformer) is transformers.GPT2Model
    assert model.config.to_dict() == config.to_dict()
    assert torch.equal(forward(model), before)


def test_parts_with_a_config_of_their_own_stay_parts() -> None:
    model = build("clip")
    assert model.config.text_config is model.text_model.config
    patch_model(model, strategy="direct")
    assert model.config.text_config is model.text_model.config
    assert model.config.to_dict()["text_config"]["model_type"] == "clip_text_model"


def break_writing(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The disk is full after so many weight files."""
    written: list[object] = []

    def save(tensors: Any, filename: str, **kwargs: Any) -> None:
        written.append(filename)
        if len(written) > after:
            Path(filename).write_bytes(b"half")
            raise OSError(28, "No space left on device", filename)
        save_file(tensors, filename, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save)


@pytest.mark.parametrize("strategy", ["auto", "direct"])
def test_a_failed_save_leaves_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    model = patch_model(gpt2(), strategy=strategy)
    target = tmp_path / "model"
    patch_model(gpt2(5), "rmsnorm").save_pretrained(target, max_shard_size="20KB")
    (target / "notes.txt").write_text("mine")
    before, config = contents(tmp_path), model.config
    with monkeypatch.context() as patch:
        break_writing(patch, after=1)
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(target, max_shard_size="20KB")
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(tmp_path / "new", max_shard_size="20KB")
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()
    assert model.config is config
    model.save_pretrained(target)
    assert torch.equal(forward(hf_rmsnorm.from_pretrained(target).eval()), forward(model))


def test_a_save_that_fails_while_moving_leaves_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    patch_model(gpt2(5)).save_pretrained(target, max_shard_size="20KB")
    before = contents(tmp_path)
    replace, moves = Path.replace, []

    def fails_once(self: Path, to: Path) -> Path:
        moves.append(self.name)
        if len(moves) == fail_at:
            raise PermissionError(13, "Permission denied", str(to))
        return replace(self, to)

    model = patch_model(gpt2(), strategy="direct")
    for fail_at in (1, 3, len(before) + 1, len(before) + 4):
        moves.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", fails_once)
            with pytest.raises(PermissionError):
                model.save_pretrained(target)
        assert contents(tmp_path) == before, f"failed at move {fail_at}"


def test_another_format_over_an_existing_folder_leaves_no_mixture(tmp_path: Path) -> None:
    exact, direct = patch_model(gpt2()), patch_model(gpt2(5), strategy="direct")
    target = tmp_path / "model"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    (target / "pytorch_model.bin").write_bytes(b"old")
    for model, sizes in ((direct, {"max_shard_size": "20KB"}), (exact, {}), (direct, {})):
        model.save_pretrained(target, **sizes)
        alone = tmp_path / "alone"
        model.save_pretrained(alone, **sizes)
        names = {path.name for path in alone.iterdir()}
        assert {path.name for path in target.iterdir()} == names | {"notes.txt"}
        assert torch.equal(forward(hf_rmsnorm.from_pretrained(target).eval()), forward(model))


def test_variants_of_the_same_model_stay_beside_each_other(tmp_path: Path) -> None:
    model = patch_model(gpt2(), strategy="direct")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    model.save_pretrained(tmp_path, variant="fp16")
    names = {path.name for path in tmp_path.glob("*.safetensors*")}
    assert names == {"model.safetensors", "model.fp16.safetensors"}
    patch_model(gpt2(5), "prmsnorm", strategy="direct").save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.glob("*.safetensors*")}
    assert names == {"model.safetensors"}, "weights of another patch"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(PatchError, match="model is a file"):
        patch_model(gpt2(), strategy="direct").save_pretrained(tmp_path / "model")
    assert contents(tmp_path).keys() == {"model"}


def test_a_class_of_ones_own_never_loads_as_its_base_class(tmp_path: Path) -> None:
    class Mine(transformers.GPT2LMHeadModel):
        pass

    exact = patch_model(Mine(gpt2().config).eval())
    assert saved_as_stock(exact, tmp_path / "exact")
    model = patch_model(Mine(gpt2().config).eval(), strategy="direct")
    with pytest.warns(UserWarning, match="Mine is not a class of transformers"):
        model.save_pretrained(tmp_path / "own")
    for load in (hf_rmsnorm.from_pretrained, CAUSAL.from_pretrained):
        with pytest.raises(PatchError, match=r"base_model_type '.*\.Mine'"):
            load(tmp_path / "own")
    again = apply_and_load(Mine(gpt2(7).config).eval(), model, tmp_path / "own")
    assert torch.equal(forward(again), forward(model))


def apply_and_load(model: Any, like: Any, folder: Path) -> Any:
    """What the warning says."""
    apply_plan(model, hf_rmsnorm.patch_report(like).plan)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return model


def test_pushing_uploads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits: list[dict[str, Any]] = []

    class Hub:
        """The Hub, as far as a push needs it."""

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Url", (), {"repo_id": f"me/{repo_id.rpartition('/')[2]}"})

        def create_commit(self, repo_id: str, operations: Any, **kwargs: Any) -> None:
            files = {o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations}
            commits.append({"repo_id": repo_id, "files": files, **kwargs})

        def create_branch(self, **kwargs: Any) -> None: ...

        def hf_hub_download(self, repo_id: str, filename: str, **kwargs: Any) -> str:
            path = tmp_path / repo_id.replace("/", "-")
            path.write_text("---\nlicense: mit\n---\nOn the Hub.\n")
            return str(path)

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    model = patch_model(gpt2(), strategy="direct")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    model.save_pretrained(tmp_path / "model", push_to_hub=True, commit_message="one")
    model.push_to_hub("me/other", commit_message="two", revision="dev", tags=["fun"])
    assert [(c["repo_id"], c["commit_message"], c["revision"]) for c in commits] == [
        ("me/model", "one", None),
        ("me/other", "two", "dev"),
    ]
    for commit in commits:
        config = json.loads(commit["files"]["config.json"])
        assert config["model_type"] == "hf_rmsnorm"
        assert {"README.md", "model.safetensors", "modeling_hf_rmsnorm.py"} <= commit[
            "files"
        ].keys()
        assert "notes.txt" not in commit["files"]
        card = commit["files"]["README.md"].decode()
        assert "license: mit" in card and "On the Hub." in card and "- hf_rmsnorm" in card
    assert b"- fun\n" in commits[1]["files"]["README.md"]


def test_an_adapter_is_saved_alone(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = patch_model(gpt2())
    base.save_pretrained(tmp_path / "base")
    names = ["c_attn", "c_proj"]
    lora = LoraConfig(target_modules=names, init_lora_weights=False, fan_in_fan_out=True)
    model = get_peft_model(base, lora).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    again = PeftModel.from_pretrained(
        hf_rmsnorm.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    assert torch.equal(forward(again), forward(model))
    merged = model.merge_and_unload()
    assert not saved_as_stock(merged, tmp_path / "merged")
    again = hf_rmsnorm.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(forward(again), forward(merged))


def test_the_trainer_saves_what_the_model_computes(tmp_path: Path) -> None:
    model = patch_model(gpt2())
    rows = [{**{k: v[0] for k, v in TOKENS.items()}, "labels": TOKENS["input_ids"][0]}] * 4
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        report_to=[],
        use_cpu=True,
        save_steps=1,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.save_model(str(tmp_path / "before"))
    assert is_stock(tmp_path / "before")
    trainer.train()
    trainer.save_model(str(tmp_path / "after"))
    for folder in (tmp_path / "after", tmp_path / "run" / "checkpoint-1"):
        assert not is_stock(folder)
        again = hf_rmsnorm.from_pretrained(folder).eval()
        assert torch.equal(forward(again), forward(model.eval()))
