"""What `save_pretrained` and `push_to_hub` of a patched model do.

A model that is still exact is written as the stock architecture, with the record in its config;
any other under the `hf_rmsnorm` type, with a modeling file. Either goes to a folder beside the
target first, so that a save that fails leaves the target as it was.
"""

from __future__ import annotations

import copy
import functools
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..errors import PatchError
from . import modeling
from .adapters import mark_adapters
from .answers import well_formed
from .autos import auto_map, place
from .cards import write_card
from .configs import is_marked, mark_config, unmark_config
from .folders import move_into
from .moving import staging, write_file
from .parts import SAVED, what_to_save
from .records import RECORD


def save_patched(
    model: Any,
    base: type,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """As `PreTrainedModel.save_pretrained`, in a format that loads as what the model computes."""
    native: Any = base.save_pretrained  # type: ignore[attr-defined]
    if getattr(model, "_hf_peft_config_loaded", False):  # writes the adapter alone
        mark_adapters(model)
        native(model, save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
        return
    target = Path(save_directory)
    if target.exists() and not target.is_dir():
        raise PatchError(f"{target} is a file: save_pretrained needs a folder")
    if state_dict is not None:  # of torch.compile's wrappers, too
        state_dict = {name.replace("_orig_mod.", ""): t for name, t in state_dict.items()}
    saved = what_to_save(model)
    assert saved is not None
    stock = saved.stock_record(model, state_dict)
    with _saving_config(model, base, saved.record, stock):
        if not is_main_process or kwargs.get("distributed_checkpoint"):
            # nothing is written, or by all processes into one folder
            if is_main_process:
                target.mkdir(parents=True, exist_ok=True)
                _write_code(model, target)
            native(model, target, is_main_process, state_dict, push_to_hub=push_to_hub, **kwargs)
            return
        upload = _prepare_upload(target, kwargs) if push_to_hub else None
        with staging(target) as staged:
            _write_code(model, staged)
            try:
                native(model, staged, True, state_dict, **kwargs)
            except SafetensorError as error:
                raise OSError(f"{target} cannot be written: {error}") from error
            _write_card(staged, target, model, upload)
            before = model._get_files_timestamps(target) if target.exists() else {}
            move_into(staged, target, kwargs.get("variant"))
    if upload is not None:
        with well_formed():
            model._upload_modified_files(target, files_timestamps=before, **upload)


@contextmanager
def _saving_config(
    model: Any, base: type, record: dict[str, Any], stock: dict[str, Any] | None
) -> Iterator[None]:
    """The model with the config that is to be written, and as a class that writes its own code.

    Args:
        record: for a checkpoint of our own type.
        stock: for one in the stock format, if it is to be in that.
    """
    old, cls = model.config, type(model)
    config = copy.deepcopy(old)
    unmark_config(config)
    native, own = type(config), base.__module__.startswith("transformers.")
    where: dict[str, Any] = {}
    if own and native.__module__.startswith("transformers."):
        config.__dict__.update(where := place(native, base))
    if stock is not None:
        setattr(config, RECORD, stock)
    else:
        mark_config(config, record)
        config.auto_map = {}
        if not own:
            config.base_model_type = f"{base.__module__}.{base.__name__}"  # never its base class
            warnings.warn(
                f"{base.__name__} is not a class of transformers, so nothing can load the saved "
                "checkpoint by itself: build the model, use hf_rmsnorm.apply_plan with the plan of "
                "patch_report(model), and load the weights",
                stacklevel=4,
            )
        elif where:
            names = {"AutoConfig": "RMSNormAutoConfig", "AutoModel": base.__name__}
            config.auto_map = {k: f"{modeling.MODULE}.{name}" for k, name in names.items()}
        else:
            config.auto_map = auto_map(native, base.__name__)
    ignored = model._keys_to_ignore_on_save
    before = {"config": old, "_keys_to_ignore_on_save": ignored}
    try:
        try:
            model.config = config
            if stock is not None:  # LayerNorm may have it
                model._keys_to_ignore_on_save = {*(ignored or ()), *_marks(model)}
            if stock is not None and base.is_remote_code():  # type: ignore[attr-defined]
                model.__class__ = base
            yield
        finally:
            _restore(model, cls, before)
    finally:
        _restore(model, cls, before)  # again, for what interrupted the first, Ctrl-C say


def _restore(model: Any, cls: type, attributes: Mapping[str, Any]) -> None:
    model.__class__ = cls
    for name, value in attributes.items():
        setattr(model, name, value)


def _marks(model: Any) -> Iterator[str]:
    """What the patched norms add to the state dict."""
    for name, module in model.named_modules():
        if getattr(module, "marks_state", False):
            yield f"{name}.hf_rmsnorm_p".removeprefix(".")


def _write_code(model: Any, folder: Path) -> None:
    """The modeling file, if the config names it."""
    if getattr(model.config, "auto_map", None) and is_marked(model.config):
        write_file(folder / modeling.FILE, modeling.source())


def _write_card(staged: Path, target: Path, model: Any, upload: dict[str, Any] | None) -> None:
    """The card; one that is there already is merged, or left if that cannot be done.

    Where the model is uploaded, that is the Hub's, and as in transformers the model's tags are
    added.
    """
    known, tags = target / "README.md", []
    if upload is not None:
        known = _card_on_hub(upload) or known
        tags = [*(model.model_tags or ()), *(upload.pop("tags", None) or ())]
    try:
        write_card(staged, start=model.name_or_path, known_card=known, tags=tags)
    except PatchError as error:  # no reason to lose a training run's weights
        warnings.warn(f"{known} was left as it is: {error}", stacklevel=4)


def _card_on_hub(upload: dict[str, Any]) -> Path | None:
    from transformers.utils.hub import hf_api

    revision, token = upload.get("revision"), upload.get("token")
    try:
        return Path(
            hf_api().hf_hub_download(upload["repo_id"], "README.md", revision=revision, token=token)
        )
    except (RemoteEntryNotFoundError, RevisionNotFoundError):
        return None


def _prepare_upload(target: Path, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Create the repository; what is left in `kwargs` is for writing the files."""
    from transformers.utils.hub import hf_api

    names = ("private", "token", "repo_type", "exist_ok", "space_sdk")
    repo = {name: kwargs[name] for name in names if name in kwargs}
    repo_id = kwargs.pop("repo_id", target.name)
    upload: dict[str, Any] = {
        name: kwargs.pop(name)
        for name in ("commit_message", "commit_description", "create_pr", "revision", "tags")
        if name in kwargs
    }
    for name in repo:
        kwargs.pop(name)
    with well_formed():
        upload["repo_id"] = hf_api().create_repo(repo_id, **{**repo, "exist_ok": True}).repo_id
    return {**upload, "token": repo.get("token")}


def push_to_hub(model: Any, repo_id: str, *, tags: list[str] | None = None, **kwargs: Any) -> None:
    """As `PreTrainedModel.push_to_hub`; the card says what the model is."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(
            Path(folder) / repo_id.rpartition("/")[2],
            push_to_hub=True,
            repo_id=repo_id,
            tags=tags,
            **kwargs,
        )


def _watch_saving(native: Any) -> None:
    """See to it that a model around one that was patched by itself (`patch_model(m.transformer)`,
    or a patched encoder built into something) is saved as what it computes, too.

    Nothing leads from a part to the models around it, so this cannot be done to them: it is the one
    thing that is changed in transformers. A model without patched parts is saved as ever.
    """

    @functools.wraps(native)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        own = self.__dict__
        saved = None if SAVED in own else what_to_save(self)
        if saved is None:
            native(self, *args, **kwargs)
            return
        try:
            own[SAVED] = saved
            save_patched(self, type(self), *args, **kwargs)
        finally:
            own.pop(SAVED, None)

    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


_watch_saving(PreTrainedModel.save_pretrained)
