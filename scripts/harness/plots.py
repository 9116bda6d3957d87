"""PNG plots of a comparison, and of the benchmarks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from harness.results import quantile

# Okabe and Ito's colours, which the colour-blind can tell apart; the control is black.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = "os^vDP*X"


def draw(results: dict[str, Any], folder: Path) -> list[str]:
    """Writes the plots into `folder`; returns their file names."""
    figures = {"loss_vs_steps.png": _loss_against_steps(results)}
    if results["throughput"]:
        figures["loss_vs_time.png"] = _loss_against_time(results)
        figures["throughput.png"] = _throughput_bars(results["throughput"])
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
    return list(figures)


def ops(document: dict[str, Any], folder: Path) -> list[str]:
    """Share of a copy's bandwidth against the hidden size: one file for each dtype and mode."""
    files = []
    rows = document["rows"]
    for dtype, mode in sorted({(row["dtype"], row["mode"]) for row in rows}):
        here = [row for row in rows if (row["dtype"], row["mode"]) == (dtype, mode)]
        files.append(f"ops-{dtype}-{mode}.png")
        _share_of_copy(here, f"{dtype}, {mode}, {document['environment']['device']}").savefig(
            folder / files[-1], dpi=120
        )
    return files


def _share_of_copy(rows: list[dict[str, Any]], title: str) -> Figure:
    across = list(dict.fromkeys(row["pass"] for row in rows))
    down = list(dict.fromkeys((row["op"], row["rows"]) for row in rows))
    names = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != "copy"]
    size = (4.5 * len(across) + 2, 3 * len(down) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(down), len(across), squeeze=False)
    for (op, n_rows), line in zip(down, grid, strict=True):
        for which, axes in zip(across, line, strict=True):
            axes.set_title(f"{op}, {which}, {n_rows} rows", fontsize=9)
            axes.set_xscale("log", base=2)
            axes.axhline(100, color="grey", linewidth=0.8)
            axes.grid(alpha=0.3)
            for index, name in enumerate(names):
                picked = (op, n_rows, which, name)
                keys = ("op", "rows", "pass", "provider")
                points = sorted(
                    (row["hidden"], row["percent_of_copy"])
                    for row in rows
                    if tuple(row[key] for key in keys) == picked
                )
                axes.plot(
                    [hidden for hidden, _ in points],
                    [share for _, share in points],
                    marker=MARKERS[index % len(MARKERS)],
                    markersize=4,
                    linewidth=2.5 if name.startswith("rms_norm") else 1,  # ours
                    label=name,
                    **_style(index),
                )
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(title)
    figure.supxlabel("hidden size")
    figure.supylabel("bandwidth, % of a copy of as many bytes")
    return figure


def models(document: dict[str, Any], folder: Path) -> list[str]:
    """Speed relative to the unpatched model, one panel for each model and precision."""
    rows = document["rows"]
    panels = list(dict.fromkeys((row["model"], row["precision"], row["compiled"]) for row in rows))
    figure = Figure(figsize=(5 * min(3, len(panels)), 3.2 * -(-len(panels) // 3)))
    figure.set_layout_engine("constrained")
    for position, panel in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // 3), min(3, len(panels)), position + 1)
        here = [row for row in rows if (row["model"], row["precision"], row["compiled"]) == panel]
        labels = [f"{row['arm']}\n{row['mode']}" for row in here]
        for index, row in enumerate(here):
            speed = row["speed"]
            below, above = speed["median"] - speed["min"], speed["max"] - speed["median"]
            arms = list(dict.fromkeys(r["arm"] for r in here))
            colour = COLOURS[arms.index(row["arm"]) % len(COLOURS)]
            axes.bar(index, speed["median"], yerr=[[below], [above]], color=colour, capsize=3)
        axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=6)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_title(f"{panel[0]}, {panel[1]}{', compiled' * panel[2]}", fontsize=9)
    figure.suptitle(f"speed over unpatched, {document['environment']['device']}", fontsize=10)
    figure.savefig(folder / "models.png", dpi=120)
    return ["models.png"]


def _loss_against_steps(results: dict[str, Any]) -> Figure:
    figure, axes = _axes("Validation loss against steps")
    for index, (_, curve) in enumerate(_curves(results).items()):
        _draw_curve(axes, index, curve, seconds_per_step=1)
    axes.set_xlabel("optimizer steps")
    return _finish(figure, axes, results)


def _loss_against_time(results: dict[str, Any]) -> Figure:
    figure, axes = _axes("Validation loss against training time")
    for index, (name, curve) in enumerate(_curves(results).items()):
        step = results["throughput"][name]["training"]["step_s_p50"]
        _draw_curve(axes, index, curve, seconds_per_step=step)
    axes.set_xlabel("seconds = steps x the arm's median step time, measured interleaved")
    return _finish(figure, axes, results)


def _throughput_bars(throughput: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for position, mode in enumerate(("training", "inference")):
        axes = figure.add_subplot(1, 2, position + 1)
        for index, (name, modes) in enumerate(throughput.items()):
            ratio = modes[mode]["speed_ratio"]
            below, above = ratio["median"] - ratio["min"], ratio["max"] - ratio["median"]
            axes.bar(
                name,
                ratio["median"],
                yerr=[[below], [above]],
                color=_style(index)["color"],
                alpha=0.8,
                capsize=4,
            )
            axes.annotate(
                f"{modes[mode]['tokens_per_s']:.0f}\ntokens/s",
                (index, 0),
                ha="center",
                va="bottom",
                color="white",
                fontsize=7,
            )
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_title(f"Speed, {mode}")
        axes.set_ylabel("tokens/s over the control's")
        axes.tick_params(axis="x", rotation=20)
    figure.supxlabel("bars: median over rounds; whiskers: smallest and largest", fontsize=8)
    return figure


def _curves(results: dict[str, Any]) -> dict[str, dict[int, list[float]]]:
    """By arm and step: the validation loss of every seed."""
    curves: dict[str, dict[int, list[float]]] = {arm["name"]: {} for arm in results["arms"]}
    for run in results["runs"]:
        curve = curves[run["arm"]["name"]]
        for point in run["evaluations"]:
            loss = math.nan if point["loss"] is None else point["loss"]
            curve.setdefault(point["step"], []).append(loss)
    return curves


def _draw_curve(
    axes: Any, index: int, curve: dict[int, list[float]], seconds_per_step: float
) -> None:
    x = [step * seconds_per_step for step in curve]
    axes.plot(
        x,
        [quantile(losses, 0.5) for losses in curve.values()],
        marker=".",
        **_style(index),
    )
    lowest, highest = map(min, curve.values()), map(max, curve.values())
    axes.fill_between(x, list(lowest), list(highest), color=_style(index)["color"], alpha=0.15)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
    }


def _axes(title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_ylabel("validation loss, nats per token")
    axes.grid(alpha=0.3)
    return figure, axes


def _finish(figure: Figure, axes: Any, results: dict[str, Any]) -> Figure:
    axes.legend(
        axes.lines,
        [arm["name"] for arm in results["arms"]],
        title="median over seeds,\nband: smallest to largest",
        fontsize=8,
        title_fontsize=8,
    )
    return figure
