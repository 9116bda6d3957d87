"""Loading patched checkpoints: model classes of the `hf_rmsnorm` type, and `from_pretrained`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PatchError
from ..patching import apply_plan
from ..patching.changes import get_tensor
from ..patching.check import check_fits
from ..patching.plan import PatchPlan
from ..probing import Fold
from . import saving
from .autos import heads, remote_auto_class
from .configs import MODEL_TYPE, PLACE, config_class, library_class, stock_class
from .exactness import Evidence, is_plain, off_centre
from .folders import check_exists, check_folder, check_object
from .parts import SAVED
from .records import RECORD, config_file, folds_of, from_record, gains
from .valid import valid_record
from .weights import load_whole, named_class, typed_errors

HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder")  # where files are

_model_classes: dict[Any, Any] = {}


def model_class(base: Any, own: Any = None) -> Any:
    """`base`, patched as its config says at the end of `__init__`, and saved as what it is.

    The class keeps the name of `base`: pipelines, label smoothing and `architectures` go by it.

    Args:
        own: the class of its config, if not that of `base`.
    """
    own = own or base.config_class
    if (base, own) not in _model_classes:

        def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            where = config_file(config.name_or_path)
            record = valid_record(getattr(config, RECORD, None), where)
            with stock_class(self, config):
                base.__init__(self, config, *args, **kwargs)
            plan = from_record(self, record, where)
            apply_plan(self, plan, what=f"the patch record in {where}")

        def from_pretrained(cls: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            load = base.from_pretrained.__func__
            return load_whole(functools.partial(load, cls), path, *args, **kwargs)

        def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
            saving.save_patched(self, base, *args, **kwargs)

        def push_to_hub(self: Any, *args: Any, **kwargs: Any) -> Any:
            return saving.push_to_hub(self, *args, **kwargs)

        def reduce(self: Any, protocol: Any) -> Any:
            return new_model, (base, own), *base.__reduce_ex__(self, protocol)[2:]

        members = {
            "__init__": __init__,
            "is_custom_code": classmethod(lambda cls: False),  # key conversions of `base` hold
            # these two read the module that a class is in
            "_can_set_attn_implementation": classmethod(
                lambda cls: base._can_set_attn_implementation()
            ),
            "_can_set_experts_implementation": classmethod(
                lambda cls: base._can_set_experts_implementation()
            ),
            "_auto_class": None,
            "_keys_to_ignore_on_load_unexpected": [
                *(base._keys_to_ignore_on_load_unexpected or ()),
                r"(^|\.)hf_rmsnorm_p$",
            ],
            "config_class": config_class(own),
            "from_pretrained": classmethod(from_pretrained),
            "save_pretrained": save_pretrained,
            "push_to_hub": push_to_hub,
            "__reduce_ex__": reduce,
            "__module__": __name__,
            "__doc__": base.__doc__,
        }
        _model_classes[base, own] = type(base.__name__, (base,), members)
    return _model_classes[base, own]


def base_class(cls: Any) -> Any:
    """The class that `model_class` made `cls` from, or `cls` itself."""
    return cls.__mro__[1] if cls in _model_classes.values() else cls


def new_model(base: Any, own: Any = None) -> Any:
    """An empty instance, for pickle and copy, which cannot find the generated classes by name."""
    cls = model_class(base, own)
    return cls.__new__(cls)


def register_models(base: Any) -> None:
    """Register the patched class of every head of `base` with its Auto class."""
    for auto, classes in list(heads(base)):
        ours = tuple(map(model_class, classes))
        auto.register(config_class(base), ours if len(ours) > 1 else ours[0], exist_ok=True)


def register_model(config: Any, base: Any) -> None:
    """Register the patched class of `base`, which no Auto class has, under its own config class."""
    transformers.AutoModel.register(config, model_class(base, config.__mro__[1]), exist_ok=True)


def from_pretrained(
    path_or_repo: str | Path, *, new_weights: str | Sequence[str] = (), **kwargs: Any
) -> PreTrainedModel:
    """Load a checkpoint with the class its config names, patched if it was saved patched.

    Sugar over `AutoModelFor...from_pretrained`, for local folders and hub names. A checkpoint in
    the stock format, which that would load as the LayerNorm model it equals, becomes the RMSNorm
    model again.

    Args:
        path_or_repo: a folder written by `save_pretrained`, or a hub repository.
        new_weights: glob patterns over the names of weights that may be missing, and then start at
            random. None other do, but with `ignore_mismatched_sizes=True` those of another shape.
        kwargs: as for `AutoModel.from_pretrained`.

    Raises:
        PatchError: a folder that is not there or no whole checkpoint, weights that would be random,
            or a patched checkpoint whose record is missing, damaged, or does not fit its weights.
        OSError: no such hub repository (from transformers).
    """
    check_exists(path_or_repo)
    check_folder(Path(path_or_repo) / (kwargs.get("subfolder") or ""))
    where_from = {key: kwargs[key] for key in HUB if key in kwargs}
    where = config_file(path_or_repo)
    with typed_errors(str(path_or_repo)):
        config, _ = PreTrainedConfig.get_config_dict(path_or_repo, **where_from)
        check_object(config, where)
    patched, record = config.get("model_type") == MODEL_TYPE, config.get(RECORD)
    if record is not None or patched:
        valid_record(record, where)
    with typed_errors(str(path_or_repo)):
        base, own = _class_of(config, where)
        if patched:
            load = model_class(base, own).from_pretrained
        else:
            load = functools.partial(load_whole, base.from_pretrained)
            if own is not None and "config" not in kwargs:  # the class's own would read it
                kwargs["config"] = own.from_pretrained(path_or_repo, **where_from)
        loaded = load(path_or_repo, new_weights=new_weights, **kwargs)
    if record is not None and not patched:
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        _patch_again(model, record, where)
    return loaded


def _class_of(config: dict[str, Any], where: str) -> tuple[Any, Any]:
    """The class that a checkpoint with this config is of, of transformers or an Auto class; and
    that of its config where the checkpoint says."""
    path, own = (config.get(key) for key in PLACE)
    if path is not None:
        config_of = library_class(own, PreTrainedConfig, where)
        return library_class(path, PreTrainedModel, where), config_of
    base: Any = named_class(config, where)
    names = config.get("architectures") or ()
    if config.get("model_type") == MODEL_TYPE:
        base_type = config.get("base_model_type")
        if (base is None and names) or (base and base_type != base.config_class.model_type):
            raise PatchError(
                f"{where} has base_model_type {base_type!r} but names {list(names)}: it was edited "
                "since hf_rmsnorm wrote it, or no class of transformers loads it"
            )
    if base is None:
        base = getattr(transformers, remote_auto_class(config.get("auto_map"), names))
    return base, None


def _patch_again(model: Any, record: dict[str, Any], where: str) -> None:
    """The patch of a stock checkpoint, whose weights are folded already."""
    plan, folds = from_record(model, record, where), folds_of(model, record, where)
    _require_readable(model, folds, where)
    check_fits(replace(plan, folds=folds), model, f"the patch record in {where}")
    if changed := _changed_since(model, plan, folds, record["gains"]):
        raise PatchError(
            f"{where} says that the weights were folded for RMSNorm, but {changed}: the checkpoint "
            "was trained as a LayerNorm model since. Load it with transformers' AutoModel classes, "
            "and patch it again"
        )
    apply_plan(model, plan)
    saved = model.__dict__[SAVED]
    if saved.evidence is not None:
        saved.evidence = Evidence(model, folds)


def _require_readable(model: Any, folds: tuple[Fold, ...], where: str) -> None:
    """`PatchError` for weights that cannot be looked at, quantised ones say: rounding them coarsely
    takes away that they are centred, which LayerNorm does not mind."""
    for fold in folds:
        with _in_memory(model.get_submodule(fold.parameter.rpartition(".")[0])):
            tensor = get_tensor(model, fold.parameter)
            if is_plain(tensor):
                continue
        raise PatchError(
            f"{where} says that {fold.parameter} was folded for RMSNorm, but here it is quantised "
            f"or sharded ({type(tensor).__name__}, {tensor.dtype}), so that it need not be centred "
            "any more: load the checkpoint with transformers' AutoModel classes, as the LayerNorm "
            "model that it equals, or without quantization_config"
        )


def _changed_since(model: Any, plan: PatchPlan, folds: tuple[Fold, ...], expected: float) -> str:
    """What no longer is as it was when the checkpoint was written; empty if all is."""
    for fold in folds:
        with _in_memory(model.get_submodule(fold.parameter.rpartition(".")[0])):
            if off_centre(model, (fold,)):
                return f"{fold.parameter} is not centred (any more)"
    with ExitStack() as stack:
        for site in plan.sites:
            stack.enter_context(_in_memory(model.get_submodule(site.name)))
        found = gains(model, plan)
    rounding = max(1e-6, torch.finfo(model.dtype).eps)
    if not math.isclose(found, expected, rel_tol=rounding):
        return "its norms' weights are others"
    return ""


def _in_memory(module: nn.Module) -> AbstractContextManager[None]:
    """The module with its weights, if it is one whose weights accelerate keeps elsewhere."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)
