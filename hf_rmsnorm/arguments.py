"""What users pass to `patch_model`, checked before any work."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from .errors import PatchError
from .probe_inputs import make_inputs
from .recipes import NormSpec, Unreadable

NORMS = ("rmsnorm", "prmsnorm")
STRATEGIES = ("auto", "exact", "direct")
TWINS = ("auto", "never", "always")
POST_NORMS = ("extra_neuron",)
DEFAULT_P = 0.0625  # the paper's

Inputs = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, `DistributedDataParallel` and `DataParallel` wrappers."""
    while True:
        if type(model).__name__ == "OptimizedModule":
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def check_arguments(model: object, norm: str, p: float | None, strategy: str) -> float:
    """The share `p` to use, after every check that needs no look at the norms."""
    if not isinstance(model, nn.Module):
        raise PatchError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("norm", norm, NORMS)
    check_choice("strategy", strategy, STRATEGIES)
    if norm == "rmsnorm" and p is not None:
        raise PatchError(f'p={p} has no meaning for norm="rmsnorm": use norm="prmsnorm"')
    share = 1.0 if norm == "rmsnorm" else DEFAULT_P if p is None else p
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise PatchError(f"p must be a share in (0, 1], got {p!r}; the paper uses {DEFAULT_P}")
    if strategy == "exact" and share < 1:
        raise PatchError(
            f'strategy="exact" cannot hold for pRMSNorm with p={share:g}: a statistic from part of '
            'the features changes the function; use strategy="auto"'
        )
    for name, module in model.named_modules():
        if {cls.__name__ for cls in type(module).__mro__} & {
            "FSDPModule",
            "FullyShardedDataParallel",
        }:
            raise PatchError(
                f"{name or 'the model'} is already sharded by FSDP: patch the model first, "
                "then wrap it"
            )
    return float(share)


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise PatchError(f"{argument} must be one of {', '.join(choices)}; got {value!r}")


def check_post_norm(post_norm: str | None, strategy: str) -> None:
    if post_norm is None:
        return
    if post_norm not in POST_NORMS:
        raise PatchError(
            f"post_norm must be None or one of {', '.join(map(repr, POST_NORMS))}; "
            f"got {post_norm!r}"
        )
    if strategy == "direct":
        raise PatchError(
            f'post_norm={post_norm!r} changes weights, which strategy="direct" never does: use '
            '"auto" or "exact"'
        )


def check_hold(hold: str | Sequence[str], strategy: str) -> tuple[str, ...]:
    """The patterns of `hold`; `"all"` is every output."""
    patterns = (hold,) if isinstance(hold, str) else tuple(hold)
    patterns = ("*",) if patterns == ("all",) else patterns
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise PatchError(f'hold must be "all" or a list of patterns of outputs, got {hold!r}')
    if patterns and strategy == "direct":
        raise PatchError(
            'hold= asks for outputs that do not move, which strategy="direct" cannot promise: use '
            '"auto" or "exact"'
        )
    return patterns


def clean_name(name: str) -> str:
    """A module path without the prefixes of `torch.compile` wrappers."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod").removesuffix("_orig_mod")


def select(
    found: Mapping[str, NormSpec | Unreadable],
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> set[str]:
    """The names that `include` and `exclude` leave; a pattern that matches nothing is an error."""

    def matches(patterns: str | Sequence[str], argument: str) -> set[str]:
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
