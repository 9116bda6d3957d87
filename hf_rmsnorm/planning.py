"""What will be done to a model, decided before anything is touched."""

from __future__ import annotations

import fnmatch
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import nn

from .errors import PatchError
from .functional import statistic_size
from .recipes import NormSpec, Unreadable, find_norms

NORMS = ("rmsnorm", "prmsnorm")
STRATEGIES = ("auto", "exact", "direct")
DEFAULT_P = 0.0625  # the paper's
FORMAT_VERSION = 1

Verdict = Literal["exact", "approximate", "kept"]


@dataclass(frozen=True)
class Site:
    """One norm site and what becomes of it.

    Attributes:
        name: module path in the model, `""` for the model itself.
        class_name: class before patching.
        verdict: `exact` (same function in eval, up to rounding), `approximate` (the function
            changes; wants fine-tuning) or `kept` (untouched).
        reason: why, in one line.
        spec: what the module computes; `None` where it could not be read.
    """

    name: str
    class_name: str
    verdict: Verdict
    reason: str
    spec: NormSpec | None = None


@dataclass(frozen=True)
class PatchPlan:
    """A patch as pure data: print it, store it, apply it elsewhere.

    Attributes:
        norm: `"rmsnorm"` or `"prmsnorm"`.
        p: share of the features in the statistic; 1.0 for RMSNorm.
        strategy: `"auto"`, `"exact"` or `"direct"`.
        sites: every norm site of the model, in module order.
    """

    norm: str
    p: float
    strategy: str
    sites: tuple[Site, ...]
    version: int = field(default=FORMAT_VERSION)

    def count(self, verdict: Verdict) -> int:
        return sum(site.verdict == verdict for site in self.sites)

    def summary(self) -> str:
        """One line: how many sites, and how many of each verdict."""
        target = self.norm if self.p == 1.0 else f"{self.norm} (p={self.p:g})"
        counts = ", ".join(f"{self.count(v)} {v}" for v in ("exact", "approximate", "kept"))
        return f"{len(self.sites)} norm sites -> {target}, strategy {self.strategy}: {counts}"

    def __str__(self) -> str:
        return self.summary() + "\n" + site_table(self.sites)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> PatchPlan:
        """The inverse of `to_json`; `PatchError` for text that is not such a plan."""
        try:
            data = json.loads(text)
            version = data["version"]
            if version > FORMAT_VERSION:
                raise PatchError(
                    f"the plan has format version {version}, this hf_rmsnorm reads up to "
                    f"{FORMAT_VERSION}: update the package"
                )
            sites = tuple(
                Site(**{**site, "spec": spec_from_dict(site["spec"])}) for site in data["sites"]
            )
            return cls(**{**data, "sites": sites})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise PatchError(f"not a patch plan: {error!r}") from None


def spec_from_dict(data: Mapping[str, Any] | None) -> NormSpec | None:
    if data is None:
        return None
    lists = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
    return NormSpec(**lists)


