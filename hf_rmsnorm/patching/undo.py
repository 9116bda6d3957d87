"""Taking a patch back."""

from __future__ import annotations

from torch import nn

from ..errors import PatchError
from .state import STATE, PatchState, on_unpatched, require_states, states


def unpatch_model(model: nn.Module) -> nn.Module:
    """Take a patch back, in place: the original weights and classes, bitwise.

    Weights that the patch did not touch keep any training since, norm weights too.

    Raises:
        PatchError: the model is not patched; weights that the patch folded were trained since
            (their original values would throw that training away); a module that it changed was
            replaced since, by an adapter's wrapper say.
        Anything else, Ctrl-C or no memory say, is raised once the model is unpatched. Should that
        fail too, the model refuses to be saved or patched until another call has finished it.
    """
    found = states(model) if isinstance(model, nn.Module) else []
    found = found or require_states(model)
    for _, owner, record in found:
        _require_untrained(owner, record)
    undo([(owner, record) for _, owner, record in found])
    return model


def _require_untrained(model: nn.Module, record: PatchState) -> None:
    if record.changes.forgotten:
        raise PatchError(
            f"this {type(model).__name__} was patched with keep_originals=False: the weights that "
            "the patch folded are gone, so it cannot be unpatched. Load the model again"
        )
    if not record.undoing and (replaced := record.changes.replaced_since(model)):
        raise PatchError(
            f"{replaced[0]} was changed by the patch and is a "
            f"{type(model.get_submodule(replaced[0])).__name__} now: unload adapters, or take back "
            "what else has replaced it, first"
        )
    if touched := record.changes.touched_since(model):
        raise PatchError(
            f"{touched[0]} was folded by the patch and has changed since (trained, cast, sharded, "
            "quantised or offloaded): its original values would throw that away, so the patch stays"
        )


def undo(patched: list[tuple[nn.Module, PatchState]]) -> None:
    """Take patches back, to the end also if an exception comes in between."""
    for _, record in patched:
        record.undoing = True
    try:
        _undo_all(patched)
    except BaseException:
        _undo_all(patched)
        raise


def _undo_all(patched: list[tuple[nn.Module, PatchState]]) -> None:
    for model, record in patched:
        for callback in on_unpatched:
            callback(model)
        record.changes.undo(model)
    for model, _ in patched:
        model.__dict__.pop(STATE, None)
