"""Child processes with a deadline: worker processes that print JSON lines, and benchmarks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.benchmark import Deadline

ROOT = Path(__file__).parents[2]
MOST_RESTARTS = 8
Line = dict[str, Any]


def environment(*, interpret: bool, **extra: str) -> dict[str, str]:
    """Ours and offline; Triton's interpreter on or off."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(ROOT), *([env["PYTHONPATH"]] if env.get("PYTHONPATH") else [])]
    env |= {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    return env | ({"TRITON_INTERPRET": "1"} if interpret else {}) | extra


@dataclass
class Child:
    """One process, its output in a file."""

    command: Sequence[str]
    env: dict[str, str]
    log: Path
    process: subprocess.Popen | None = None

    def start(self) -> None:
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *self.command],
                env=self.env,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it starts ends with it
            )

    @property
    def status(self) -> int | None:
        """None while it runs."""
        assert self.process is not None
        return self.process.poll()

    def stop(self) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def wait(children: Sequence[Child], deadline: Deadline) -> list[Child]:
    """Until all have ended or time is over; those still running are stopped and returned."""
    while any(child.status is None for child in children) and not deadline.passed:
        time.sleep(0.1)
    late = [child for child in children if child.status is None]
    for child in children:
        child.stop()
    return late


@dataclass
class Worker:
    """A share of the checks, through as many processes as it takes."""

    child: Child
    results: list[Line] = field(default_factory=list)
    expected: list[list[str]] = field(default_factory=list)
    restarts: int = 0

    def start(self) -> None:
        command = [*self.child.command, "--done", str(len(self.results))]
        self.running = Child(command, self.child.env, self.child.log)
        self.running.start()

    def collect(self, *, over: bool) -> bool:
        """Takes over what the process that ended found; whether another one was started."""
        started: Line | None = None
        for text in self.running.text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # a warning, a traceback
                continue
            if "checks" in line:
                self.expected = self.expected or line["checks"]
            elif line["status"] == "started":
                started = line
            else:
                started = None
                self.results.append(line)
        if started and not over:
            why = f"the process ended with status {self.running.status}: {_end(self.running)}"
            self.results.append({**started, "status": "failed", "why": why})
        missing = len(self.results) < len(self.expected) or not self.expected
        if over or not missing or self.restarts >= MOST_RESTARTS:
            return False
        self.restarts += 1
        self.start()
        return True


def run_workers(workers: Sequence[Worker], deadline: Deadline) -> list[Line]:
    """All their results; checks that were not reached have the status "not run"."""
    for worker in workers:
        worker.start()
    busy = list(workers)
    while busy and not deadline.passed:
        time.sleep(0.1)
        busy = [w for w in busy if w.running.status is None or w.collect(over=False)]
    for worker in busy:
        worker.running.stop()
        worker.collect(over=True)
    results = []
    for worker in workers:
        worker.running.stop()
        results += worker.results
        for group, check in worker.expected[len(worker.results) :]:
            why = "no time left" if worker in busy else "its process ended too often"
            results.append({"group": group, "check": check, "status": "not run", "why": why})
        if not worker.expected:
            why = f"no check was started: {_end(worker.running)}"
            results.append({"group": "worker", "check": "", "status": "failed", "why": why})
    return results


def _end(child: Child) -> str:
    lines = [line for line in child.text().splitlines() if line and not line.startswith("{")]
    return " / ".join(lines[-3:])[-600:] or "it printed nothing"
