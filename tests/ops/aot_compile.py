"""Compile, without a GPU, what the Triton backend would launch, and report what the cubins hold.

Run as a script (the interpreter must be off): `python aot_compile.py 90 bfloat16:768 ...`.
The launches are recorded from the backend itself, on meta tensors, so the table cannot go stale.
The last line of stdout is a JSON list with one entry per kernel.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_rmsnorm.ops import triton_backend
from hf_rmsnorm.ops.reference import Formula

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}
SASS = {"local_loads": "LDL", "local_stores": "STL", "vector_loads": "LDG.E.128"}


def recorded_launches(dtype: torch.dtype, hidden: int, everything: bool) -> list[tuple]:
    """What one forward and backward launch: with residual, bias and all gradients, or bare."""
    launches: list[tuple] = []
    triton_backend.launch = lambda kernel, grid, *args, **constants: launches.append(
        (kernel, args, constants)
    )
    x, residual = torch.empty(2, 4096, hidden, dtype=dtype, device="meta")
    weight, bias = torch.empty(2, hidden, dtype=dtype, device="meta")
    if not everything:
        residual = bias = None
    formula = Formula(max(1, hidden // 16), 1e-5, float(everything), everything)
    y, summed, rstd = triton_backend.forward(x, residual, weight, bias, formula, save_rstd=True)
    triton_backend.backward(
        y,
        summed if everything else None,
        summed,
        weight,
        rstd,
        formula,
        weight_grad=everything,
        bias_grad=dtype if everything else None,
    )
    return launches


def compile_one(kernel, args, constants, capability: int):
    options = {"num_warps": constants.pop("num_warps")}
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


def inspect(compiled) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        tool = str(BIN / "cuobjdump")
        usage, sass = (
            subprocess.run([tool, flag, f.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    ptx = compiled.asm["ptx"]
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    counts = {name: sass.count(op) for name, op in SASS.items()}
    return {
        "registers": int(registers),
        "stack": int(stack),
        **counts,
        "loads": len(re.findall(r"\bLDG\b", sass)),
        "mul_s32": len(re.findall(r"\bmul\.lo\.s32", ptx)),
        "f64": len(re.findall(r"\.f64", ptx)),
    }


def main(capability: int, cases: list[str]) -> list[dict]:
    report, seen = [], set()
    for case in cases:
        dtype, hidden = case.split(":")
        for everything in (True, False):
            for kernel, args, constants in recorded_launches(
                getattr(torch, dtype), int(hidden), everything
            ):
                name = kernel.__name__
                # without gradients a kernel does strictly less; a sample of those is enough, and
                # the reduction hardly depends on the width
                repeats = name == "reduce_partials" and name in seen
                if repeats or not (everything or hidden in ("512", "8192")):
                    continue
                seen.add(name)
                labels = {"case": case, "hidden": int(hidden), "kernel": name, "full": everything}
                report.append(labels | inspect(compile_one(kernel, args, constants, capability)))
    return report


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2:])))
