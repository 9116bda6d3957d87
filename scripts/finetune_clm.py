"""Fine-tune a causal language model whose LayerNorms were replaced by RMSNorm or pRMSNorm.

A trained model, patched, on a text file:

    accelerate launch scripts/finetune_clm.py --model_name_or_path gpt2 \\
        --train_file notes.txt --norm rmsnorm --output_dir runs/gpt2-rmsnorm

The paper's drop-in pRMSNorm on a hub dataset, in bfloat16, saved every 500 steps:

    accelerate launch scripts/finetune_clm.py --model_name_or_path gpt2 \\
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 \\
        --norm prmsnorm --p 0.0625 --strategy direct --mixed_precision bf16 \\
        --checkpointing_steps 500 --output_dir runs/gpt2-prmsnorm

From scratch:

    accelerate launch scripts/finetune_clm.py --config_name gpt2 \\
        --config_overrides n_layer=6,n_embd=384,n_head=6 --tokenizer_name gpt2 \\
        --train_file notes.txt --norm rmsnorm --output_dir runs/small

Two processes on a CPU (`accelerate launch --cpu --num_processes 2` would start only one):

    accelerate launch --multi_gpu --num_processes 2 scripts/finetune_clm.py --cpu ...

The output folder gets the model, its tokenizer, all_results.json and, if it was patched, a
model card with these results.
Exit status 2 means that something in the request was wrong; the message says what.
"""

from __future__ import annotations

import harness  # noqa: F401  first, so that it can say what is missing

# isort: split
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from harness import arms, checkpoints, data, errors, evaluation, launch, models, results, training
from harness.args import (
    DataArguments,
    ModelArguments,
    NormArguments,
    PatchArguments,
    TrainArguments,
    flag,
    parse,
)
from harness.arms import Arm
from harness.errors import ScriptError

import hf_rmsnorm
from hf_rmsnorm.hub.cards import write_card


@dataclass(frozen=True)
class RunArguments:
    _argument_group_name = "run"

    output_dir: str = flag("where the model and the results go")
    overwrite_output_dir: bool = flag("write into an output folder that is not empty", False)
    seed: int = flag("initial weights, order of the data, dropout", 0)
    checkpointing_steps: str | None = flag(
        "save the state every so many steps, or at every 'epoch'; never if not given", None
    )
    resume_from_checkpoint: str | None = flag(
        "a folder that --checkpointing_steps wrote, or 'latest'; continues bit by bit", None
    )
    with_tracking: bool = flag("report to experiment trackers", False)
    report_to: str = flag("tensorboard, wandb, ..., or 'all' that are installed", "all")


def main(argv: Sequence[str] | None = None) -> None:
    model_args, data_args, train_args, norm_args, patch_args, run_args = parse(
        (
            ModelArguments,
            DataArguments,
            TrainArguments,
            NormArguments,
            PatchArguments,
            RunArguments,
        ),
        argv,
        __doc__,
    )
    arm = Arm.make(norm_args.norm, norm_args.strategy, norm_args.p)
    check_request(arm, model_args, data_args, run_args)

    output_dir = Path(run_args.output_dir)
    tracking = {"log_with": run_args.report_to} if run_args.with_tracking else {}
    accelerator = launch.make_accelerator(train_args, project_dir=str(output_dir), **tracking)
    tokenizer = models.load_tokenizer(model_args)
    config = models.load_config(model_args, tokenizer)
    block_size = models.resolve_block_size(data_args.block_size, config, tokenizer)
    with accelerator.main_process_first():
        blocks = data.load_data(data_args, tokenizer, block_size)
    accelerator.print(
        f"{len(blocks.train)} training and {len(blocks.validation)} validation blocks "
        f"of {block_size} tokens"
    )
    # The patch comes before the optimizer and before prepare, which may wrap or shard the model.
    model = models.load_model(model_args, config, tokenizer, run_args.seed)
    facts = {
        "seed": run_args.seed,
        "start": models.describe_start(model_args, model),
        "data": data.describe(data_args, blocks),
        "training": training.fixed_arguments(train_args),
        "eval_unpatched": None,
    }
    if arm.patched and model_args.model_name_or_path:
        facts["eval_unpatched"] = evaluation.evaluate_unpatched(
            accelerator, model, blocks, train_args.per_device_eval_batch_size
        )
    model = arm.apply(model, **models.patch_options(arm, patch_args, blocks))
    if arm.patched:
        accelerator.print(hf_rmsnorm.patch_report(model))

    run = training.Run(accelerator, model, blocks, train_args, run_args.seed)
    saver = checkpoints.Checkpoints(
        output_dir,
        run_args.checkpointing_steps,
        {
            "model": asdict(model_args),
            "arm": arm.to_dict(),
            "data": blocks.fingerprint,
            "training": training.fixed_arguments(train_args),
            "seed": run_args.seed,
            "num_processes": accelerator.num_processes,
        },
    )
    accelerator.register_for_checkpointing(run.progress)
    if run_args.resume_from_checkpoint:
        folder = saver.find(run_args.resume_from_checkpoint)
        saver.check(folder)
        accelerator.load_state(str(folder))
        accelerator.print(f"resumed from {folder} at step {run.progress.step}")
    if run_args.with_tracking:
        settings = {**asdict(model_args), **asdict(train_args), "arm": str(arm)}
        accelerator.init_trackers(
            "finetune_clm", {k: v for k, v in settings.items() if v is not None}
        )

    if not run.progress.evaluations:
        run.progress.evaluations.append({"step": 0, **run.evaluate()})
        before = run.progress.evaluations[0]
        accelerator.print(f"before training: validation loss {before['loss']:.4f}")
    reset_peak_memory(accelerator)
    run.train(saver, accelerator.log if run_args.with_tracking else None, f"{arm}")
    save(accelerator, run, arm, tokenizer, output_dir, argv, facts)
    accelerator.end_training()


