"""Two processes of one job under `torch.distributed`, beside the test that started them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


@contextmanager
def beside(job: str, folder: Path, *, seconds: float = 200) -> Iterator[Path]:
    """Run a job twice while the block runs; at its end both must have come to theirs.

    The job is told its rank, a file to meet at, and `folder/RANK.pt` to write to. Yields the script.
    """
    script = folder / "job.py"
    script.write_text(textwrap.dedent(job))
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    jobs = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder / "store"), str(folder / f"{rank}.pt")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        yield script
        for process in jobs:
            errors = process.communicate(timeout=seconds)[1]
            assert process.returncode == 0, errors
    finally:
        for process in jobs:
            process.kill()
            process.wait()
