"""`hf-rmsnorm`: inspect, patch, verify, describe and upload checkpoints from the command line."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import ops
from .cli_options import parser
from .errors import PatchError, VerificationError
from .patching import patch_model, patch_report
from .patching.config import PatchConfig, resolve_inputs
from .patching.decide import plan_patch
from .probing import relative_change, run_outputs

logger = logging.getLogger(__name__)

PLAN_FILE = "hf_rmsnorm_plan.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 (verify: they differ) or 2 (an error)."""
    arguments = parser(COMMANDS).parse_args(argv)
    try:
        with warnings.catch_warnings(), _telling(getattr(arguments, "quiet", True)):
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _show_warning
            status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141  # as of tools that SIGPIPE ends
    except ModuleNotFoundError as error:
        advice = 'pip install "hf_rmsnorm[hub]"' if error.name == "transformers" else ""
        print(f"hf-rmsnorm {arguments.command}: {error}. {advice}".rstrip(". "), file=sys.stderr)
        return 2
    except (PatchError, VerificationError, OSError, ValueError, ImportError) as error:
        print(f"hf-rmsnorm {arguments.command}: {error}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _telling(quiet: bool) -> Iterator[None]:
    """What the package logs of its progress, on stderr, with the seconds since the start."""
    logger, start = logging.getLogger("hf_rmsnorm"), time.perf_counter()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seconds = time.perf_counter() - start
            print(f"[{seconds:6.1f} s] {record.getMessage()}", file=sys.stderr, flush=True)

    handler, level = Handler(logging.INFO), logger.level
    if not quiet:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    print(f"hf-rmsnorm: warning: {message}", file=sys.stderr)


def inspect(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    plan = plan_patch(_load(arguments.model, arguments), **_patch_arguments(arguments))
    print(plan.to_json() if arguments.json else plan)
    return 0


def patch(arguments: argparse.Namespace) -> int:
    """Write the patched checkpoint; beside first, so that a failure leaves nothing half-written."""
    from .hub.companions import copy_companions
    from .hub.folders import check_replaceable, move_into
    from .hub.moving import staging

    out, source = Path(arguments.out), Path(arguments.model)
    if source.exists() and source.resolve().is_relative_to(out.resolve()):
        raise PatchError(f"{out} holds the unpatched model, which would be lost: choose another")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not arguments.overwrite:
        raise PatchError(f"{out} exists and is not empty: choose another, or pass --overwrite")
    if out.is_dir():
        check_replaceable(out)
    model: Any = patch_model(_load(arguments.model, arguments), **_patch_arguments(arguments))
    report = patch_report(model)
    logger.info("writing %s", out)
    with staging(out) as staged:
        if (out / "README.md").is_file():  # saving merges a card that is there
            shutil.copy2(out / "README.md", staged)
        model.save_pretrained(staged)
        copy_companions(arguments.model, staged)
        (staged / PLAN_FILE).write_text(report.plan.to_json() + "\n", encoding="utf-8")
        move_into(staged, out, replace=True)
    print(report)
    print(f"written to {out}; load it with hf_rmsnorm.from_pretrained({str(out)!r})")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Compare the outputs of two checkpoints on made inputs."""
    first = _load(arguments.model, arguments)
    dtype = getattr(torch, arguments.precision)
    inputs = resolve_inputs(first, None)
    before = run_outputs(first.to(dtype), inputs)
    del first
    second = _load(arguments.other, arguments).to(dtype)
    apart = f"{arguments.model} and {arguments.other} cannot be compared"
    try:
        after = run_outputs(second, inputs)
    except Exception as failure:  # a model's own forward may raise anything
        why = f"{type(failure).__name__}: {failure}".splitlines()[0]
        raise PatchError(f"{apart}: the second cannot run on the first's inputs ({why})") from None
    shapes = [[tuple(x.shape) for x in outputs] for outputs in (before, after)]
    if shapes[0] != shapes[1]:
        raise PatchError(f"{apart}: their outputs have shapes {shapes[0]} and {shapes[1]}")
    error = relative_change(before, after)
    same = error <= arguments.tolerance
    print(
        f"largest output difference over largest output, in {arguments.precision}: {error:.2e} "
        f"({'within' if same else 'OVER'} {arguments.tolerance:.0e})"
    )
    return 0 if same else 1


def card(arguments: argparse.Namespace) -> int:
    """Write the model card of a checkpoint, of a run, or of both."""
    from .hub.cards import make_card, read_config, save_card
    from .hub.runs import FILES, read_run

    source = Path(arguments.run_dir)
    checkpoint = source if arguments.checkpoint is None else Path(arguments.checkpoint)
    config = run = None
    if arguments.checkpoint is not None or (source / "config.json").is_file():
        config = read_config(checkpoint)
    if config is None or checkpoint != source or any((source / name).is_file() for name in FILES):
        run = read_run(source, arguments.arm, config["hf_rmsnorm"] if config else None)
    if config is None and arguments.out is None:
        raise PatchError(
            f"{source} kept no checkpoint: name the folder of one with --checkpoint, or a file to "
            "write with --out"
        )
    out = checkpoint / "README.md" if arguments.out is None else Path(arguments.out)
    replace = ("base_model",) if arguments.base_model else ()
    print(save_card(out, make_card(config, run, arguments.base_model), replace))
    return 0


def push(arguments: argparse.Namespace) -> int:
    """Upload a checkpoint that loads and whose card is right."""
    from .hub.push import push

    url = push(
        arguments.folder,
        arguments.repo,
        private=arguments.private or None,
        revision=arguments.revision,
        commit_message=arguments.commit_message,
        exclude=arguments.exclude,
        trust_remote_code=arguments.trust,
    )
    print(url)
    return 0


def env(arguments: argparse.Namespace) -> int:
    """Print what a bug report needs."""
    names = ("hf_rmsnorm", "torch", "triton", "transformers", "accelerate", "kernels", "peft")
    print(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cpus")
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            print(f"{name} {importlib.metadata.version(name)}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        print(f"cuda device: {torch.cuda.get_device_name()}")
    for device in devices:
        print(f"kernels on {device}: {ops.status(device)}")
    print(f"calls on cpu: {ops.cpu_autograd.status()}")
    return 0


def _patch_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    names = (field.name for field in fields(PatchConfig))
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def _load(path: str, arguments: argparse.Namespace) -> Any:
    """A checkpoint, or with `--random-weights` a model built from its config alone."""
    import transformers

    from .hub.autos import remote_auto_class
    from .hub.folders import check_exists
    from .hub.loading import from_pretrained
    from .hub.weights import named_class, typed_errors

    check_exists(path)
    logger.info("loading %s", path)
    transformers.utils.logging.disable_progress_bar()
    if not getattr(arguments, "random_weights", False):
        return from_pretrained(
            path,
            dtype=arguments.dtype,
            trust_remote_code=arguments.trust,
            new_weights=arguments.new_weights,
        ).eval()
    torch.manual_seed(0)
    with typed_errors(path):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=arguments.trust)
        cls = named_class({"architectures": config.architectures}, path)
        auto_map, names = getattr(config, "auto_map", None), config.architectures or ()
        auto = getattr(transformers, remote_auto_class(auto_map, names))
        model: nn.Module = (
            cls(config) if cls else auto.from_config(config, trust_remote_code=arguments.trust)
        )
    with torch.no_grad():  # fresh ones and zeros would make post-norm models look convertible
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


COMMANDS = {
    "inspect": inspect,
    "patch": patch,
    "verify": verify,
    "card": card,
    "push": push,
    "env": env,
}
