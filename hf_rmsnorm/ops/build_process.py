"""Builds one library: `python build_process.py JOB`, started by build_cache.py.

A process of its own, with the standard library alone, so that neither a compiler that hangs nor a
library that crashes concerns the process that wants it. Prints what went wrong.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# What a process that was killed left behind
_STALE_SECONDS = 3600


def main(job: dict[str, Any]) -> str:
    """Returns what went wrong; nothing if the library is in place."""
    where, problem = Path(job["where"]), ""
    os.nice(job["nice"])
    for left in where.glob("partial-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()
    end = time.monotonic() + job["limit"]
    for command in job["commands"]:
        handle, name = tempfile.mkstemp(prefix="partial-", suffix=".so", dir=where)
        os.close(handle)
        partial = Path(name)
        try:
            problem = run([*command, "-o", name], where, end) or run(
                [*job["trial"], name], where, end
            )
            if not problem:
                publish(partial, job["stem"])
                break
        except subprocess.TimeoutExpired:
            return f"{command[0]} was stopped: it takes more than {job['limit']:g} s"
        finally:
            partial.unlink(missing_ok=True)
    return problem


def run(command: list[str], where: Path, end: float) -> str:
    """Why it failed, in its own words; nothing if it did not."""
    # No pipe: what a compiler has started may hold that open when the compiler is gone.
    with tempfile.TemporaryFile(prefix="partial-", dir=where) as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(os.environ) | {"TMPDIR": str(where)},
            start_new_session=True,
        )
        try:
            status = process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if status == 0:
            return ""
        output.seek(0)
        said = output.read().decode(errors="replace").strip()
        return f"{command[0]} failed: {said[-400:] or f'status {status}'}"


def publish(partial: Path, stem: str) -> None:
    """Under its final name, it is on the disk in full."""
    with partial.open("rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
        os.fsync(file.fileno())
    partial.chmod(0o644)
    partial.replace(partial.with_name(f"{stem}-{digest}.so"))


if __name__ == "__main__":
    try:
        said = main(json.loads(sys.argv[1]))
    except OSError as error:
        said = str(error)
    print(said)
    sys.exit(bool(said))
