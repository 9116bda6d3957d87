"""Data from outside, held against the types of the fields that it is to fill."""

from __future__ import annotations

import functools
import json
from typing import Any, TypeVar

from .errors import PatchError

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
