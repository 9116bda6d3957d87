"""Model cards: README.md of a patched checkpoint, from its config and the JSON of a run.

The text is in `card_template.md`. A card that exists already is merged into: `card_merge.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ..errors import PatchError
from ..names import layer_pattern
from .autos import auto_class, task
from .card_merge import merge
from .card_results import METRICS, TASK, eval_results, texts
from .configs import MODEL_TYPE
from .folders import read_json
from .moving import write_file
from .per_layer import layers, of_layer
from .records import RECORD
from .runs import Run, read_run
from .valid import valid_record

TEMPLATE = Path(__file__).with_name("card_template.md")


def write_card(
    folder: Path,
    *,
    run: Path | None = None,
    arm: str | None = None,
    base_model: str | None = None,
    start: str | None = None,
    known_card: Path | None = None,
    tags: Sequence[str] = (),
) -> Path:
    """Write the card of the checkpoint in `folder`, or bring the one that is there up to date.

    Measured results are in the card only if `run` brings them: results of other weights do not
    survive a save.

    Args:
        folder: holds a `config.json` with a patch record.
        run: folder of a run of `finetune_clm.py` or `compare.py`, or its JSON.
        arm: which arm of a comparison; found by the checkpoint's record if not given.
        base_model: the Hub's name of the unpatched model; known to the run if it was loaded
            from the Hub.
        start: the name or path that the model was loaded from, which is `base_model` if it is a
            name on the Hub and the card there names no other.
        known_card: the card to bring up to date, if it is not the one in `folder`.
        tags: further tags for the metadata.

    Raises:
        PatchError: no config, no valid record, a run that does not belong to it, or a README.md
            that cannot be merged into.
    """
    folder = Path(folder)
    config = read_config(folder)
    found = None if run is None else read_run(run, arm, config[RECORD])
    base = base_model or (found and found.base_model) or _hub_name(start)
    if found is None and not (known_card or folder / "README.md").exists():
        return write_file(folder / "README.md", _new_text(json.dumps(config), base, tuple(tags)))
    card = _with_tags(make_card(config, found, base), tags)
    replace = ("base_model",) if base_model else ()
    return save_card(folder / "README.md", card, replace, known_card)


def save_card(
    path: Path, card: ModelCard, replace: Sequence[str] = (), known_card: Path | None = None
) -> Path:
    """Write `card` to `path`, whole or not at all, merged into the card that is known already.

    Args:
        replace: keys of the metadata that are written over what is there.
        known_card: the file to merge into; what is at `path` if not given.
    """
    known = known_card or path
    return write_file(path, merge(known, card, replace) if known.exists() else str(card))


@lru_cache(maxsize=8)
def _new_text(config: str, base_model: str | None, tags: tuple[str, ...]) -> str:
    """A card of which nothing is known but the config: the same at every save of a training."""
    return str(_with_tags(make_card(json.loads(config), None, base_model), tags))


def _with_tags(card: ModelCard, tags: Iterable[str]) -> ModelCard:
    card.data["tags"] = list(dict.fromkeys([*card.data["tags"], *tags]))
    return card


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a patched checkpoint."""
    path = folder / "config.json"
    if not path.is_file():
        raise PatchError(f"{folder} is not a checkpoint: it has no config.json")
    config = read_json(path)
    valid_record(config.get(RECORD), str(path))
    return config


def _hub_name(start: str | None) -> str | None:
    try:
        validate_repo_id(start or "")
    except HFValidationError:
        return None
    return None if Path(str(start)).exists() else start


