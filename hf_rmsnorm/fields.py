"""What the fields of plans and records may hold, as pydantic reads it; needs no pydantic."""

from __future__ import annotations

import math
from typing import Annotated, Any


class Limit:
    """Limits on a field's value, by pydantic's names: `ge`, `gt`, `le`, `lt`, `min_length`."""

    def __init__(self, **limits: float):
        self.limits = limits

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return {**handler(source), **self.limits}


Count = Annotated[int, Limit(ge=1)]
Axis = Annotated[int, Limit(ge=0)]  # counted from the front; a position
Name = Annotated[str, Limit(min_length=1)]
Finite = Annotated[float, Limit(gt=-math.inf, lt=math.inf)]
Epsilon = Annotated[float, Limit(ge=0, lt=math.inf)]
Share = Annotated[float, Limit(gt=0, le=1)]
