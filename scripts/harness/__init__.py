"""What the scripts share.

Fine-tuning and comparing (`finetune_clm.py`, `compare.py`):

args         command-line flags, as dataclasses
errors       ScriptError and the exit status
arms         the norms a script knows, as one table, and `NAME[:strategy][:p]`
baselines    the paper's "no norm" and "L2 norm", for training from scratch
launch       Accelerator, and what accelerate launch asked for
models       config, tokenizer, model; checks on them
data         text to token blocks, split, order
training     the loop
checkpoints  save and resume in mid-run
evaluation   loss, perplexity, token accuracy
throughput   tokens/s of several arms, interleaved
results      JSON files, quantiles, environment
report       Markdown
plots        PNG

Benchmarks and `gpu_check.py`, which need torch and transformers alone:

benchmark       timing providers against each other, in turns
norms           the norms that bench_ops times, and the check each must pass first
op_trials       one shape of bench_ops: inputs, calls, who is left to be timed
sized_models    models of any size with random weights, for bench_models
goals           what must be reached, and whether rows of a benchmark show it
kernel_grid     one case of the norms against float64
kernel_checks   all checks of gpu_check, and its worker process
gpu_launching   checks of graphs, streams, repeats, kept kernels
gpu_behaviour   checks of everything else that wants a GPU
children        child processes with a deadline

Scripts import this package before anything else: from then on a package that is missing ends them
with a line that says which, and how to install it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

# What `pip install` installs all that the scripts may import with, from the repository's root.
_EXTRA = '".[scripts]"'


def missing(error: BaseException) -> str | None:
    """What to say of an error that is a package which is not installed; None of any other."""
    if not isinstance(error, ModuleNotFoundError) or not error.name or "." in error.name:
        return None  # a part of a package is missing: another version is needed, or it is broken
    script = Path(sys.argv[0]).name
    advice = f"pip install {'.' if error.name == 'hf_rmsnorm' else _EXTRA}"
    return f"error: {script} needs {error.name}, which is not installed: {advice}"


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if text := missing(error):
        print(text, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _hook
