"""The norms a script knows, as one table, and arms: a norm with its strategy and p.

An arm is written `NAME[:strategy][:p]`: `layernorm`, `rmsnorm:direct`, `prmsnorm:0.125`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

import hf_rmsnorm
from harness import baselines
from harness.errors import ScriptError

STRATEGIES = ("auto", "exact", "direct")
CONTROL = "layernorm"


@dataclass(frozen=True)
class Norm:
    """One row of `NORMS`: what `--norm NAME` does to a model."""

    apply: Callable[[nn.Module, Arm, dict[str, Any]], nn.Module]
    summary: str
    strategy: str | None = None  # the default, None where a strategy means nothing
    p: float | None = None  # the default, None where p means nothing
    from_scratch_only: bool = False


@dataclass(frozen=True)
class Arm:
    """A norm with its settings. `str(arm)` is its name in tables and file names."""

    norm: str
    strategy: str | None = None
    p: float | None = None

    @classmethod
    def make(cls, norm: str, strategy: str | None = None, p: float | None = None) -> Arm:
        """Fills defaults in and refuses settings the norm does not have."""
        if norm not in NORMS:
            raise ScriptError(f"unknown norm {norm!r}; choose from {', '.join(NORMS)}")
        row = NORMS[norm]
        if p is not None and row.p is None:
            raise ScriptError(f"p={p:g} was given, but {norm!r} has no p; only prmsnorm has one")
        if p is not None and not 0 < p <= 1:
            raise ScriptError(f"p={p:g} is outside (0, 1]: p is the share of features read")
        if strategy is not None and row.strategy is None:
            raise ScriptError(f"strategy {strategy!r} was given, but {norm!r} patches nothing")
        if strategy is not None and strategy not in STRATEGIES:
            known = ", ".join(STRATEGIES)
            raise ScriptError(f"unknown strategy {strategy!r}; choose from {known}")
        return cls(norm, strategy or row.strategy, row.p if p is None else p)

    @classmethod
    def parse(cls, text: str) -> Arm:
        """`NAME[:strategy][:p]`, the two settings in any order."""
        norm, *settings = text.split(":")
        strategy: str | None = None
        p: float | None = None
        for setting in settings:
            try:
                p, is_number = float(setting), True
            except ValueError:
                strategy, is_number = setting, False
            if not is_number and setting not in STRATEGIES:
                raise ScriptError(
                    f"arm {text!r}: {setting!r} is neither a strategy ({', '.join(STRATEGIES)}) "
                    "nor a number; an arm is NAME[:strategy][:p]"
                )
        return cls.make(norm, strategy, p)

    def __str__(self) -> str:
        row = NORMS[self.norm]
        parts = [self.norm]
        if self.strategy not in (None, row.strategy):
            parts.append(str(self.strategy))
        if self.p is not None:
            parts.append(f"{self.p:g}")
        return ":".join(parts)

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return str(self).replace(":", "-")

    @property
    def from_scratch_only(self) -> bool:
        return NORMS[self.norm].from_scratch_only

    @property
    def patched(self) -> bool:
        """Whether `hf_rmsnorm` changed the model, so that `patch_report` has something to say."""
        return NORMS[self.norm].strategy is not None

    def apply(self, model: nn.Module, **patch_options: Any) -> nn.Module:
        """The model with this arm's norm. `patch_options`: inputs, include, exclude."""
        return NORMS[self.norm].apply(model, self, patch_options)

    def to_dict(self) -> dict[str, Any]:
        return {"name": str(self), **asdict(self)}


def parse_arms(texts: Sequence[str]) -> list[Arm]:
    """Arms in the order given, the control first; twice the same is an error."""
    arms = [Arm.parse(text) for text in texts]
    names = [str(arm) for arm in arms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ScriptError(f"arm {twice[0]!r} is given twice")
    control = Arm.make(CONTROL)
    return [control, *(arm for arm in arms if arm != control)]


def check_start(arm: Arm, from_scratch: bool) -> None:
    """Refuses a baseline that no trained model can become."""
    if arm.from_scratch_only and not from_scratch:
        raise ScriptError(
            f"{arm} is for training from scratch: a trained model does not survive it; "
            "give --config_name instead of --model_name_or_path"
        )


def _keep(model: nn.Module, arm: Arm, options: dict[str, Any]) -> nn.Module:
    if options.get("include") or options.get("exclude"):
        raise ScriptError(
            f"--include and --exclude choose what to patch, but {arm} patches nothing"
        )
    return model


def _patch(model: nn.Module, arm: Arm, options: dict[str, Any]) -> nn.Module:
    return hf_rmsnorm.patch_model(
        model, arm.norm, p=arm.p, strategy=arm.strategy or "auto", **options
    )


def _replace(model: nn.Module, arm: Arm, options: dict[str, Any]) -> nn.Module:
    return baselines.replace_norms(model, arm.norm, **options)


NORMS: dict[str, Norm] = {
    "layernorm": Norm(_keep, "the model as it is: the control"),
    "rmsnorm": Norm(_patch, "patched to RMSNorm", strategy="auto"),
    "prmsnorm": Norm(_patch, "patched to pRMSNorm", strategy="auto", p=0.0625),
    "none": Norm(_replace, "no normalisation", from_scratch_only=True),
    "l2norm": Norm(_replace, "x / ||x||, no sqrt(n)", from_scratch_only=True),
}
