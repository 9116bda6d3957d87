"""What a run of `finetune_clm.py` or `compare.py` measured, read from the JSON it left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PatchError

FILES = {"all_results.json": "finetune_clm.py", "results.json": "compare.py"}
ENVIRONMENT = {
    "date",
    "command",
    "device",
    "num_processes",
    "threads",
    "mixed_precision",
    "versions",
    "git",
}
CONTROL = "layernorm"
QUALITIES = {"loss": ".4f", "perplexity": ".2f", "token_accuracy": ".4f"}
NOT_MEASURED = "not measured"

Spread = Mapping[str, float]  # median, min, max


@dataclass(frozen=True)
class Result:
    """Quality of one arm. A moment that is missing was not measured, a spread of None diverged."""

    arm: Mapping[str, Any]
    sites: Mapping[str, int] | None
    moments: Mapping[str, Mapping[str, Spread | None]]
    difference: Spread | str | None = NOT_MEASURED  # of the loss after training to the control's

    @property
    def is_control(self) -> bool:
        return self.arm["norm"] == CONTROL

    @property
    def label(self) -> str:
        return f"{self.arm['name']} (unpatched)" if self.is_control else str(self.arm["name"])

    @property
    def sites_text(self) -> str:
        if self.sites is None:
            return "not patched"
        return ", ".join(f"{count} {verdict}" for verdict, count in self.sites.items())

    @property
    def difference_text(self) -> str:
        if self.is_control:
            return ""
        known = self.difference
        return known if isinstance(known, str) else spread_text(known, "+.4f")

    def cell(self, moment: str, quality: str) -> str:
        values = self.moments.get(moment)
        return NOT_MEASURED if values is None else spread_text(values[quality], QUALITIES[quality])


@dataclass(frozen=True)
class Run:
    """One arm of a run, and what it is compared with.

    Attributes:
        script: what ran.
        arm: `name`, `norm`, `strategy` and `p` of the arm that a card is about.
        steps: optimizer steps of the training after patching.
        results: quality of every arm, this one among them.
        speeds: by mode (`training`, `inference`) and arm; without `speed_ratio` where nothing
            was timed beside it.
        sites: name, class_name, verdict and reason of every norm site of this arm.
        environment: when, where and with what it ran, as `harness/results.py` writes it.
        start: what training began from, as far as it is known: `name`, `is_local`,
            `config_name`, `config_overrides`, `model_class`, `model_type`.
        data: the text, as far as it is known: `dataset`, `config`, `is_local`, `files`,
            `fingerprint`, `block_size`, `validation_blocks`.
        seeds: of the data's order and dropout.
    """

    script: str
    arm: Mapping[str, Any]
    steps: int
    results: tuple[Result, ...]
    speeds: Mapping[str, Mapping[str, Any]]
    sites: tuple[Mapping[str, Any], ...]
    environment: Mapping[str, Any]
    start: Mapping[str, Any]
    data: Mapping[str, Any]
    seeds: tuple[int, ...]

    @property
    def base_model(self) -> str | None:
        """The Hub's name of the model that it started from, if that is where it came from."""
        return self.start.get("name") if self.start.get("is_local") is False else None


