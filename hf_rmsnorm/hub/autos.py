"""What the Auto classes of transformers have for a model type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from transformers.modelcard import TASK_MAPPING
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from . import modeling
from .configs import PLACE


def heads(base: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """`(Auto class, model classes)` for all that transformers has for the config class `base`."""
    for auto in list(vars(modeling_auto).values()):
        mapping = getattr(auto, "_model_mapping", None)
        if mapping is None or not hasattr(auto, "register") or base not in mapping:
            continue
        found = mapping[base]
        every = found if isinstance(found, tuple) else (found,)
        # one with another config class takes a part of this config
        if fitting := tuple(head for head in every if head.config_class is base):
            yield auto, fitting


def auto_map(base: Any, name: str) -> dict[str, str]:
    """The Auto classes and what each finds in the modeling file, where it has a choice the class
    called `name`; empty for a config class that transformers does not know."""
    if base.model_type not in CONFIG_MAPPING or CONFIG_MAPPING[base.model_type] is not base:
        return {}
    found = {"AutoConfig": "RMSNormAutoConfig"}
    for auto, classes in heads(base):
        names = [head.__name__ for head in classes]
        found[auto.__name__] = name if name in names else names[0]
    return {auto: f"{modeling.MODULE}.{head}" for auto, head in found.items()}


def place(base: Any, cls: Any) -> dict[str, str]:
    """For the config, where in transformers the model class `cls` and its config's class `base`
    are; empty where an Auto class finds them by type and name."""
    known = auto_map(base, cls.__name__) and any(cls in classes for _, classes in heads(base))
    if known:
        return {}
    paths = (f"{c.__module__}.{c.__name__}".removeprefix("transformers.") for c in (cls, base))
    return dict(zip(PLACE, paths, strict=True))


@cache
def auto_class(base_type: str, class_name: str | None) -> str:
    """The Auto class that loads `class_name`; `AutoModel` where none lists it."""
    mappings = {
        name: getattr(auto, "_model_mapping", None)
        for name, auto in vars(modeling_auto).items()
        if name.startswith("Auto")
    }
    found = [
        name
        for name, mapping in mappings.items()
        if _lists(getattr(mapping, "_model_mapping", {}), base_type, class_name)
    ]
    last = ("AutoModelForPreTraining", "AutoModelWithLMHead", "AutoModel")
    return min(found, key=lambda name: name in last, default="AutoModel")


def remote_auto_class(auto_map: object, names: Sequence[str]) -> str:
    """The Auto class that loads a class called one of `names`, or what there is, from a repository
    with its own code; `AutoModel` where that says nothing."""
    found = auto_map if isinstance(auto_map, dict) else {}
    autos = [
        auto for auto in found if auto.startswith("AutoModel") and hasattr(modeling_auto, auto)
    ]

    def other(auto: str) -> tuple[bool, bool]:
        return str(found[auto]).rpartition(".")[2] not in names, auto != "AutoModel"

    return min(autos, key=other, default="AutoModel")


def _is_auto(name: str) -> bool:
    return name.startswith("AutoModel") and hasattr(modeling_auto, name)


@cache
def task(base_type: str, class_name: str | None) -> str | None:
    """The Hub's name of what the class is for, as transformers knows it."""
    tasks: dict[str, Any] = TASK_MAPPING
    return next((t for t, names in tasks.items() if _lists(names, base_type, class_name)), None)


def _lists(names: Mapping[str, Any], base_type: str, class_name: str | None) -> bool:
    known = names.get(base_type, ())
    return class_name in ((known,) if isinstance(known, str) else known)
