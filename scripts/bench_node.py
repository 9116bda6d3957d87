"""What the C++ autograd node of the CPU brings: with it, without it, F.layer_norm; interleaved.

    python scripts/bench_node.py
    python scripts/bench_node.py --only models --rounds 81 --threads 1 --out node.json

One call at 1, 64 and 512 rows, without gradients ("forward") and with them ("both": forward and
backward); then the two whole models in which a call weighs most: a sentence encoder of 6 layers,
384 wide, on one sentence of 16 tokens, and a GPT-2 of 12 layers, 768 wide, decoding one token after
a cache of 32. Each is patched, and computes the same with the node and without it.

"speed" is the time without the node over the arm's, within each round: median and range; above 1 is
faster than without the node. "best" is the same of each one's shortest block, which a busy machine
disturbs least. The last line is one JSON document.
"""

from __future__ import annotations

import harness  # noqa: F401  first, so that it can say what is missing

# isort: split
import argparse
import copy
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from harness.benchmark import Call, finish, interleaved, ratio
from harness.results import machine
from torch import nn
from torch.nn import functional as F

from hf_rmsnorm import functional, patch_model
from hf_rmsnorm.ops import cpu_autograd, shortcut

WITH, WITHOUT, LAYER_NORM, UNPATCHED = "node", "no node", "F.layer_norm", "unpatched"
Arm = tuple[Callable[[], Any], bool]  # a call, and whether it goes through the node


def op_arms(rows: int, hidden: int, grad: bool) -> dict[str, Arm]:
    x, dy = torch.randn(2, rows, hidden)
    weight, bias = torch.randn(2, hidden)
    leaves = [t.requires_grad_(grad) for t in (x, weight, bias)]

    def run(norm: Callable[..., torch.Tensor]) -> None:
        y = norm(*leaves)
        if grad:
            torch.autograd.grad(y, leaves, dy)

    ours = partial(run, functional.rms_norm)
    other = partial(run, lambda x, w, b: F.layer_norm(x, (hidden,), w, b))
    return {LAYER_NORM: (other, False), WITH: (ours, True), WITHOUT: (ours, False)}


def encoder() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=512,
    )
    return transformers.BertModel(config), {"input_ids": torch.randint(5, 30522, (1, 16))}


def decoder() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(5, 50257, (1, 32))}


MODELS = {
    "encoder 6x384, 16 tokens": (encoder, False),
    "GPT-2 12x768, next token": (decoder, True),
}


def model_arms(model: nn.Module, batch: dict[str, Any], *, decode: bool) -> dict[str, Arm]:
    # each has weights of its own: shared ones would be in the caches for whoever comes second
    twins = {name: copy.deepcopy(model.eval()) for name in (UNPATCHED, WITH, WITHOUT)}
    arms: dict[str, Arm] = {}
    for name, used in twins.items():
        if name != UNPATCHED:
            patch_model(used, strategy="direct", verify=False)
        cache = used(**batch, use_cache=True).past_key_values if decode else None

        def run(used: Any = used, cache: Any = cache) -> torch.Tensor:
            if cache is None:
                return used(**batch)[0]
            last = batch["input_ids"][:, :1]
            logits = used(input_ids=last, past_key_values=cache, use_cache=True)[0]
            cache.crop(-1)
            return logits

        arms[name] = run, name == WITH
    return arms


def measure(case: str, arms: dict[str, Arm], args: argparse.Namespace) -> list[dict[str, Any]]:
    node = shortcut.call
    calls = {
        n: Call(run, partial(_use, node if uses else shortcut.none))
        for n, (run, uses) in arms.items()
    }
    try:
        found = interleaved(
            calls, WITHOUT, rounds=args.rounds, block_seconds=args.block_seconds, description=case
        )
    finally:
        shortcut.call = node
    rows = []
    for arm, summary in found.items():
        best = found[WITHOUT]["us_min"] / summary["us_min"]
        rows.append({"case": case, "arm": arm, **summary, "best": best})
        print(
            f"{case:<26} {arm:<13}{summary['us_p50']:>9.1f} us (p10 {summary['us_p10']:.1f}, "
            f"p90 {summary['us_p90']:.1f})  {ratio(summary)}  best {best:.3f}",
            flush=True,
        )
    return rows


def _use(node: Callable[..., Any]) -> None:
    shortcut.call = node


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("ops", "models"))
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--block_seconds", type=float, default=0.05)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    functional.rms_norm(torch.ones(1, 8))
    if not cpu_autograd.finish():
        sys.exit(f"there is no node here: {cpu_autograd.status()}")
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    if args.only != "models":
        for hidden, n_rows, grad in itertools.product((384, 768), (1, 64, 512), (False, True)):
            case = f"{n_rows} x {hidden}, {'both' if grad else 'forward'}"
            rows += measure(case, op_arms(n_rows, hidden, grad), args)
    if args.only != "ops":
        for case, (build, decode) in MODELS.items():
            with torch.no_grad():
                rows += measure(case, model_arms(*build(), decode=decode), args)
    finish({"environment": machine(torch.device("cpu"), argv), "rows": rows}, args.out)


if __name__ == "__main__":
    main()
