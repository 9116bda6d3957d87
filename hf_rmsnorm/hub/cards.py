"""Model cards: README.md of a patched checkpoint, from its config and the JSON of a run.

The text is in `card_template.md`. In a card that exists already, only the part between our two
marks, our tags and our entries of `model-index` are rewritten, and metadata that is missing is
added; everything else stays byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump
from transformers.modelcard import TASK_MAPPING
from transformers.models.auto import modeling_auto as autos

from ..errors import PatchError
from .configs import MODEL_TYPE, RECORD, check_record

TEMPLATE = Path(__file__).with_name("card_template.md")
BEGIN, END = "<!-- hf_rmsnorm: begin", "<!-- hf_rmsnorm: end -->"
SECTION = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
TAGS = ("hf_rmsnorm", "rmsnorm", "prmsnorm", "custom_code")


def write_card(folder: Path, *, run: Path | None = None) -> Path:
    """Write the card of the checkpoint in `folder`, or bring the one that is there up to date.

    Measured results are in the card only if `run` brings them: results of other weights do not
    survive a save.

    Args:
        folder: holds a `config.json` with a patch record.
        run: `all_results.json` of `finetune_clm.py` or `results.json` of `compare.py`.

    Raises:
        PatchError: no config, no valid record, or a README.md that cannot be merged into.
    """
    folder = Path(folder)
    card = make_card(read_config(folder))
    path = folder / "README.md"
    text = merge(path, card) if path.exists() else str(card)
    beside = path.with_name("README.md.partial")
    with beside.open("w", newline="", encoding="utf-8") as file:
        file.write(text)
    beside.replace(path)
    return path


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a patched checkpoint."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PatchError(f"{folder} is not a checkpoint: it has no config.json") from None
    except ValueError as error:
        raise PatchError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or RECORD not in config:
        raise PatchError(f"{path} has no {RECORD!r} record: it is not of a patched model")
    check_record(config[RECORD])
    return config


def make_card(config: Mapping[str, Any]) -> ModelCard:
    """The whole card of a checkpoint with this config."""
    record = config[RECORD]
    own = config.get("model_type") == MODEL_TYPE
    base_type = str(config.get("base_model_type") if own else config.get("model_type"))
    class_name = next(iter(config.get("architectures") or ()), None)
    remote = own and "auto_map" in config
    sites = [_cells(site) for site in record["sites"]]
    changed = [site["class_name"] for site in sites if site["verdict"] != "kept"]
    norm_name = "RMSNorm" if record["p"] == 1 else f"pRMSNorm (p = {record['p']:g})"
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_task(base_type, class_name),
        tags=[
            "hf_rmsnorm",
            "rmsnorm" if record["p"] == 1 else "prmsnorm",
            *(["custom_code"] if own else []),
        ],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=f"{class_name or base_type} with {norm_name}",
        place="path_or_repo",
        own=own,
        remote=remote,
        base_type=base_type,
        class_name=class_name,
        auto=_auto_class(base_type, class_name),
        record=record,
        norm_name=norm_name,
        share=f"{record['p']:.4%}".rstrip("0").rstrip(".%") + "%",
        replaced=" and ".join(dict.fromkeys(changed)),
        changed=bool(changed),
        sites=sites,
        counted=False,
        centers=", ".join(
            f"the {center['side']} of `{center['name']}`" for center in record["centers"]
        ),
        widens=", ".join(f"`{widen['name']}`" for widen in record["widens"]),
        run=None,
    )
    return card


def merge(path: Path, card: ModelCard) -> str:
    """The README at `path`, with metadata and section of `card` in their places."""
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
    if [body.count(BEGIN), body.count(END)] not in ([0, 0], [1, 1]):
        raise PatchError(
            f"{path}: {BEGIN!r} and {END!r} must be there once each, or neither of them"
        )
    line_break = "\r\n" if "\r\n" in text else "\n"
    section = "".join(SECTION.findall(card.text)).replace("\n", line_break)
    if BEGIN in body:
        body = SECTION.sub(lambda _: section, body)
    else:
        body = f"{body.rstrip()}{2 * line_break}{section}{line_break}"
    block = _merge_metadata(block, theirs, card.data.to_dict())
    return f"---\n{block}---\n".replace("\n", line_break) + body


def _merge_metadata(block: str, theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """`block` with our keys updated. Other entries keep their spelling: YAML read and written
    again would lose comments and make `language: no` false."""
    tags = theirs.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    wanted = {
        **{key: value for key, value in ours.items() if theirs.get(key) is None},
        "tags": [tag for tag in tags if tag not in TAGS] + ours["tags"],
    }
    updates = {key: value for key, value in wanted.items() if theirs.get(key) != value}
    expected = {**theirs, **updates}
    entries = re.split(r"(?m)^(?=[^\s#-])", block)
    for i, entry in enumerate(entries):
        key = entry.partition(":")[0].strip("'\" ")
        if key in updates:
            comments = re.findall(r"(?m)^#.*\n", entry)
            entries[i] = yaml_dump({key: updates.pop(key)}, sort_keys=False) + "".join(comments)
    if updates:
        entries.append(yaml_dump(updates, sort_keys=False))
    merged = "".join(entries)
    try:
        faithful = yaml.safe_load(merged) == expected
    except yaml.YAMLError:
        faithful = False
    if not faithful:  # a spelling that cannot be cut at its top-level keys, such as {a: 1, b: 2}
        merged = yaml_dump(expected, sort_keys=False)
    return merged


def _cells(site: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the plan, safe inside a Markdown table."""
    texts = {key: str(site[key]) for key in ("class_name", "verdict", "reason")}
    texts["name"] = str(site["name"]) or "(the model itself)"
    return {key: text.replace("|", "\\|") for key, text in texts.items()}


def _auto_class(base_type: str, class_name: str | None) -> str:
    """The Auto class that loads `class_name`; `AutoModel` where none lists it."""
    mappings = {
        name: getattr(auto, "_model_mapping", None)
        for name, auto in vars(autos).items()
        if name.startswith("Auto")
    }
    found = [
        name
        for name, mapping in mappings.items()
        if _lists(getattr(mapping, "_model_mapping", {}), base_type, class_name)
    ]
    last = ("AutoModelForPreTraining", "AutoModelWithLMHead", "AutoModel")
    return min(found, key=lambda name: name in last, default="AutoModel")


def _task(base_type: str, class_name: str | None) -> str | None:
    """The Hub's name of what the class is for, as transformers knows it."""
    tasks: dict[str, Any] = TASK_MAPPING
    return next((t for t, names in tasks.items() if _lists(names, base_type, class_name)), None)


def _lists(names: Mapping[str, Any], base_type: str, class_name: str | None) -> bool:
    known = names.get(base_type, ())
    return class_name in ((known,) if isinstance(known, str) else known)
