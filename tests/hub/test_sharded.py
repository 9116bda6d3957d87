"""Patched models under FSDP on two processes: their state dicts, marks included, come back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import json, os, sys
from pathlib import Path
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
import hf_rmsnorm

folder, norm = Path(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
ids = torch.tensor([[5, 9, 12, 40]])

def build(seed=0):
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=57, n_embd=24, n_layer=2, n_head=3, n_positions=32, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return hf_rmsnorm.patch_model(model, norm)

def sharded(seed=0):
    model = build(seed)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)

wanted = build()(ids).logits
def off(model):
    return (model(ids).logits - wanted).abs().max().item()

model, found = sharded(), {}
found["forward"] = off(model)
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
whole = get_model_state_dict(model, options=options)
found["before loading"] = off(build(seed=1))
other = sharded(seed=1)
options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
set_model_state_dict(other, dict(whole), options=options)  # which replaces what is in it
found["broadcast"] = off(other)
dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / "dcp")
other = sharded(seed=1)
state = {"model": get_model_state_dict(other)}
dcp.load(state, checkpoint_id=folder / "dcp")
set_model_state_dict(other, state["model"])
found["distributed checkpoint"] = off(other)
model.save_pretrained(folder / "saved", is_main_process=dist.get_rank() == 0, state_dict=whole)
dist.barrier()
found["save_pretrained"] = off(hf_rmsnorm.from_pretrained(folder / "saved").eval())
old = FullyShardedDataParallel(build(1), use_orig_params=True, device_id=torch.device("cpu"))
ours = FullyShardedDataParallel(build(), use_orig_params=True, device_id=torch.device("cpu"))
old.load_state_dict(ours.state_dict())
found["FSDP 1"] = off(old)
(folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.launch
@pytest.mark.parametrize("norm", ["rmsnorm", "prmsnorm"])
def test_state_dicts_of_sharded_models_come_back(tmp_path: Path, norm: str) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc_per_node", "2", str(worker), str(tmp_path), norm],
        env=dict(os.environ) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.pop("before loading") > 0.1
        assert len(found) == 5 and max(found.values()) < 1e-5, found
