"""Fine-tune a model with several norms beside the unpatched control, and report the differences.

A trained model, three ways to patch it, three seeds:

    accelerate launch scripts/compare.py --model_name_or_path gpt2 --train_file notes.txt \\
        --arms layernorm rmsnorm rmsnorm:direct prmsnorm:0.0625 --seeds 0 1 2 \\
        --max_train_steps 500 --eval_steps 50 --output_dir runs/compare

From scratch, with the paper's other baselines:

    accelerate launch scripts/compare.py --config_name gpt2 --config_overrides n_layer=4 \\
        --tokenizer_name gpt2 --train_file notes.txt \\
        --arms layernorm rmsnorm:direct prmsnorm:direct none l2norm --output_dir runs/scratch

An arm is NAME[:strategy][:p]; the control, layernorm, always takes part. All arms share the
starting weights, the batches and their order, the dropout masks, the precision and compilation.

The output folder gets results.json (every number), report.md and the plots. Finished runs are
kept in runs/ there: the same command again goes on where it stopped, and may name more arms or
seeds. With other settings it stops; --overwrite starts anew.
Exit status 2 means that something in the request was wrong; the message says what.
"""

from __future__ import annotations

import harness  # noqa: F401  first, so that it can say what is missing

# isort: split
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import transformers
from accelerate import Accelerator
from harness import arms, data, errors, launch, models, plots, report, results, throughput, training
from harness.args import (
    DataArguments,
    ModelArguments,
    PatchArguments,
    TrainArguments,
    flag,
    parse,
)
from harness.arms import Arm
from harness.checkpoints import require_equal
from harness.errors import ScriptError
from torch import nn

Build = Callable[[Arm, int], nn.Module]


@dataclass(frozen=True)
class CompareArguments:
    _argument_group_name = "comparison"

    output_dir: str = flag("where results.json, report.md and the plots go")
    arms: list[str] = field(
        default_factory=lambda: ["layernorm", "rmsnorm", "rmsnorm:direct", "prmsnorm:0.0625"],
        metadata={"help": "NAME[:strategy][:p] each"},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "order of the data, dropout and, from scratch, initial weights"},
    )
    throughput_rounds: int = flag(
        "rounds of interleaved timing, all arms in memory at once; 0: no timing", 7
    )
    throughput_steps: int = flag("timed steps per arm and round", 4)
    overwrite: bool = flag("throw away what the output folder holds of a comparison", False)


