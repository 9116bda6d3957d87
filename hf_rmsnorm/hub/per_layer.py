"""What the layers that share a row of a patch record have of their own: mostly a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def together(texts: list[str]) -> str | list[str | list[str]]:
    """Texts of several layers as one: pieces that are the same for all, and lists of what is not.
    That is mostly a number."""
    if len(set(texts)) == 1:
        return texts[0]
    if len({text.count(" ") for text in texts}) > 1:
        return [list(texts)]
    pieces: list[str | list[str]] = []
    for words in zip(*(text.split(" ") for text in texts), strict=True):
        last = pieces[-1] if pieces else None
        if len(set(words)) > 1:
            pieces.append(list(words))
        elif isinstance(last, str):
            pieces[-1] = f"{last} {words[0]}"
        else:
            pieces.append(words[0])
    return pieces


def of_layer(row: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """The reason and leftover that a site's row of a record has for one of its layers."""

    def pick(values: list[Any]) -> Any:
        return values[min(layer, len(values) - 1)]

    reason, leftover = row["reason"], row.get("leftover")
    if isinstance(reason, list):
        reason = " ".join(piece if isinstance(piece, str) else pick(piece) for piece in reason)
    return {
        "reason": reason,
        "leftover": pick(leftover) if isinstance(leftover, list) else leftover,
    }


def layers(row: Mapping[str, Any]) -> int:
    """For how many layers a site's row has reasons of their own; 1 if for all the same."""
    found = row["reason"]
    pieces = [p for p in found if isinstance(p, list)] if isinstance(found, list) else []
    return max(map(len, pieces), default=1)
