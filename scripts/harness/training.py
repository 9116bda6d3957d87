"""The training loop, the same for every script and every arm."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import get_scheduler

from harness.args import TrainArguments
from harness.checkpoints import Checkpoints, Progress
from harness.data import Data, ShuffledOrder, eval_loader, train_loader
from harness.errors import ScriptError
from harness.evaluation import count_targets, evaluate_model, next_token_nll
from harness.results import step_times

WARMUP_STEPS = 10  # not timed; a fifth of the steps in short runs

# What does not change a single number, and may therefore differ when a run is resumed.
FREE_ARGUMENTS = ("per_device_eval_batch_size", "logging_steps", "cpu")


def fixed_arguments(args: TrainArguments) -> dict[str, Any]:
    """The training arguments that decide the outcome."""
    return {name: value for name, value in asdict(args).items() if name not in FREE_ARGUMENTS}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Norms and biases are not decayed, whichever norm the arm has; everything else is.

    By the type of the module that owns a parameter, not by its name: GPT-2's `ln_1`, say, is
    missed by the usual list of names.
    """
    decayed: dict[int, nn.Parameter] = {}
    spared: dict[int, nn.Parameter] = {}
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                group = spared if is_norm or name == "bias" else decayed
                group[id(parameter)] = parameter
    return [
        {"params": list(decayed.values()), "weight_decay": weight_decay},
        {"params": list(spared.values()), "weight_decay": 0.0},
    ]