def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, train_args, patch_args, args = parse(
        (ModelArguments, DataArguments, TrainArguments, PatchArguments, CompareArguments),
        argv,
        __doc__,
    )
    chosen = arms.parse_arms(args.arms)
    check_request(chosen, model_args, data_args, args)
    folder = Path(args.output_dir)

    accelerator = launch.make_accelerator(train_args)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = models.load_tokenizer(model_args)
    config = models.load_config(model_args, tokenizer)
    block_size = models.resolve_block_size(data_args.block_size, config, tokenizer)
    with accelerator.main_process_first():
        blocks = data.load_data(data_args, tokenizer, block_size)

    def build(arm: Arm, seed: int) -> nn.Module:
        model = models.load_model(model_args, config, tokenizer, seed)
        options = models.patch_options(arm, patch_args, blocks) if arm.patched else {}
        return arm.apply(model, **options)

    unpatched = models.load_model(model_args, config, tokenizer, seed=0)
    weights, start = models.fingerprint(unpatched), models.describe_start(model_args, unpatched)
    del unpatched
    for arm in chosen:  # refuse an arm that cannot be built before hours are spent on the others
        accelerator.print(f"{arm}: {describe(build(arm, args.seeds[0]), arm)}")

    where = results.environment(accelerator, argv)
    settings = {
        "model": asdict(model_args),
        "patch": asdict(patch_args),
        "weights": weights,
        "data": blocks.fingerprint,
        "block_size": block_size,
        "training_blocks": len(blocks.train),
        "validation_blocks": len(blocks.validation),
        "training": training.fixed_arguments(train_args),
        **{name: where[name] for name in ("device", "num_processes", "threads", "mixed_precision")},
    }
    if accelerator.is_main_process:
        open_folder(folder, settings, args.overwrite)
    accelerator.wait_for_everyone()

    runs = train_all(accelerator, chosen, args.seeds, build, blocks, train_args, folder / "runs")
    timed = time_all(accelerator, chosen, build, blocks, train_args, args, folder)
    if accelerator.is_main_process:
        outcome = {
            "environment": where,
            "settings": settings,
            "start": start,
            "data": data.describe(data_args, blocks),
            "arms": [arm.to_dict() for arm in chosen],
            "quality": report.quality_rows(runs),
            "throughput": timed,
            "runs": runs,
        }
        pictures = plots.draw(outcome, folder)
        (folder / "report.md").write_text(report.markdown_report(outcome, pictures))
        results.write_json(folder / "results.json", outcome)
        show(outcome, folder)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def check_request(
    chosen: Sequence[Arm],
    model_args: ModelArguments,
    data_args: DataArguments,
    args: CompareArguments,
) -> None:
    """Refuses, before anything is loaded or written, what cannot work."""
    models.check_arguments(model_args)
    data.check_arguments(data_args)
    for arm in chosen:
        arms.check_start(arm, bool(model_args.config_name))
    if len(set(args.seeds)) < len(args.seeds):
        raise ScriptError(f"--seeds {' '.join(map(str, args.seeds))}: a seed is given twice")
    if args.throughput_rounds < 0 or args.throughput_steps < 1:
        raise ScriptError("--throughput_rounds must be at least 0, --throughput_steps at least 1")
    folder = Path(args.output_dir)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "settings.json").is_file():
        raise ScriptError(f"--output_dir {folder} holds something else; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise ScriptError(f"--output_dir {folder} is a file")


def describe(model: nn.Module, arm: Arm) -> str:
    patch = models.describe_patch(model, arm)
    return patch["text"] if patch else arms.NORMS[arm.norm].summary


def open_folder(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Makes the folder, or checks that what it holds was made with the same settings."""
    path = folder / "settings.json"
    if path.is_file() and not overwrite:
        advice = "use another --output_dir, or --overwrite to start anew"
        require_equal(json.loads(path.read_text()), settings, f"{folder}", advice)
        return
    shutil.rmtree(folder / "runs", ignore_errors=True)
    for name in ("throughput.json", "results.json", "report.md"):
        (folder / name).unlink(missing_ok=True)
    results.write_json(path, settings)


def train_all(
    accelerator: Accelerator,
    chosen: Sequence[Arm],
    seeds: Sequence[int],
    build: Build,
    blocks: data.Data,
    args: TrainArguments,
    folder: Path,
) -> list[dict[str, Any]]:
    """Every arm with every seed; runs that are in `folder` already are read, not repeated."""
    wanted = [
        (arm, seed, folder / f"{arm.slug}-seed{seed}.json") for seed in seeds for arm in chosen
    ]
    missing = [path for _, _, path in wanted if not path.is_file()]
    accelerator.wait_for_everyone()  # nobody writes before everybody has looked
    for arm, seed, path in wanted:
        if path not in missing:
            accelerator.print(f"{arm}, seed {seed}: done before, in {path}")
            continue
        label = f"[{missing.index(path) + 1}/{len(missing)}] {arm}, seed {seed}"
        outcome = train_one(accelerator, arm, seed, build, blocks, args, label)
        if accelerator.is_main_process:
            results.write_json(path, outcome)
    accelerator.wait_for_everyone()
    return [json.loads(path.read_text()) for _, _, path in wanted]


def train_one(
    accelerator: Accelerator,
    arm: Arm,
    seed: int,
    build: Build,
    blocks: data.Data,
    args: TrainArguments,
    label: str,
) -> dict[str, Any]:
    """One arm, one seed: quality right after patching, training, quality at the end."""
    start = time.perf_counter()
    model = build(arm, seed)
    patch = models.describe_patch(model, arm)
    run = training.Run(accelerator, model, blocks, args, seed)
    run.progress.evaluations.append({"step": 0, **run.evaluate()})
    progress = run.train(description=label)
    outcome = {
        "arm": arm.to_dict(),
        "seed": seed,
        "steps": progress.step,
        "tokens": progress.tokens,
        "before": progress.evaluations[0],
        "after": progress.evaluations[-1],
        "evaluations": progress.evaluations,
        "history": progress.history,
        "timing": run.timing(),
        "patch": patch,
        "seconds": time.perf_counter() - start,
    }
    accelerator.free_memory()
    return outcome


def time_all(
    accelerator: Accelerator,
    chosen: Sequence[Arm],
    build: Build,
    blocks: data.Data,
    args: TrainArguments,
    compare: CompareArguments,
    folder: Path,
) -> dict[str, Any] | None:
    """Throughput of all arms; measured again if the arms or the rounds are not the stored ones."""
    if compare.throughput_rounds == 0:
        return None
    path = folder / "throughput.json"
    wanted = {
        "arms": [str(arm) for arm in chosen],
        "rounds": compare.throughput_rounds,
        "steps": compare.throughput_steps,
    }
    stored = json.loads(path.read_text()) if path.is_file() else {}
    accelerator.wait_for_everyone()
    if stored.get("settings") == wanted:
        accelerator.print(f"throughput: done before, in {path}")
        return stored["throughput"]
    seed = compare.seeds[0]
    timed = throughput.measure(
        accelerator,
        chosen,
        lambda arm: build(arm, seed),
        blocks,
        args,
        rounds=compare.throughput_rounds,
        steps=compare.throughput_steps,
    )
    accelerator.free_memory()
    if accelerator.is_main_process:
        results.write_json(path, {"settings": wanted, "throughput": timed})
    return timed


def show(outcome: dict[str, Any], folder: Path) -> None:
    """The tables on the terminal, and where everything is."""
    print("\n" + report.quality_table(outcome["quality"]))
    for mode in throughput.MODES if outcome["throughput"] else ():
        print(f"\n{mode}\n" + report.throughput_table(outcome["throughput"], mode))
    print(f"\nreport: {folder / 'report.md'}")


if __name__ == "__main__":
    sys.exit(errors.run(main))