def read_run(path: Path, arm: str | None = None, record: Mapping[str, Any] | None = None) -> Run:
    """The run whose JSON `path` is, or whose folder.

    Args:
        path: `all_results.json` or `results.json`, or the folder that holds one of them.
        arm: which arm of a comparison, by its name.
        record: patch record of the checkpoint that the card is for; it finds the arm, too.

    Raises:
        PatchError: no such file, not what the scripts write, or no (single) such arm.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise PatchError(f"{path} is not the folder of a run: it has no {' or '.join(FILES)}")
        path = found[0]
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if lacking := ENVIRONMENT - data["environment"].keys():
            raise KeyError(*sorted(lacking))
        arms = data["arms"] if "arms" in data else [data["arm"]]
        chosen = _choose(arms, arm, record, path)
        return _compared(data, chosen) if "arms" in data else _finetuned(data, chosen)
    except FileNotFoundError:
        raise PatchError(f"there is no {path}") from None
    except PatchError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise PatchError(
            f"{path} is not what {' or '.join(FILES.values())} writes: {error!r}"
        ) from None


def spread_text(values: Spread | None, form: str) -> str:
    """`median [min, max]`, or one number where all are the same to the digits shown."""
    if values is None:
        return "diverged"
    texts = [format(values[key], form) for key in ("median", "min", "max")]
    return texts[0] if len(set(texts)) == 1 else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _choose(
    arms: list[dict[str, Any]], name: str | None, record: Mapping[str, Any] | None, path: Path
) -> dict[str, Any]:
    patched = [arm for arm in arms if arm["strategy"] is not None]
    if name is not None:
        fitting = [arm for arm in arms if arm["name"] == name]
    elif record is not None and patched:
        asked = (record["norm"], record["strategy"], record["p"])
        fitting = [a for a in patched if (a["norm"], a["strategy"], a["p"] or 1.0) == asked]
    else:
        fitting = patched or arms
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(arm["name"] for arm in arms)
    if name is not None:
        raise PatchError(f"{path} has no arm {name!r}; it has {known}")
    if record is not None:
        raise PatchError(
            f"the checkpoint was made with norm {record['norm']}, strategy {record['strategy']}, "
            f"p {record['p']:g}, which is no arm of {path} ({known}): they do not belong together"
        )
    raise PatchError(f"{path} has several arms ({known}): say which one the card is about")


def _compared(data: Mapping[str, Any], arm: Mapping[str, Any]) -> Run:
    arms = {each["name"]: each for each in data["arms"]}
    results = tuple(
        Result(
            arms[row["arm"]],
            row["sites"],
            {
                moment: {quality: row[f"{quality}_{moment}"] for quality in QUALITIES}
                for moment in ("before", "after")
            },
            row["loss_difference"],
        )
        for row in data["quality"]
    )
    first = next(run for run in data["runs"] if run["arm"]["name"] == arm["name"])
    timed = data["throughput"] or {}
    modes = dict.fromkeys(mode for speeds in timed.values() for mode in speeds)
    settings = data["settings"]
    model, known = settings["model"], ("block_size", "validation_blocks")
    return Run(
        "compare.py",
        arm,
        first["steps"],
        results,
        {mode: {name: speeds[mode] for name, speeds in timed.items()} for mode in modes},
        tuple((first["patch"] or {}).get("sites", ())),
        data["environment"],
        {
            "name": model["model_name_or_path"],
            **{key: model[key] for key in ("config_name", "config_overrides")},
            **data.get("start", {}),
        },
        {
            "fingerprint": settings["data"],
            **{key: settings[key] for key in known},
            **data.get("data", {}),
        },
        tuple(sorted({run["seed"] for run in data["runs"]})),
    )


def _finetuned(data: Mapping[str, Any], arm: Mapping[str, Any]) -> Run:
    def single(values: Mapping[str, Any]) -> dict[str, Spread | None]:
        known = {quality: values[quality] for quality in QUALITIES}
        return {
            quality: None if value is None else dict.fromkeys(("median", "min", "max"), value)
            for quality, value in known.items()
        }

    evaluations = data["evaluations"]
    moments = {"before": single(evaluations[0]), "after": single(evaluations[-1])}
    patch = data["patch"] or {}
    results = [Result(arm, patch.get("counts"), moments)]
    if data.get("eval_unpatched"):
        control = {"name": CONTROL, "norm": CONTROL, "strategy": None, "p": None}
        results.insert(0, Result(control, None, {"before": single(data["eval_unpatched"])}))
    timing = data["timing"]
    memory = {"peak_memory_bytes": data["peak_memory_bytes"]}
    speeds = {} if timing is None else {"training": {arm["name"]: {**timing, **memory}}}
    return Run(
        "finetune_clm.py",
        arm,
        data["steps"],
        tuple(results),
        speeds,
        tuple(patch.get("sites", ())),
        data["environment"],
        data.get("start", {}),
        data.get("data", {}),
        (data["seed"],) if "seed" in data else (),
    )
