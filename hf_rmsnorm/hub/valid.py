"""What the fields of a patch record may hold, which readers without the package do not check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from ..errors import PatchError
from ..fields import Finite, Limit
from ..patching.plan import PatchPlan, check_plan
from ..probing import Fold
from ..validation import read_fields
from .per_layer import of_layer
from .records import RECORD, _rest, check_record


def valid_record(record: object, where: str = "the config") -> dict[str, Any]:
    """`check_record`, and every field of it of a type and in a range that it may have."""
    found = check_record(record, where)
    what = f"the {RECORD!r} record in {where}"

    def rows(key: str, name: str, **missing: str) -> object:
        if not isinstance(found[key], list):
            return found[key]  # which is refused
        for i, row in enumerate(found[key]):
            if not isinstance(row, dict) or type(row.get("base")) is not bool:
                raise PatchError(f"{what} is not valid: {key}[{i}] must say true or false as base")
        return [{name: _whole(row), **missing, **_rest(row)} for row in found[key]]

    plan = {key: found[key] for key in ("version", "norm", "p", "strategy")}
    plan["sites"], plan["centers"] = _sites(rows("sites", "name"), what), rows("centers", "module")
    plan["widens"] = rows("widens", "up", norm="")
    check_plan(read_fields(PatchPlan, plan, what), what)
    if "folds" in found:
        read_fields(tuple[Fold, ...], rows("folds", "parameter"), what)
        read_fields(tuple[Finite], [found.get("gains")], what)
    return found


@dataclass(frozen=True)
class _OfLayers:
    """What `per_layer` puts together."""

    reason: str | tuple[str | Annotated[tuple[str, ...], Limit(min_length=1)], ...]
    leftover: float | Annotated[tuple[float | None, ...], Limit(min_length=1)] | None = None


def _sites(rows: object, what: str) -> object:
    """Each with the reason and leftover of its first layer."""
    if not isinstance(rows, list):
        return rows
    own = [{k: row[k] for k in ("reason", "leftover") if k in row} for row in rows]
    read_fields(tuple[_OfLayers, ...], own, f"{what}, in its sites,")
    return [{**row, **of_layer(row, 0)} for row in rows]


def _whole(row: dict[str, Any]) -> Any:
    """The name; one below the base model is another than the same below the model."""
    name = row.get("name")
    return f"(base).{name}" if isinstance(name, str) and row["base"] else name
