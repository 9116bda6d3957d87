"""What users pass to `patch_model`, checked before any work."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import PatchError
from ..probing.autocast import AUTOCAST_OUTPUTS
from ..probing.inputs import make_inputs
from ..recipes import NormSpec, Unreadable

NORMS = ("rmsnorm", "prmsnorm")
STRATEGIES = ("auto", "exact", "direct")
TWINS = ("auto", "never", "always")
POST_NORMS = ("extra_neuron",)
DEFAULT_P = 0.0625  # the paper's

Inputs = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None


Patterns = str | Sequence[str]


@dataclass(frozen=True)
class PatchConfig:
    """What `patch_model` was asked for: its arguments but for the model and the inputs.

    `patch_model`, which documents them, `plan_patch` and the command line all make one of these.

    Raises:
        PatchError: an argument that has no meaning, by itself or beside another.
    """

    norm: str = "rmsnorm"
    p: float | None = None
    strategy: str = "auto"
    post_norm: str | None = None
    include: Patterns | None = None
    exclude: Patterns | None = None
    hold: Patterns = ()
    autocast_output: str = "auto"
    twin: str = "auto"
    verify: bool = True
    keep_originals: bool = True

    def __post_init__(self) -> None:
        choices = {
            "norm": NORMS,
            "strategy": STRATEGIES,
            "post_norm": (None, *POST_NORMS),
            "autocast_output": AUTOCAST_OUTPUTS,
            "twin": TWINS,
        }
        for argument, allowed in choices.items():
            if (value := getattr(self, argument)) not in allowed:
                named = ", ".join(str(choice) for choice in allowed)
                raise PatchError(f"{argument} must be one of {named}; got {value!r}")
        self._check_p()
        if self.post_norm is not None and self.strategy == "direct":
            raise PatchError(
                f'post_norm={self.post_norm!r} changes weights, which strategy="direct" never '
                'does: use "auto" or "exact"'
            )
        if not all(isinstance(pattern, str) for pattern in self.held):
            raise PatchError(
                f'hold must be "all" or a list of patterns of outputs, got {self.hold!r}'
            )
        if self.held and self.strategy == "direct":
            raise PatchError(
                'hold= asks for outputs that do not move, which strategy="direct" cannot promise: '
                'use "auto" or "exact"'
            )

    def _check_p(self) -> None:
        p, share = self.p, self.share
        if self.norm == "rmsnorm" and p is not None:
            raise PatchError(f'p={p} has no meaning for norm="rmsnorm": use norm="prmsnorm"')
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise PatchError(f"p must be a share in (0, 1], got {p!r}; the paper uses {DEFAULT_P}")
        if self.strategy == "exact" and share < 1:
            raise PatchError(
                f'strategy="exact" cannot hold for pRMSNorm with p={share:g}: a statistic from '
                'part of the features changes the function; use strategy="auto"'
            )

    @property
    def share(self) -> float:
        """Of the features, in the statistic."""
        return 1.0 if self.norm == "rmsnorm" else DEFAULT_P if self.p is None else self.p

    @property
    def held(self) -> tuple[str, ...]:
        """The patterns of `hold`; `"all"` is every output."""
        patterns = (self.hold,) if isinstance(self.hold, str) else tuple(self.hold)
        return ("*",) if patterns == ("all",) else patterns


def check_model(model: object) -> nn.Module:
    """The module to patch, inside its wrappers.

    Raises:
        PatchError: no module, or one that FSDP has sharded.
    """
    if not isinstance(model, nn.Module):
        raise PatchError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrap(model)
    for name, module in model.named_modules():
        if {cls.__name__ for cls in type(module).__mro__} & {
            "FSDPModule",
            "FullyShardedDataParallel",
        }:
            raise PatchError(
                f"{name or 'the model'} is already sharded by FSDP: patch the model first, "
                "then wrap it"
            )
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DistributedDataParallel` and `DataParallel` wrappers."""
    while True:
        if type(model).__name__ == "OptimizedModule":
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def clean_name(name: str) -> str:
    """A module path without the prefixes of `torch.compile` wrappers."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod").removesuffix("_orig_mod")


def select(
    found: Mapping[str, NormSpec | Unreadable],
    include: Patterns | None,
    exclude: Patterns | None,
) -> set[str]:
    """The names that `include` and `exclude` leave; a pattern that matches nothing is an error."""

    def matches(patterns: Patterns, argument: str) -> set[str]:
        hit: set[str] = set()
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(patterns, Collection) or not all(isinstance(x, str) for x in patterns):
            raise PatchError(
                f"{argument} must be a glob pattern or a list of them, got {patterns!r}"
            )
        for pattern in patterns:
            names = {n for n in found if fnmatch.fnmatchcase(clean_name(n), pattern)}
            if not names:
                some = ", ".join(repr(clean_name(n)) for n in itertools.islice(found, 3))
                raise PatchError(
                    f"{argument} pattern {pattern!r} matches no norm site; there are "
                    f"{len(found)}" + (f", such as {some}" if some else "")
                )
            hit |= names
        return hit

    chosen = set(found) if include is None else matches(include, "include")
    return chosen if exclude is None else chosen - matches(exclude, "exclude")


def resolve_inputs(
    model: nn.Module, inputs: Inputs, hold: Sequence[str] = ()
) -> list[Mapping[str, Any]]:
    """The user's inputs as a list, or made ones, which ask for the hidden states if `hold` does."""
    if inputs is None:
        shown = any(pattern.startswith("hidden_states") for pattern in hold)
        asked = {"output_hidden_states": True} if shown else {}
        return [{**made, **asked} for made in make_inputs(model)]
    found = [inputs] if isinstance(inputs, Mapping) else inputs
    if (
        not isinstance(found, Sequence)
        or not found
        or not all(isinstance(kwargs, Mapping) for kwargs in found)
    ):
        raise PatchError(
            "inputs must be a dict of the forward's keyword arguments, or a non-empty list of "
            f"such dicts; got {type(inputs).__name__}"
        )
    return list(found)
