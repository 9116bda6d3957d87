"""What the fields of plans and records may hold, and data from outside held against that."""

from __future__ import annotations

import functools
import json
import math
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MinLen

from .errors import PatchError

Count = Annotated[int, Ge(1)]
Axis = Annotated[int, Ge(0)]  # counted from the front; a position
Name = Annotated[str, MinLen(1)]
Finite = Annotated[float, Gt(-math.inf), Lt(math.inf)]
Epsilon = Annotated[float, Ge(0), Lt(math.inf)]
Share = Annotated[float, Gt(0), Le(1)]

T = TypeVar("T")


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter  # takes longer to import than the rest of the package

    return TypeAdapter(kind)


def read_fields(kind: type[T], data: object, what: str) -> T:
    """`data`, as JSON has it, as a `kind`: a dataclass, or a tuple of them.

    Raises:
        PatchError: naming each field (of three) that is missing, unknown, of another type or out
            of its range, what was found and what is allowed.
    """
    from pydantic import ValidationError

    text = json.dumps(data, default=repr)
    try:
        adapter = _adapter(kind)  # type: ignore[arg-type]
        return adapter.validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        found = error.errors(include_url=False)
        faults = "; ".join(map(_fault, found[:3])) + ("; ..." if len(found) > 3 else "")
    raise PatchError(f"{what} is not valid: {faults}. Restore it, or plan again with plan_patch")


def _fault(error: Any) -> str:
    """`folds[3].axis is -1: input should be greater than or equal to 0`."""
    where = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in error["loc"])
    where = where.lstrip(".") or "it"
    if error["type"] == "missing":
        return f"{where} is missing"
    if error["type"] == "unexpected_keyword_argument":
        return f"{where} is unknown"
    found, message = repr(error["input"]), error["msg"]
    found = found if len(found) <= 60 else f"{found[:57]}..."
    return f"{where} is {found}: {message[0].lower()}{message[1:]}"
