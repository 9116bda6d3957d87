"""The options of `hf-rmsnorm`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from importlib.metadata import version

from .patching.config import AUTOCAST_OUTPUTS, NORMS, POST_NORMS, STRATEGIES, TWINS

PACKAGE = "hf_rmsnorm"


def parser(run: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """The parser; `run` has what each command does, as `arguments.run`."""
    whole = argparse.ArgumentParser(
        prog="hf-rmsnorm",
        description="LayerNorm to RMSNorm or pRMSNorm in Hugging Face models.",
    )
    whole.add_argument("--version", action="version", version=f"hf_rmsnorm {version(PACKAGE)}")
    commands = whole.add_subparsers(dest="command", required=True)

    trusting = argparse.ArgumentParser(add_help=False)
    trusting.add_argument(
        "--trust-remote-code", dest="trust", action="store_true", help="run the repository's code"
    )
    loading = argparse.ArgumentParser(add_help=False, parents=[trusting])
    loading.add_argument("model", help="checkpoint folder or hub name")
    loading.add_argument("--quiet", action="store_true", help="say nothing of the progress")
    loading.add_argument("--dtype", default="auto", help="dtype to load in (default: as saved)")
    loading.add_argument(
        "--new-weights",
        nargs="+",
        default=(),
        metavar="GLOB",
        help="weights that may be missing, and then start at random",
    )

    patching = argparse.ArgumentParser(add_help=False)
    patching.add_argument("--norm", choices=NORMS, default="rmsnorm", help="default: rmsnorm")
    patching.add_argument(
        "--p", type=float, help="share of the features in pRMSNorm's statistic (default: 0.0625)"
    )
    patching.add_argument("--strategy", choices=STRATEGIES, default="auto", help="default: auto")
    patching.add_argument(
        "--post-norm",
        choices=POST_NORMS,
        help="make norms after feed-forward blocks exact by one more hidden unit in each block",
    )
    patching.add_argument("--include", nargs="+", metavar="GLOB", help="only these norm sites")
    patching.add_argument("--exclude", nargs="+", metavar="GLOB", help="not these norm sites")
    patching.add_argument(
        "--hold",
        nargs="+",
        metavar="GLOB",
        default=(),
        help='outputs that must not move beside the main ones, by name, such as "hidden_states"',
    )
    patching.add_argument(
        "--twin",
        choices=TWINS,
        default="auto",
        help="probe a thin twin with a few of each kind of layer (default: for large models)",
    )

    patching.add_argument(
        "--autocast-output",
        choices=AUTOCAST_OUTPUTS,
        default="auto",
        help="dtype of the norms' outputs under autocast (default: auto)",
    )
    patching.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not run what is called exact before it is written",
    )

    command = commands.add_parser(
        "inspect", parents=[loading, patching], help="print what a patch would do, and why"
    )
    command.add_argument("--json", action="store_true", help="the whole plan as JSON")
    command.add_argument(
        "--random-weights",
        action="store_true",
        help="judge the architecture by its config alone, with random weights",
    )
    command.set_defaults(run=run["inspect"])

    command = commands.add_parser(
        "patch", parents=[loading, patching], help="write the patched checkpoint"
    )
    command.add_argument("out", help="folder to write")
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the checkpoint there; its card is merged, what is no checkpoint's stays",
    )
    command.set_defaults(run=run["patch"])

    command = commands.add_parser(
        "verify",
        parents=[loading],
        help="compare two checkpoints' outputs; status 1 if they differ",
    )
    command.add_argument("other", help="the second checkpoint")
    command.add_argument("--precision", choices=("float64", "float32"), default="float64")
    command.add_argument("--tolerance", type=float, default=1e-5, help="default: %(default)s")
    command.set_defaults(run=run["verify"])

    command = commands.add_parser(
        "card", help="write the model card of a checkpoint, with the results of a run"
    )
    command.add_argument(
        "run_dir", help="what finetune_clm.py or compare.py wrote, or just a patched checkpoint"
    )
    command.add_argument(
        "--checkpoint",
        help="the patched checkpoint, if it is not the run's; its README.md is merged",
    )
    command.add_argument("--arm", help="arm of a comparison (default: the checkpoint's)")
    command.add_argument("--base-model", help="hub name of the model that was patched")
    command.add_argument("--out", help="write this file, not the checkpoint's README.md")
    command.set_defaults(run=run["card"])

    command = commands.add_parser(
        "push", parents=[trusting], help="upload a checkpoint, after checking that it loads"
    )
    command.add_argument("folder", help="checkpoint folder")
    command.add_argument("repo", help="hub name, USER/NAME")
    command.add_argument("--private", action="store_true", help="make a new repository private")
    command.add_argument("--revision", help="branch to upload to, made if it does not exist")
    command.add_argument("--commit-message", "--commit_message", help="what the commit says")
    command.add_argument("--exclude", nargs="+", metavar="GLOB", help="files to leave out")
    command.set_defaults(run=run["push"])

    command = commands.add_parser("env", help="versions and backends, for bug reports")
    command.set_defaults(run=run["env"])
    return whole
