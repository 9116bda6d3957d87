"""Saving a run in its middle and going on from there."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from harness.errors import ScriptError
from harness.results import write_json

SETTINGS = "settings.json"


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    unlogged: list[tuple[float, int]] = field(default_factory=list)  # (summed loss, tokens)

    def pop_mean_loss(self) -> float:
        """Loss per token since the last call."""
        mean = sum(nll for nll, _ in self.unlogged) / sum(tokens for _, tokens in self.unlogged)
        self.unlogged.clear()
        return mean

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often a run saves itself.

    Attributes:
        folder: the run's output folder.
        every: a number of steps, `"epoch"`, or None for never.
        settings: what must be equal for a run to go on; stored beside the state.
    """

    folder: Path
    every: str | None
    settings: dict[str, Any]

    def due(self, progress: Progress) -> str | None:
        """The name of the checkpoint to write now, if any."""
        if self.every == "epoch":
            at_end = progress.step_in_epoch == 0 and progress.step > 0
            return f"epoch_{progress.epoch}" if at_end else None
        if self.every is not None and progress.step % int(self.every) == 0:
            return f"step_{progress.step}"
        return None

    def save(self, accelerator: Accelerator, name: str) -> None:
        """Writes beside, then renames, so that a folder of this name is always whole."""
        beside = self.folder / f".{name}.partial"
        if accelerator.is_main_process and beside.exists():
            shutil.rmtree(beside)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(beside))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(beside / SETTINGS, self.settings)
            if (self.folder / name).exists():
                shutil.rmtree(self.folder / name)
            beside.rename(self.folder / name)
        accelerator.wait_for_everyone()

    def find(self, asked: str) -> Path:
        """The folder to resume from: `asked` itself, or the newest one for `latest`."""
        if asked == "latest":
            found = [
                path.parent
                for kind in ("step", "epoch")
                for path in self.folder.glob(f"{kind}_*/{SETTINGS}")
            ]
            if not found:
                raise ScriptError(f"no checkpoint to resume from in {self.folder}")
            return max(found, key=lambda path: (path / SETTINGS).stat().st_mtime_ns)
        path = Path(asked)
        if not (path / SETTINGS).is_file():
            raise ScriptError(
                f"--resume_from_checkpoint {asked} is not a checkpoint of this script: "
                + (f"no {SETTINGS} in it" if path.is_dir() else "there is no such folder")
            )
        return path

    def check(self, path: Path) -> None:
        """Refuses a checkpoint of a run with other settings: it would not be the same run."""
        stored = json.loads((path / SETTINGS).read_text())
        require_equal(stored, self.settings, f"checkpoint {path}", "resume with the same settings")


def check_interval(every: str | None) -> None:
    """`--checkpointing_steps`: a number or `epoch`."""
    if every not in (None, "epoch") and not (str(every).isdigit() and int(str(every)) > 0):
        raise ScriptError(f"--checkpointing_steps {every}: give a number of steps, or 'epoch'")


def require_equal(stored: Any, asked: dict[str, Any], what: str, advice: str) -> None:
    """Raises a ScriptError that lists the settings in which `stored` and `asked` differ."""
    then, now = _by_path(stored), _by_path(json.loads(json.dumps(asked)))
    lines = [
        f"  {name}: stored {then.get(name)!r}, now {now.get(name)!r}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]
    if lines:
        raise ScriptError("\n".join([f"{what} was made with other settings; {advice}:", *lines]))


def _by_path(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values in nested settings, by names such as `training.learning_rate`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, dict) and value
        found.update(_by_path(value, f"{prefix}{name}.") if inner else {prefix + name: value})
    return found
