"""The `hf_rmsnorm` model type: configs that carry a patch, so that a patched checkpoint can never
load as the LayerNorm model in silence."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import PatchError
from .records import RECORD, check_record, config_file

MODEL_TYPE = "hf_rmsnorm"

# Where in transformers the classes of model and config are: in the configs of models that no Auto
# class has.
PLACE = ("base_class", "base_config")

_config_classes: dict[Any, Any] = {}
_placed: dict[str, tuple[Any, Any]] = {}  # classes of these, model's and config's, by name


def library_class(path: object, kind: type, where: str) -> Any:
    """The class of transformers that is a `kind` and at `path`, such as
    `models.owlvit.modeling_owlvit.OwlViTTextModel`; `PatchError` naming `where` that was read."""
    module, _, name = str(path).rpartition(".")
    if re.fullmatch(r"models(\.\w+)+", module):
        with suppress(ImportError):
            found = getattr(importlib.import_module(f"transformers.{module}"), name, None)
            if isinstance(found, type) and issubclass(found, kind):
                return found
    raise PatchError(
        f"{where} names {path!r}, which this version of transformers has no {kind.__name__} at"
    )


def config_class(base: Any, class_path: str | None = None) -> Any:
    """`base` with the `hf_rmsnorm` model type in files; everything else is inherited.

    In memory it has the model type of `base`: the library's own code, and others' (generation,
    pipelines, weight conversions, adapters), ask for it. A file has its own, and that of `base` as
    `base_model_type`.

    Args:
        class_path: of the one model class that this is for, where no Auto class has it.
    """
    if (base, class_path) not in _config_classes:

        def get_config_dict(cls: Any, *args: Any, **kwargs: Any) -> Any:
            found, rest = base.get_config_dict.__func__(cls, *args, **kwargs)
            if found.get("model_type") == MODEL_TYPE:
                found = {**found, "model_type": found.get("base_model_type")}
            return found, rest

        def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            own = {**config_dict, "model_type": base.model_type}
            return base.from_dict.__func__(cls, own, **kwargs)

        def to_json_string(self: Any, *args: Any, **kwargs: Any) -> str:
            found = json.loads(base.to_json_string(self, *args, **kwargs))
            return json.dumps({**found, "model_type": MODEL_TYPE}, indent=2, sort_keys=True) + "\n"

        def reduce(self: Any, protocol: Any) -> Any:
            return new_config, (base, class_path), dict(self.__dict__)

        name = f"RMSNorm{base.__name__}"
        members = {
            "file_type": MODEL_TYPE,
            "get_config_dict": classmethod(get_config_dict),
            "from_dict": classmethod(from_dict),
            "to_json_string": to_json_string,
            "_auto_class": None,  # remote code saves itself; this class is not in its file
            "__reduce_ex__": reduce,
            "__module__": __name__,
            "__qualname__": name,
        }
        _config_classes[base, class_path] = type(name, (base,), members)
    return _config_classes[base, class_path]


def new_config(base: Any, class_path: str | None = None) -> Any:
    """An empty instance, for pickle and copy, which cannot find the generated classes by name."""
    cls = config_class(base, class_path)
    return cls.__new__(cls)


def stock_config(config: PreTrainedConfig) -> Any:
    """The class of transformers, or of a repository, that a config's is or was made from."""
    return type(config).__mro__[1] if is_marked(config) else type(config)


def is_marked(config: PreTrainedConfig) -> bool:
    return getattr(type(config), "file_type", None) == MODEL_TYPE


def mark_config(config: PreTrainedConfig, record: dict[str, Any]) -> None:
    """Make a config of transformers one of the `hf_rmsnorm` type, in place."""
    cls = config_class(type(config))
    config.__dict__.update({RECORD: record, "base_model_type": config.model_type})
    config.__class__ = cls


def unmark_config(config: PreTrainedConfig) -> None:
    """The inverse of `mark_config`, for the configs of parts in it, too."""
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            unmark_config(value)
    for name in (RECORD, *PLACE, "base_model_type"):  # in what was made of its `to_dict`, too
        config.__dict__.pop(name, None)
    if is_marked(config):
        config.__dict__.pop("auto_map", None)
        config.__class__ = stock_config(config)


@contextmanager
def stock_class(model: Any, config: Any) -> Iterator[None]:
    """The config as a stock one, also to the model's own checks, while a model is built that builds
    parts of itself from it through `AutoModel`: those get their share of the patch with the
    whole."""
    ours, stock = type(config), stock_config(config)
    try:
        config.__class__ = model.__dict__["config_class"] = stock
        yield
    finally:
        config.__class__ = ours
        model.__dict__.pop("config_class", None)


class RMSNormAutoConfig(PreTrainedConfig):
    """Reads the config of any patched checkpoint and returns its own class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        where = config_file(kwargs.get("name_or_path"))
        path, base_path = (config_dict.get(key) for key in PLACE)
        base_type = str(config_dict.get("base_model_type"))
        if path is not None:
            from transformers import PreTrainedModel  # which may import this module

            check_record(config_dict.get(RECORD), where)

            model = library_class(path, PreTrainedModel, where)
            base = library_class(base_path, PreTrainedConfig, where)
            _placed[model.__name__] = model, base
            return config_class(base, path).from_dict(config_dict, **kwargs)
        if base_type not in CONFIG_MAPPING:
            raise PatchError(
                f"{where.lstrip('/')} has model type {MODEL_TYPE!r} and base_model_type "
                f"{base_type!r}, which this version of transformers does not know"
            )
        check_record(config_dict.get(RECORD), where)
        return config_class(CONFIG_MAPPING[base_type]).from_dict(config_dict, **kwargs)


def placed_model(path: str) -> Any:
    """The model class at `path`, of a config that was read."""
    return _placed[path.rpartition(".")[2]][0]
