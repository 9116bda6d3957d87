"""Writes our kernels as a folder for the Hub's kernel repositories (the `kernels` package).

    python scripts/export_kernel.py --out hf-rmsnorm-kernel --repo_id USER/hf-rmsnorm
    hf upload USER/hf-rmsnorm hf-rmsnorm-kernel --type kernel --revision v1

The package's own files are copied as they are: `layers.py`, `functional.py` and whatever they
import from the package. Only the CPU's compiled backend is left out: on a CPU plain PyTorch runs.
The folder holds `build/torch-<backend>`, which `kernels` loads, and `build.toml` with `torch-ext`,
the form that `kernel-builder` starts from.
"""

from __future__ import annotations

import harness  # noqa: F401  first, so that it can say what is missing

# isort: split
import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
import string
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.errors import ScriptError, run

import hf_rmsnorm

PACKAGE = Path(hf_rmsnorm.__file__).parent
ROOTS = ("layers.py", "functional.py")
BACKENDS = ("cuda", "rocm", "xpu", "cpu")
ALLOWED = sys.stdlib_module_names | {"torch", "triton"}

INIT = '''\
"""RMSNorm and pRMSNorm: `rms_norm`, `add_rms_norm`, and the layers that `kernels` binds.

Written by scripts/export_kernel.py of hf_rmsnorm {version}; every other file is the package's own.
"""

from . import layers
from .functional import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "layers", "rms_norm"]
'''

LEFT_OUT = "ops/cpu_*.py"
STUB = '''\
"""Left out: a kernel from the Hub starts no compiler of its own. On a CPU plain PyTorch runs."""


def library() -> None:
    return None
'''

BUILD = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "Apache-2.0"
backends = [{backends}]

[general.hub]
repo-id = "{repo_id}"

[torch-noarch]
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; new or empty")
    parser.add_argument("--name", default="hf-rmsnorm", help="name of the kernel (%(default)s)")
    parser.add_argument("--repo_id", help="repository it will be in (USER/NAME, left to fill in)")
    parser.add_argument("--version", type=int, default=1, help="of the kernel (%(default)s)")
    args = parser.parse_args(argv)
    if not re.fullmatch("[a-z][-a-z0-9]*[a-z0-9]", args.name):
        raise ScriptError(
            f"--name {args.name!r}: use lower-case letters, digits and dashes, a letter first"
        )
    if args.version < 0:
        raise ScriptError(f"--version {args.version}: use 0 or a positive number")
    repo_id = args.repo_id or f"USER/{args.name}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ScriptError(f"--repo_id {repo_id!r}: use USER/NAME")
    out: Path = args.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ScriptError(f"--out {out} is there already; remove it, or name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export", dir=out.parent) as folder:
        beside = Path(folder) / "kernel"
        export(beside, args.name, repo_id, args.version)
        if out.exists():
            out.rmdir()
        beside.rename(out)
    print(f"wrote {out}: {', '.join(f'torch-{backend}' for backend in BACKENDS)}")


def export(out: Path, name: str, repo_id: str, version: int) -> None:
    """Write the whole folder `out`, which must not exist."""
    files = sources()
    written = {"name": name, "repo_id": repo_id, "version": version}
    write(out / "torch-ext" / name.replace("-", "_"), files)
    for backend in BACKENDS:
        folder = out / "build" / f"torch-{backend}"
        write(folder, files)
        metadata = {
            "name": name,
            "id": f"_{name.replace('-', '_')}_{backend}_{fingerprint(files)}",
            "version": version,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": {n: digest(t) for n, t in files.items()}},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    (out / "build.toml").write_text(BUILD.format(**written, backends=backends))
    template = string.Template((Path(__file__).parent / "harness" / "kernel_card.md").read_text())
    card = template.substitute(written, package=hf_rmsnorm.__version__)
    for target in ("CARD.md", "README.md"):  # for kernel-builder, and for the Hub
        (out / target).write_text(card)
    licence = PACKAGE.parent / "LICENSE"
    if licence.exists():
        shutil.copyfile(licence, out / "LICENSE")


def sources() -> dict[str, str]:
    """The kernel's Python files by path: `ROOTS`, and all that they import from the package.

    Raises:
        ScriptError: a file imports what a kernel may not, or registers operators under a fixed
            name, of which two versions of the kernel could not be loaded.
    """
    found = {"__init__.py": INIT.format(version=hf_rmsnorm.__version__)}
    waiting = list(ROOTS)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        if Path(name).match(LEFT_OUT):
            found[name] = STUB
            continue
        found[name] = (PACKAGE / name).read_text(encoding="utf-8")
        tree = ast.parse(found[name])
        check(name, tree)
        waiting += imported(name, tree)
    return dict(sorted(found.items()))


def imported(name: str, tree: ast.Module) -> Iterator[str]:
    """Paths, relative to the package, of the modules that the file `name` imports from it."""
    folder = Path(name).parent
    if folder != Path():
        yield str(folder / "__init__.py")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [folder, *folder.parents][node.level - 1]
            base = base.joinpath(*(node.module or "").split("."))
            for path in (base, *(base / alias.name for alias in node.names)):
                for file in (f"{path}.py", f"{path}/__init__.py"):
                    if path != Path() and (PACKAGE / file).is_file():
                        yield file


def check(name: str, tree: ast.Module) -> None:
    for node in ast.walk(tree):
        absolute: list[str] = []
        if isinstance(node, ast.Import):
            absolute = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            absolute = [str(node.module)]
        for module in absolute:
            if module.partition(".")[0] not in ALLOWED:
                raise ScriptError(
                    f"{PACKAGE.name}/{name} imports {module}; a kernel may import the standard "
                    "library, torch, triton, and its own files by relative imports"
                )
        said = getattr(node, "value" if isinstance(node, ast.Constant) else "attr", None)
        if isinstance(said, str) and re.match(rf"{PACKAGE.name}\w*(::|$)", said):
            raise ScriptError(
                f"{PACKAGE.name}/{name} names {said!r}: operators must be "
                "under the first part of __name__, which differs for each version of a kernel"
            )


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def fingerprint(files: dict[str, str]) -> str:
    """Differs for every other content: two versions can be loaded into one process."""
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(run(main))
