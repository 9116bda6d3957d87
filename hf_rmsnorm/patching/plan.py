"""A patch as pure data: `PatchPlan`, its sites, its table and its JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from ..errors import PatchError
from ..fields import Limit, Share
from ..names import layer_pattern, pattern_list
from ..probing import Center, Fold, LayerScale
from ..probing.facts import Absorb, Widen
from ..recipes import NormSpec
from ..validation import read_fields

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
        mean_free: the mean of its input is zero once the plan's folds and centres are applied, so
            that dropping the centring alone changes nothing.
        leftover: largest |mean| / rms seen at its input after folds and centres; `None` if not
            measured.
        unproven: `exact` holds on the paths probed alone: the probe inputs never reached a weight
            that may write to what this norm reads; `reason` names it.
        autocast_output: dtype of its output under autocast; see `RMSNorm`.
    """

    name: str
    class_name: str
    verdict: Verdict
    reason: str
    spec: NormSpec | None = None
    mean_free: bool = False
    leftover: float | None = None
    unproven: bool = False
    autocast_output: Literal["float32", "input", "autocast"] = "float32"


@dataclass(frozen=True)
class PatchPlan:
    """A patch as pure data: print it, store it, apply it elsewhere.

    Attributes:
        norm: `"rmsnorm"` or `"prmsnorm"`.
        p: share of the features in the statistic; 1.0 for RMSNorm.
        strategy: `"auto"`, `"exact"` or `"direct"`.
        sites: every norm site of the model, in module order.
        absorbs, layerscales, folds, widens, centers: what makes the means zero or small, in this
            order.
        assumed: parameters that the probe inputs never reached, folded like their siblings.
        moved: outputs beside the main ones (hidden states, outputs of sub-models) that the folds
            change: they lose their mean over the features.
        hold: patterns of the outputs that must not move, beside the main ones.
        unreached: parameters and buffers that the probe inputs never reached and that may write to
            what a norm reads, with no reached sibling to show what they do.
        reached: how many parameters and buffers the inputs reached, and of how many; `None` where
            nothing was run.
        twin: which of the layers were probed, in words, if not all were.
        filled: folded weights of which many entries were zero (pruned), and are no longer.
        precision: dtype that the probe computed in; empty where no probe was needed.
    """

    norm: Literal["rmsnorm", "prmsnorm"]
    p: Share
    strategy: Literal["auto", "exact", "direct"]
    sites: tuple[Site, ...]
    absorbs: tuple[Absorb, ...] = ()
    layerscales: tuple[LayerScale, ...] = ()
    folds: tuple[Fold, ...] = ()
    widens: tuple[Widen, ...] = ()
    centers: tuple[Center, ...] = ()
    assumed: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    hold: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    reached: tuple[int, int] | None = None
    filled: tuple[str, ...] = ()
    twin: str = ""
    precision: str = ""
    version: Annotated[int, Limit(ge=1, le=FORMAT_VERSION)] = FORMAT_VERSION

    def count(self, verdict: Verdict) -> int:
        return sum(site.verdict == verdict for site in self.sites)

    def summary(self) -> str:
        """One line: how many sites, and how many of each verdict."""
        target = self.norm if self.p == 1.0 else f"{self.norm} (p={self.p:g})"
        unproven = sum(site.unproven for site in self.sites)
        aside = f" ({unproven} on the paths probed alone)" if unproven else ""
        counts = ", ".join(
            f"{self.count(v)} {v}{aside if v == 'exact' else ''}"
            for v in ("exact", "approximate", "kept")
        )
        line = f"{len(self.sites)} norm sites -> {target}, strategy {self.strategy}: {counts}"
        if self.folds or self.centers:
            line += f"; {len(self.folds)} folded weights, {len(self.centers)} centring ops"
        return line

    def __str__(self) -> str:
        lines = [self.summary(), site_table(self.sites)]
        if self.folds:
            folded = dict.fromkeys(layer_pattern(fold.parameter) for fold in self.folds)
            lines.append("centred over the features: " + ", ".join(folded))
        if self.absorbs:
            biases = dict.fromkeys(layer_pattern(absorb.bias) for absorb in self.absorbs)
            lines.append("mean moved from a norm's bias into its readers': " + ", ".join(biases))
        if self.widens:
            blocks = dict.fromkeys(layer_pattern(widen.up) for widen in self.widens)
            lines.append("one more hidden unit (intermediate size + 1): " + ", ".join(blocks))
        for center in self.centers:
            served = f", for {len(center.serves)} norms" if center.serves else ""
            lines.append(f"one mean subtraction at {center}{served}")
        if self.assumed:
            lines.append(
                "never reached by the probe, treated like their siblings: "
                + ", ".join(pattern_list(self.assumed))
            )
        if self.reached:
            line = "the probe inputs reached {} of {} parameters and buffers".format(*self.reached)
            if self.twin:
                line += f" of a thin twin ({self.twin})"
            if self.unreached:
                line += f"; pass inputs= that reach {', '.join(pattern_list(self.unreached))}"
            lines.append(line)
        if self.filled:
            lines.append(
                "pruned weights whose zeros folding fills "
                f'(strategy="direct" leaves them): {", ".join(pattern_list(self.filled))}'
            )
        if low := sum(site.autocast_output == "autocast" for site in self.sites):
            lines.append(f"under autocast {low} norms write its dtype themselves")
        if self.moved:
            lines.append("side outputs that lose their mean: " + ", ".join(self.moved))
        return "\n".join(lines)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> PatchPlan:
        """The inverse of `to_json`; `PatchError` for text that is not such a plan."""
        try:
            data = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise PatchError(f"not a patch plan: {error!r}") from None
        version = data.get("version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise PatchError(
                f"the plan has format version {version}, this hf_rmsnorm reads up to "
                f"{FORMAT_VERSION}: update the package"
            )
        plan = read_fields(cls, data, "the plan")
        if missing := [name for name in (*_DOES, "version") if name not in data]:
            raise PatchError(f"not a patch plan: {missing[0]!r} is missing")
        return check_plan(plan)


