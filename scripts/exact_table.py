"""Which LayerNorms become RMSNorm exactly, over the whole zoo of tiny models, and how exactly.

    python scripts/exact_table.py
    python scripts/exact_table.py --models 'gpt*' vit clip --reasons

"free" norms need weight folding only, "via" norms one of the k explicit mean subtractions, "kept"
ones stay LayerNorm. "d64" and "d32" are the largest relative changes of an output, on inputs the
probe has not seen: in float64 after the same conversion by the tests' own code, in float32 after
`patch_model(strategy="exact")`, which keeps what is exact on the paths probed alone; "floor" is the
original's own float32 error. "seconds" is planning.
Nothing is downloaded; the models come from `tests/model_zoo`. The last line is one JSON document.
"""

from __future__ import annotations

import harness  # noqa: F401  first, so that it can say what is missing

# isort: split
import argparse
import copy
import fnmatch
import functools
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from harness.results import machine
from torch import nn

import hf_rmsnorm
from hf_rmsnorm.probing import plain_copy, probe, relative_change, rounding_gap, run_outputs
from hf_rmsnorm.probing.optional_inputs import optional_inputs
from hf_rmsnorm.recipes import NormSpec, find_norms

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "probing")]

from conversion import convert  # noqa: E402
from model_zoo import INPUTS, ZOO, build, inputs_for  # noqa: E402

FRESH = ((3, 11), (1, 7))


def change(before: nn.Module, after: nn.Module, inputs: list[dict[str, Any]]) -> float | None:
    """Relative change of the outputs; None where the model cannot run in this dtype."""
    try:
        return relative_change(run_outputs(before, inputs), run_outputs(after, inputs))
    except Exception:  # a model's own forward may raise anything
        return None


def row(name: str) -> dict[str, Any]:
    model = build(name)
    inputs, fresh = inputs_for(name, model), inputs_for(name, model, FRESH, seed=50)
    own = name in INPUTS  # inputs that a user would have to pass
    more = None if own else functools.partial(optional_inputs, model, dict(inputs[0]))
    norms = {n: spec for n, spec in find_norms(model).items() if isinstance(spec, NormSpec)}
    start = time.perf_counter()
    result = probe(model, norms, inputs, more)
    seconds = time.perf_counter() - start

    double = plain_copy(convert(model, norms, result), torch.float64)
    d64 = change(plain_copy(model, torch.float64), double, fresh)
    d32, error = None, ""
    if result.exact.keys() - result.unproven.keys():
        try:
            patched = hf_rmsnorm.patch_model(
                copy.deepcopy(model), strategy="exact", inputs=inputs if own else None
            )
            d32 = change(model, patched, fresh)
        except Exception as problem:  # one model must not stop the table
            error = f"{type(problem).__name__}: {problem}"
    via = sum(len(center.serves) for center in result.centers)
    return {
        "model": name,
        "norms": len(result.exact) + len(result.kept),
        "free": len(result.exact) - via,
        "centers": len(result.centers),
        "via": via,
        "kept": len(result.kept),
        "unproven": len(result.unproven),
        "d64": d64,
        "d32": d32,
        "floor": rounding_gap(model, fresh),
        "probed_in": result.dtype,
        "seconds": round(seconds, 2),
        "reasons": result.kept,
        "error": error,
    }


def short(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=["*"], help="names or patterns")
    parser.add_argument("--reasons", action="store_true", help="say why norms are kept")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    names = [n for n in ZOO if any(fnmatch.fnmatchcase(n, pattern) for pattern in args.models)]
    if not names:
        parser.error(f"no model of the zoo matches {' '.join(args.models)}")
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")

    form = "{:<24}{:>6}{:>6}{:>9}{:>6}{:>8}{:>8}{:>8}{:>9}"
    print(form.format("model", "norms", "free", "k->via", "kept", "d64", "d32", "floor", "seconds"))
    rows = []
    for name in names:
        found = row(name)
        rows.append(found)
        cells = [found[key] for key in ("model", "norms", "free")]
        cells += [f"{found['centers']}->{found['via']}", found["kept"]]
        cells += [short(found[key]) for key in ("d64", "d32", "floor")]
        print(form.format(*cells, found["seconds"]), flush=True)
        if found["error"]:
            print(f"    patch_model failed: {found['error']}")
        if args.reasons:
            for norm, reason in found["reasons"].items():
                print(f"    {norm}: {reason}")
    total = {key: sum(r[key] for r in rows) for key in ("norms", "free", "centers", "via", "kept")}
    print(
        f"{len(rows)} models, {total['norms']} norms: {total['free']} free, {total['via']} via "
        f"{total['centers']} mean subtractions, {total['kept']} kept"
    )
    document = {"environment": machine(torch.device("cpu"), None), "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    sys.exit(any(r["error"] for r in rows))


if __name__ == "__main__":
    main()
