"""Whole models, patched against unpatched: a training step and inference, interleaved.

    python scripts/bench_models.py                               # GPT-2, BERT, ViT at 768 wide
    python scripts/bench_models.py --models gpt2 --layers 12 --batch 4
    python scripts/bench_models.py --mixed_precision bf16 --torch_compile --out models.json

Models are built from their configs with random weights, 768 wide by default, patched with
`patch_model` in each way, and take turns in one process. "speed" is the unpatched model's time over
the arm's, within each round: median and range; above 1 is faster than the unpatched model. A
training step is forward, backward and AdamW. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from harness.benchmark import add_flags, finish, interleaved, ratio
from harness.results import environment
from torch import nn

import hf_rmsnorm

CONTROL = "unpatched"
ARMS: dict[str, dict[str, Any] | None] = {
    CONTROL: None,
    "rmsnorm": {"norm": "rmsnorm"},
    "rmsnorm direct": {"norm": "rmsnorm", "strategy": "direct"},
    "prmsnorm 1/16": {"norm": "prmsnorm", "strategy": "direct"},
}


def build(name: str, args: argparse.Namespace) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model with random weights, and one batch with labels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": args.width, "num_hidden_layers": args.layers}
    heads, feed_forward = max(1, args.width // 64), 4 * args.width
    tokens = torch.randint(5, 8000, (args.batch, args.length))
    model: Any
    if name == "gpt2":
        config: Any = transformers.GPT2Config(
            n_embd=args.width,
            n_layer=args.layers,
            n_head=heads,
            vocab_size=8192,
            n_positions=args.length,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
        model = transformers.GPT2LMHeadModel(config)
    elif name == "bert":
        config = transformers.BertConfig(
            **sizes,
            num_attention_heads=heads,
            intermediate_size=feed_forward,
            vocab_size=8192,
            max_position_embeddings=args.length,
        )
        model = transformers.BertForMaskedLM(config)
    else:
        config = transformers.ViTConfig(
            **sizes, num_attention_heads=heads, intermediate_size=feed_forward
        )
        config.num_labels = 10
        model = transformers.ViTForImageClassification(config)
        batch = max(1, args.batch // 2)
        pixels = torch.randn(batch, 3, config.image_size, config.image_size)
        return model, {"pixel_values": pixels, "labels": torch.randint(0, 10, (batch,))}
    return model, {"input_ids": tokens, "labels": tokens}


def steps(model: nn.Module, batch: dict[str, torch.Tensor], accelerator: Accelerator) -> Any:
    """`(training step, inference)` of one arm, as calls without arguments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model, optimizer = accelerator.prepare(model, optimizer)

    def train() -> None:
        model.train()
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()

    def infer() -> None:
        model.eval()
        with torch.no_grad():
            model(**{k: v for k, v in batch.items() if k != "labels"})

    return train, infer


def measure(name: str, accelerator: Accelerator, args: argparse.Namespace) -> list[dict[str, Any]]:
    model, batch = build(name, args)
    batch = {key: value.to(accelerator.device) for key, value in batch.items()}
    calls: dict[str, dict[str, Callable[[], None]]] = {"training": {}, "inference": {}}
    for arm, arguments in ARMS.items():
        twin = copy.deepcopy(model)
        if arguments is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=r".*changed approximately")
                hf_rmsnorm.patch_model(twin, verify=False, **arguments)
        calls["training"][arm], calls["inference"][arm] = steps(twin, batch, accelerator)
    found = []
    for mode, providers in calls.items():
        summaries = interleaved(
            providers,
            CONTROL,
            rounds=args.rounds,
            block_seconds=args.block_seconds,
            description=f"{name} {mode}",
        )
        for arm, summary in summaries.items():
            found.append({"model": name, "mode": mode, "arm": arm, **summary})
            print(
                f"{name:>6} {mode:>9}  {arm:<15}{summary['us_p50'] / 1e3:>9.1f} ms  "
                f"{ratio(summary)}",
                flush=True,
            )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = ("gpt2", "bert", "vit")
    parser.add_argument("--models", nargs="+", choices=models, default=list(models))
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="sequences; half as many images")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--torch_compile", action="store_true")
    add_flags(parser, rounds=9, block_seconds=1.0)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.mixed_precision,
        dynamo_backend="inductor" if args.torch_compile else "no",
    )
    rows = [row for name in args.models for row in measure(name, accelerator, args)]
    sizes = {k: getattr(args, k) for k in ("width", "layers", "batch", "length", "torch_compile")}
    document = {"environment": environment(accelerator, argv), "sizes": sizes, "rows": rows}
    finish(document, args.out)


if __name__ == "__main__":
    main()
