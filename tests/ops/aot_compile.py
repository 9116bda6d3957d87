"""Compile, without a GPU, what the Triton backend would launch, and report what the cubins hold.

    python tests/ops/aot_compile.py                              # every tile, as a table
    python tests/ops/aot_compile.py 90:bfloat16:768:full,plain   # of one width only
    python tests/ops/aot_compile.py 90c:bfloat16:8192:full       # with clusters: Triton 3.8
    python tests/ops/aot_compile.py --json 90:bfloat16:768:full  # for tests

The interpreter must be off. The launches are recorded from the backend itself, on meta tensors, so
the table cannot go stale. Columns: "warps" are resident on one multiprocessor, "planned" the
programs the backend counts on there and "programs" those that fit; "bytes" are read or written
per value of a row (in the loop, where rows are looped over), and "128" is the share of them in
accesses of 128 bits, leaving out each row's own statistic; "in flight" is what the resident
programs can have asked for at a time. Exit status 1 if something is not as `problems` wants it.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_rmsnorm.ops import triton_backend
from hf_rmsnorm.ops.reference import Formula

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}
SHARED = {80: 164 * 1024, 90: 228 * 1024}  # bytes of shared memory of a multiprocessor
# Every tile: the widths are one of each, by number of tiles, warps and rows.
TABLE = [
    *(f"90:bfloat16:{n}:full,plain" for n in (7, 64, 96, 256, 512, 768, 1024, 2048, 4096, 5120)),
    *(f"90:bfloat16:{n}:full,plain" for n in (7168, 8192, 10240, 12288, 16384, 28672, 32768)),
    *(f"90:bfloat16:{n}:partial" for n in (768, 16384, 65536)),
    *(f"90:float32:{n}:full,plain" for n in (64, 768, 4096, 5120, 7168, 12288, 16384, 65536)),
    *("90:bfloat16:65536:full,plain", "90:bfloat16:768:frozen", "90:float16:4096:full"),
    *(f"80:bfloat16:{n}:full,plain" for n in (64, 768, 5120, 12288, 16384, 65536)),
]
# Widths whose accesses should all be of 128 bits.
EXACT = {64, 96, 256, 512, 768, 1024, 2048, 4096, 5120, 7168, 8192, 10240, 12288}
EXACT |= {16384, 28672, 32768, 65536}


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    constants: dict

    def key(self) -> tuple:
        """Equal for launches that differ in the hidden size but not in their tiles or parts."""
        sizes = {k: v for k, v in self.constants.items() if k not in ("N", "K", "FIRST", "DOTS")}
        n, bn = (self.constants[name] for name in ("N", "BN"))
        partial = self.constants.get("K", n) < n
        kinds = tuple(getattr(a, "dtype", a is None) for a in self.args)
        return self.kernel.__name__, *sizes.items(), n % bn == 0, partial, kinds


def recorded_launches(
    capability: int, dtype: torch.dtype, hidden: int, variant: str, clusters: bool = False
) -> list[Launch]:
    """What one forward and backward launch on 4096 rows.

    "full": residual, bias, offset, llama's rounding and all gradients. "plain": a weight.
    "frozen": no gradient but dx. "partial": as plain, the statistic over a sixteenth.
    """
    launches: list[Launch] = []
    triton_backend.launch = lambda kernel, grid, *args, **constants: launches.append(
        Launch(kernel, grid, args, constants)
    )
    triton_backend.processors = lambda device: 1
    triton_backend.clusters_work = lambda device: clusters
    triton_backend.shared_memory = lambda device: SHARED[capability]
    full = variant == "full"
    x, residual = torch.empty(2, 4096, hidden, dtype=dtype, device="meta")
    weight, bias = torch.empty(2, hidden, dtype=dtype, device="meta")
    if not full:
        residual = bias = None
    k = max(1, hidden // 16) if variant == "partial" else hidden
    formula = Formula(k, 1e-5, float(full), full)
    y, summed, rstd = triton_backend.forward(
        x, residual, weight, bias, formula, save_rstd=variant != "frozen"
    )
    if rstd is None:
        rstd = torch.empty(4096, 1, device="meta")
    triton_backend.backward(
        y,
        summed if full else None,
        summed,
        weight,
        rstd,
        formula,
        weight_grad=variant != "frozen",
        bias_grad=dtype if full else None,
    )
    return launches


def compile_one(launch: Launch, capability: int) -> Any:
    kernel, _, args, constants = launch
    names = {param.name for param in kernel.params}
    options = {k: v for k, v in constants.items() if k not in names}
    signature, constexprs, attrs = {}, {}, {}
    for i, (param, value) in enumerate(zip(kernel.params, args, strict=False)):
        if value is None or (isinstance(value, int) and value == 1 and not param.do_not_specialize):
            signature[param.name], constexprs[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = POINTERS[value.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "i32"
            if value % 16 == 0 and not param.do_not_specialize:
                attrs[(i,)] = [["tt.divisibility", 16]]
    for i, param in enumerate(kernel.params):
        if param.name in constants:
            signature[param.name], constexprs[(i,)] = "constexpr", constants[param.name]
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def inspect(launch: Launch, compiled: Any, capability: int) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage, sass = (
            subprocess.run(
                [str(CUOBJDUMP), flag, f.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    ptx, constants = compiled.asm["ptx"], launch.constants
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    body = row_loop(sass)
    widths = [access_bytes(op) for op in body if re.search(r"\b(LDG|LDGSTS|STG)\.E", op)]
    statistics = [4] * min(2, widths.count(4))
    warps, shared = constants["num_warps"], compiled.metadata.shared
    allocated = -(-registers // 8) * 8 * 32 * warps
    programs = min(65536 // allocated, 64 // warps, 32, SHARED[capability] // (shared + 1024))
    tile = constants.get("BM", 1) * constants["BN"] * constants.get("T", 1)
    tile //= constants.get("num_ctas", 1)
    row_pointers = ("p_x", "p_residual", "p_dy", "p_dsummed", "p_dweight_partials")
    loaded = sum(
        arg.element_size()
        for param, arg in zip(launch.kernel.params, launch.args, strict=False)
        if param.name in row_pointers and arg is not None
    )
    ahead = 2 if constants.get("STAGES", 1) > 1 else 1
    return {
        "registers": registers,
        "warps": warps * programs,
        "programs": programs,
        "planned": launch.grid[0] if "STAGES" in constants else 0,
        "spilled": stack,
        "bytes": sum(widths) * 32 * warps / tile,
        "wide": sum(w for w in widths if w == 16) / max(1, sum(widths) - sum(statistics)),
        "in_flight": programs * tile * loaded * ahead,
        "barriers": sum("BAR.SYNC" in op for op in body),
        "copies": sum("LDGSTS" in op for op in body),
        "instructions": len(body) * 32 * warps / tile,
        "mul_s32": len(re.findall(r"\bmul\.lo\.s32", ptx)),
        "f64": len(re.findall(r"\.f64", ptx)),
    }


def row_loop(sass: str) -> list[str]:
    """The instructions of the innermost loop that writes rows; all where there is none."""
    code = [(int(a, 16), op) for a, op in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)]
    jumps = [(a, re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", op)) for a, op in code]
    loops = sorted((a - int(m[1], 16), int(m[1], 16), a) for a, m in jumps if m)
    for size, start, end in loops:
        body = [op for a, op in code if start <= a <= end]
        if size > 0 and any("STG" in op for op in body):
            return body
    return [op for _, op in code]


def access_bytes(op: str) -> int:
    """By the opcode alone: the address registers are called .64 too."""
    opcode = re.search(r"\b(?:LDG|LDGSTS|STG)\.E\S*", op)[0]
    width = re.search(r"\.(128|64|[US]16|[US]8)\b", opcode)
    return {"128": 16, "64": 8, "16": 2, "8": 1}[width[1].lstrip("US")] if width else 4


def report_on(cases: list[str]) -> list[dict]:
    report, seen = [], set()
    for case in cases:
        capability, dtype, hidden, variants = case.split(":")
        for variant in variants.split(","):
            clusters, sm = capability.endswith("c"), int(capability.rstrip("c"))
            kind = getattr(torch, dtype)
            for launch in recorded_launches(sm, kind, int(hidden), variant, clusters):
                key = capability, *launch.key()
                if key in seen:
                    continue
                seen.add(key)
                c = launch.constants
                ctas = f"x{c['num_ctas']}" if "num_ctas" in c else ""
                labels = {
                    "capability": sm,
                    "dtype": dtype,
                    "hidden": int(hidden),
                    "variant": variant,
                    "kernel": launch.kernel.__name__ + (f"_{c['PART']}" if "PART" in c else ""),
                    "tile": f"{c.get('BM', 1)}x{c.get('T', 1)}x{c['BN']}/{c['num_warps']}{ctas}",
                    "stages": c.get("STAGES", 1),
                }
                compiled = compile_one(launch, sm)
                report.append(labels | inspect(launch, compiled, sm))
    return report


def problems(report: list[dict]) -> list[str]:
    """What is not as it should be."""
    found = []
    for r in report:
        # ptxas gives up a register of 33 by itself, so that a multiprocessor is full
        full = r["registers"] == 32 and r["warps"] == 64
        limits = {
            "spills": r["spilled"] > (8 if full else 0),
            "float64 arithmetic": r["f64"] > 0,
            "a 32-bit product may be a row offset": r["mul_s32"] > 0,
        }
        if r["hidden"] in EXACT:
            limits |= {
                "accesses narrower than 128 bits": r["wide"] < 0.9,
                "too little in flight": r["in_flight"] < 60 * 1024,
                "fewer resident than planned": r["planned"] > r["programs"],
                "does not load ahead": r["stages"] > 1 and not r["copies"],
            }
        # x, residual, sum and y, and two vectors; dy, the sum's gradient, the sum and dx
        passes = {"forward_tile": 6, "backward_rows_row": 4}.get(r["kernel"])
        if r["hidden"] in EXACT and r["variant"] == "full" and passes:
            size = 2 if r["dtype"].endswith("16") else 4
            limits["more than one pass"] = r["bytes"] > passes * size + 0.7
        found += [f"{what}: {r}" for what, broken in limits.items() if broken]
    return found


def print_table(report: list[dict]) -> None:
    same = (
        *("capability", "kernel", "dtype", "hidden", "variant", "tile", "stages", "registers"),
        *("warps", "planned", "programs", "spilled", "bytes"),
    )
    names = {name: name for name in same} | {"128": "wide", "in flight": "in_flight"}
    rows = [list(names)]
    for r in sorted(report, key=lambda r: (r["capability"], r["kernel"], r["dtype"], r["hidden"])):
        shown = r | {"wide": f"{r['wide']:.0%}", "in_flight": f"{r['in_flight'] // 1024} KB"}
        values = (shown[name] for name in names.values())
        rows.append([f"{v:.1f}" if isinstance(v, float) else str(v) for v in values])
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(size) for cell, size in zip(row, sizes, strict=True)))


if __name__ == "__main__":
    as_json = sys.argv[1:2] == ["--json"]
    report = report_on(sys.argv[1 + as_json :] or TABLE)
    if as_json:
        print(json.dumps({"report": report, "problems": problems(report)}))
    else:
        print_table(report)
        if found := problems(report):
            sys.exit("\n".join(found))
