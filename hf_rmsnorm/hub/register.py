"""Registers the `hf_rmsnorm` model type with Transformers' Auto classes. Nothing imports this file:
`connect` in `_transformers.py` loads it, once those classes are there."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .configs import MODEL_TYPE, PLACE, RMSNormAutoConfig, placed_model


class _Registering(RMSNormAutoConfig):
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Models that are put together from others hand on their configs as keywords."""
        if "base_model_type" in kwargs:
            return cls.from_dict(kwargs)
        return super().__new__(cls)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from .loading import register_model, register_models  # transformers is still loading

        found = super().from_dict(config_dict, **kwargs)
        if (path := config_dict.get(PLACE[0])) is not None:
            config = found[0] if isinstance(found, tuple) else found
            register_model(type(config), placed_model(path))
        else:
            register_models(CONFIG_MAPPING[config_dict["base_model_type"]])
        return found


AutoConfig.register(MODEL_TYPE, _Registering, exist_ok=True)
