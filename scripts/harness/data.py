"""Text to blocks of tokens: loading, tokenising, packing, splitting, and the order of training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from harness.args import DataArguments
from harness.errors import ScriptError

BUILDERS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSED = (".gz", ".bz2", ".xz")


class TokenBlocks(Dataset):
    """Tokens cut into sequences of `block_size`; `labels` are `input_ids`, as models expect."""

    def __init__(self, tokens: np.ndarray, block_size: int) -> None:
        self.blocks = tokens[: len(tokens) // block_size * block_size].reshape(-1, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        block = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {"input_ids": block, "labels": block}

    def take(self, start: int, stop: int | None) -> TokenBlocks:
        """The blocks from `start` to `stop`."""
        part = TokenBlocks.__new__(TokenBlocks)
        part.blocks = self.blocks[start:stop]
        return part


@dataclass(frozen=True)
class Data:
    """Training and validation blocks."""

    train: TokenBlocks
    validation: TokenBlocks

    @property
    def block_size(self) -> int:
        return self.train.blocks.shape[1]

    @property
    def fingerprint(self) -> str:
        """The same for the same tokens, cut in the same way, split in the same way."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            digest.update(f"{part.blocks.shape}".encode())
            digest.update(np.ascontiguousarray(part.blocks).data)
        return digest.hexdigest()[:16]


def describe(args: DataArguments, blocks: Data) -> dict[str, Any]:
    """The text of a run, for its card. Local files are named without their path."""
    name = args.dataset_name
    is_local = name is None or Path(name).exists()
    files = (args.train_file, args.validation_file)
    return {
        "dataset": Path(name).name if name and is_local else name,
        "config": args.dataset_config_name,
        "is_local": is_local,
        "files": [Path(file).name for file in files if file],
        "fingerprint": blocks.fingerprint,
        "block_size": blocks.block_size,
        "training_blocks": len(blocks.train),
        "validation_blocks": len(blocks.validation),
    }


class ShuffledOrder(Sampler[int]):
    """Every block once per epoch, in an order that depends on seed and epoch alone.

    `seek` says where the next iteration starts, so that a resumed run goes on in mid-epoch.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch, self.start = length, seed, 0, 0

    def seek(self, epoch: int, start: int = 0) -> None:
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist()[self.start :])


def train_loader(data: Data, batch_size: int, order: ShuffledOrder) -> DataLoader:
    """Full batches only, so that N processes see the batches that one process with N times the
    batch size would see."""
    return DataLoader(data.train, batch_size=batch_size, sampler=order, drop_last=True)


def eval_loader(data: Data, batch_size: int) -> DataLoader:
    """The validation blocks in order."""
    return DataLoader(data.validation, batch_size=batch_size)


def check_arguments(args: DataArguments) -> None:
    """What can be refused before anything is loaded."""
    if (args.dataset_name is None) == (args.train_file is None):
        found = "both" if args.dataset_name else "neither"
        raise ScriptError(f"give --dataset_name or --train_file, one of them; found {found}")
    if args.dataset_name and args.validation_file:
        raise ScriptError("--validation_file goes with --train_file, not with --dataset_name")
    for name in ("train_file", "validation_file"):
        if (value := getattr(args, name)) is not None:
            _check_file(name, Path(value))
    if not 0 < args.validation_split_percentage < 100:
        raise ScriptError(
            f"--validation_split_percentage is {args.validation_split_percentage:g}; "
            "it must lie between 0 and 100"
        )


def _check_file(name: str, path: Path) -> None:
    if not path.is_file():
        raise ScriptError(
            f"--{name} {path} " + ("is a folder" if path.is_dir() else "does not exist")
        )
    if _builder(path) is None:
        raise ScriptError(
            f"--{name} {path}: unknown kind of file {path.suffix!r}; known: {', '.join(BUILDERS)}, "
            f"also compressed as {', '.join(COMPRESSED)}"
        )
    if path.stat().st_size == 0:
        raise ScriptError(f"--{name} {path} is empty")


def _builder(path: Path) -> str | None:
    """The reader for a file, by its name; None for a kind that is not known."""
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return BUILDERS.get(plain.suffix.lower())


def load_data(args: DataArguments, tokenizer: Any, block_size: int) -> Data:
    """Training and validation blocks. The tokens of all texts are packed one after the other."""
    raw = _load_text(args)
    train = _pack(raw["train"], args, tokenizer, block_size, args.train_file or args.dataset_name)
    if "validation" in raw:
        source = args.validation_file or args.dataset_name
        validation = _pack(raw["validation"], args, tokenizer, block_size, source)
    else:
        held_out = max(1, round(len(train) * args.validation_split_percentage / 100))
        if held_out >= len(train):
            raise ScriptError(
                f"{args.train_file or args.dataset_name} gives {len(train)} block(s) of "
                f"{block_size} tokens: too few to keep some for validation; give a "
                "--validation_file, more text or a smaller --block_size"
            )
        train, validation = train.take(0, -held_out), train.take(-held_out + len(train), None)
    return Data(train.take(0, args.max_train_samples), validation.take(0, args.max_eval_samples))


def _load_text(args: DataArguments) -> Any:
    if args.dataset_name is not None:
        try:
            raw = datasets.load_dataset(
                args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ScriptError(f"cannot load dataset {args.dataset_name}: {reason}") from error
        if "train" not in raw:
            raise ScriptError(f"{args.dataset_name} has no 'train' split, only {', '.join(raw)}")
        return raw
    raw = {}
    for split, name in (("train", args.train_file), ("validation", args.validation_file)):
        if name is None:
            continue
        builder = _builder(Path(name))
        options = {"keep_linebreaks": True} if builder == "text" else {}
        try:
            raw[split] = datasets.load_dataset(
                builder, data_files=name, split="train", cache_dir=args.cache_dir, **options
            )
        except Exception as error:  # every format has errors of its own
            reason = str(error.__cause__ or error).strip().split("\n")[0]
            raise ScriptError(f"cannot read {name} as {builder}: {reason}") from error
    return raw


def _pack(
    texts: Any, args: DataArguments, tokenizer: Any, block_size: int, source: str | None
) -> TokenBlocks:
    columns = texts.column_names
    column = args.text_column_name or ("text" if "text" in columns else columns[0])
    if column not in columns:
        raise ScriptError(f"{source} has no column {column!r}; its columns: {', '.join(columns)}")
    if getattr(texts.features[column], "dtype", None) not in ("string", "large_string"):
        raise ScriptError(
            f"column {column!r} of {source} does not hold text; see --text_column_name"
        )
    tokenized = texts.map(
        lambda batch: {
            "input_ids": tokenizer(
                [text or "" for text in batch[column]],
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
        },
        batched=True,
        num_proc=args.preprocessing_num_workers,
        remove_columns=columns,
        load_from_cache_file=not args.overwrite_cache,
        desc=f"tokenising {Path(str(source)).name}",
    )
    chunks = tokenized.data.column("input_ids").chunks
    parts = (chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks)
    tokens = np.concatenate([np.zeros(0, np.int32), *parts])
    if len(tokens) < block_size:
        raise ScriptError(
            f"{source} has {len(tokens)} tokens, fewer than one block of {block_size}; "
            "give more text or a smaller --block_size"
        )
    return TokenBlocks(tokens.astype(np.int32), block_size)
