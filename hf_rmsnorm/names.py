"""Names of modules and tensors, with the numbers of layers as `*`."""

from __future__ import annotations

from collections.abc import Iterable


def layer_pattern(name: str) -> str:
    """A module path with the numbers of layers as `*`: `h.3.ln_1` gives `h.*.ln_1`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def pattern_list(names: Iterable[str]) -> list[str]:
    """The names, those that differ in the numbers of layers alone as one with `*`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(layer_pattern(name), []).append(name)
    return [pattern if len(group) > 1 else group[0] for pattern, group in groups.items()]
