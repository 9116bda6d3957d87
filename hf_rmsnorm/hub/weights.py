"""Loading without random weights: what a checkpoint lacks is named, not made up."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..errors import PatchError, VerificationError
from .configs import unmark_config

# Errors that say what they are, whatever was loaded.
_TYPED = (PatchError, VerificationError, OSError, ImportError, MemoryError, Warning)


@contextmanager
def typed_errors(where: str) -> Iterator[None]:
    """`PatchError` naming `where` for whatever else loading a damaged checkpoint raises."""
    try:
        yield
    except (*_TYPED, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
        raise PatchError(f"{where} does not load ({why})") from error


def load_whole(
    load: Callable[..., Any],
    path: Any,
    *args: Any,
    new_weights: str | Sequence[str] = (),
    output_loading_info: bool = False,
    ignore_mismatched_sizes: bool = False,
    **kwargs: Any,
) -> Any:
    """`load(path, ...)`, a `from_pretrained` of transformers, unless it would make up weights that
    nobody asked for.

    Asked for are: weights that the class does not share with the one that was saved (another head),
    those that match `new_weights`, and with `ignore_mismatched_sizes` those of another shape.

    Args:
        new_weights: glob patterns over names of weights.

    Raises:
        PatchError: naming the weights.
    """
    model, info = load(
        path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    patterns = [new_weights] if isinstance(new_weights, str) else list(new_weights)
    lost = set(info["missing_keys"])
    if lost and (saved := _saved_names(model)) is not None:
        lost = {name for name in lost if _short(model, name) in saved}
    shapes = {name: f" (of shape {list(there)})" for name, there, _ in info["mismatched_keys"]}
    lost |= set() if ignore_mismatched_sizes else set(shapes)
    names = sorted(n for n in lost if not any(fnmatchcase(n, glob) for glob in patterns))
    if names:
        some = ", ".join(name + shapes.get(name, "") for name in names[:3])
        raise PatchError(
            f"{path}: {len(names)} weights are missing or of another shape than config.json says, "
            f"{some} among them: they would load as random numbers. Restore the files, or say "
            f"which are to start anew, as in from_pretrained(..., new_weights={names[:1]})"
        )
    return (model, info) if output_loading_info else model


def _saved_names(model: PreTrainedModel) -> set[str] | None:
    """What the class that was saved has, relative to the base model; None where that is the class
    of `model`, or unknown."""
    names = model.config.architectures or ()
    saved: Any = next((getattr(transformers, n, None) for n in names), None)
    if saved is None or type(model).__name__ in names:
        return None
    config = copy.deepcopy(model.config)
    unmark_config(config)
    with torch.device("meta"):
        twin = saved(config)
    return {_short(twin, name) for name in twin.state_dict()}


def _short(model: PreTrainedModel, name: str) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.")


def named_class(config: dict[str, Any], where: str) -> Any:
    """The class of transformers that a config names, if it has it.

    Raises:
        PatchError: what it names is no model.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PatchError(f"{where}: architectures must be a list of names, not {names!r}")
    for found in (getattr(transformers, name, None) for name in names):
        if found is None:
            continue
        if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
            raise PatchError(f"{where}: architectures names {names[0]!r}, which is no model")
        return found
    return None
