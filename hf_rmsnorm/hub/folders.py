"""A checkpoint's folder: written beside and moved into its place, and found whole or not."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from ..errors import PatchError
from . import modeling
from .records import RECORD

ALONE = (
    ". Weights alone, as accelerator.save_model writes them, do not say what they are of: save "
    "with unwrap_model(model).save_pretrained, or call model.config.save_pretrained, too"
)
_WEIGHTS = re.compile(
    r"(?:model|pytorch_model)(?P<variant>\.[^.]+?)?(?:-\d{5}-of-\d{5})?"
    r"\.(?:safetensors|bin)(?:\.index(?P<late_variant>\.[^.]+)?\.json)?"
)


@contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A new folder on the same file system, gone at the end."""
    parent = target.resolve().parent
    parent.mkdir(parents=True, exist_ok=True)
    inside = target.is_dir() and (os.path.ismount(target) or not os.access(parent, os.W_OK))
    place = target if inside else parent
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{target.name}.") as beside:
        staged = Path(beside) / "staged"
        staged.mkdir()
        yield staged


def move_into(staged: Path, target: Path, variant: str | None) -> None:
    """Move what is in `staged` into `target`, in place of the checkpoint there; wholly or not.

    `config.json` goes first and comes last: without it a folder is no checkpoint.
    """
    if not target.exists():
        staged.rename(target)
        return
    backup = staged.parent / "backup"
    backup.mkdir()
    new = sorted((path.name for path in staged.iterdir()), key="config.json".__eq__)
    old = {name for name in new if (target / name).exists()} | _stale(staged, target, variant)
    moved: list[tuple[Path, Path]] = []
    try:
        for name in sorted(old, key="config.json".__ne__):
            moved.append((target / name, backup / name))
            (target / name).replace(backup / name)
        for name in new:
            moved.append((staged / name, target / name))
            (staged / name).replace(target / name)
    except BaseException:
        for source, destination in reversed(moved):
            if destination.exists() and not source.exists():
                destination.replace(source)
        raise


def _stale(staged: Path, target: Path, variant: str | None) -> set[str]:
    """Files of the checkpoint in `target` that would make a mixture with the one in `staged`."""
    stale = {modeling.FILE} & {path.name for path in target.iterdir()}
    same = _kind(staged) == _kind(target)
    for path in target.iterdir():
        found = _WEIGHTS.fullmatch(path.name)
        if found and not path.is_dir():
            its_variant = (found["variant"] or found["late_variant"] or "").removeprefix(".")
            if not same or its_variant == (variant or ""):
                stale.add(path.name)
    return stale


def _kind(folder: Path) -> object:
    """What a folder's config says about the patch: weights of another kind do not belong to it."""
    try:
        config = PreTrainedConfig.get_config_dict(folder)[0]
    except (OSError, ValueError):
        return None
    return config.get("model_type"), config.get(RECORD)


def check_exists(name: str | Path) -> None:
    """`PatchError` for what can only be a folder (`./a`, `/a`, `a/b/c`), where there is none."""
    text = os.fspath(name)
    is_path = text.startswith((".", "~")) or text.count("/") > 1 or Path(text).is_absolute()
    if (is_path or (os.sep == "\\" and os.sep in text)) and not Path(text).exists():
        hint = " (a ~ is not expanded here)" if text.startswith("~") else ""
        raise PatchError(f"{text} does not exist{hint}")


def check_folder(folder: Path) -> None:
    """`PatchError` for a local folder that is no checkpoint, or half of one."""
    if not folder.exists():
        return  # a hub name, or transformers says what is wrong
    if folder.is_file():
        raise PatchError(f"{folder} is not a checkpoint but a file")
    weights = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    if not (folder / "config.json").is_file():
        hint = ALONE if weights else ""
        raise PatchError(f"{folder} is not a checkpoint: it has no config.json{hint}")
    if not weights and not any(path.is_dir() for path in folder.iterdir()):  # as DCP writes
        raise PatchError(f"{folder} is half a checkpoint: it has a config.json, but no weights")
    for path in (*weights, *_shards(folder)):
        if not path.is_file():
            raise PatchError(f"{path} is missing: {folder} was not written, or copied, to the end")
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except SafetensorError as error:
                raise PatchError(f"{path} is damaged or incomplete ({error})") from None


def _shards(folder: Path) -> Iterator[Path]:
    """The files that the folder's indices name."""
    for index in folder.glob("*.index*.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise PatchError(f"{index} is damaged ({error!r})") from None
        yield from (folder / name for name in sorted(names))
