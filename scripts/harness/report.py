"""Results of a comparison as rows and as Markdown. Every number in the report is in the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.arms import CONTROL
from harness.results import spread

QUALITIES = ("loss", "perplexity", "token_accuracy")


def quality_rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per arm: quality before and after, over seeds, and the difference to the control.

    The difference is taken seed by seed: same data order, same dropout.
    """
    by_arm: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_arm.setdefault(run["arm"]["name"], []).append(run)
    control = {run["seed"]: run["after"]["loss"] for run in by_arm[CONTROL]}
    rows = []
    for name, same_arm in by_arm.items():
        row: dict[str, Any] = {
            "arm": name,
            "seeds": [run["seed"] for run in same_arm],
            "sites": same_arm[0]["patch"]["counts"] if same_arm[0]["patch"] else None,
        }
        for moment in ("before", "after"):
            for quality in QUALITIES:
                values = [run[moment][quality] for run in same_arm]
                row[f"{quality}_{moment}"] = spread(values)
        row["loss_difference"] = spread(
            [_difference(run["after"]["loss"], control[run["seed"]]) for run in same_arm]
        )
        rows.append(row)
    return rows


def _difference(value: float | None, control: float | None) -> float | None:
    return None if value is None or control is None else value - control


def quality_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: what the patch changed, and what training recovered."""
    header = [
        "arm",
        "norm sites",
        "loss before",
        "loss after",
        "after, minus control",
        "perplexity after",
        "token accuracy after",
    ]
    body = [
        [
            row["arm"],
            _sites(row["sites"]),
            _spread(row["loss_before"], ".4f"),
            _spread(row["loss_after"], ".4f"),
            "" if row["arm"] == CONTROL else _spread(row["loss_difference"], "+.4f"),
            _spread(row["perplexity_after"], ".2f"),
            _spread(row["token_accuracy_after"], ".4f"),
        ]
        for row in rows
    ]
    return markdown_table(header, body)


def throughput_table(throughput: dict[str, Any], mode: str) -> str:
    """Markdown: speed of every arm and its ratio to the control."""
    header = ["arm", "tokens/s", "ratio to control", "step p10 / p50 / p90, ms", "peak memory, MiB"]
    body = []
    for name, modes in throughput.items():
        row = modes[mode]
        times = " / ".join(f"{1000 * row[f'step_s_p{q}']:.1f}" for q in (10, 50, 90))
        peak = row["peak_memory_bytes"]
        body.append(
            [
                name,
                f"{row['tokens_per_s']:.0f}",
                "1" if name == CONTROL else _spread(row["speed_ratio"], ".3f"),
                times,
                "not measured" if peak is None else f"{peak / 2**20:.0f}",
            ]
        )
    return markdown_table(header, body)


def markdown_report(results: dict[str, Any], plots: Sequence[str]) -> str:
    """The whole report."""
    where, settings = results["environment"], results["settings"]
    seeds = sorted({run["seed"] for run in results["runs"]})
    steps = results["runs"][0]["steps"]
    parts = [
        f"# {', '.join(arm['name'] for arm in results['arms'])}",
        f"Every arm starts from {_start(settings)}, trains {steps} steps on the same batches in "
        f"the same order with the same dropout, and is scored on the same "
        f"{settings['validation_blocks']} validation blocks of {settings['block_size']} tokens. "
        f"Seeds: {', '.join(map(str, seeds))}. The control is `{CONTROL}`: the model as it was, "
        "trained in the same way.",
        "## Quality",
        quality_table(results["quality"]),
        "Loss is in nats per token. *Before* is right after patching, without any training. "
        "Median over seeds [smallest, largest]; differences are taken seed by seed. "
        "*Norm sites*: exact (same function up to rounding), approximate (the function changes), "
        "kept (untouched).",
    ]
    if results["throughput"]:
        for mode in ("training", "inference"):
            parts += [f"## Speed, {mode}", throughput_table(results["throughput"], mode)]
        parts.append(
            "Blocks of steps of all arms alternate in one process, every step is synchronised, "
            "warm-up is dropped. Ratio: tokens/s of the arm over the control's, median over rounds "
            "[smallest, largest]; above 1 is faster. An interval that contains 1 shows no "
            "difference."
        )
    parts += ["## Plots", *(f"![{name}]({name})" for name in plots)]
    parts += [
        "## Where this comes from",
        "\n".join(
            [
                f"- command: `{where['command']}`",
                f"- date: {where['date']}",
                f"- device: {where['device']}, {where['num_processes']} process(es), "
                f"{where['threads']} threads, mixed precision {where['mixed_precision']}",
                f"- code: {_code(where['git'])}",
                "- versions: "
                + ", ".join(f"{name} {version}" for name, version in where["versions"].items()),
                "- every number, every run and every step: `results.json`",
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Columns padded, so that it reads well on a terminal too."""
    rows = [list(header), *[list(row) for row in body]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def _spread(values: dict[str, float] | None, form: str) -> str:
    if values is None:
        return "diverged"
    texts = [format(values[key], form) for key in ("median", "min", "max")]
    return texts[0] if len(set(texts)) == 1 else f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _sites(counts: dict[str, int] | None) -> str:
    if counts is None:
        return "not patched"
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def _start(settings: dict[str, Any]) -> str:
    model = settings["model"]
    if model["model_name_or_path"]:
        return f"the same trained model (`{model['model_name_or_path']}`), patched"
    overrides = f" with {model['config_overrides']}" if model["config_overrides"] else ""
    return f"the same new weights (`{model['config_name']}`{overrides}; they depend on the seed)"


def _code(git: dict[str, Any] | None) -> str:
    if git is None:
        return "not in a git checkout"
    return git["commit"] + (" with uncommitted changes" if git["dirty"] else "")
