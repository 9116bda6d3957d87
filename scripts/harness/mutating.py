"""JSON data and files with something wrong in them, the same for the same seed."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**20, 0.5, -0.0, float("nan"), float("inf"), "", "banana", "../..",
    [], [[]], {}, {"a": 1}, [1, 2, 3, 4],
)  # fmt: skip


def mutated(data: Any, seed: int) -> Any:
    """A copy with one to three places changed: another value, gone, twice, renamed or swapped."""
    found, choose = copy.deepcopy(data), random.Random(seed)
    for _ in range(choose.choice((1, 1, 1, 2, 3))):
        places = list(_places(found))
        if not places:
            return choose.choice(ODD)
        holder, key = choose.choice(places)
        how = choose.randrange(6)
        if how <= 2:
            holder[key] = copy.deepcopy(choose.choice(ODD))
        elif how == 3:
            del holder[key]
        elif how == 4 and isinstance(holder, dict):
            holder[f"{key}_"] = holder.pop(key)
        elif isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        else:
            other, name = choose.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = copy.deepcopy(other[name])
    return found


def _places(data: Any) -> Any:
    pairs = list(data.items() if isinstance(data, dict) else enumerate(data))
    for key, value in pairs:
        yield data, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def damage(folder: Path, seed: int) -> str:
    """Change one file of a checkpoint; returns what was done."""
    choose = random.Random(seed)
    path = choose.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    data = path.read_bytes()
    how = choose.choice(("cut", "flip", "fill", "empty", "gone", "mutate", "mutate", "folder"))
    if how == "mutate" and path.suffix == ".json":
        path.write_text(json.dumps(mutated(json.loads(data), seed)))
    elif how in ("gone", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
    else:
        at = choose.randrange(len(data) or 1)
        noise = choose.randbytes(8)
        new = {"cut": data[:at], "fill": noise * 9, "empty": b""}
        path.write_bytes(new.get(how, data[:at] + noise + data[at + 8 :]))
    return f"{how} {path.name}"
