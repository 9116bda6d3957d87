"""Next-token loss, and the quality of a model on the validation blocks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import evaluate
import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.nn import functional as F

from harness.data import Data, eval_loader

METRICS = Path(__file__).parent / "metrics"
IGNORED = -100


def next_token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of every next token, `(batch, length - 1)`; 0 where it is ignored."""
    targets = labels[:, 1:]
    nll = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    return nll.view_as(targets)


def count_targets(labels: Tensor) -> Tensor:
    """How many tokens of each sequence are predicted."""
    return (labels[:, 1:] != IGNORED).sum(-1)


def evaluate_unpatched(
    accelerator: Accelerator, model: nn.Module, data: Data, batch_size: int
) -> dict[str, float] | None:
    """Quality of a model before it is patched and prepared; it comes back as it was.

    None where every process has only a part of the model.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return None
    home = next(model.parameters()).device
    loader = accelerator.prepare_data_loader(eval_loader(data, batch_size))
    with torch.random.fork_rng(devices=[]), accelerator.autocast():
        quality = evaluate_model(accelerator, model.to(accelerator.device), loader)
    model.to(home)
    return quality


@torch.no_grad()
def evaluate_model(
    accelerator: Accelerator, model: nn.Module, batches: Iterable[dict[str, Tensor]]
) -> dict[str, float]:
    """`loss`, `perplexity` and `token_accuracy` over all processes; every block counts once."""
    perplexity = evaluate.load(str(METRICS / "perplexity"), keep_in_memory=True)
    accuracy = evaluate.load(str(METRICS / "token_accuracy"), keep_in_memory=True)
    was_training = model.training
    model.eval()
    for batch in batches:
        labels = batch["labels"]
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
        correct = (logits[:, :-1].argmax(-1) == labels[:, 1:]).sum(-1)
        nll = next_token_nll(logits, labels).double().sum(-1)
        rows = accelerator.gather_for_metrics((nll, correct, count_targets(labels)))
        sums, hits, tokens = (row.tolist() for row in rows)
        perplexity.add_batch(nll=sums, tokens=tokens)
        accuracy.add_batch(correct=hits, tokens=tokens)
    model.train(was_training)
    return {**perplexity.compute(), **accuracy.compute()}
