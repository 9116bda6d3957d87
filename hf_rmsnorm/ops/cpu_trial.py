"""Tries the CPU kernel: `python cpu_trial.py LIBRARY`, in a process that may crash.

Rows of 1 and -1 and weights of 1 and 2 have results that every dtype holds exactly.
"""

from __future__ import annotations

import ctypes
import struct
import sys

ROWS, HIDDEN, BLOCKS = 40, 70, 3
X = [1.0 if i % 3 else -1.0 for i in range(ROWS * HIDDEN)]
WEIGHT = [1.0 + i % 2 for i in range(HIDDEN)]
SCALED = [x * WEIGHT[i % HIDDEN] for i, x in enumerate(X)]
GRADIENT = [x * (WEIGHT[i % HIDDEN] - 1.5) for i, x in enumerate(X)]
SUMS = [sum(X[column::HIDDEN]) for column in range(HIDDEN)]
CODES = {"f32": "f", "f64": "d", "f16": "e"}


def packed(dtype: str, values: list[float]) -> ctypes.Array:
    if dtype == "bf16":
        wide = struct.pack(f"<{len(values)}f", *values)
        return ctypes.create_string_buffer(
            b"".join(wide[i + 2 : i + 4] for i in range(0, len(wide), 4)), 2 * len(values)
        )
    content = struct.pack(f"<{len(values)}{CODES[dtype]}", *values)
    return ctypes.create_string_buffer(content, len(content))


def wrong(library: ctypes.CDLL, pair: str) -> str | None:
    """Which result of this pair of dtypes is not what it must be."""
    x_type, out = pair.split("_")
    compute = "f64" if x_type == "f64" else "f32"
    forward = getattr(library, f"forward_{pair}", None)
    if forward is None:  # float16, with an older compiler
        return None
    n, d = ctypes.c_ssize_t, ctypes.c_double
    x, weight = packed(x_type, X), packed(compute, WEIGHT)
    y, rstd = packed(out, [0.0] * len(X)), packed(compute, [0.0] * ROWS)
    sizes = [n(v) for v in (ROWS, HIDDEN, HIDDEN, HIDDEN, 0)]
    forward(x, None, weight, None, y, None, rstd, *sizes, d(0.0), d(0.0), 0, 2)
    if y.raw != packed(out, SCALED).raw or rstd.raw != packed(compute, [1.0] * ROWS).raw:
        return f"forward_{pair}"

    dx, dy = packed(x_type, [0.0] * len(X)), packed(out, X)
    dweight, dbias = (packed(compute, [0.0] * HIDDEN) for _ in range(2))
    partials = [packed(compute, [0.0] * HIDDEN * BLOCKS) for _ in range(2)]
    sizes = [n(v) for v in (ROWS, HIDDEN, HIDDEN, HIDDEN, 0, HIDDEN)]
    getattr(library, f"backward_{pair}")(
        *(dy, None, x, weight, rstd, dx, dweight, dbias, *partials),
        *(*sizes, d(0.0), 0, n(BLOCKS), 2),
    )
    found = dx.raw, dweight.raw, dbias.raw
    expected = (x_type, GRADIENT), (compute, [float(ROWS)] * HIDDEN), (compute, SUMS)
    same = all(a == packed(*b).raw for a, b in zip(found, expected, strict=True))
    return None if same else f"backward_{pair}"


if __name__ == "__main__":
    loaded = ctypes.CDLL(sys.argv[1])
    pairs = [f"{x}_{y}" for x in (*CODES, "bf16") for y in (*CODES, "bf16")]
    if bad := [name for pair in pairs if (name := wrong(loaded, pair))]:
        sys.exit(f"wrong results from {', '.join(bad)}")
