"""The patch record: what a config says about a patch, so that a reader can do it again."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatchError
from ..names import layer_pattern
from ..patching.plan import FORMAT_VERSION, PatchPlan, Site, spec_from_dict
from ..probing import Center, Fold
from ..probing.facts import Widen
from .per_layer import of_layer, together

RECORD = "hf_rmsnorm"  # the config's attribute

KEYS = {"version", "norm", "p", "strategy", "sites", "centers", "widens", "digest"}


def config_file(folder: object) -> str:
    """What to call the file that a config was read from."""
    return f"{folder}/config.json" if folder else "the config"


def check_record(record: object, where: str = "the config") -> dict[str, Any]:
    """`record`, after checks that need no model; `PatchError` naming the file `where` it is."""
    if not isinstance(record, dict) or KEYS - record.keys():
        raise PatchError(
            f"{where} has no usable {RECORD!r} record: it was not written by hf_rmsnorm, or edited "
            "since"
        )
    version = record["version"]
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise PatchError(
            f"the {RECORD!r} record in {where} has version {version!r}, this hf_rmsnorm reads 1 to "
            f"{FORMAT_VERSION}: update the package, or restore the file"
        )
    with reading(where):
        fits = record["digest"] == digest(record)
    if not fits:
        raise PatchError(
            f"the {RECORD!r} record in {where} was edited since it was written (its digest does "
            "not fit), so what the weights were trained with is not known: restore the file"
        )
    return record


@contextmanager
def reading(where: str) -> Iterator[None]:
    """`PatchError` naming `where` a record is, for what one that is damaged raises."""
    try:
        yield
    except PatchError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise PatchError(
            f"the {RECORD!r} record in {where} is damaged ({type(error).__name__}: {error}): "
            "restore the file"
        ) from error


def digest(record: dict[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def to_record(model: Any, plan: PatchPlan) -> dict[str, Any]:
    """What a reader of the checkpoint has to do again, as JSON-able data: the weights are folded
    already, the swaps and centres are not in them, and the config has the blocks' stock width.

    Names hold for every head on the same base model: relative to the base model where `"base"` is
    true, to the model otherwise. Layer numbers become `*` where all layers agree.
    """
    groups: dict[str, list[Site]] = {}
    for site in plan.sites:
        groups.setdefault(layer_pattern(site.name), []).append(site)
    modules = Counter(layer_pattern(name) for name, _ in model.named_modules())
    sites: list[dict[str, Any]] = []
    for pattern, group in groups.items():
        alike = {replace(s, name="", reason="", leftover=None) for s in group}
        if len(alike) == 1 and len(group) == modules[pattern]:
            row = {**asdict(group[0]), "reason": together([s.reason for s in group])}
            if len({s.leftover for s in group}) > 1:
                row["leftover"] = [x and float(f"{x:.3g}") for x in (s.leftover for s in group)]
            sites.append({**row, **_relative(model, pattern)})
        else:
            sites += ({**asdict(s), **_relative(model, s.name)} for s in group)
    centers = [{**asdict(c), "serves": (), **_relative(model, c.module)} for c in plan.centers]
    for center in centers:
        del center["module"]
    widens = [
        {**asdict(w), "down": _relative(model, w.down)["name"], **_relative(model, w.up)}
        for w in plan.widens
    ]
    for widen in widens:
        del widen["up"], widen["norm"]
    record = {
        "version": FORMAT_VERSION,
        "norm": plan.norm,
        "p": plan.p,
        "strategy": plan.strategy,
        "sites": sites,
        "centers": centers,
        "widens": widens,
    }
    record = json.loads(json.dumps(record))  # tuples are lists, as a reader will see them
    return {**record, "digest": digest(record)}


def about_weights(
    record: dict[str, Any], fold_rows: list[dict[str, Any]], gains: float
) -> dict[str, Any]:
    """The record of a stock checkpoint, which others may train: it says what must be true of the
    weights for it to hold."""
    record = {**record, "folds": fold_rows, "gains": gains}
    return {**record, "digest": digest(record)}


def _relative(model: Any, name: str) -> dict[str, Any]:
    if model.base_model is model:
        return {"name": name, "base": True}
    short = name.removeprefix(f"{model.base_model_prefix}.")
    return {"name": short, "base": short != name}


def gains(model: nn.Module, plan: PatchPlan, weights: Mapping[str, Tensor] | None = None) -> float:
    """The sum of squares of the patched norms' weights and biases. What an exact patch rests on can
    be norms with equal gains, which training them alone would undo.

    Args:
        weights: where to look for the tensors by name, before the model's own.
    """
    given = weights or {}
    groups: dict[Any, list[Tensor]] = {}  # few operations for many tensors
    for site in plan.sites:
        if site.verdict == "kept":
            continue
        for name, own in model.get_submodule(site.name)._parameters.items():
            if own is not None:
                tensor = given.get(f"{site.name}.{name}", own).detach().reshape(-1)
                groups.setdefault((len(tensor), tensor.dtype, tensor.device), []).append(tensor)
    sums = (torch.stack(g).double().square().sum(1).tolist() for g in groups.values())
    return math.fsum(chain.from_iterable(sums))  # whatever the order


def fold_rows(model: Any, folds: Iterable[Fold]) -> list[dict[str, Any]]:
    """Folds as rows of a record, one for all layers where every layer has the same."""
    tensors = Counter(map(layer_pattern, _tensors(model)))
    groups: dict[tuple[str, Fold], list[str]] = {}
    for fold in folds:
        pattern = layer_pattern(fold.parameter)
        alike = replace(fold, parameter=pattern, aliases=())
        groups.setdefault((pattern, alike), []).append(fold.parameter)
    rows = []
    for (pattern, fold), names in groups.items():
        for name in [pattern] if len(set(names)) == tensors[pattern] else names:
            row = asdict(fold)
            del row["parameter"], row["aliases"]
            rows.append({**_relative(model, name), **row})
    return json.loads(json.dumps(rows))


def _tensors(model: nn.Module) -> list[str]:
    return [
        *dict(model.named_parameters(remove_duplicate=False)),
        *dict(model.named_buffers(remove_duplicate=False)),
    ]


def from_record(model: Any, record: dict[str, Any], where: str) -> PatchPlan:
    """The plan of `to_record` for `model`, which may have another head or other depth.

    Raises:
        PatchError: naming `where` the record is, if it and the model do not belong together.
    """
    with reading(where):
        return _plan_of(model, record, where)


def _plan_of(model: Any, record: dict[str, Any], where: str) -> PatchPlan:
    modules = dict(model.named_modules())
    names = _resolver(model, modules, where)
    sites = []
    for row in record["sites"]:
        rest = _rest(row, "spec", "reason", "leftover")
        for layer, name in enumerate(names(row)):
            site = Site(name=name, spec=spec_from_dict(row["spec"]), **rest, **of_layer(row, layer))
            if site.verdict != "kept" and not _fits(site, modules[name]):
                raise PatchError(
                    f"the patch record in {where} has {name} as {site.class_name} over "
                    f"{site.spec and site.spec.normalized_shape}, the {type(model).__name__} has "
                    f"{modules[name]} there: record and model do not belong together"
                )
            sites.append(site)
    order = {name: i for i, name in enumerate(modules)}
    sites.sort(key=lambda site: order[site.name])
    centers = tuple(
        Center(module=name, **_rest(row)) for row in record["centers"] for name in names(row)
    )
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    widens = tuple(
        Widen("", name, down=(prefix if row["base"] else "") + row["down"], **_rest(row, "down"))
        for row in record["widens"]
        for name in names(row)
    )
    return PatchPlan(
        norm=record["norm"],
        p=record["p"],
        strategy=record["strategy"],
        sites=tuple(sites),
        centers=centers,
        widens=widens,
    )


def _fits(site: Site, module: nn.Module) -> bool:
    """Whether `module` can be what the record was written for."""
    if type(module).__name__ != site.class_name or site.spec is None:
        return False
    shape, weight = site.spec.normalized_shape, getattr(module, "weight", None)
    return weight is None or not shape or tuple(weight.shape[-len(shape) :]) == shape


def folds_of(model: Any, record: dict[str, Any], where: str) -> tuple[Fold, ...]:
    """The weights of `model` that a stock checkpoint's record calls centred."""
    if not {"folds", "gains"} <= record.keys():
        raise PatchError(
            f"the {RECORD!r} record in {where} does not say which weights are centred, so it "
            "is not that of a stock checkpoint: the file was edited, or mixed from two"
        )
    names = _resolver(model, _tensors(model), where)

    def blocks(row: dict[str, Any]) -> tuple[tuple[int, int], ...] | None:
        return None if row.get("blocks") is None else tuple((i, j) for i, j in row["blocks"])

    with reading(where):
        return tuple(
            Fold(parameter=name, blocks=blocks(row), **_rest(row, "blocks"))
            for row in record["folds"]
            for name in names(row)
        )


