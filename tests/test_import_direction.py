"""Imports go one way (DESIGN: folders), and importing the package stays light."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_rmsnorm"

# a file may import from its own layer and the ones before it
LAYERS = [
    {"errors", "names"},
    {"fields", "validation"},
    {"ops"},
    {"functional"},
    {"modules", "recipes"},
    {"probing", "layers"},
    {"patching"},
    {"_transformers", "hub"},
    {"cli_options"},
    {"cli", "__main__", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> set[str]:
    """Names of the package's own parts that `path` imports, relative imports resolved."""
    depth = len(path.relative_to(PACKAGE).parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            found |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_rmsnorm."):
            found.add(node.module.split(".")[1])
    return {name for name in found if name in LEVEL}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.name))
def test_imports_go_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert part in LEVEL, f"{part} is new: give it a layer"
    above = {name for name in imports_of(path) if LEVEL[name] > LEVEL[part]}
    assert not above, f"{path.name} imports {above}, which lie above it"


def inside(package: Path) -> dict[str, set[str]]:
    """File -> the files of the same package that it imports, in functions too."""
    names = {path.stem for path in package.glob("*.py")} - {"__init__"}
    found: dict[str, set[str]] = {}
    for name in names:
        found[name] = set()
        for node in ast.walk(ast.parse((package / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                first = node.module.split(".")[0] if node.module else None
                found[name] |= ({first} if first else {a.name for a in node.names}) & names
    return found


@pytest.mark.parametrize("package", ["recipes", "probing", "patching", "hub"])
def test_no_package_has_a_circle_in_it(package: str) -> None:
    graphlib.TopologicalSorter(inside(PACKAGE / package)).prepare()


@pytest.mark.launch
def test_importing_the_package_is_light() -> None:
    code = (
        "import torch, time, sys; t = time.perf_counter(); import hf_rmsnorm; "
        "seconds = time.perf_counter() - t; "
        "print([m for m in ('triton', 'transformers') if m in sys.modules], seconds)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    loaded, seconds = zip(*(run.stdout.rsplit(" ", 1) for run in runs), strict=True)
    assert set(loaded) == {"[]"}
    assert min(float(s) for s in seconds) < 0.3
