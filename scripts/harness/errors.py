"""Errors a user can cause, and how a script ends when one happens."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from hf_rmsnorm import PatchError


class ScriptError(Exception):
    """What was asked for cannot be done. The message says what was found and what to do."""


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Calls `main(argv)`. Returns the exit status: 0, or 2 after a message about bad input."""
    try:
        main(argv)
    except (ScriptError, PatchError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
