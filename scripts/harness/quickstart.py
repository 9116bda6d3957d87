"""What quickstart.sh runs in its environment: text, tokenizer, pretraining, comparison."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SCRIPTS = Path(__file__).parents[1]
FOLDER = Path("runs/quickstart")
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 1024

MODEL = (
    "n_layer=4,n_embd=256,n_head=4,n_positions=128,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0"
)
PRETRAINING = f"""
    --config_name gpt2 --config_overrides {MODEL}
    --max_train_steps 360 --learning_rate 1e-3 --lr_scheduler_type constant_with_warmup
    --num_warmup_steps 20 --weight_decay 0.1 --per_device_train_batch_size 4 --eval_steps 120
    --overwrite_output_dir
"""
COMPARISON = """
    --arms layernorm rmsnorm rmsnorm:direct prmsnorm:0.0625
    --seeds 0 1
    --max_train_steps 60 --learning_rate 5e-4 --num_warmup_steps 6
    --weight_decay 0.1 --per_device_train_batch_size 4 --eval_steps 15
    --throughput_rounds 9 --throughput_steps 4
"""


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    text, tokenizer, pretrained = FOLDER / "topics.txt", FOLDER / "tokenizer", FOLDER / "gpt2"
    if not (tokenizer / "tokenizer.json").is_file():
        text.write_text("\n\n".join(topics[name] for name in sorted(topics)))
        train_tokenizer(text, tokenizer)
        print(f"{text.stat().st_size / 1e6:.2f} MB of text, {VOCABULARY} tokens: {tokenizer}")
    if not (pretrained / "all_results.json").is_file():
        run(
            "finetune_clm.py",
            *PRETRAINING.split(),
            *("--tokenizer_name", str(tokenizer), "--train_file", str(text)),
            *("--output_dir", str(pretrained)),
        )
    run(
        "compare.py",
        *("--model_name_or_path", str(pretrained), "--train_file", str(text)),
        *COMPARISON.split(),
        *("--output_dir", str(FOLDER / "comparison")),
        *sys.argv[1:],
    )


def train_tokenizer(text: Path, folder: Path, vocabulary: int = VOCABULARY) -> None:
    """A byte-level BPE tokenizer, learned from `text`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train([str(text)], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    ).save_pretrained(folder)


def run(script: str, *arguments: str) -> None:
    """Runs a script of this project, offline, with its caches in the run's folder."""
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    print(f"\n$ python scripts/{script} {shlex.join(arguments)}\n", flush=True)
    caches = {"HF_HOME": str(FOLDER.resolve() / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env={**os.environ, **caches}, check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
