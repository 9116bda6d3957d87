"""What lies beside a checkpoint's weights and config, and belongs to the patched one as well."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from transformers import AutoProcessor, AutoTokenizer

# The unpatched model in other formats; in any, and what a training left.
_OTHER_MODELS = {".onnx", ".onnx_data", ".xml", ".h5", ".msgpack", ".gguf", ".tflite", ".mlmodel"}
_WEIGHTS = _OTHER_MODELS | {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_OWN = {"config.json", "trainer_state.json", "hf_rmsnorm_plan.json"}
_PROCESSORS = ("*token*", "*processor*", "vocab*", "merges.txt", "*.model", "*.tiktoken")


def copy_companions(source: str, target: Path) -> None:
    """Copy to `target` what `source` has beside weights, config and index, and `target` has not:
    tokenizer, chat template, licence, sentence-transformers' `modules.json` and its modules.

    Of a hub name: the tokenizer or processor.
    """
    folder = Path(source)
    if not folder.is_dir() or any(p for glob in _PROCESSORS for p in folder.glob(glob)):
        for auto in (AutoProcessor, AutoTokenizer):
            with contextlib.suppress(OSError, ValueError, ImportError, KeyError):
                auto.from_pretrained(source).save_pretrained(target)
                break
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        relative = path.relative_to(folder)
        if path.is_file() and _belongs(relative) and not (target / relative).exists():
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / relative)


def _belongs(path: Path) -> bool:
    if any(part.startswith((".", "checkpoint-", "runs")) for part in path.parts):
        return False
    if len(path.parts) > 1:  # a part of its own, whose weights are not the model's
        return path.suffix not in _OTHER_MODELS and path.parts[0] not in ("onnx", "openvino")
    index = path.name.endswith(".index.json")
    return path.suffix not in _WEIGHTS and path.name not in _OWN and not index
