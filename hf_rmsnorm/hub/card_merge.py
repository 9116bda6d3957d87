"""Bringing a card that exists up to date without touching what others wrote.

In the text, only the part between our two marks is rewritten. In the metadata: our tags and our
entries of `model-index`; what is missing is added. Everything else stays byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from ..errors import PatchError

BEGIN, END = "<!-- hf_rmsnorm: begin", "<!-- hf_rmsnorm: end -->"
SECTION = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
TAGS = ("hf_rmsnorm", "rmsnorm", "prmsnorm", "custom_code")
RESULT_MARK = "hf_rmsnorm"  # a key in the `args` of our metrics


def merge(path: Path, card: ModelCard, replace: Sequence[str] = ()) -> str:
    """The README at `path`, with metadata and section of `card` in their places.

    Metadata that is there stays, but for our tags, our results, and the keys in `replace`.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            text = file.read()
        found = REGEX_YAML_BLOCK.match(text)
        block = found[2].replace("\r\n", "\n").strip("\n") + "\n" if found else ""
        theirs = yaml.safe_load(block) or {}
        if not isinstance(theirs, dict):
            raise ValueError("its metadata is not a mapping")
    except (ValueError, yaml.YAMLError) as error:
        raise PatchError(
            f"{path} cannot be read as a model card: {error}; repair it or move it away"
        ) from None
    body = text[found.end() :] if found else text
    if [body.count(BEGIN), body.count(END), len(SECTION.findall(body))] not in ([0] * 3, [1] * 3):
        raise PatchError(
            f"{path}: {BEGIN!r} and {END!r} must be there once each, in this order, or neither"
        )
    line_break = "\r\n" if "\r\n" in text else "\n"
    section = "".join(SECTION.findall(card.text)).replace("\n", line_break)
    if BEGIN in body:
        body = SECTION.sub(lambda _: section, body)
    else:
        body = f"{body.rstrip()}{2 * line_break}{section}{line_break}"
    try:
        block = _merge_metadata(block, theirs, card.data.to_dict(), replace)
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise PatchError(f"{path}: its metadata is not as the Hub defines it: {error!r}") from None
    return f"---\n{block}---\n".replace("\n", line_break) + body


def _merge_metadata(
    block: str, theirs: dict[str, Any], ours: dict[str, Any], replace: Sequence[str]
) -> str:
    """`block` with our keys updated. Other entries keep their spelling: YAML read and written
    again would lose comments and make `language: no` false."""
    tags = theirs.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    wanted = {
        **{k: v for k, v in ours.items() if theirs.get(k) is None or k in replace},
        "tags": list(dict.fromkeys([*(t for t in tags if t not in TAGS), *ours["tags"]])),
        "model-index": _merge_results(theirs.get("model-index"), ours.get("model-index")),
    }
    updates = {key: value for key, value in wanted.items() if theirs.get(key) != value}
    expected = {k: v for k, v in {**theirs, **updates}.items() if k not in updates or v is not None}
    entries = re.split(r"(?m)^(?=[^\s#-])", block)
    for i, entry in enumerate(entries):
        key = entry.partition(":")[0].strip("'\" ")
        if key in updates:
            comments = re.findall(r"(?m)^#.*\n", entry)
            entries[i] = _dump({key: updates.pop(key)}) + "".join(comments)
    entries.append(_dump(updates))
    merged = "".join(entries)
    try:
        faithful = yaml.safe_load(merged) == expected
    except yaml.YAMLError:
        faithful = False
    if not faithful:  # a spelling that cannot be cut at its top-level keys, such as {a: 1, b: 2}
        merged = _dump(expected)
    return merged


def _dump(entries: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in entries.items() if value is not None}
    return yaml_dump(kept, sort_keys=False) if kept else ""


def _merge_results(theirs: Any, ours: Any) -> Any:
    """`model-index` with our results, marked in their `args`, in place of those we had put there.

    They become the last entries of the first model; other results are not touched.
    """
    if not theirs:
        return ours
    models = []
    for model in theirs:
        results = []
        for result in model["results"]:
            kept = [m for m in result["metrics"] if RESULT_MARK not in (m.get("args") or {})]
            if kept or not result["metrics"]:
                results.append({**result, "metrics": kept})
        if results or not model["results"]:
            models.append({**model, "results": results})
    if ours and models:
        models[0]["results"] += ours[0]["results"]
    return models or ours
