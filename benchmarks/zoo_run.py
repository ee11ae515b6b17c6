"""One job in a process of its own, under a limit of time and memory; and the file that the results are kept in."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Record = dict[str, Any]
POLL = 0.1
"""Seconds between two looks at a worker."""
_FORKS = multiprocessing.get_context("forkserver")


def preload(*modules: str) -> None:
    """Have these imported once, before the workers are forked; call it before the first of them starts."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the fork server does not hand its parent's path down
    # A lock of a progress bar among the packages; said once, at the very end, of a process that is not ours.
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"
    _FORKS.set_forkserver_preload(list(modules))


def supervise(
    function: Callable[..., None],
    arguments: Sequence[Any],
    *,
    seconds: float,
    memory: float,
    stop: threading.Event | None = None,
    steps: Collection[str] = (),
    step_seconds: float = float("inf"),
) -> Record:
    """What `function(*arguments, report)` reports in a fresh process, until it ends or exceeds a limit.

    Args:
        function: a top-level function; `report` takes pieces of the record, later ones over earlier ones.
        arguments: what it is called with before `report`.
        seconds: wall time it may take.
        memory: bytes of resident memory it may take, where the system says how many it has.
        stop: ends the process early when set.
        steps, step_seconds: names that the job reports as `at` while it is in some of its steps, one after the other,
            and the wall time that these may take together.
    Returns:
        What was reported, and `error` if the job did not come to its end.
    """
    here, there = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(target=_work, args=(there, function, tuple(arguments)), daemon=True)
    start = time.perf_counter()
    begun: float | None = None
    process.start()
    there.close()
    record: Record = {}
    ended = ""
    while not ended:
        alive = process.is_alive()  # before the pipe is emptied: what was sent last must not be lost
        _drain(here, record)
        if not alive or record.get("done"):
            break
        if record.get("at") not in steps:
            begun = None
        elif begun is None:
            begun = time.perf_counter()
        if stop is not None and stop.is_set():
            ended = "interrupted"
        elif begun is not None and time.perf_counter() - begun > step_seconds:
            ended = f"not done after {step_seconds:g} s"
        elif time.perf_counter() - start > seconds:
            ended = f"not done after {seconds:g} s"
        elif resident(process.pid) > memory:
            ended = f"took more than {memory / 2**30:g} GiB"
        else:
            here.poll(POLL)
    if ended:
        process.kill()
    process.join()
    _drain(here, record)
    done = record.pop("done", False)
    if not done and not ended:
        ended = f"the process died with exit code {process.exitcode}"
    at = record.pop("at", "")
    if ended and not done:
        record["error"] = f"{at}: {ended}" if at else ended
    return record | {"wall_s": time.perf_counter() - start}


def _drain(pipe: Connection, record: Record) -> None:
    try:
        while pipe.poll():
            record.update(pipe.recv())
    except (EOFError, OSError):
        pass


def _work(pipe: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        function(*arguments, pipe.send)
    except BaseException as error:
        line = next(iter(str(error).splitlines()), "")
        pipe.send({"error": f"{type(error).__name__}: {line}"[:240]})
    pipe.send({"done": True})


def resident(pid: int | None) -> int:
    """Bytes of memory a process holds; 0 where the system has no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)


class Results:
    """The results of one section: a JSON file that is whole after every record.

    Attributes:
        path: where it is.
        data: what it holds: `records` by model and tool, and what else a section keeps.
    """

    def __init__(self, path: Path, section: str) -> None:
        self.path = path
        self.data: Record = {"section": section, "records": []}
        if path.exists():
            self.data = json.loads(path.read_text())
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forget all records."""
        self.data["records"] = []

    def find(self, model: str, tool: str) -> Record | None:
        """The record of a model and a tool, if there is one."""
        return next((r for r in self.data["records"] if (r["model"], r["tool"]) == (model, tool)), None)

    def done(self, model: str, tool: str, versions: Mapping[str, str]) -> bool:
        """Whether there is a record that these versions would give again."""
        found = self.find(model, tool)
        return found is not None and found["versions"] == dict(versions)

    def put(self, record: Record) -> None:
        """Take a record in, in the place of an older one of the same model and tool, and write the file."""
        with self._lock:
            key = (record["model"], record["tool"])
            self.data["records"] = [r for r in self.data["records"] if (r["model"], r["tool"]) != key] + [record]
            self.write()

    def write(self) -> None:
        """Write the file in one go, so that an interruption leaves the old one or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(beside, self.path)

    def of(self, tool: str) -> Iterator[Record]:
        """The records of one tool."""
        return (r for r in self.data["records"] if r["tool"] == tool)
