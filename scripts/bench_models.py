"""Whole models, patched against unpatched: a training step and inference, interleaved.

    python scripts/bench_models.py                               # GPT-2, BERT, ViT at 768 wide
    python scripts/bench_models.py --models gpt2 --full --precision autocast
    python scripts/bench_models.py --models llama whisper --compiled no yes --out models.json
    python scripts/bench_models.py --quick                       # what the goals need

Models are built from their configs with random weights, patched with `patch_model` in each way, and
take turns in one process. "speed" is the unpatched model's time over the arm's, within each round:
median and range; above 1 is faster than the unpatched model. "moved" is how far the patch moved the
outputs in float32, over their largest value: an arm whose sites are all exact must not move them,
or it is not timed and the script fails. A training step is forward, backward and AdamW (fused, as
Trainer's default); `autocast` is bfloat16 under torch.autocast. On a CPU, "norms" is LayerNorm's
share of the unpatched model's time (torch.profiler): the most that norms for free could save. The
last line is one JSON document.
"""

from __future__ import annotations

import harness  # noqa: F401  first, so that it can say what is missing

# isort: split
import argparse
import copy
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from harness import goals
from harness.benchmark import (
    Deadline,
    add_flags,
    finish,
    interleaved,
    kernel_times,
    pick_device,
    plot,
    ratio,
)
from harness.results import machine, write_json
from harness.sized_models import BUILDERS, FULL, Batch, Sizes, build
from torch import nn

import hf_rmsnorm
from hf_rmsnorm import functional

CONTROL = "unpatched"
ARMS: dict[str, dict[str, Any] | None] = {
    CONTROL: None,
    "rmsnorm": {"norm": "rmsnorm"},
    "rmsnorm direct": {"norm": "rmsnorm", "strategy": "direct"},
    "prmsnorm 1/16": {"norm": "prmsnorm", "strategy": "direct"},
}
# Only where it makes a difference: what the choice of the norms' output, and of the compiled body,
# brings beside "rmsnorm", which takes the defaults.
AUTOCAST_ARM = "rmsnorm, float32 output"
ARMS[AUTOCAST_ARM] = {"norm": "rmsnorm", "autocast_output": "float32"}
COMPILED_BODIES = ("kernel", "torch")
MOVED_AT_MOST = 1e-4
WRONG = "its sites are all exact, but the outputs moved by {:.1e}"
PRECISIONS = ("fp32", "autocast", "bf16")  # bf16 is last: it rounds the weights


def patched(
    model: nn.Module, batch: Batch, skipped: dict[str, str], label: str
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """`({arm: model}, {arm: how far the outputs moved})`."""
    twins, moved = {CONTROL: model.eval()}, {CONTROL: 0.0}
    before = outputs(model, batch)
    inputs = {name: value[:2] for name, value in _inputs(batch).items()}
    for arm, arguments in ARMS.items():
        if arguments is None:
            continue
        twin = copy.deepcopy(model)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r".*changed approximately")
                hf_rmsnorm.patch_model(twin, inputs=inputs, verify=False, **arguments)
        except hf_rmsnorm.PatchError as error:
            skipped[f"{label}, {arm}"] = str(error)
            print(f"without {arm}: {error}", flush=True)
            continue
        move = (outputs(twin, batch) - before).abs().max().item() / before.abs().max().item()
        exact = {site.verdict for site in hf_rmsnorm.patch_report(twin).sites} == {"exact"}
        if exact and not move <= MOVED_AT_MOST:
            skipped[f"{label}, {arm}"] = WRONG.format(move)
            print(f"without {arm}: {WRONG.format(move)}", flush=True)
            continue
        twins[arm], moved[arm] = twin, move
    return twins, moved


def outputs(model: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**_inputs(batch)).logits


def _inputs(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "labels"}


def steps(
    model: nn.Module, batch: Batch, precision: str, compiled: bool, body: Any = "torch"
) -> dict[str, Callable]:
    """The training step and inference of one arm, as calls without arguments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    device = next(iter(batch.values())).device
    run: Callable[..., Any] = torch.compile(model, dynamic=False) if compiled else model
    if precision == "bf16":
        batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}

    def autocast() -> Any:
        return torch.autocast(device.type, torch.bfloat16) if precision == "autocast" else nothing

    nothing = nullcontext()

    def train() -> None:
        functional.set_compiled_body(body)
        model.train()
        with autocast():
            loss = run(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def infer() -> None:
        functional.set_compiled_body(body)
        model.eval()
        with torch.no_grad(), autocast():
            run(**_inputs(batch))

    return {"training": train, "inference": infer}


def layer_norm_share(call: Callable[[], Any]) -> float:
    """Of the time that a call spends in PyTorch's operations on a CPU."""
    times = kernel_times(call, torch.device("cpu"), calls=1)
    return sum(us for name, us in times.items() if "layer_norm" in name) / sum(times.values())


