"""The exported Hub kernel: loaded by the real `kernels`, without the package, same numbers."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import export_kernel
import kernels
import pytest
import torch
import transformers
from harness.errors import ScriptError
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
from kernels._rust import Build, Digest, Metadata
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import hf_rmsnorm
from hf_rmsnorm.hub.kernels import mapping

PACKAGE = Path(hf_rmsnorm.__file__).parent
STUBS = {"ops/cpu_autograd.py", "ops/cpu_backend.py", "ops/cpu_build.py"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "kernel"
    export_kernel.main(["--out", str(out), "--repo_id", "someone/norms", "--version", "3"])
    return out


def test_the_real_package_accepts_every_part(exported: Path) -> None:
    backends = Build.open(exported).general.backends
    assert {str(b).lower() for b in backends} == {"cuda", "rocm", "xpu", "cpu"}
    variants = sorted((exported / "build").iterdir())
    assert len(variants) == 4
    for folder in variants:
        metadata = Metadata.read_from_file(folder / "metadata.json")
        assert folder.name == f"torch-{str(metadata.backend.backend_type).lower()}"
        assert (metadata.name.python_name, metadata.version) == ("hf_rmsnorm", 3)
        assert metadata.id.isidentifier()
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, folder))
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n") and "$" not in card
    assert 'get_kernel("someone/norms", version=3, trust_remote_code=True)' in card


def test_the_files_are_the_packages_own(exported: Path) -> None:
    folder = exported / "torch-ext" / "hf_rmsnorm"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
    triton = {f"ops/{path.name}" for path in (PACKAGE / "ops").glob("triton_*.py")}
    assert {"layers.py", "functional.py", "ops/reference.py"} | triton | STUBS <= names
    for name in names - STUBS - {"__init__.py"}:
        assert (folder / name).read_bytes() == (PACKAGE / name).read_bytes()


def llama() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        rms_norm_eps=1e-4,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def test_a_model_kernelized_with_it_computes_and_trains_the_same(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what Transformers' decorator does where `kernels` is new enough for it
    monkeypatch.setattr(LlamaRMSNorm, "kernel_layer_name", "RMSNorm", raising=False)
    stock, ours, model = llama(), llama(), llama()
    repository = LocalLayerRepository(exported, layer_name="RMSNorm")
    for used, m in ((mapping(), ours), ({"RMSNorm": {"cpu": repository}}, model)):
        with use_kernel_mapping(used, inherit_mapping=False):
            kernelize(m, mode=Mode.TRAINING, device="cpu", use_fallback=False)
    source = sys.modules[model.model.norm.forward.__func__.__module__].__file__
    assert Path(source).parents[1] == exported / "build"

    ids = torch.tensor([[3, 14, 15, 9, 2, 6, 5], [35, 8, 9, 7, 9, 3, 2]])
    dy = torch.randn(2, 7, 61)
    logits = [m(ids).logits for m in (stock, ours, model)]
    for y in logits:
        (y * dy).sum().backward()
    torch.testing.assert_close(logits[2], logits[0])
    torch.testing.assert_close(logits[2], logits[1])
    for (name, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_its_triton_kernels_run_and_are_the_packages(exported: Path) -> None:
    from hf_rmsnorm.ops import reference, triton_backend

    kernel = kernels.get_local_kernel(exported)
    theirs = importlib.import_module(f"{kernel.__name__}.ops.triton_backend")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight, bias = (torch.randn(n, device=device) for n in ((5, 24), 24, 24))
    formula = reference.Formula(7, 1e-3, 1.0, False)
    got, expected = (
        backend.forward(x, None, weight, bias, formula, save_rstd=True)
        for backend in (theirs, triton_backend)
    )
    assert theirs is not triton_backend
    assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2])


WITHOUT_THE_PACKAGE = """
import importlib.util, sys
from pathlib import Path
sys.modules["hf_rmsnorm"] = sys.modules["kernels"] = sys.modules["transformers"] = None

def load(folder, name):  # as `kernels` does
    spec = importlib.util.spec_from_file_location(name, Path(folder) / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path in sorted(Path(folder).rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        importlib.import_module(".".join([name, *(p for p in parts if p != "__init__")]))
    return module

import torch
first, second = (load(sys.argv[1], name) for name in ("_norms_1", "_norms_2"))  # two versions
x = torch.randn(4, 24, requires_grad=True)
y = torch.compile(second.rms_norm, backend="aot_eager", fullgraph=True)(x, p=0.3)
assert torch.equal(y, first.rms_norm(x, p=0.3))
y.backward(torch.randn(4, 24))
assert x.grad.isfinite().all()
assert not [name for name in sys.modules if name.startswith("hf_rmsnorm.")]
"""


@pytest.mark.launch
def test_it_works_where_the_package_is_not_and_twice_at_once(exported: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, exported / "build" / "torch-cuda"],
        capture_output=True,
        text=True,
        check=False,
        cwd=exported,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--name", "RMSNorm"], "'RMSNorm': use lower-case letters"),
        (["--repo_id", "norms"], "'norms': use USER/NAME"),
        (["--version", "-1"], "--version -1"),
    ],
)
def test_bad_flags_write_nothing(tmp_path: Path, flags: list[str], says: str) -> None:
    with pytest.raises(ScriptError, match=says):
        export_kernel.main(["--out", str(tmp_path / "new"), *flags])
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ScriptError, match="is there already"):
        export_kernel.main(["--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("import numpy.linalg", r"functional\.py imports numpy\.linalg"),
        ("from hf_rmsnorm import ops", r"functional\.py imports hf_rmsnorm"),
        ("NAME = 'hf_rmsnorm::forward'", "names 'hf_rmsnorm::forward'"),
        ("call = torch.ops.hf_rmsnorm.forward", "names 'hf_rmsnorm': operators"),
    ],
)
def test_what_a_kernel_may_not_do_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, says: str
) -> None:
    copy = tmp_path / "hf_rmsnorm"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "functional.py").write_text((copy / "functional.py").read_text() + line + "\n")
    monkeypatch.setattr(export_kernel, "PACKAGE", copy)
    with pytest.raises(ScriptError, match=says):
        export_kernel.main(["--out", str(tmp_path / "kernel")])
    assert [path.name for path in tmp_path.iterdir()] == ["hf_rmsnorm"]
