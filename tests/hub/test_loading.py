"""What the libraries around it do with a patched checkpoint: load it, run it, train it, save it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import TOKENS, config_of, forward, gpt2, run_python, train
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import hf_rmsnorm
from hf_rmsnorm import PartialRMSNorm, PatchError, RMSNorm, patch_model

Load = Callable[..., Any]
FORMATS = ["own", "stock"]
# A checkpoint in the stock format gives a model with RMSNorm through the package alone.
LOADERS = [
    pytest.param("own", AutoModelForCausalLM.from_pretrained, id="own-AutoModel"),
    pytest.param("own", hf_rmsnorm.from_pretrained, id="own"),
    pytest.param("stock", hf_rmsnorm.from_pretrained, id="stock"),
]


def patched(format: str) -> Any:
    if format == "stock":
        return patch_model(gpt2())
    return patch_model(gpt2(), "prmsnorm", p=0.25, strategy="direct")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """The folder and the model that was saved there, of both formats; in several shards."""
    found = {}
    for format in FORMATS:
        folder, model = tmp_path_factory.mktemp("checkpoints") / format, patched(format)
        model.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
        found[format] = folder, model
    return found


def is_stock(folder: Path) -> bool:
    return config_of(folder)["model_type"] == "gpt2"


def assert_patched(model: nn.Module, format: str) -> None:
    kind = RMSNorm if format == "stock" else PartialRMSNorm
    found = [type(module) for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert found == [kind] * 7


@pytest.mark.parametrize("format, load", LOADERS)
def test_onto_devices(format: str, load: Load, checkpoints: Any) -> None:
    folder, model = checkpoints[format]
    for device_map in ({"": "cpu"}, "cpu", {"transformer": "cpu", "lm_head": "cpu"}):
        loaded = load(folder, device_map=device_map).eval()
        assert_patched(loaded, format)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
        assert torch.equal(forward(loaded), forward(model))


@pytest.mark.filterwarnings("ignore:.*offloaded modules")
@pytest.mark.parametrize("format, load", LOADERS)
def test_offloaded_to_disk(format: str, load: Load, checkpoints: Any, tmp_path: Path) -> None:
    folder, model = checkpoints[format]
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "lm_head": "cpu"}
    places |= {"transformer.h": "disk", "transformer.ln_f": "disk"}
    loaded = load(folder, device_map=places, offload_folder=tmp_path / "offload").eval()
    assert_patched(loaded, format)
    assert loaded.transformer.h[1].ln_1.weight.is_meta
    assert torch.equal(forward(loaded), forward(model))
    loaded.save_pretrained(tmp_path / "again")
    again = hf_rmsnorm.from_pretrained(tmp_path / "again").eval()
    assert_patched(again, format)
    assert torch.equal(forward(again), forward(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format, load", LOADERS)
def test_in_half_precision(format: str, load: Load, dtype: torch.dtype, checkpoints: Any) -> None:
    folder, _ = checkpoints[format]
    loaded = load(folder, dtype=dtype).eval()
    assert_patched(loaded, format)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(forward(loaded), forward(patched(format).to(dtype)))


@pytest.mark.parametrize(
    "auto, kind", [(AutoModelForCausalLM, "GPT2LMHeadModel"), (AutoModel, "GPT2Model")]
)
def test_from_config(auto: Any, kind: str, checkpoints: Any) -> None:
    config = transformers.AutoConfig.from_pretrained(checkpoints["own"][0])
    model = auto.from_config(config)
    assert_patched(model, "own")
    assert type(model).__name__ == kind


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(53)}
    found = Tokenizer(models.WordLevel(words, unk_token="w0"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, unk_token="w0", eos_token="w2", pad_token="w2"
    )


@pytest.mark.parametrize("format", FORMATS)
def test_text_generation_pipeline(
    format: str, checkpoints: Any, tokenizer: Any, tmp_path: Path
) -> None:
    folder, model = checkpoints[format]
    shutil.copytree(folder, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = str(tmp_path / "model")
    if format == "stock":  # by its path it is a LayerNorm model, of the same function
        given = hf_rmsnorm.from_pretrained(given)
    run = transformers.pipeline("text-generation", model=given, tokenizer=tokenizer)
    assert_patched(run.model, format)
    settings = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    (answer,) = run("w5 w9 w11 w40", return_tensors=True, **settings)
    (wanted,) = model.generate(**tokenizer("w5 w9 w11 w40", return_tensors="pt"), **settings)
    assert answer["generated_token_ids"] == wanted.tolist()
    assert wanted.shape == (10,)


def test_image_classification_pipeline(tmp_path: Path) -> None:
    from model_zoo import build
    from PIL import Image

    model = patch_model(build("vit"), "prmsnorm", p=0.25, strategy="direct")
    model.save_pretrained(tmp_path)
    size = {"height": 20, "width": 20}
    transformers.ViTImageProcessor(size=size).save_pretrained(tmp_path)
    run = transformers.pipeline("image-classification", model=str(tmp_path))
    pixels = torch.randint(256, (20, 20, 3), dtype=torch.uint8)
    (best, *_) = run(Image.fromarray(pixels.numpy()), function_to_apply="none")
    with torch.no_grad():
        logits = model(pixel_values=(pixels.permute(2, 0, 1)[None] / 255 - 0.5) / 0.5).logits
    assert best["label"] == model.config.id2label[logits.argmax().item()]
    assert best["score"] == pytest.approx(logits.max().item(), rel=1e-5)


@pytest.mark.parametrize("format, load", LOADERS)
def test_an_adapter_on_top(format: str, load: Load, checkpoints: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    folder, _ = checkpoints[format]
    modules = {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]}
    lora = LoraConfig(**modules, r=2, fan_in_fan_out=True)
    model = get_peft_model(load(folder), lora)
    train(model, 1e-2)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    assert torch.equal(forward(again), forward(model))
    assert not torch.equal(forward(again), forward(load(folder).eval()))
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_patched(loaded, format)
    assert torch.equal(forward(loaded), forward(merged))


def rows() -> list[dict[str, Any]]:
    tokens = TOKENS["input_ids"][0]
    return [{"input_ids": tokens, "labels": tokens}] * 4


def arguments(folder: Path, **settings: Any) -> Any:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )


@pytest.mark.parametrize("format, load", LOADERS)
def test_trained_from_a_checkpoint(
    format: str, load: Load, checkpoints: Any, tmp_path: Path
) -> None:
    folder, _ = checkpoints[format]
    settings = {"gradient_checkpointing": True, "label_smoothing_factor": 0.1}
    model = load(folder)
    trainer = transformers.Trainer(model, arguments(tmp_path, **settings), train_dataset=rows())
    trainer.train()
    trainer.save_model(str(tmp_path / "last"))
    for saved in (tmp_path / "last", tmp_path / "checkpoint-2"):
        again = AutoModelForCausalLM.from_pretrained(saved).eval()
        assert_patched(again, format)
        assert torch.equal(forward(again), forward(model.eval()))
    resumed = transformers.Trainer(
        load(folder), arguments(tmp_path, **settings), train_dataset=rows()
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_patched(resumed.model, format)
    torch.testing.assert_close(forward(resumed.model.eval()), forward(model))


@pytest.mark.parametrize("strategy", ["auto", "direct"])
def test_resumed_on_a_model_that_was_not_patched(
    strategy: str, tmp_path: Path, caplog: Any, accelerator: Any
) -> None:
    model = patch_model(gpt2(), strategy=strategy)
    transformers.Trainer(model, arguments(tmp_path), train_dataset=rows()).train()
    plain = transformers.Trainer(gpt2(), arguments(tmp_path), train_dataset=rows())
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "unexpected keys in the checkpoint" in caplog.text and "hf_rmsnorm_p" in caplog.text

    accelerator.prepare(model)
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.load_state(str(tmp_path / "state"))
    accelerator._models.clear()
    accelerator.prepare(gpt2())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*hf_rmsnorm_p"):
        accelerator.load_state(str(tmp_path / "state"))


@pytest.fixture
def accelerator() -> Iterator[Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("format, load", LOADERS)
def test_saved_by_accelerate(
    format: str, load: Load, checkpoints: Any, tmp_path: Path, accelerator: Any
) -> None:
    from accelerate import load_checkpoint_in_model

    folder, _ = checkpoints[format]
    inner = load(folder).eval()
    model = accelerator.prepare(torch.compile(inner, backend="eager"))
    for trained in (False, True):
        if trained:
            train(inner)
        expected = forward(inner)
        accelerator.unwrap_model(model).save_pretrained(
            tmp_path / "model",
            is_main_process=accelerator.is_main_process,
            save_function=accelerator.save,
            state_dict=accelerator.get_state_dict(model),
        )
        again = hf_rmsnorm.from_pretrained(tmp_path / "model").eval()
        assert_patched(again, format)
        assert torch.equal(forward(again), expected)
        assert is_stock(tmp_path / "model") == (format == "stock" and not trained)

        # weights alone, for a model that is built some other way
        accelerator.save_model(inner, tmp_path / "weights")
        with pytest.raises(PatchError, match=r"config\.json. Weights alone.*model\.config\.save"):
            hf_rmsnorm.from_pretrained(tmp_path / "weights")
        other = load(folder).eval()
        load_checkpoint_in_model(other, tmp_path / "weights")
        assert torch.equal(forward(other), expected)
        inner.config.save_pretrained(tmp_path / "weights")
        for whole in (hf_rmsnorm.from_pretrained, AutoModelForCausalLM.from_pretrained):
            again = whole(tmp_path / "weights").eval()
            assert_patched(again, format)
            assert torch.equal(forward(again), expected)
        (tmp_path / "weights" / "config.json").unlink()


@pytest.mark.launch
@pytest.mark.parametrize("first", ["transformers", "transformers.modeling_utils", "hf_rmsnorm"])
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    code = f"import {first}; import hf_rmsnorm; from hf_rmsnorm import from_pretrained"
    done = run_python(code, package=True)
    assert not done.returncode, done.stderr


@register_quantization_config("rounded")
class Rounded(QuantizationConfigMixin):
    def __init__(self) -> None:
        self.quant_method = "rounded"  # type: ignore[assignment]


@register_quantizer("rounded")
class Rounding(HfQuantizer):
    """Makes the weights of projections int8."""

    requires_calibration = False
    is_trainable = False

    def is_serializable(self) -> bool:
        return True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in model.modules():
            if isinstance(module, transformers.pytorch_utils.Conv1D):
                module.weight = nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
        return model


def test_quantised_on_loading(checkpoints: Any) -> None:
    config = {"quantization_config": Rounded()}
    with pytest.raises(PatchError, match=r"c_proj\.weight was folded .* quantised .*int8"):
        hf_rmsnorm.from_pretrained(checkpoints["stock"][0], **config)
    assert_patched(hf_rmsnorm.from_pretrained(checkpoints["own"][0], **config), "own")
