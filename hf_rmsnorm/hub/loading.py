"""Loading patched checkpoints: model classes of the `hf_rmsnorm` type, and `from_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..errors import PatchError
from ..patching import apply_plan
from .configs import RECORD, check_record, config_class, from_record

_classes: dict[Any, type[PreTrainedModel]] = {}


def model_class(base: Any) -> type[PreTrainedModel]:
    """`base`, patched as its config says at the end of `__init__`.

    The class keeps the name of `base`: pipelines, label smoothing and `architectures` go by it.
    """
    if base in _classes:
        return _classes[base]

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        record = check_record(getattr(config, RECORD, None))
        apply_plan(self, from_record(self, record))

    def is_custom_code(cls: type) -> bool:
        return False  # the checkpoint key conversions of `base` hold

    members = {
        "__init__": __init__,
        "is_custom_code": classmethod(is_custom_code),
        "config_class": config_class(base.config_class),
        "__module__": __name__,
        "__doc__": base.__doc__,
    }
    _classes[base] = type(base.__name__, (base,), members)
    return _classes[base]


def __getattr__(name: str) -> Any:
    """Lets pickle find the generated classes again."""
    base = getattr(transformers, name, None)
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        return model_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register_models(base: Any) -> None:
    """Register the patched class of every head of `base` with its Auto class."""
    for auto in list(vars(modeling_auto).values()):
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is None or not hasattr(auto, "register") or base not in mapping:
            continue
        found = mapping[base]
        for head in found if isinstance(found, tuple) else (found,):
            auto.register(config_class(base), model_class(head), exist_ok=True)


def from_pretrained(path_or_repo: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a checkpoint with the class its config names, patched if it was saved patched.

    Sugar over `AutoModelFor...from_pretrained`, for local folders and hub names.

    Args:
        path_or_repo: a folder written by `save_pretrained`, or a hub repository.
        kwargs: as for `AutoModel.from_pretrained`.

    Raises:
        PatchError: a folder that is no checkpoint, or a patched checkpoint whose record is
            missing, damaged, or does not fit.
        OSError: no such hub repository (from transformers).
    """
    folder = Path(path_or_repo)
    if folder.exists() and not (folder / "config.json").is_file():
        raise PatchError(f"{folder} is not a checkpoint: it has no config.json")
    hub = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")
    config = AutoConfig.from_pretrained(
        path_or_repo, **{key: kwargs[key] for key in hub if key in kwargs}
    )
    for name in config.architectures or ():
        base = getattr(transformers, name, None)
        if base is not None:
            cls = model_class(base) if RECORD in config.__dict__ else base
            return cls.from_pretrained(path_or_repo, config=config, **kwargs)
    return transformers.AutoModel.from_pretrained(path_or_repo, **kwargs)
