"""Config, tokenizer and model, from a checkpoint or from scratch, with checks a user can read."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_rmsnorm  # also lets the Auto classes load patched checkpoints
from harness.args import ModelArguments, PatchArguments
from harness.arms import Arm
from harness.data import Data
from harness.errors import ScriptError

MAX_DEFAULT_BLOCK_SIZE = 1024


def check_arguments(args: ModelArguments) -> None:
    """What can be refused before anything is loaded."""
    if args.model_name_or_path and (args.config_name or args.config_overrides):
        raise ScriptError(
            "--model_name_or_path continues from trained weights, --config_name and "
            "--config_overrides start from scratch: give one or the other"
        )
    if not args.model_name_or_path and not args.config_name:
        raise ScriptError("no model: give --model_name_or_path, or --config_name to train anew")
    if args.config_name and not args.tokenizer_name:
        raise ScriptError("--config_name needs --tokenizer_name: a new model has no tokenizer")
    for name in ("model_name_or_path", "config_name"):
        value = getattr(args, name)
        if value and value not in CONFIG_MAPPING:
            _check_folder(name, value)


def _check_folder(name: str, value: str) -> None:
    folder = Path(value)
    if folder.is_dir() and not (folder / "config.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ScriptError(
            f"--{name} {value} is a folder but no checkpoint: it has no config.json, only {found}"
        )
    if folder.is_file():
        raise ScriptError(f"--{name} {value} is a file; give the folder that save_pretrained wrote")
    if not folder.exists() and (
        folder.is_absolute() or value.startswith(".") or len(folder.parts) > 2
    ):
        raise ScriptError(f"--{name} {value} does not exist")


def load_tokenizer(args: ModelArguments) -> Any:
    """The tokenizer of `--tokenizer_name`, or else of the model."""
    name = args.tokenizer_name or args.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, use_fast=not args.use_slow_tokenizer, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ScriptError(f"no tokenizer in {name}: {_first_line(error)}") from error
    if tokenizer.vocab_size == 0:  # what transformers makes of a folder with a config alone
        raise ScriptError(f"no tokenizer in {name}: no vocabulary; see --tokenizer_name")
    return tokenizer


def load_config(args: ModelArguments, tokenizer: Any) -> Any:
    """The model's config; from scratch, sized for the tokenizer and with the overrides."""
    name = str(args.model_name_or_path or args.config_name)
    try:
        if args.config_name and args.config_name in CONFIG_MAPPING:
            config = CONFIG_MAPPING[args.config_name]()
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ScriptError(f"no model config in {name}: {_first_line(error)}") from error
    if args.config_name:
        config.vocab_size = len(tokenizer)
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, token, getattr(tokenizer, token))
        if args.config_overrides:
            try:
                config.update_from_string(args.config_overrides)
            except (ValueError, KeyError) as error:
                raise ScriptError(
                    f"--config_overrides {args.config_overrides}: {_first_line(error)}; "
                    "it is written name=value,name=value with names of the config"
                ) from error
    return config


def load_model(args: ModelArguments, config: Any, tokenizer: Any, seed: int) -> Any:
    """The unpatched model: trained weights, or new ones that depend on `seed` alone."""
    dtype = getattr(torch, args.dtype)
    if args.config_name:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=args.trust_remote_code
        )
    name = str(args.model_name_or_path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            trust_remote_code=args.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ScriptError(f"no causal language model in {name}: {_first_line(error)}") from error
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        warnings.warn(
            f"the tokenizer has {len(tokenizer)} tokens, the model {rows}: embeddings resized",
            stacklevel=2,
        )
        model.resize_token_embeddings(len(tokenizer))
    return model


def resolve_block_size(asked: int | None, config: Any, tokenizer: Any) -> int:
    """Tokens per sequence: what was asked, checked, or else the model's maximum up to 1024."""
    limit = getattr(config, "max_position_embeddings", None)
    if asked is None:
        known = [n for n in (limit, tokenizer.model_max_length) if n]
        return min([*known, MAX_DEFAULT_BLOCK_SIZE])
    if asked < 2:
        raise ScriptError(f"--block_size {asked} leaves no token to predict; give 2 or more")
    if limit is not None and asked > limit:
        raise ScriptError(
            f"--block_size {asked} is over the model's maximum of {limit} positions; "
            f"give {limit} or less"
        )
    return asked


def fingerprint(model: nn.Module) -> str:
    """The same for the same weights, wherever they were loaded from."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def patch_options(arm: Arm, args: PatchArguments, data: Data) -> dict[str, Any]:
    """What `Arm.apply` needs: the globs given, and real text to probe the model with."""
    options: dict[str, Any] = {
        name: value for name, value in vars(args).items() if value is not None
    }
    if arm.patched and arm.strategy != "direct":
        blocks = [data.train[i % len(data.train)]["input_ids"] for i in range(2)]
        options["inputs"] = {"input_ids": torch.stack(blocks)}
    return options


def describe_start(args: ModelArguments, model: Any) -> dict[str, Any]:
    """What a run starts from, for its card. Local folders are named without their path."""
    name = args.model_name_or_path
    is_local = None if name is None else Path(name).exists()
    return {
        "name": Path(name).name if name and is_local else name,
        "is_local": is_local,
        "config_name": args.config_name,
        "config_overrides": args.config_overrides,
        "model_class": type(model).__name__,
        "model_type": model.config.model_type,
    }


def describe_patch(model: nn.Module, arm: Arm) -> dict[str, Any] | None:
    """The patch report as plain data; None for arms that patch nothing."""
    if not arm.patched:
        return None
    report = hf_rmsnorm.patch_report(model)
    sites = [
        {key: getattr(site, key) for key in ("name", "class_name", "verdict", "reason")}
        for site in report.sites
    ]
    counts = Counter(site["verdict"] for site in sites)
    return {"counts": dict(counts), "sites": sites, "text": str(report)}


def save_model(accelerator: Accelerator, model: nn.Module, arm: Arm, folder: Path) -> None:
    """`save_pretrained`, so that the folder loads what was trained.

    No class could load the `none` and `l2norm` baselines, and a config beside their weights would
    silently load LayerNorm: they are kept as a bare state dict.
    """
    state = accelerator.get_state_dict(model)
    if arm.from_scratch_only:
        folder.mkdir(parents=True, exist_ok=True)
        accelerator.save(
            state, folder / f"baseline-{arm.slug}.safetensors", safe_serialization=True
        )
        return
    unwrapped: Any = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(folder, is_main_process=accelerator.is_main_process, state_dict=state)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
