"""What the kernels must reach, and whether a benchmark's rows show it.

A goal is reached if every measured point reaches it; one without a point is "not measured".
The figures are for an H100, in bfloat16, and for a CPU with two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from harness.norms import CONTROL, OURS, is_ours

Row = dict[str, Any]
Cell = dict[str, Row]  # one shape, pass and mode, by provider
KEYS = ("op", "rows", "hidden", "dtype", "pass", "mode")
COMPILED = ("compiled F.layer_norm", "compiled F.rms_norm")
ANY = (0, 2**30)


def over(*names: str, ours: str = OURS) -> Callable[[Cell], float | None]:
    """Time of the fastest of these (none given: of every peer), over ours."""

    def value(cell: Cell) -> float | None:
        peers = [
            row["us_p50"]
            for name, row in cell.items()
            if (name in names if names else not is_ours(name) and name != "copy")
        ]
        return min(peers) / cell[ours]["us_p50"] if peers and ours in cell else None

    return value


def share_of_copy(cell: Cell) -> float | None:
    return cell[OURS]["percent_of_copy"] / 100 if OURS in cell else None


class Goal(NamedTuple):
    text: str
    needed: float
    value: Callable[[Cell], float | None]
    which: str  # pass
    op: str = "norm"
    mode: str = "graph"
    rows: tuple[int, int] = ANY
    hidden: tuple[int, int] = ANY
    device_type: str = "cuda"  # there in bfloat16 only

    def covers(self, cell: Row) -> bool:
        return (
            (cell["op"], cell["pass"], cell["mode"]) == (self.op, self.which, self.mode)
            and self.rows[0] <= cell["rows"] <= self.rows[1]
            and self.hidden[0] <= cell["hidden"] <= self.hidden[1]
            and (cell["dtype"] == "bfloat16" or self.device_type == "cpu")
        )


MANY, WIDE, KILO = (4096, 2**30), (8192, 2**30), (1024, 65536)
OF_OPS = (
    Goal("forward, speed over the fastest peer's", 0.97, over(), "forward"),
    Goal(
        "forward, share of copy bandwidth, 1K to 64K wide, 4096 rows and more",
        *(0.95, share_of_copy, "forward"),
        rows=MANY,
        hidden=KILO,
    ),
    Goal(
        "backward, speed over Liger's and ATen's, 8K wide and more, 4096 rows and more",
        *(1.5, over("Liger", "F.rms_norm"), "backward"),
        rows=MANY,
        hidden=WIDE,
    ),
    Goal(
        "backward, speed over Inductor's and quack's",
        *(1.0, over(*COMPILED, "quack"), "backward"),
    ),
    Goal(
        "eager forward and backward, speed over F.rms_norm, 1K wide and more, 4096 rows",
        *(1.0, over("F.rms_norm"), "both"),
        mode="eager",
        rows=(4096, 4096),
        hidden=(1024, 2**30),
    ),
    Goal(
        "add and norm, forward, share of copy bandwidth, 1K to 64K wide, 4096 rows and more",
        *(0.95, share_of_copy, "forward"),
        op="add_norm",
        rows=MANY,
        hidden=KILO,
    ),
    *(
        Goal(
            f"CPU, {label}, speed over F.layer_norm, 512 rows and more",
            *(1.1, over(CONTROL, ours="rms_norm, bias"), which),
            mode="eager",
            rows=(512, 2**30),
            device_type="cpu",
        )
        for which, label in (("forward", "forward"), ("both", "forward and backward"))
    ),
)


def of_ops(rows: list[Row], device_type: str) -> list[Row]:
    """The goals of one op, from the rows of bench_ops."""
    cells: dict[tuple, Cell] = {}
    for row in rows:
        cells.setdefault(tuple(row[key] for key in KEYS), {})[row["provider"]] = row
    found = []
    for goal in OF_OPS:
        points: list[tuple[str, float]] = []
        places: list[Row] = []
        for key, cell in cells.items():
            place = dict(zip(KEYS, key, strict=True))
            value = goal.value(cell)
            if value is not None and goal.device_type == device_type and goal.covers(place):
                points.append((f"{place['rows']}x{place['hidden']}", value))
                places.append(place)
        judged = _judged(goal.text, goal.needed, points)
        if points:
            ratios = [ratio for _, ratio in points]
            judged["worst_place"] = places[ratios.index(min(ratios))]
        found.append(judged)
    return found


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
