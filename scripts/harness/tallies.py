"""What the parts of `faults.py` share: models, processes, disks, and what is counted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from harness.injecting import Injected, InjectedError
from hf_rmsnorm import PatchError, VerificationError, patch_model

TYPED = (PatchError, VerificationError, OSError, ImportError)
KINDS: dict[str, dict[str, Any]] = {
    "stock": {"verify": False},
    "own": {"norm": "prmsnorm", "p": 0.25, "strategy": "direct"},
    "wide": {"post_norm": "extra_neuron", "verify": False},
}
TOKENS = {"input_ids": torch.tensor([[5, 9, 2, 40, 11, 7]])}
ERRORS = (Injected, InjectedError)
THESIS = "not of a checkpoint"


@dataclass
class Tally:
    """What came of the tries of one part: all lists should stay empty."""

    tries: int = 0
    refused: int = 0
    raw: list[str] = field(default_factory=list)
    half: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    @property
    def faults(self) -> int:
        return sum(map(len, (self.raw, self.half, self.random, self.lost)))

    def attempt(self, label: str, action: Callable[..., Any], *arguments: Any) -> Any:
        """What `action` gives, or None where it is refused with an error that says what it is."""
        try:
            return action(*arguments)
        except TYPED as error:
            self.refused += 1
            if not str(error):
                self.raw.append(f"{label}: {error!r} says nothing")
        except (Injected, InjectedError):
            raise
        except BaseException as error:
            self.raw.append(f"{label}: {error!r}"[:300])
        return None


def model(kind: str, seed: int = 0) -> Any:
    """A tiny model, all of its weights random: a BERT where one is to be widened, else a GPT-2."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 53}
    if kind == "wide":
        sizes |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 20, "max_position_embeddings": 16}
        made: Any = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
    else:
        sizes |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
        ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
        made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **ids))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


def outputs(found: Any) -> torch.Tensor:
    with torch.no_grad():
        return found(**TOKENS)[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def points(total: int, count: int, seed: int) -> list[int]:
    """`count` of the lines 1 to `total`, spread evenly; all if there are no more."""
    if count >= total:
        return list(range(1, total + 1))
    return sorted(random.Random(seed).sample(range(1, total + 1), count))


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def patched(kind: str) -> Any:
    return patch_model(model(kind), **KINDS[kind])


def old_model(kind: str) -> Any:
    return patch_model(model(kind, seed=1), strategy="direct")


def check_thesis(tally: Tally, label: str, folder: Path) -> None:
    path = folder / "thesis.txt"
    if not path.is_file() or path.read_text() != THESIS:
        tally.lost.append(f"{label}: thesis.txt")


def in_child(action: Callable[[], object], kill_after: float | None = None) -> str:
    """Run `action` in a fork; what was wrong, empty if nothing, "killed" if it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        said = ""
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            action()
        except BaseException as error:
            said = f"{'typed' if isinstance(error, TYPED) and str(error) else 'raw'} {error!r}"
        os.write(writing, said.encode()[:4000])
        os._exit(0)
    os.close(writing)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    return said if not status else "killed" if status == signal.SIGKILL else f"raw status {status}"


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of that size at `folder`, where this process may mount one."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = not subprocess.run(mount, capture_output=True, check=False).returncode
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