def make_card(
    config: Mapping[str, Any] | None, run: Run | None, base_model: str | None = None
) -> ModelCard:
    """The whole card of a checkpoint with this config, of a run, or of both.

    A model that was trained after it was patched is a `finetune` of its base model. One that was
    only converted has no `base_model_relation`: none that the Hub knows (finetune, adapter, merge,
    quantized) is true of it.
    """
    facts: dict[str, Any] = {}
    if config:
        facts = _facts_of_config(config)
    elif run:
        facts = _facts_of_run(run)
    base_model = base_model or (run.base_model if run else None)
    relation = "finetune" if base_model and run and run.steps else None
    norm_tag = "rmsnorm" if facts["p"] == 1 else "prmsnorm"
    data = ModelCardData(
        base_model=base_model,
        base_model_relation=relation,
        library_name="transformers",
        pipeline_tag=task(facts["base_type"], facts["model_class"]) if config else TASK,
        tags=["hf_rmsnorm", norm_tag, *(["custom_code"] if facts["format"] == "own" else [])],
    )
    norm_name = "RMSNorm" if facts["p"] == 1 else f"pRMSNorm (p = {facts['p']:g})"
    changed = [site["class_name"] for site in facts["sites"] if site["verdict"] != "kept"]
    measured = {}
    if run:
        data["datasets"] = [run.data["dataset"]] if run.data.get("is_local") is False else None
        data["metrics"] = list(METRICS.values())
        data["model_name"] = f"{facts['base_type'] or 'language-model'}-{norm_tag}"
        data["eval_results"] = eval_results(run) or None
        measured = texts(run)
    text = _template().render(
        card_data=_Whole(data.to_yaml()),
        base_model=base_model,
        title=f"{facts['model_class'] or facts['base_type'] or 'Language model'} with {norm_name}",
        norm_name=norm_name,
        share=f"{100 * facts['p']:g}%",
        replaced=" and ".join(dict.fromkeys(changed)),
        changed=bool(changed),
        run=run,
        relation=relation,
        **facts,
        **measured,
    )
    return ModelCard(text)


@cache
def _template() -> jinja2.Template:
    """As in `ModelCard.from_template`, which would compile it for every card: most of the time."""
    return jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), finalize=_in_a_line)


class _Whole(str):
    """Text that a template takes over as it is."""


def _in_a_line(value: object) -> object:
    """Names and reasons come from elsewhere: no line break, comment or mark of ours in them."""
    if isinstance(value, _Whole) or not isinstance(value, str):
        return value
    line = " ".join(value.splitlines()) if value.strip() else value
    return line.replace("<!--", "&lt;!--").replace("-->", "--&gt;")


def _facts_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    record = config[RECORD]
    own = config.get("model_type") == MODEL_TYPE
    base_type = str(config["base_model_type"] if own else config.get("model_type"))
    model_class = next(iter(config.get("architectures") or ()), None)
    return {
        "format": "own" if own else "stock",
        "remote": bool(config.get("auto_map")),
        "known": base_type in CONFIG_MAPPING_NAMES,
        "base_type": base_type,
        "model_class": model_class,
        "auto": auto_class(base_type, model_class),
        **{key: record[key] for key in ("norm", "p", "strategy")},
        "sites": _rows(record["sites"]),
        "centers": ", ".join(f"the {c['side']} of `{c['name']}`" for c in record["centers"]),
        "widens": ", ".join(f"`{widen['name']}`" for widen in record["widens"]),
    }


def _facts_of_run(run: Run) -> dict[str, Any]:
    return {
        "format": None,
        "base_type": run.start.get("model_type"),
        "model_class": run.start.get("model_class"),
        **{key: run.arm[key] for key in ("norm", "strategy")},
        "p": run.arm["p"] or 1.0,
        "sites": _rows(run.sites),
    }


def _rows(sites: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Rows of the plan, safe inside a Markdown table; equal ones of numbered layers are one."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for site in sites:
        for layer in range(many := layers(site)):
            name = str(site["name"]) or "(the model itself)"
            if many > 1 and name.count("*") == 1:
                name = name.replace("*", str(layer))
            reason = str(of_layer(site, layer)["reason"])
            key = (layer_pattern(name), str(site["class_name"]), str(site["verdict"]), reason)
            groups.setdefault(key, []).append(name)
    keys = ("name", "class_name", "verdict", "reason")
    rows = [(k[0] if len(names) > 1 else names[0], *k[1:]) for k, names in groups.items()]
    return [{k: _in_a_cell(v, k) for k, v in zip(keys, r, strict=True)} for r in rows]


def _in_a_cell(text: str, key: str) -> str:
    text = text.replace("|", "\\|")
    return text.replace("`", "'") if key in ("name", "class_name") else text  # in quotes there
