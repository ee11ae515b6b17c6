"""A save that is killed leaves the old artefact or the new one, whole, whenever it happens."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import graphprune as gp

ROOT = Path(__file__).parents[2]
X = torch.rand(2, 3, 9, 9)
SAVER = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import artefact_fuzz as fuzz
import graphprune as gp
from pathlib import Path
from graphprune.artefact import store

results = [
    gp.prune(fuzz.convolutional(), fuzz.STARTS["convolutional"][1], target=gp.Target(channels=fraction))
    for fraction in (0.3, 0.7)
]
"""
EVERY_STEP = """
def killing_at(at):
    count = [-1]

    def counted(original):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == at:
                os._exit(9)
            return original(*args, **kwargs)
        return call

    os.fsync, os.open = counted(os.fsync), counted(os.open)
    Path.replace, Path.unlink = counted(Path.replace), counted(Path.unlink)
    store._Counted.write = counted(store._Counted.write)

at = 0
while True:
    directory = f"{sys.argv[1]}/{at}"
    gp.save(results[0], directory)
    child = os.fork()
    if not child:
        killing_at(at)
        gp.save(results[1], directory)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
    at += 1
print(at)
"""
FOREVER = """
for result in results:
    gp.save(result, sys.argv[1], graph=False)
print("ready", flush=True)
while True:
    for result in results:
        gp.save(result, sys.argv[1], graph=False)
"""


def widths(directory):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import artefact_fuzz as fuzz

    return gp.load(directory, fuzz.convolutional())[0].out_channels


def test_a_save_killed_at_any_step_leaves_the_old_artefact_or_the_new(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SAVER + EVERY_STEP, str(tmp_path)],
        capture_output=True, text=True, timeout=300, cwd=ROOT, check=True,
    )  # fmt: skip
    steps = int(done.stdout)
    assert steps > 15
    found = [widths(tmp_path / str(at)) for at in range(steps + 1)]
    assert set(found) == {2, 4}
    assert found == sorted(found)  # the old one up to some step, the new one from there on
    assert all(gp.load(tmp_path / str(at))(X).shape == (2, 5) for at in (0, steps // 2, steps))


def test_a_save_killed_at_any_time_leaves_one_of_them(tmp_path):
    chance = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER + FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
        process.stdout.close()
        assert widths(tmp_path) in (2, 4)


def test_what_stopped_saves_left_is_cleared_away_in_time(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import artefact_fuzz as fuzz

    result = gp.prune(fuzz.convolutional(), X, target=gp.Target(channels=0.5))
    old, young = tmp_path / "weights-0123456789abcdef.safetensors", tmp_path / ".weights.0123"
    for path in (old, young):
        path.write_text("rest")
    os.utime(old, (0, 0))
    gp.save(result, tmp_path)
    assert not old.exists()
    assert young.exists()  # another process may be writing it


@pytest.mark.parametrize("moment", ["structure", "weights"])
def test_a_reader_that_meets_a_new_artefact_says_that_a_file_is_missing(moment, tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import artefact_fuzz as fuzz

    gp.save(gp.prune(fuzz.convolutional(), X, target=gp.Target(channels=0.3)), tmp_path)
    artefact = gp.Artefact.read(tmp_path)
    gp.save(gp.prune(fuzz.convolutional(), X, target=gp.Target(channels=0.7)), tmp_path)
    with pytest.raises(gp.ArtefactError, match="is missing"):
        artefact.load(fuzz.convolutional() if moment == "weights" else None)