# Without one of these, a plan would do something else than what it calls exact.
_DOES = ("absorbs", "layerscales", "folds", "widens", "centers")


def check_plan(plan: object, what: str = "the plan") -> PatchPlan:
    """`plan`, if every field of it has a value that it may have, and they fit together.

    Raises:
        PatchError: naming `what` it is, the field, what was found and what is allowed.
    """
    if not isinstance(plan, PatchPlan):
        raise PatchError(f"{what} must be a PatchPlan, not a {type(plan).__name__}: see plan_patch")
    read_fields(PatchPlan, asdict(plan), what)
    if plan.norm == "rmsnorm" and plan.p != 1:
        raise PatchError(f"{what} has p {plan.p!r}, but norm 'rmsnorm': only 'prmsnorm' has a p")
    names = [site.name for site in plan.sites]
    if len(names) > len(set(names)):
        twice = next(name for name in names if names.count(name) > 1)
        raise PatchError(f"{what} has the site {twice!r} more than once")
    for site in plan.sites:
        if site.spec is None and site.verdict != "kept":
            raise PatchError(
                f"{what} has {site.name} as {site.verdict}, without a spec of its norm"
            )
    for center in plan.centers:
        if center.side == "input" and center.key is None:
            raise PatchError(f"{what} subtracts a mean at {center}, without a key of the argument")
    return plan


def spec_from_dict(data: Mapping[str, Any] | None) -> NormSpec | None:
    return None if data is None else NormSpec(**_tuples(data))


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows lists alone: every list in `data` as the tuple it was."""

    def convert(value: Any) -> Any:
        return tuple(map(convert, value)) if isinstance(value, list) else value

    return {key: convert(value) for key, value in data.items()}


def site_table(sites: Iterable[Site]) -> str:
    """The sites as a text table: one row for numbered layers that differ in numbers alone."""
    rows: dict[tuple[str, ...], list[Site]] = {}
    for site in sites:
        shape = " ".join(map(layer_pattern, _NUMBER.sub("\0", site.reason).split(" ")))
        key = (layer_pattern(site.name), site.class_name, site.verdict, shape)
        rows.setdefault(key, []).append(site)
    table = [("site", "count", "class", "verdict", "reason")]
    for (pattern, class_name, verdict, shape), alike in rows.items():
        first = alike[0]
        name, reason = first.name or "(the model itself)", first.reason
        if len(alike) > 1:
            numbers = zip(*(_NUMBER.findall(site.reason) for site in alike), strict=True)
            name, reason = pattern, _filled(shape, map(_range, numbers))
        table.append((name, str(len(alike)), class_name, verdict, reason))
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        + "  "
        + row[4]
        for row in table
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


_NUMBER = re.compile(r"(?<=up to )[0-9.]+(?:e[-+]?[0-9]+)?")


def _filled(shape: str, parts: Iterable[str]) -> str:
    rest = iter(parts)
    return re.sub("\0", lambda _: next(rest), shape)


def _range(numbers: Iterable[str]) -> str:
    found = sorted(numbers, key=float)
    return found[0] if found[0] == found[-1] else f"{found[-1]} (from {found[0]})"