def site_table(sites: Iterable[Site]) -> str:
    """The sites as a text table, equal rows of numbered layers folded into one."""
    rows: dict[tuple[str, ...], int] = {}
    for site in sites:
        pattern = re.sub(r"\d+", "*", site.name) or "(the model itself)"
        key = (pattern, site.class_name, site.verdict, site.reason)
        rows[key] = rows.get(key, 0) + 1
    header = ("site", "count", "class", "verdict", "reason")
    table = [header] + [(k[0], str(n), k[1], k[2], k[3]) for k, n in rows.items()]
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        + "  "
        + row[4]
        for row in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def clean_name(name: str) -> str:
    """A module path without the prefixes of `torch.compile` wrappers."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod").removesuffix("_orig_mod")


def plan_patch(
    model: nn.Module,
    norm: str = "rmsnorm",
    *,
    p: float | None = None,
    strategy: str = "auto",
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    verify: bool = True,
) -> PatchPlan:
    """What `patch_model` would do with the same arguments. Changes nothing.

    Args and errors: as `patch_model`.

    Example:
        >>> from torch import nn
        >>> plan = plan_patch(nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), strategy="direct")
        >>> plan.summary()
        '1 norm sites -> rmsnorm, strategy direct: 0 exact, 1 approximate, 0 kept'
    """
    share = check_arguments(model, norm, p, strategy)
    found = find_norms(model)
    chosen = select(found, include, exclude)
    sites = tuple(
        judge(name, model.get_submodule(name), reading, norm, share, name in chosen)
        for name, reading in found.items()
    )
    if strategy == "exact":
        sites = tuple(
            replace(site, verdict="kept", reason=f'strategy="exact": {site.reason}')
            if site.verdict == "approximate"
            else site
            for site in sites
        )
    require_work(sites, strategy)
    return PatchPlan(norm, share, strategy, sites)


def check_arguments(model: object, norm: str, p: float | None, strategy: str) -> float:
    """The share `p` to use, after every check that needs no look into the model."""
    if not isinstance(model, nn.Module):
        raise PatchError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if norm not in NORMS:
        raise PatchError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}")
    if strategy not in STRATEGIES:
        raise PatchError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}")
    if norm == "rmsnorm" and p is not None:
        raise PatchError(f'p={p} has no meaning for norm="rmsnorm": use norm="prmsnorm"')
    share = DEFAULT_P if norm == "prmsnorm" and p is None else p
    if share is None:
        share = 1.0
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise PatchError(f"p must be a share in (0, 1], got {p!r}; the paper uses {DEFAULT_P}")
    sharded = [n for n, m in model.named_modules() if _is_sharded(m)]
    if sharded:
        raise PatchError(
            f"{sharded[0] or 'the model'} is already sharded by FSDP: patch the model first, "
            "then wrap it"
        )
    return float(share)


def _is_sharded(module: nn.Module) -> bool:
    names = {cls.__name__ for cls in type(module).__mro__}
    return bool(names & {"FSDPModule", "FullyShardedDataParallel"})


def select(
    found: Mapping[str, NormSpec | Unreadable],
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
) -> set[str]:
    """The names that `include` and `exclude` leave; a pattern that matches nothing is an error."""

    def matches(patterns: str | Sequence[str], argument: str) -> set[str]:
        hit: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
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


def judge(
    name: str,
    module: nn.Module,
    reading: NormSpec | Unreadable,
    norm: str,
    p: float,
    chosen: bool,
) -> Site:
    """The verdict on one site when no weight may be touched (the paper's drop-in)."""
    class_name = type(module).__name__
    if isinstance(reading, Unreadable):
        return Site(name, class_name, "kept", reading.reason)
    if not chosen:
        return Site(name, class_name, "kept", "left out by include/exclude", reading)
    if getattr(module, "is_hf_rmsnorm", False) and getattr(module, "p", 1.0) == p:
        return Site(name, class_name, "kept", f"is hf_rmsnorm's {class_name} already", reading)
    hidden = math.prod(reading.normalized_shape)
    statistic = f"statistic from {statistic_size(hidden, p)} of {hidden} features" if p < 1 else ""
    if reading.kind == "layernorm":
        reason = "centring dropped" + (f", {statistic}" if statistic else "")
        return Site(name, class_name, "approximate", reason, reading)
    if p < 1:
        return Site(name, class_name, "approximate", statistic, reading)
    return Site(name, class_name, "exact", "already RMSNorm: same formula, our kernel", reading)


def require_work(sites: Sequence[Site], strategy: str) -> None:
    """`PatchError` where nothing would change."""
    if any(site.verdict != "kept" for site in sites):
        return
    if not sites:
        raise PatchError(
            "no LayerNorm or RMSNorm module found in the model: there is nothing to patch "
            "(functional calls of F.layer_norm are out of reach)"
        )
    what = "can be exact" if strategy == "exact" else "can be patched"
    raise PatchError(f"none of the {len(sites)} norm sites {what}:\n{site_table(sites)}")