def measure(
    name: str, sizes: Sizes, args: argparse.Namespace, deadline: Deadline, report: dict[str, Any]
) -> None:
    device = pick_device(cpu=args.cpu)
    model, batch = build(name, sizes)
    model, batch = model.to(device), {key: value.to(device) for key, value in batch.items()}
    label = f"{name} {sizes.layers}x{sizes.width}"
    twins, moved = patched(model, batch, report["skipped"], label)
    sized = {"model": name, **sizes._asdict()}
    for precision, compiled in itertools.product(PRECISIONS, args.compiled):
        if precision not in args.precision:
            continue
        case = {"precision": precision, "compiled": compiled == "yes"}
        if deadline.passed:
            report["skipped"][f"{label}, {case}"] = "no time left"
            continue
        arms = {
            arm: t for arm, t in twins.items() if arm != AUTOCAST_ARM or precision == "autocast"
        }
        torch._dynamo.reset()
        if precision == "bf16":
            arms = {arm: twin.bfloat16() for arm, twin in arms.items()}
        calls = {arm: steps(t, batch, precision, case["compiled"]) for arm, t in arms.items()}
        if case["compiled"] and "rmsnorm" in arms:
            for body in COMPILED_BODIES:
                calls[f"rmsnorm, {body} body"] = steps(
                    arms["rmsnorm"], batch, precision, True, body
                )
        for mode in ("training", "inference"):
            summaries = interleaved(
                {arm: call[mode] for arm, call in calls.items()},
                CONTROL,
                rounds=args.rounds,
                block_seconds=args.block_seconds,
                description=f"{label} {precision} {mode}",
            )
            for arm, summary in summaries.items():
                row = {**sized, **case, "mode": mode, "arm": arm, **summary}
                row["moved"] = moved.get(arm, moved.get("rmsnorm"))  # another body, same weights
                share = ""
                if arm == CONTROL and device.type == "cpu" and not case["compiled"]:
                    row["layer_norm_share"] = layer_norm_share(calls[arm][mode])
                    share = f"  norms {row['layer_norm_share']:.1%}"
                report["rows"].append(row)
                print(
                    f"{label:>14} {precision:>8}{' compiled' * case['compiled']} {mode:>9}  "
                    f"{arm:<28}{summary['us_p50'] / 1e3:>9.2f} ms  {ratio(summary)}  "
                    f"moved {row['moved']:.1e}{share}",
                    flush=True,
                )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=BUILDERS, default=["gpt2", "bert", "vit"])
    parser.add_argument(
        "--full", action="store_true", help="published sizes; ignores the next five"
    )
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="sequences; half as many images")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument("--compiled", nargs="+", choices=("no", "yes"), default=["no"])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="what the goals need: on a GPU all models, --full, under autocast; few rounds",
    )
    add_flags(parser, rounds=9, block_seconds=1.0)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device, deadline = pick_device(cpu=args.cpu), Deadline(args.max_seconds)
    if args.quick:
        args.rounds, args.block_seconds = min(args.rounds, 5), min(args.block_seconds, 0.25)
        if device.type == "cuda":
            args.full, args.precision = True, ["autocast"]
            args.models = ["gpt2", "bert", "vit", "llama", "whisper"]
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in convolutions too
    torch._dynamo.config.recompile_limit = 64  # arms and modes share their code
    report: dict[str, Any] = {"rows": [], "skipped": {}}
    document: dict[str, Any] = {}
    for name in args.models:
        images = max(1, args.batch // 2)
        batch = images if name == "vit" else args.batch
        sizes = Sizes(args.width, args.layers, args.length, batch, args.vocabulary)
        problem = None
        if deadline.passed:
            problem = f"the {args.max_seconds:.0f} seconds are over"
        else:
            try:
                measure(name, FULL[name] if args.full else sizes, args, deadline, report)
            except torch.OutOfMemoryError:
                problem = "out of memory"
                torch.cuda.empty_cache()
        if problem:
            report["skipped"][name] = problem
            print(f"skipped {name}: {problem}", flush=True)
        document = {"environment": machine(device, argv), **report}
        if args.out:  # what there is, should this process be stopped
            write_json(args.out, document)
    document["goals"] = goals.of_models(document["rows"], device.type)
    goals.show(document["goals"])
    plot("models", document, args.plots)
    finish(document, args.out)
    if any(reason.startswith(WRONG[:20]) for reason in report["skipped"].values()):
        sys.exit("a patch is wrong: see above")


if __name__ == "__main__":
    main()