def _rest(row: dict[str, Any], *left_out: str) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in ("name", "base", *left_out)}


def _resolver(
    model: Any, known: Iterable[str], where: str
) -> Callable[[dict[str, Any]], list[str]]:
    """Finds the names in `model` that a row of a record means."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    patterns = {name: layer_pattern(name) for name in known}

    def names(row: dict[str, Any]) -> list[str]:
        wanted = (prefix if row["base"] else "") + row["name"]
        found = [name for name, pattern in patterns.items() if wanted in (name, pattern)]
        if not found and row["base"] and row.get("verdict") != "kept":
            raise PatchError(
                f"the patch record in {where} names {wanted!r}, which this {type(model).__name__} "
                "does not have: record and model do not belong together"
            )
        return found

    return names


def below(plan: PatchPlan, prefix: str) -> PatchPlan:
    """The part of `plan` that concerns the module at `prefix`, with names relative to it."""
    if not prefix:
        return plan
    start = prefix + "."
    sites = (
        replace(site, name=site.name.removeprefix(start))
        for site in plan.sites
        if site.name.startswith(start)
    )
    centers = (
        replace(center, module=center.module.removeprefix(start))
        for center in plan.centers
        if center.module.startswith(start)
    )
    widens = (
        replace(widen, up=widen.up.removeprefix(start), down=widen.down.removeprefix(start))
        for widen in plan.widens
        if widen.up.startswith(start) and widen.down.startswith(start)
    )
    return replace(plan, sites=tuple(sites), centers=tuple(centers), widens=tuple(widens))


def lifted(plan: PatchPlan, prefix: str) -> PatchPlan:
    """The inverse of `below`, for what a record holds: the names as seen from an outer module."""
    start = prefix + "."
    return replace(
        plan,
        sites=tuple(
            replace(s, name=(start + s.name).removesuffix("."))  # a norm patched by itself has none
            for s in plan.sites
        ),
        centers=tuple(replace(c, module=start + c.module) for c in plan.centers),
        widens=tuple(replace(w, up=start + w.up, down=start + w.down) for w in plan.widens),
    )