def check_request(
    arm: Arm, model_args: ModelArguments, data_args: DataArguments, run_args: RunArguments
) -> None:
    """Refuses, before anything is loaded or written, what cannot work."""
    models.check_arguments(model_args)
    data.check_arguments(data_args)
    checkpoints.check_interval(run_args.checkpointing_steps)
    arms.check_start(arm, bool(model_args.config_name))
    available = [str(tracker) for tracker in get_available_trackers()]
    if run_args.with_tracking and run_args.report_to not in ("all", *available):
        found = ", ".join(available) or "none"
        raise ScriptError(f"--report_to {run_args.report_to} is not installed; installed: {found}")
    output_dir = Path(run_args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ScriptError(f"--output_dir {output_dir} is a file")
    may_exist = run_args.overwrite_output_dir or run_args.resume_from_checkpoint
    if output_dir.is_dir() and any(output_dir.iterdir()) and not may_exist:
        raise ScriptError(
            f"--output_dir {output_dir} is not empty; choose another one, or give "
            "--overwrite_output_dir or --resume_from_checkpoint"
        )


def save(
    accelerator: Accelerator,
    run: training.Run,
    arm: Arm,
    tokenizer: Any,
    output_dir: Path,
    argv: Sequence[str] | None,
    facts: dict[str, Any],
) -> None:
    """The model, its tokenizer, all_results.json and, last, the card of a patched model."""
    accelerator.wait_for_everyone()
    models.save_model(accelerator, run.model, arm, output_dir)
    progress = run.progress
    before, final = progress.evaluations[0], progress.evaluations[-1]
    summary = {
        "arm": arm.to_dict(),
        **facts,
        "train_loss": progress.history[-1]["loss"] if progress.history else None,
        "eval_loss": final["loss"],
        "perplexity": final["perplexity"],
        "token_accuracy": final["token_accuracy"],
        "eval_loss_before_training": before["loss"],
        "steps": progress.step,
        "epochs": progress.step / run.steps_per_epoch,
        "tokens": progress.tokens,
        "timing": run.timing(),
        "peak_memory_bytes": peak_memory(accelerator),
        "num_processes": accelerator.num_processes,
        "environment": results.environment(accelerator, argv),
        "patch": models.describe_patch(accelerator.unwrap_model(run.model), arm),
        "evaluations": progress.evaluations,
        "history": progress.history,
    }
    if accelerator.is_main_process:
        tokenizer.save_pretrained(output_dir)
        results.write_json(output_dir / "all_results.json", summary)
        if arm.patched:
            write_card(output_dir, run=output_dir)
    accelerator.print(
        f"{arm}: validation loss {before['loss']:.4f} -> {final['loss']:.4f}, "
        f"perplexity {final['perplexity']:.2f}; saved in {output_dir}"
    )


def reset_peak_memory(accelerator: Accelerator) -> None:
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)


def peak_memory(accelerator: Accelerator) -> int | None:
    """Bytes allocated at the peak of training; None where that is not measured (CPU)."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device)
    return None


if __name__ == "__main__":
    sys.exit(errors.run(main))
