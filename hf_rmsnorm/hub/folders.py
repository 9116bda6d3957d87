"""A checkpoint's folder: which files are its own, and whether it is whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import PatchError
from . import modeling
from .moving import move, recover
from .records import RECORD

ALONE = (
    ". Weights alone, as accelerator.save_model writes them, do not say what they are of: save "
    "with unwrap_model(model).save_pretrained, or call model.config.save_pretrained, too"
)
_WEIGHTS = re.compile(
    r"(?:model|pytorch_model)(?P<variant>\.[^.]+?)?(?:-\d{5}-of-\d{5})?"
    r"\.(?:safetensors|bin)(?:\.index(?P<late_variant>\.[^.]+)?\.json)?"
)
# What else belongs to a checkpoint, with the tokenizers and processors of transformers.
_OWNED = re.compile(
    _WEIGHTS.pattern + r"|(?:config|generation_config|hf_rmsnorm_plan|tokenizer|tokenizer_config"
    r"|special_tokens_map|added_tokens|vocab|(?:(?:image|video)_)?(?:pre)?processor(?:_config)?"
    r"|chat_template|normalizer)\.json|chat_template\.jinja|merges\.txt|vocab\.txt"
    r"|(?:tokenizer|spiece|sentencepiece(?:\.bpe)?|source|target)\.(?:model|spm)"
    rf"|{re.escape(modeling.FILE)}"
)
DEEPEST = 64


def move_into(
    staged: Path, target: Path, variant: str | None = None, *, replace: bool = False
) -> None:
    """Move what is in `staged` into `target`, in place of the checkpoint there; wholly or not.

    `config.json` goes first and comes last: without it a folder is no checkpoint. What is to be
    moved is written down before, so that a move that is killed can be finished: see `recover`.

    Args:
        staged: from `staging`.
        variant: of the weights, as for `save_pretrained`: those of others stay.
        replace: whether all that belongs to the old checkpoint goes. What does not, stays always.
    """
    target = target.resolve()
    if not target.exists():
        staged.rename(target)
        return
    new = sorted((path.name for path in staged.iterdir()), key="config.json".__eq__)
    old = {name for name in new if (target / name).exists()} | _stale(staged, target, variant)
    if replace:
        names = (path.name for path in target.iterdir() if not path.is_dir())
        old |= {name for name in names if _OWNED.fullmatch(name)}
    move(staged, target, sorted(old, key="config.json".__ne__), new)


def check_replaceable(folder: Path) -> None:
    """`PatchError` for a folder that holds something, but no checkpoint."""
    path = folder / "config.json"
    if not path.is_file():
        recover(folder, wait=60)
    if not any(folder.iterdir()):
        return
    if not path.is_file() or not {"model_type", "architectures"} & read_json(path).keys():
        why = f"its {path.name} is of something else" if path.is_file() else "it has no config.json"
        raise PatchError(
            f"{folder} holds files, but no checkpoint to replace ({why}): choose another"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `PatchError` naming it for anything else."""
    try:
        return check_object(json.loads(path.read_text(encoding="utf-8")), str(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, PatchError):
            raise
        raise PatchError(f"{path} is not JSON ({error}): restore the file") from None


def check_object(found: object, where: str) -> dict[str, Any]:
    """`found`, if it is a JSON object that is nested no deeper than any config is."""
    level, depth = [found], 0
    while level:
        depth += 1
        inner = [x for x in level if isinstance(x, (dict, list))]
        level = [y for x in inner for y in (x.values() if isinstance(x, dict) else x)]
        if depth > DEEPEST:
            raise PatchError(f"{where} is nested more than {DEEPEST} deep: restore the file")
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise PatchError(f"{where} holds a {kind}, where an object belongs: restore the file")
    return found


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
        config = read_json(folder / "config.json")
    except (OSError, PatchError):
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
    if not (folder / "config.json").is_file():
        recover(folder, wait=60)
    weights = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    if not (folder / "config.json").is_file():
        hint = ALONE if weights else ""
        raise PatchError(f"{folder} is not a checkpoint: it has no config.json{hint}")
    read_json(folder / "config.json")
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
