"""Exceptions at lines of the package, while it patches, undoes, saves and loads."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from harness.injecting import Lines, difference, lines_of, state
from harness.tallies import (
    ERRORS,
    KINDS,
    THESIS,
    Tally,
    check_thesis,
    contents,
    model,
    old_model,
    outputs,
    patched,
    points,
)
from hf_rmsnorm import (
    PatchPlan,
    apply_plan,
    from_pretrained,
    patch_model,
    plan_patch,
    unpatch_model,
)


def patches(tally: Tally, count: int, seed: int, folder: Path) -> Iterator[int]:
    """An exception at lines of planning, applying and undoing."""
    for kind, arguments in KINDS.items():
        original = model(kind)
        before = state(original)
        plan = plan_patch(original, **{k: v for k, v in arguments.items() if k != "verify"})

        def apply(found: Any, plan: PatchPlan = plan) -> Any:
            return apply_plan(found, plan)

        def whole(found: Any, arguments: dict[str, Any] = arguments) -> Any:
            return patch_model(found, **arguments)

        copied = copy.deepcopy(original)
        apply_plan(copied, plan)
        done = state(copied)
        for action in (whole, apply, unpatch_model):
            is_undo = action is unpatch_model
            start = copied if is_undo else original
            copies = [copy.deepcopy(start) for _ in range(2)]
            total = lines_of(_of_the_next, action, copies)
            most = 1 + count // 10 if action is whole else count  # planning takes long
            for at in points(total, most, seed):
                found, error = copy.deepcopy(start), ERRORS[at % 2]
                tally.tries += 1
                label, raised = f"{kind}, {action.__name__}, line {at}", False
                try:
                    with Lines(at, error) as lines:
                        tally.attempt(label, action, found)
                except ERRORS:
                    raised = True
                label += f" ({lines.where})"
                if is_undo and raised and difference(state(found), before):
                    tally.attempt(label, unpatch_model, found)  # not begun
                now = state(found)
                wanted = before if is_undo or raised else done
                if fault := difference(_comparable(wanted), _comparable(now)):
                    same = raised or is_undo or action is apply
                    if same or not _is_whole(found, original):  # caught: another plan, maybe
                        tally.half.append(f"{label}: {fault}")
                yield tally.tries


def _of_the_next(action: Any, models: list[Any]) -> None:
    action(models.pop())


def _comparable(found: dict[str, Any]) -> dict[str, Any]:
    """Hooks are other objects in every copy: how many there are."""
    return {k: (v[:2], v[2].count("object at"), v[3]) if isinstance(v, tuple) and len(v) == 4
            else v for k, v in found.items()}  # fmt: skip


def _is_whole(found: Any, original: Any) -> bool:
    """Patched, in a way that can be taken back wholly."""
    return not difference(_comparable(state(original)), _comparable(state(unpatch_model(found))))


def saves(tally: Tally, count: int, seed: int, folder: Path) -> Iterator[int]:
    """An exception at lines of saving over an old checkpoint, and of loading."""
    for kind in KINDS:
        found = patched(kind)
        target = folder / kind
        old_model(kind).save_pretrained(target)
        (target / "thesis.txt").write_text(THESIS)
        old, before = contents(target), state(found)

        def save(found: Any = found, target: Path = target) -> None:
            found.save_pretrained(target)

        def restore(target: Path = target, old: dict[str, bytes] = old) -> None:
            shutil.rmtree(target)
            target.mkdir()
            for name, data in old.items():
                (target / name).write_bytes(data)

        total = lines_of(save)
        new = contents(target)
        for at in points(total, count, seed):
            restore()
            tally.tries += 1
            label = f"{kind}, save, line {at}"
            with suppress(*ERRORS), Lines(at, ERRORS[at % 2]) as lines:
                tally.attempt(label, save)
            label += f" ({lines.where})"
            if contents(target) not in (old, new):
                tally.half.append(f"{label}: files are mixed")
            if fault := difference(before, state(found)):
                tally.half.append(f"{label}: the model's {fault}")
            check_thesis(tally, label, target)
            yield tally.tries
        restore()
        save()
        expected = outputs(found)
        total = lines_of(from_pretrained, target)
        for at in points(total, count, seed):
            tally.tries += 1
            label = f"{kind}, load, line {at}"
            with suppress(*ERRORS), Lines(at, ERRORS[at % 2]) as lines:
                tally.attempt(label, from_pretrained, target)
            if at % 10:
                continue
            again = tally.attempt(label, from_pretrained, target)
            label += f" ({lines.where})"
            if again is None or not torch.equal(outputs(again), expected):
                tally.half.append(f"{label}: it loads otherwise afterwards")
            if contents(target) != new:
                tally.lost.append(f"{label}: files have changed")
            yield tally.tries
