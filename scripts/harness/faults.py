"""The parts of `inject_faults.py`: each tries a kind of fault often, and tells what came of it."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from harness.injecting import difference, state
from harness.interruptions import patches, saves
from harness.mutating import damage, mutated
from harness.tallies import (
    KINDS,
    THESIS,
    Tally,
    check_thesis,
    contents,
    in_child,
    model,
    old_model,
    outputs,
    patched,
    quiet,
    small_disk,
)
from hf_rmsnorm import (
    PatchPlan,
    apply_plan,
    from_pretrained,
    plan_patch,
    unpatch_model,
)
from hf_rmsnorm.cli import main as command
from hf_rmsnorm.hub.cards import write_card
from hf_rmsnorm.hub.records import RECORD, digest


def kills(tally: Tally, count: int, seed: int, folder: Path) -> Iterator[int]:
    """kill -9 at random times of a save and of `hf-rmsnorm patch --overwrite`."""
    choose = random.Random(seed)
    torch.set_num_threads(1)  # a fork has one
    source, target = folder / "source", folder / "target"
    model("own").save_pretrained(source)
    found = patched("own")
    old = old_model("own")
    wanted = [outputs(old), outputs(found)]
    flags = ["--norm", "prmsnorm", "--p", "0.25", "--strategy", "direct", "--overwrite"]
    ways = [
        lambda: found.save_pretrained(target),
        lambda: command(["patch", str(source), str(target), *flags]),
    ]
    times = []
    for way in ways:
        old.save_pretrained(target)
        start = time.perf_counter()
        in_child(way)
        times.append(1.1 * (time.perf_counter() - start))
    for i in range(count):
        which = i % 3 // 2  # two saves, one patch
        old.save_pretrained(target)
        (target / "thesis.txt").write_text(THESIS)
        tally.tries += 1
        after = choose.uniform(0, times[which])
        label = f"{('save', 'patch')[which]} killed after {after:.4f} s"
        said = in_child(ways[which], after)
        tally.refused += said == "killed"
        if said not in ("", "killed"):
            tally.raw.append(f"{label}: {said}")
        again = tally.attempt(label, from_pretrained, target)
        if again is None or not any(torch.equal(outputs(again), x) for x in wanted):
            tally.half.append(f"{label}: it does not load as one of the two")
        check_thesis(tally, label, target)
        found.save_pretrained(target)
        if left := [
            p.name for p in folder.iterdir() if p not in (source, target) and any(p.iterdir())
        ]:
            tally.lost.append(f"{label}: {left} was not swept")
        yield tally.tries


def full_disks(tally: Tally, count: int, seed: int, folder: Path) -> Iterator[int]:
    """No space, or files limited in size, at a random moment of a save."""
    choose = random.Random(seed)
    torch.set_num_threads(1)
    found = patched("own")
    old = old_model("own")
    old.save_pretrained(folder / "plain")
    size = sum(map(len, contents(folder / "plain").values()))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for i in range(count):
        limit = choose.randrange(size * 2)
        with small_disk(folder / "disk", 3 * size + limit if i % 2 else 10 * size) as mounted:
            target = folder / "disk" / "model"
            shutil.copytree(folder / "plain", target)
            (target / "thesis.txt").write_text(THESIS)
            before = contents(target)

            is_full = bool(i % 2 and mounted)

            def save(target: Path = target, limit: int = limit, full: bool = is_full) -> None:
                if full:
                    filler = target.parent / "filler"
                    free = shutil.disk_usage(target).free
                    filler.write_bytes(b"x" * max(0, free - limit // 2))
                else:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                found.save_pretrained(target)

            tally.tries += 1
            label = f"{'disk' if is_full else 'files'} limited to {limit}"
            said = in_child(save)
            tally.refused += bool(said)
            if said and not said.startswith("typed"):
                tally.raw.append(f"{label}: {said}"[:300])
            if said and contents(target) != before:
                tally.half.append(f"{label}: files are mixed")
            check_thesis(tally, label, target)
            left = [p.name for p in target.parent.iterdir() if p.is_dir() and p != target]
            if left:
                tally.lost.append(f"{label}: {left} was left")
            shutil.rmtree(target)
            (target.parent / "filler").unlink(missing_ok=True)
        yield tally.tries


def mutations(tally: Tally, count: int, seed: int, folder: Path) -> Iterator[int]:
    """Plans with something wrong in them, and records whose digest fits."""
    cases = []
    for kind, arguments in KINDS.items():
        plan = plan_patch(model(kind), **{k: v for k, v in arguments.items() if k != "verify"})
        patched(kind).save_pretrained(folder / kind)
        config = json.loads((folder / kind / "config.json").read_text())
        cases.append((kind, model(kind), json.loads(plan.to_json()), config))
    for i in range(count):
        kind, found, plan_data, config = cases[i % len(cases)]
        tally.tries += 1
        if i % 2:
            before, text = state(found), json.dumps(mutated(plan_data, seed + i))
            label = f"{kind} plan of seed {seed + i}"
            read = tally.attempt(label, PatchPlan.from_json, text)
            if read is not None:
                tally.attempt(label, apply_plan, found, read)
                if difference(before, state(found)):
                    tally.attempt(label, unpatch_model, found)
            if fault := difference(before, state(found)):
                tally.half.append(f"{label}: {fault}")
                cases[i % len(cases)] = (kind, model(kind), plan_data, config)
        else:
            record = mutated({k: v for k, v in config[RECORD].items() if k != "digest"}, seed + i)
            if isinstance(record, dict):
                record["digest"] = digest(record)
            path = folder / kind / "config.json"
            path.write_text(json.dumps({**config, RECORD: record}))
            _loads_the_same_twice(tally, f"{kind} record of seed {seed + i}", folder / kind)
            path.write_text(json.dumps(config))
        yield tally.tries


def damages(tally: Tally, count: int, seed: int, folder: Path) -> Iterator[int]:
    """One file of a checkpoint cut, changed, filled, emptied, replaced or gone."""
    for kind in KINDS:
        patched(kind).save_pretrained(folder / kind)
    names = list(KINDS)
    for i in range(count):
        copied = folder / "damaged"
        shutil.copytree(folder / names[i % len(names)], copied)
        label = f"{names[i % len(names)]}, seed {seed + i}: {damage(copied, seed + i)}"
        tally.tries += 1
        _loads_the_same_twice(tally, label, copied)
        tally.attempt(f"{label}, card", write_card, copied)
        shutil.rmtree(copied)
        yield tally.tries


def _loads_the_same_twice(tally: Tally, label: str, folder: Path) -> None:
    """Random weights would be others with another seed."""
    refused, states = tally.refused, []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found = tally.attempt(label, from_pretrained, folder)
        if found is None:
            tally.refused = min(tally.refused, refused + 1)
            return
        states.append({k: v for k, v in state(found).items() if k.endswith(" tensor")})
    if fault := difference(*states):
        tally.random.append(f"{label}: {fault}")


# with the tries of each; of exceptions, the lines of each action (of planning, a tenth)
PARTS = {
    "exceptions in patch and undo": (patches, 5200),
    "exceptions in save and load": (saves, 1500),
    "killed saves and patches": (kills, 300),
    "full disks": (full_disks, 200),
    "mutated plans and records": (mutations, 2000),
    "damaged files": (damages, 1000),
}


def run(part: str, count: int, seed: int) -> Iterator[tuple[int, Tally]]:
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder, quiet():
        for tries in PARTS[part][0](tally, count, seed, Path(folder)):
            yield tries, tally
    yield tally.tries, tally
