"""What the kernels must reach, and whether a benchmark's rows show it.

A goal is reached if every measured point reaches it; one without a point is "not measured".
The figures are for an H100, in bfloat16, and for a CPU with two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from harness.norms import CONTROL, OURS, is_ours

Row = dict[str, Any]
COMPILED = ("compiled F.layer_norm", "compiled F.rms_norm")


def of_ops(rows: list[Row], device_type: str) -> list[Row]:
    """The goals of one op, from the rows of bench_ops."""
    cells: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("op", "rows", "hidden", "dtype", "pass", "mode"))
        cells.setdefault(key, {})[row["provider"]] = row

    def points(
        value: Callable[[dict[str, Row]], float | None],
        *,
        min_rows: int = 0,
        max_rows: int = 2**30,
        **wanted: Any,
    ) -> list[tuple[str, float]]:
        found = []
        for (op, n_rows, hidden, dtype, which, mode), cell in cells.items():
            here = {"op": op, "dtype": dtype, "which": which, "mode": mode}
            low, high = wanted.get("hidden", (0, 2**30))
            fits = all(here[k] == v for k, v in wanted.items() if k != "hidden")
            if fits and low <= hidden <= high and min_rows <= n_rows <= max_rows:
                ratio = value(cell)
                if ratio is not None:
                    found.append((f"{n_rows}x{hidden}", ratio))
        return found

    def against(names: Iterable[str] | None) -> Callable[[dict[str, Row]], float | None]:
        """Time of the fastest of these (None: every peer), over ours."""

        def value(cell: dict[str, Row]) -> float | None:
            peers = [
                row["us_p50"]
                for name, row in cell.items()
                if (name in names if names else not is_ours(name) and name != "copy")
            ]
            return min(peers) / cell[OURS]["us_p50"] if peers and OURS in cell else None

        return value

    def of_copy(cell: dict[str, Row]) -> float | None:
        return cell[OURS]["percent_of_copy"] / 100 if OURS in cell else None

    def against_layer_norm(cell: dict[str, Row]) -> float | None:
        ours, control = cell.get("rms_norm, bias"), cell.get(CONTROL)
        return control["us_p50"] / ours["us_p50"] if ours and control else None

    gpu: dict[str, Any] = {"op": "norm", "dtype": "bfloat16", "mode": "graph"}
    wide, kilo = (8192, 2**30), (1024, 65536)
    on_gpu = [
        (
            "forward, speed over the fastest peer's",
            0.97,
            points(against(None), which="forward", **gpu),
        ),
        (
            "forward, share of copy bandwidth, 1K to 64K wide, 4096 rows and more",
            0.95,
            points(of_copy, which="forward", hidden=kilo, min_rows=4096, **gpu),
        ),
        (
            "backward, speed over Liger's and ATen's, 8K wide and more, 4096 rows and more",
            1.5,
            points(
                against(["Liger", "F.rms_norm"]),
                which="backward",
                hidden=wide,
                min_rows=4096,
                **gpu,
            ),
        ),
        (
            "backward, speed over Inductor's and quack's",
            1.0,
            points(against([*COMPILED, "quack"]), which="backward", **gpu),
        ),
        (
            "eager forward and backward, speed over F.rms_norm, 1K wide and more, 4096 rows",
            1.0,
            points(
                against(["F.rms_norm"]),
                which="both",
                hidden=(1024, 2**30),
                min_rows=4096,
                max_rows=4096,
                **gpu | {"mode": "eager"},
            ),
        ),
        (
            "add and norm, forward, share of copy bandwidth, 1K to 64K wide, 4096 rows and more",
            0.95,
            points(
                of_copy, which="forward", hidden=kilo, min_rows=4096, **gpu | {"op": "add_norm"}
            ),
        ),
    ]
    cpu: dict[str, Any] = {"op": "norm", "mode": "eager", "min_rows": 512}
    on_cpu = [
        (
            f"CPU, {label}, speed over F.layer_norm, 512 rows and more",
            1.1,
            points(against_layer_norm, which=which, **cpu),
        )
        for which, label in (("forward", "forward"), ("both", "forward and backward"))
    ]
    is_gpu = device_type == "cuda"
    return [
        *(_judged(name, needed, found if is_gpu else []) for name, needed, found in on_gpu),
        *(_judged(name, needed, [] if is_gpu else found) for name, needed, found in on_cpu),
    ]


def of_models(rows: list[Row], device_type: str) -> list[Row]:
    """The goals of whole models, from the rows of bench_models."""

    def points(models: Iterable[str], mode: str, precision: str) -> list[tuple[str, float]]:
        return [
            (f"{row['model']} {row['layers']}x{row['width']}", row["speed"]["median"])
            for row in rows
            if row["model"] in models
            and (row["mode"], row["precision"], row["compiled"]) == (mode, precision, False)
            and row["width"] == 768
            and row["arm"] == "rmsnorm"
        ]

    gpt2 = [
        row
        for row in points(("gpt2",), "training", "autocast")
        if device_type == "cuda" and row[0] == "gpt2 12x768"
    ]
    found = [_judged("GPT-2-small, autocast bf16 training, eager, speed over unpatched", 1.1, gpt2)]
    for mode in ("training", "inference"):
        here = points(("gpt2", "bert", "vit"), mode, "fp32") if device_type == "cpu" else []
        found.append(_judged(f"CPU, {mode}, 768 wide, speed over unpatched", 1.0, here))
    return found


def _judged(name: str, needed: float, points: list[tuple[str, float]]) -> Row:
    goal: Row = {"goal": name, "needed": needed, "points": len(points), "status": "not measured"}
    if not points:
        return goal
    where, worst = min(points, key=lambda point: point[1])
    reached = [point for point in points if point[1] >= needed]
    goal |= {"reached_at": len(reached), "worst": worst, "worst_at": where, "values": dict(points)}
    return goal | {"status": "reached" if len(reached) == len(points) else "missed"}


def show(found: list[Row]) -> None:
    print("goals:")
    for goal in found:
        text = f"  {goal['status']:<13} {goal['goal']}: needed {goal['needed']:.2f}"
        if goal["points"]:
            text += f", worst {goal['worst']:.2f} at {goal['worst_at']}"
        if goal["status"] == "missed":
            by = 100 * (1 - goal["worst"] / goal["needed"])
            text += (
                f", missed by {by:.0f}%; {goal['reached_at']} of {goal['points']} points reach it"
            )
        print(text, flush=True)