class Run:
    """A model on its way through training.

    Args:
        accelerator: from `launch.make_accelerator`.
        model: patched already, not prepared.
        data: training and validation blocks.
        args: hyperparameters.
        seed: order of the data and dropout.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        data: Data,
        args: TrainArguments,
        seed: int,
    ) -> None:
        self.accelerator, self.args, self.seed = accelerator, args, seed
        self.order = ShuffledOrder(len(data.train), seed)
        self.blocks_per_step = (
            args.per_device_train_batch_size
            * accelerator.num_processes
            * args.gradient_accumulation_steps
        )
        batches = len(data.train) // (args.per_device_train_batch_size * accelerator.num_processes)
        if batches == 0:
            raise ScriptError(
                f"{len(data.train)} training blocks of {data.block_size} tokens do not fill one "
                f"batch of {args.per_device_train_batch_size} on {accelerator.num_processes} "
                "process(es); give more text, a smaller batch or a smaller --block_size"
            )
        self.steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
        self.total_steps = args.max_train_steps or args.num_train_epochs * self.steps_per_epoch

        optimizer = torch.optim.AdamW(
            parameter_groups(model, args.weight_decay), lr=args.learning_rate
        )
        scheduler = get_scheduler(
            args.lr_scheduler_type, optimizer, args.num_warmup_steps, self.total_steps
        )
        (
            self.model,
            self.optimizer,
            self.scheduler,
            self.train_loader,
            self.eval_loader,
        ) = accelerator.prepare(
            model,
            optimizer,
            scheduler,
            train_loader(data, args.per_device_train_batch_size, self.order),
            eval_loader(data, args.per_device_eval_batch_size),
        )
        self.progress = Progress()

    def evaluate(self) -> dict[str, float]:
        """Quality on the validation blocks, now."""
        return evaluate_model(self.accelerator, self.model, self.eval_loader)

    def train(
        self,
        checkpoints: Checkpoints | None = None,
        log: Callable[[dict[str, float], int], None] | None = None,
        description: str = "training",
    ) -> Progress:
        """Trains from where the progress is to the last step. Returns the progress."""
        progress, log = self.progress, log or (lambda values, step: None)
        self.model.train()
        with tqdm(
            total=self.total_steps,
            initial=progress.step,
            desc=description,
            disable=not self.accelerator.is_local_main_process,
        ) as bar:
            while progress.step < self.total_steps:
                for nll, tokens, norm, learning_rate in self._epoch():
                    progress.unlogged.append((nll, tokens))
                    if progress.step % self.args.logging_steps == 0:
                        mean = progress.pop_mean_loss()
                        values = {"loss": mean, "lr": learning_rate, "grad_norm": norm}
                        progress.history.append({"step": progress.step, **values})
                        log(
                            {f"train/{name}": value for name, value in values.items()},
                            progress.step,
                        )
                        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
                    bar.update()
                    self._after_step(checkpoints, log, bar)
        return progress

    def _after_step(self, checkpoints: Checkpoints | None, log: Callable, bar: tqdm) -> None:
        progress, every = self.progress, self.args.eval_steps
        due = progress.step_in_epoch == 0 if every is None else progress.step % every == 0
        if due or progress.step == self.total_steps:
            values = self.evaluate()
            progress.evaluations.append({"step": progress.step, **values})
            log({f"eval/{name}": value for name, value in values.items()}, progress.step)
            if self.accelerator.is_local_main_process:
                bar.write(
                    f"{bar.desc} step {progress.step}: validation loss {values['loss']:.4f}, "
                    f"perplexity {values['perplexity']:.2f}, "
                    f"token accuracy {values['token_accuracy']:.4f}"
                )
        if checkpoints is not None and (name := checkpoints.due(progress)):
            checkpoints.save(self.accelerator, name)

    def _epoch(self):
        """The rest of the current epoch, one optimizer step at a time."""
        progress = self.progress
        self.order.seek(progress.epoch, progress.step_in_epoch * self.blocks_per_step)
        batches = iter(self.train_loader)
        while progress.step < self.total_steps:
            start = time.perf_counter()
            group = list(itertools.islice(batches, self.args.gradient_accumulation_steps))
            learning_rate = self.scheduler.get_last_lr()[0]
            nll, tokens, norm = self.step(group)
            progress.step_seconds.append(time.perf_counter() - start)
            progress.step += 1
            progress.tokens += tokens
            progress.step_in_epoch += 1
            if progress.step_in_epoch == self.steps_per_epoch:
                progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
            yield nll, tokens, norm, learning_rate
            if progress.step_in_epoch == 0:
                return

    def step(self, group: list[dict[str, Tensor]]) -> tuple[float, int, float]:
        """One optimizer step on the batches of `group`: summed loss, tokens and gradient norm.

        The loss is the mean over all tokens of all batches and processes: each batch's *sum* is
        divided by that total. DDP averages over processes and accelerate divides by its own
        accumulation steps, so both are multiplied back in.
        """
        accelerator, args = self.accelerator, self.args
        # Dropout depends on (seed, step, rank) alone: arms see the same masks, and a resumed run
        # goes on bit by bit.
        torch.manual_seed(
            (self.seed << 32)
            + self.progress.step * accelerator.num_processes
            + accelerator.process_index
        )
        tokens = torch.stack([count_targets(batch["labels"]).sum() for batch in group]).sum()
        tokens = accelerator.reduce(tokens, "sum")
        scale = accelerator.num_processes * accelerator.gradient_accumulation_steps / tokens
        summed = torch.zeros((), device=accelerator.device)
        for position, batch in enumerate(group):
            last = position == len(group) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                logits = self.model(input_ids=batch["input_ids"], use_cache=False).logits
                nll = next_token_nll(logits, batch["labels"]).sum()
                accelerator.backward(nll * scale)
            summed += nll.detach()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), args.max_grad_norm or math.inf)
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        summed = accelerator.reduce(summed, "sum")
        return summed.item(), int(tokens), float(norm)

    def timing(self) -> dict[str, float] | None:
        """Step times without the warm-up; None for a run of a single step."""
        seconds = self.progress.step_seconds
        timed = seconds[min(WARMUP_STEPS, math.ceil(len(seconds) / 5)) :]
        if not timed:
            return None
        return step_times(timed, self.progress.tokens / len(seconds))
