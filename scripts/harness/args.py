"""Command-line flags, as dataclasses. Names follow Transformers' `run_clm_no_trainer.py`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

from transformers import HfArgumentParser

from harness.arms import NORMS, STRATEGIES
from harness.errors import ScriptError


def flag(help: str, default: Any = MISSING, **metadata: Any) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: default, metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str | None = flag("checkpoint folder or hub name to start from", None)
    config_name: str | None = flag(
        "train from scratch: a config's folder or hub name, or a model type such as gpt2", None
    )
    config_overrides: str | None = flag(
        "train from scratch with these config values: n_layer=2,n_embd=64", None
    )
    tokenizer_name: str | None = flag("tokenizer, if not --model_name_or_path's own", None)
    use_slow_tokenizer: bool = flag("use the tokenizer not backed by tokenizers", False)
    dtype: str = flag(
        "dtype of the weights; mixed precision wants float32 weights",
        "float32",
        choices=["float32", "bfloat16", "float16"],
    )
    trust_remote_code: bool = flag("allow models that bring their own code", False)


@dataclass(frozen=True)
class PatchArguments:
    _argument_group_name = "patch"

    include: list[str] | None = field(
        default=None, metadata={"help": "patch only norms whose names match these globs"}
    )
    exclude: list[str] | None = field(
        default=None, metadata={"help": "leave norms whose names match these globs"}
    )


@dataclass(frozen=True)
class NormArguments:
    _argument_group_name = "norm"

    norm: str = flag(
        "; ".join(f"{name}: {norm.summary}" for name, norm in NORMS.items())
        + " (none and l2norm only from scratch)",
        "layernorm",
        choices=list(NORMS),
    )
    p: float | None = flag(
        "prmsnorm: share of features that the statistic reads, in (0, 1]; 0.0625 if not given", None
    )
    strategy: str | None = flag(
        "auto: exact where possible, approximate elsewhere; exact: only exact sites; "
        "direct: the paper's drop-in, no weight touched. auto if not given",
        None,
        choices=list(STRATEGIES),
    )


@dataclass(frozen=True)
class DataArguments:
    _argument_group_name = "data"

    dataset_name: str | None = flag("dataset to load with the datasets library", None)
    dataset_config_name: str | None = flag("configuration of that dataset", None)
    train_file: str | None = flag(
        "training text: .txt, .json, .jsonl, .csv, .parquet, .arrow; also as .gz, .bz2, .xz",
        None,
    )
    validation_file: str | None = flag("validation text, same kinds of file", None)
    validation_split_percentage: float = flag(
        "share of the training blocks kept for validation where there is no validation split", 5.0
    )
    text_column_name: str | None = flag(
        "column that holds the text; 'text', or else the first one, if not given", None
    )
    block_size: int | None = flag(
        "tokens per sequence; the model's maximum, at most 1024, if not given", None
    )
    max_train_samples: int | None = flag("use only so many training blocks", None)
    max_eval_samples: int | None = flag("use only so many validation blocks", None)
    preprocessing_num_workers: int | None = flag("processes for tokenisation", None)
    overwrite_cache: bool = flag("tokenise again even if a cached result exists", False)
    cache_dir: str | None = flag("where datasets keeps its cache; its own place if not given", None)


@dataclass(frozen=True)
class TrainArguments:
    _argument_group_name = "training"

    per_device_train_batch_size: int = flag("sequences per process and forward pass", 8)
    per_device_eval_batch_size: int = flag("the same for evaluation", 8)
    gradient_accumulation_steps: int = flag("forward passes per optimizer step", 1)
    num_train_epochs: int = flag("passes over the training blocks", 3)
    max_train_steps: int | None = flag("optimizer steps; overrides --num_train_epochs", None)
    learning_rate: float = flag("peak learning rate of AdamW", 5e-5)
    weight_decay: float = flag("on every weight but norms and biases", 0.0)
    max_grad_norm: float = flag("clip the gradient's norm to this; 0: do not clip", 1.0)
    lr_scheduler_type: str = flag(
        "learning rate schedule",
        "linear",
        choices=["linear", "cosine", "constant", "constant_with_warmup"],
    )
    num_warmup_steps: int = flag("optimizer steps of warm-up", 0)
    eval_steps: int | None = flag("evaluate every so many steps; each epoch if not given", None)
    logging_steps: int = flag("log every so many steps", 1)
    mixed_precision: str | None = flag(
        "autocast policy; what accelerate's config says if not given",
        None,
        choices=["no", "fp16", "bf16"],
    )
    torch_compile: bool = flag("compile the model with Inductor", False)
    cpu: bool = flag("use the CPU even where there is a GPU", False)

    def __post_init__(self) -> None:
        for name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_train_steps",
            "eval_steps",
            "logging_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ScriptError(f"--{name} is {value}; it must be at least 1")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "num_warmup_steps"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ScriptError(f"--{name} is {value}; it must be a number of at least 0")


def parse(
    groups: Sequence[Any], argv: Sequence[str] | None, description: str | None
) -> tuple[Any, ...]:
    """One instance of each dataclass in `groups`, read from `argv` (`sys.argv[1:]` if None)."""
    title, _, examples = (description or "").partition("\n\n")
    parser = HfArgumentParser(
        list(groups),
        description=title,
        epilog=examples,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    *parsed, unknown = parser.parse_args_into_dataclasses(
        args=argv, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(parsed)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind every flag that has one, examples as they were written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)
