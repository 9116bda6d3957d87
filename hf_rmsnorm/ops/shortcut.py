"""A norm on the CPU as one call of C++, once cpu_autograd.py has that: no other way is as light."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def none(*args: Any) -> None:
    """What `call` is until then, and where there is no compiler."""


# call(x, residual, weight, bias, make_formula, eps, p, weight_offset, casting, out_dtype): y, or
# `(y, summed)` with a residual. None for all but plain CPU tensors that fit together: the caller
# goes on as if there were no shortcut, which is also where errors are worded.
call: Callable[..., Any] = none
