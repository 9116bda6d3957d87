"""Adapters of `peft` say which patch the model had that they were trained on, and are not loaded
onto one that has another: the corrections that a patch folds into a model are not in them.

The mark is in `adapter_config.json`, under peft's own key `auto_mapping`. What saves and loads
adapters is wrapped where this package is imported; a model without patched parts saves as ever.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import PatchError
from ..patching import patched_parts
from .parts import changes_the_class
from .records import RECORD

_CONFIG = "adapter_config.json"
# names of wrappers, which the same model has or has not
_WRAPPERS = re.compile(
    r"\b(base_model\.model|modules_to_save\.[^.]+|base_layer|original_module|token_adapter|module|"
    r"_orig_mod)(\.|$)"
)


def patch_mark(model: nn.Module) -> dict[str, Any] | None:
    """What tells the patch of `model` from others; None if it computes what its class does."""
    parts = [(name, plan) for name, plan in patched_parts(model) if changes_the_class(plan)]
    if not parts:
        return None
    rows: set[tuple[Any, ...]] = set()
    for path, plan in parts:
        for site in plan.sites:
            how = plan.strategy if site.verdict == "approximate" else ""  # exact is exact
            if site.verdict != "kept":
                name = _plain(f"{path}.{site.name}")
                rows.add((name, site.verdict, plan.norm, plan.p, how))
        for center in plan.centers:
            rows.add((_plain(f"{path}.{center.module}"), center.side, str(center.key), center.axis))
        rows |= {(_plain(f"{path}.{widen.up}"),) for widen in plan.widens}
    text = json.dumps(sorted(map(list, rows), key=str))
    known = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    first = parts[0][1]
    return {"norm": first.norm, "p": first.p, "strategy": first.strategy, "digest": known}


def _plain(name: str) -> str:
    return _WRAPPERS.sub("", name).strip(".")


def mark_adapters(model: Any, names: Any = None) -> dict[str, Any] | None:
    """Have the configs of the adapters in `model` say which patch it has."""
    mark = patch_mark(model)
    for name in names or model.peft_config:
        config = model.peft_config[name]
        if mark is not None:
            config.auto_mapping = {**(config.auto_mapping or {}), RECORD: mark}
    return mark


def check_adapter(model: nn.Module, config: Mapping[str, Any], where: str) -> None:
    """`PatchError` if the adapter with this config was trained on another patch of `model`."""
    wanted, found = (config.get("auto_mapping") or {}).get(RECORD), patch_mark(model)
    if wanted == found or (isinstance(wanted, dict) and _same(wanted, found)):
        return
    kind = type(model).__name__
    if wanted is None:
        raise PatchError(
            f"{where} says nothing of a patch, so the adapter was trained on an unpatched model, "
            f"but this {kind} is patched ({_words(found)}): load the adapter onto the unpatched "
            "model and call patch_model after that, which folds it, too. If it was trained on this "
            f'very patch, write {{"{RECORD}": {json.dumps(found)}}} there as "auto_mapping"'
        )
    this = f"is patched otherwise ({_words(found)})" if found else "is not patched"
    raise PatchError(
        f"{where} says that the adapter was trained on a model patched by hf_rmsnorm "
        f"({_words(wanted)}), but this {kind} {this}: load its base with "
        "hf_rmsnorm.from_pretrained, or patch it in the same way, and the adapter after that"
    )


def _same(one: dict[str, Any], other: dict[str, Any] | None) -> bool:
    return other is not None and one.get("digest") == other["digest"]


def _words(mark: object) -> str:
    if not isinstance(mark, dict):
        return repr(mark)
    norm, p, strategy = (mark.get(key) for key in ("norm", "p", "strategy"))
    return f"{norm}, p {p}, strategy {strategy}"


def watch(library: ModuleType) -> None:
    """Wrap what `library`, a module of peft or transformers, saves and loads adapters with."""
    for name in ("PeftModel", "PeftMixedModel", "PeftAdapterMixin"):
        cls = vars(library).get(name)
        if cls is None or cls.__module__ != library.__name__:
            continue
        own = vars(cls)
        if "from_pretrained" in own:
            wrapped = _checked(own["from_pretrained"].__func__, "model", "model_id")
            cls.from_pretrained = classmethod(wrapped)
        model_id = "peft_model_id" if name == "PeftAdapterMixin" else "model_id"
        cls.load_adapter = _checked(own["load_adapter"], "self", model_id)
        if name == "PeftModel":
            cls.save_pretrained = _marking(own["save_pretrained"])


def _checked(native: Any, model: str, model_id: str) -> Any:
    """`native`, after a look at the config of the adapter."""
    signature = inspect.signature(native)

    @functools.wraps(native)
    def load(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        where, config = _read(given.get(model_id), given)
        if config is not None:
            check_adapter(given[model], config, where)
        return native(*args, **kwargs)

    return load


def _read(model_id: Any, given: Mapping[str, Any]) -> tuple[str, Mapping[str, Any] | None]:
    """The adapter's config and what to call its file; None where there is none, which the caller of
    this says better."""
    from transformers.utils.peft_utils import find_adapter_config_file

    config = given.get("peft_config")
    if config is not None:
        return "the adapter's config", config if isinstance(config, dict) else vars(config)
    if model_id is None:
        return "", None
    hub = {**given, **given.get("kwargs", {}), **(given.get("adapter_kwargs") or {})}
    if (loading := given.get("load_config")) is not None:
        hub.update(loading.download_kwargs)
    known = inspect.signature(find_adapter_config_file).parameters
    hub = {k: v for k, v in hub.items() if k in known and k != "model_id" and v is not None}
    file = find_adapter_config_file(str(model_id), **hub)
    if file is None:
        return "", None
    return f"{model_id}/{_CONFIG}", json.loads(Path(file).read_text(encoding="utf-8"))


def _marking(native: Any) -> Any:
    """`native`, which writes adapters and their configs, with the mark in these."""
    signature = inspect.signature(native)

    @functools.wraps(native)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        names = given.arguments["selected_adapters"] or list(self.peft_config)
        mark = mark_adapters(self, [name for name in names if name in self.peft_config])
        native(self, *args, **kwargs)
        if mark is not None and given.arguments["is_main_process"]:
            for file in _config_files(Path(given.arguments["save_directory"]), names):
                config = json.loads(file.read_text(encoding="utf-8"))
                # without a task, peft puts the base's class there in place of all else
                config["auto_mapping"] = {**(config.get("auto_mapping") or {}), RECORD: mark}
                file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")

    return save_pretrained


def _config_files(folder: Path, names: list[str]) -> Iterator[Path]:
    for name in names:
        yield (folder if name == "default" else folder / name) / _CONFIG
