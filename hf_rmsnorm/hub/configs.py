"""The `hf_rmsnorm` model type: configs that carry a patch, so that a patched checkpoint can never
load as the LayerNorm model in silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import PatchError
from .records import RECORD, check_record, config_file

MODEL_TYPE = "hf_rmsnorm"

_config_classes: dict[Any, Any] = {}


def config_class(base: Any) -> Any:
    """`base` under the `hf_rmsnorm` model type; everything else is inherited.

    That type is the class's, which files and Auto classes go by. Its instances say the model type
    of `base`: the library's own code (generation, pipelines, weight conversions) asks for it.
    """
    if base not in _config_classes:

        def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            found = base.from_dict.__func__(cls, config_dict, **kwargs)
            config = found[0] if isinstance(found, tuple) else found
            config.__dict__["model_type"] = base.model_type
            return found

        def reduce(self: Any, protocol: Any) -> Any:
            return new_config, (base,), dict(self.__dict__)

        name = f"RMSNorm{base.__name__}"
        members = {
            "model_type": MODEL_TYPE,
            "from_dict": classmethod(from_dict),
            "__reduce_ex__": reduce,
            "__module__": __name__,
            "__qualname__": name,
        }
        _config_classes[base] = type(name, (base,), members)
    return _config_classes[base]


def new_config(base: Any) -> Any:
    """An empty instance, for pickle and copy, which cannot find the generated classes by name."""
    cls = config_class(base)
    return cls.__new__(cls)


def is_marked(config: PreTrainedConfig) -> bool:
    return type(config).model_type == MODEL_TYPE


def mark_config(config: PreTrainedConfig, record: dict[str, Any]) -> None:
    """Make a config of transformers one of the `hf_rmsnorm` type, in place."""
    cls = config_class(type(config))
    marks = {RECORD: record, "base_model_type": config.model_type, "model_type": config.model_type}
    config.__dict__.update(marks)
    config.__class__ = cls


def unmark_config(config: PreTrainedConfig) -> None:
    """The inverse of `mark_config`, for the configs of parts in it, too."""
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            unmark_config(value)
    if is_marked(config):
        for name in (RECORD, "base_model_type", "model_type", "auto_map"):
            config.__dict__.pop(name, None)
        config.__class__ = type(config).__mro__[1]


@contextmanager
def stock_class(model: Any, config: Any) -> Iterator[None]:
    """The config as a stock one, also to the model's own checks, while a model is built that builds
    parts of itself from it through `AutoModel`: those get their share of the patch with the
    whole."""
    ours = type(config)
    stock = ours.__mro__[1] if ours.model_type == MODEL_TYPE else ours
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
        base_type = str(config_dict.get("base_model_type"))
        if base_type not in CONFIG_MAPPING:
            raise PatchError(
                f"{where.lstrip('/')} has model type {MODEL_TYPE!r} and base_model_type "
                f"{base_type!r}, which this version of transformers does not know"
            )
        check_record(config_dict.get(RECORD), where)
        return config_class(CONFIG_MAPPING[base_type]).from_dict(config_dict, **kwargs)


class _Registering(RMSNormAutoConfig):
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Models that are put together from others hand on their configs as keywords."""
        if "base_model_type" in kwargs:
            return cls.from_dict(kwargs)
        return super().__new__(cls)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from .loading import register_models

        found = super().from_dict(config_dict, **kwargs)
        register_models(CONFIG_MAPPING[config_dict["base_model_type"]])
        return found


AutoConfig.register(MODEL_TYPE, _Registering, exist_ok=True)
