"""Text to blocks, and the order in which training sees them."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from conftest import BLOCK, Assets
from harness import data
from harness.args import DataArguments
from harness.data import ShuffledOrder, TokenBlocks
from harness.errors import ScriptError


def load(assets: Assets, **arguments: Any) -> data.Data:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.tokenizer)
    arguments = {"cache_dir": str(assets.folder / "cache"), **arguments}
    return data.load_data(DataArguments(**arguments), tokenizer, BLOCK)


def as_jsonl(lines: list[str], path: Path) -> None:
    path.write_text("".join(json.dumps({"id": 7, "text": line}) + "\n" for line in lines))


def as_json(lines: list[str], path: Path) -> None:
    path.write_text(json.dumps([{"text": line} for line in lines]))


def as_csv(lines: list[str], path: Path) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([line] for line in lines)])


def as_parquet(lines: list[str], path: Path) -> None:
    datasets.Dataset.from_dict({"id": [7] * len(lines), "text": lines}).to_parquet(path)


def as_arrow(lines: list[str], path: Path) -> None:
    with datasets.arrow_writer.ArrowWriter(path=str(path)) as writer:
        for line in lines:
            writer.write({"text": line})
        writer.finalize()


def as_txt(lines: list[str], path: Path) -> None:
    path.write_text("".join(lines))


WRITERS = [as_txt, as_jsonl, as_json, as_csv, as_parquet, as_arrow]


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_of_file_gives_the_same_tokens(
    assets: Assets, tmp_path: Path, write: Callable[[list[str], Path], None]
) -> None:
    path = tmp_path / f"text.{write.__name__.removeprefix('as_')}"
    write(assets.text.read_text().splitlines(keepends=True), path)
    expected = load(assets, train_file=str(assets.text))
    assert load(assets, train_file=str(path)).fingerprint == expected.fingerprint


@pytest.mark.parametrize("ending", data.COMPRESSED)
@pytest.mark.parametrize("write", [as_txt, as_json, as_jsonl, as_csv])
def test_compressed_files_give_the_same_tokens(
    assets: Assets, tmp_path: Path, write: Callable[[list[str], Path], None], ending: str
) -> None:
    kind = write.__name__.removeprefix("as_")
    write(assets.text.read_text().splitlines(keepends=True), plain := tmp_path / f"text.{kind}")
    compress = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[ending].compress
    path = tmp_path / f"Text.{kind.upper()}{ending}"
    path.write_bytes(compress(plain.read_bytes()))
    data.check_arguments(DataArguments(train_file=str(path)))
    expected = load(assets, train_file=str(plain))
    assert load(assets, train_file=str(path)).fingerprint == expected.fingerprint


@pytest.mark.parametrize("kind", ["txt.gz", "json", "jsonl.xz", "parquet", "arrow"])
def test_a_file_that_is_not_what_its_name_says(assets: Assets, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"text.{kind}"
    path.write_bytes(b"\x00\xff{ this is nothing of the kind" * 9)
    with pytest.raises(ScriptError, match=f"cannot read .*text.{kind} as"):
        load(assets, train_file=str(path))


@pytest.mark.parametrize("name", ["a.docx", "a.gz", "a.txt.zip", "a", "a.csv.7z", "a.gz.txt.gz.gz"])
def test_other_kinds_of_files_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("text")
    with pytest.raises(ScriptError, match=r"unknown kind of file .*known: .txt.*\.parquet.*\.gz"):
        data.check_arguments(DataArguments(train_file=str(path)))


def test_blocks_are_the_tokens_of_the_text_in_order(assets: Assets) -> None:
    from transformers import AutoTokenizer

    blocks = load(assets, train_file=str(assets.text), validation_split_percentage=10)
    tokenizer = AutoTokenizer.from_pretrained(assets.tokenizer)
    tokens = [
        token
        for line in assets.text.read_text().splitlines(keepends=True)
        for token in tokenizer(line)["input_ids"]
    ]
    whole = np.concatenate([blocks.train.blocks, blocks.validation.blocks])
    assert whole.ravel().tolist() == tokens[: whole.size]
    assert len(tokens) - whole.size < BLOCK, "only the tail that fills no block is lost"
    assert len(blocks.validation) == round(len(whole) * 0.1)


def test_validation_file_is_used(assets: Assets, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("a norm of a sum of what every layer reads. " * 20)
    blocks = load(assets, train_file=str(assets.text), validation_file=str(other))
    alone = load(assets, train_file=str(other), validation_split_percentage=50)
    assert len(blocks.train) > len(blocks.validation) == len(alone.train) + len(alone.validation)


def test_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    order, same, other = ShuffledOrder(50, 3), ShuffledOrder(50, 3), ShuffledOrder(50, 4)
    first = list(order)
    assert sorted(first) == list(range(50))
    assert list(same) == first == list(order)
    assert list(other) != first
    order.seek(1)
    assert list(order) != first
    order.seek(0, start=20)
    assert list(order) == first[20:]


def test_fingerprint_sees_tokens_cut_and_split() -> None:
    tokens = np.arange(64, dtype=np.int32)
    blocks = TokenBlocks(tokens, 8)

    def fingerprint(blocks: TokenBlocks, held_out: int) -> str:
        return data.Data(blocks.take(0, -held_out), blocks.take(-held_out, None)).fingerprint

    changed = tokens.copy()
    changed[5] = 99
    seen = {
        fingerprint(blocks, 1),
        fingerprint(blocks, 2),
        fingerprint(TokenBlocks(tokens, 4), 1),
        fingerprint(TokenBlocks(changed, 8), 1),
    }
    assert len(seen) == 4
    assert fingerprint(TokenBlocks(tokens, 8), 1) in seen
