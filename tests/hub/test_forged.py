"""Patch records that were changed, with a digest that fits: refused, or loaded whole."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.mutating import mutated
from model_zoo import build, inputs_for
from tiny_models import config_of, gpt2
from torch import nn

import hf_rmsnorm
from hf_rmsnorm import PatchError, apply_plan, patch_model, plan_patch
from hf_rmsnorm.hub import modeling
from hf_rmsnorm.hub.cards import write_card
from hf_rmsnorm.hub.records import digest

NAN = float("nan")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    found = {kind: folder / kind for kind in ("own", "stock", "wide")}
    patch_model(gpt2(), "prmsnorm", p=0.25, strategy="direct").save_pretrained(found["own"])
    patch_model(gpt2()).save_pretrained(found["stock"])
    bert: Any = build("bert")
    apply_plan(bert, plan_patch(bert, inputs=inputs_for("bert", bert), post_norm="extra_neuron"))
    bert.save_pretrained(found["wide"])
    return found


def forge(config: dict[str, Any], record: Any) -> dict[str, Any]:
    if isinstance(record, dict):
        rest = {key: value for key, value in record.items() if key != "digest"}
        record = {**rest, "digest": digest(rest)}
    return {**config, "hf_rmsnorm": record}


def with_row(record: dict[str, Any], part: str, **changes: Any) -> dict[str, Any]:
    return {**record, part: [{**record[part][0], **changes}, *record[part][1:]]}


NONSENSE: dict[str, tuple[str, Any, str]] = {
    "norm": ("own", lambda r: {**r, "norm": "banana"}, "norm is 'banana'"),
    "version": ("own", lambda r: {**r, "version": -3}, "has version -3"),
    "a truth": ("own", lambda r: {**r, "version": True}, "has version True"),
    "p": ("own", lambda r: {**r, "p": 7}, "p is 7"),
    "sites": ("own", lambda r: {**r, "sites": {}}, "sites is {}"),
    "site": ("own", lambda r: {**r, "sites": [7]}, r"sites\[0\] must say true or false as base"),
    "verdict": ("own", lambda r: with_row(r, "sites", verdict="x"), r"sites\[0\].verdict is 'x'"),
    "name": ("own", lambda r: with_row(r, "sites", name=7), r"sites\[0\].name is 7"),
    "other": ("own", lambda r: with_row(r, "sites", name="h.9.ln"), "do not belong together"),
    "center": (
        "stock",
        lambda r: with_row(r, "centers", side="top"),
        r"\[0\].side is 'top'",
    ),
    "fold": ("stock", lambda r: with_row(r, "folds", axis=-1), r"\[0\].axis is -1"),
    "size": ("stock", lambda r: with_row(r, "folds", size=23), "no multiple of 23"),
    "gains": ("stock", lambda r: {**r, "gains": NAN}, r"\[0\] is nan"),
    "no gains": ("stock", lambda r: {k: v for k, v in r.items() if k != "gains"}, "is None"),
    "axis": ("wide", lambda r: with_row(r, "widens", up_axis=9), "2 axes, not an axis 9"),
    "down": ("wide", lambda r: with_row(r, "widens", down="nope"), "it has no tensor"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_each_field_of_a_record_is_checked(
    folders: dict[str, Path], tmp_path: Path, case: str
) -> None:
    kind, change, message = NONSENSE[case]
    folder = linked(folders[kind], tmp_path)
    config = config_of(folders[kind])
    (folder / "config.json").write_text(json.dumps(forge(config, change(config["hf_rmsnorm"]))))
    with pytest.raises(PatchError, match=message) as raised:
        hf_rmsnorm.from_pretrained(folder)
    assert str(folder / "config.json") in str(raised.value)


def linked(folder: Path, place: Path) -> Path:
    """A folder with the same files, and a config of its own."""
    for path in folder.iterdir():
        if path.name != "config.json":
            (place / path.name).symlink_to(path)
    return place


@pytest.mark.parametrize("kind", ["own", "stock", "wide"])
def test_forged_records_are_refused_or_loaded_whole(
    folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder, config = linked(folders[kind], tmp_path), config_of(folders[kind])
    (folder / "README.md").unlink()
    refused = 0
    for seed in range(40):
        record = {k: v for k, v in config["hf_rmsnorm"].items() if k != "digest"}
        text = json.dumps(forge(config, mutated(record, seed)))
        (folder / "config.json").write_text(text)
        try:
            _, info = hf_rmsnorm.from_pretrained(folder, output_loading_info=True)
            assert not info["missing_keys"]
            write_card(folder)
        except PatchError:
            refused += 1
    assert refused > 15


@pytest.fixture
def stranger() -> Iterator[Any]:
    """The modeling file, as `trust_remote_code=True` runs it."""
    module = types.ModuleType("modeling_of_a_stranger")
    sys.modules[module.__name__] = module
    exec(compile(modeling.source(), modeling.FILE, "exec"), module.__dict__)
    yield module
    del sys.modules[module.__name__]


@pytest.mark.parametrize("kind", ["own", "wide"])
def test_readers_without_the_package_get_typed_errors_too(
    folders: dict[str, Path], stranger: Any, kind: str
) -> None:
    config = config_of(folders[kind])
    assert "pydantic" not in modeling.source() and "read_fields" not in modeling.source()
    refused = 0
    for seed in range(60):
        record = mutated({k: v for k, v in config["hf_rmsnorm"].items() if k != "digest"}, seed)
        data = json.loads(json.dumps({**forge(config, record), "_name_or_path": "here"}))
        with torch.device("meta"):
            try:
                read = stranger.RMSNormAutoConfig.from_dict(data)
                found: nn.Module = getattr(stranger, config["architectures"][0])(read)
                assert len(list(found.parameters())) > 10
            except stranger.PatchError as error:
                assert "record" in str(error)
                refused += 1
    assert refused > 10
