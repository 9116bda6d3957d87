"""Patched models on disk and on the Hub. The only part of the package that needs transformers.

- What a model knows of itself: `marking`, `configs`, `records`, `per_layer`, `parts`, `exactness`.
- Saving and loading: `saving`, `loading`, `autos`, `modeling` (the file for readers without the
  package).
- What is on disk: `folders` (a checkpoint's files), `moving` (how they come there, wholly or not),
  `valid` (the record's fields), `weights` (none is made up), `companions` (what lies beside).
- `adapters`: which patch the base of an adapter had.
- Describing and uploading: `cards`, `card_merge`, `card_results`, `runs`, `push`, `answers`.
- `kernels`: our layers under Transformers' `use_kernels=True`.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return import_module(".kernels", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
