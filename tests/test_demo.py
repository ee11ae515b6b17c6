"""`graphprune demo`: what it promises, from the command line to the files it leaves."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner, Result

import graphprune as gp
from graphprune import cli, demo

SEED = 3


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["demo", *map(str, arguments)])


def words(text: str) -> str:
    """The text of an error without the frame and the line breaks of the terminal."""
    return " ".join(text.translate(dict.fromkeys(map(ord, "╭╮╰╯─│"), " ")).split())


@dataclass(frozen=True, eq=False)
class Run:
    result: Result
    found: demo.Demo
    out: Path
    random_state_kept: bool


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run of the command with few epochs, and the figures it printed."""
    out = tmp_path_factory.mktemp("demo")
    found = []
    real = demo.run_demo

    def recording(*args: Any, **kwargs: Any) -> demo.Demo:
        found.append(real(*args, **kwargs))
        return found[-1]

    before = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_demo", recording)
        result = invoke("--out", out, "--seed", str(SEED), "--epochs", "3")
    assert result.exit_code == 0, result.output
    return Run(result, found[0], out, torch.equal(before, torch.get_rng_state()))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*args: object, **kwargs: object) -> nn.Module:
        pytest.fail("training started")

    monkeypatch.setattr(demo, "trained", train)


def test_the_demo_prints_the_figures_it_measured(run: Run) -> None:
    printed = words(run.result.stdout)
    assert [s.name for s in run.found.stages] == ["before", "pruned", "fine-tuned"]
    for stage in run.found.stages:
        for text in (f"{stage.accuracy:.3f}", f"{stage.macs:,}", f"{stage.params:,}", f"{1000 * stage.latency:.2f}"):
            assert text in printed
    assert words(str(run.found.result.report)) in printed
    assert words(run.found.result.report.table()) in printed


def test_at_most_half_of_the_macs_are_left(run: Run) -> None:
    before, pruned, tuned = run.found.stages
    assert 0 < pruned.macs <= 0.5 * before.macs
    assert tuned.macs == pruned.macs


def test_parameters_are_what_the_models_hold(run: Run) -> None:
    dense = demo.new_network(SEED)
    models = [dense, run.found.result.model, run.found.model]
    assert [s.params for s in run.found.stages] == [sum(p.numel() for p in m.parameters()) for m in models]
    assert run.found.stages[1].params < run.found.stages[0].params


def counted_macs(model: nn.Module) -> int:
    """Multiply-adds of the convolutions and linear layers for one image, counted while they run."""
    total = 0

    def count(module: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal total
        total += out.numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    model(demo.load_data().test.images[:1])
    for hook in hooks:
        hook.remove()
    return total


def test_macs_are_what_the_models_compute(run: Run) -> None:
    models = [demo.new_network(SEED), run.found.result.model, run.found.model]
    assert [s.macs for s in run.found.stages] == [counted_macs(m) for m in models]


def test_pruning_was_verified_and_removed_something(run: Run) -> None:
    verification = run.found.result.report.verification
    assert verification is not None
    assert run.found.result.plan.removed > 0
    assert verification.effect > 1e-3
    assert verification.error <= verification.tolerance


def test_fine_tuning_trains_a_copy(run: Run) -> None:
    pruned, tuned = run.found.result.model.state_dict(), run.found.model.state_dict()
    assert {n: t.shape for n, t in pruned.items()} == {n: t.shape for n, t in tuned.items()}
    assert not torch.equal(pruned["stem.weight"], tuned["stem.weight"])
    assert not run.found.model.training


def test_training_learns_the_digits(run: Run) -> None:
    untrained = demo.accuracy(demo.new_network(SEED), demo.load_data().test)
    assert run.found.stages[0].accuracy > max(0.6, untrained)


def test_the_saved_weights_load_into_a_network_pruned_by_the_saved_plan(run: Run) -> None:
    network, data = demo.new_network(SEED), demo.load_data()
    example = data.test.images[:1]
    plan = gp.Plan.from_json((run.out / demo.PLAN).read_text())
    assert plan == run.found.result.plan
    small = gp.rewrite(network, example, gp.couple(gp.trace(network, example)), plan).model
    weights = load_file(run.out / demo.WEIGHTS)
    with pytest.raises(RuntimeError, match="size mismatch"):
        network.load_state_dict(weights)
    small.load_state_dict(weights, strict=True)
    assert demo.accuracy(small, data.test) == run.found.stages[2].accuracy


def test_only_the_two_files_are_left_behind(run: Run) -> None:
    assert sorted(p.name for p in run.out.iterdir()) == sorted([demo.WEIGHTS, demo.PLAN])


def test_the_global_random_state_is_left_alone(run: Run) -> None:
    assert run.random_state_kept


def test_quiet_switches_the_progress_bar_off(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def known(*args: object, advance: demo.Advance, **kwargs: object) -> demo.Demo:
        advance("training", 1, 2)
        return run.found

    monkeypatch.setattr(demo, "run_demo", known)
    assert "training" in run.result.stderr
    assert "fine-tuning" in run.result.stderr
    assert "1/2" in invoke("--out", tmp_path).stderr
    quiet = invoke("--out", tmp_path, "--quiet")
    assert quiet.exit_code == 0
    assert quiet.stderr == ""


def test_the_network_has_an_add_over_a_concatenation(run: Run) -> None:
    coupling = run.found.result.coupling
    wide = {str(m) for m in coupling.group("wide").members}
    assert {"wide.weight[0]", "block2.conv2.weight[0]", "classifier.weight[1]"} <= wide
    assert "add" in coupling.explain("stem.weight", "block1.conv2.weight")


def test_the_splits_share_no_image() -> None:
    data = demo.load_data()
    splits = [data.train, data.validation, data.test]
    assert [len(s.labels) for s in splits] == [1097, 200, 500]
    whole = torch.cat([s.images.flatten(1) for s in splits])
    again = demo.load_digits().data / 16
    assert torch.equal(whole.sum(0).double(), torch.from_numpy(again).sum(0))
    assert len(whole.unique(dim=0)) == len(torch.from_numpy(again).unique(dim=0))


def test_the_models_take_turns_at_being_timed_first() -> None:
    calls: list[int] = []

    class Recorder(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(self.number)
            return x

    seconds = demo.latencies([Recorder(k) for k in range(3)], torch.zeros(1), repeats=6)
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 6 + demo.WARM_UP
    assert all(sorted(r) == [0, 1, 2] for r in rounds)
    assert {r[0] for r in rounds} == {0, 1, 2}
    assert all(s > 0 for s in seconds)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("kind", ["missing", "file", "read-only"])
def test_an_out_that_cannot_be_written_to_is_refused_before_training(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / kind
    if kind == "file":
        out.write_text("")
    if kind == "read-only":
        out.mkdir()
        allowed = os.access  # permission bits do not stop every user
        monkeypatch.setattr(os, "access", lambda p, mode: mode != os.W_OK and allowed(p, mode))
    result = invoke("--out", out)
    assert result.exit_code == 2
    assert "Invalid value for '--out'" in words(result.stderr)
    expected = {"missing": "does not exist", "file": "is a file", "read-only": "is not writable"}[kind]
    assert expected in words(result.stderr)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("macs", "advice"),
    [
        ("0", "the fraction kept lies in (0, 1]"),
        ("1.5", "the fraction kept lies in (0, 1]"),
        ("-0.5", "the fraction kept lies in (0, 1]"),
        ("nan", "the fraction kept lies in (0, 1]"),
        ("0.001", "ask for at least what is left"),
    ],
)
def test_a_bad_target_is_refused_before_training_in_the_words_of_the_library(
    macs: str, advice: str, tmp_path: Path
) -> None:
    result = invoke("--out", tmp_path, "--macs", macs)
    assert result.exit_code == 2
    assert f"macs={float(macs)}" in words(result.stderr)
    assert advice in words(result.stderr)
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_files(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / demo.WEIGHTS).write_text("old")

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space"):
        demo.save_to(tmp_path, run.found)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {demo.WEIGHTS: "old"}


@pytest.fixture
def fresh_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line and the demo are imported anew, and the present ones put back afterwards."""
    for name in ("cli", "demo"):
        monkeypatch.setattr(gp, name, getattr(gp, name))
        monkeypatch.delitem(sys.modules, f"graphprune.{name}")


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("fresh_import")
@pytest.mark.parametrize("package", ["rich", "typer"])
def test_the_command_line_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(package, monkeypatch)
    with pytest.raises(SystemExit, match=rf'needs {package}.*pip install "graphprune\[demo\]"'):
        importlib.import_module("graphprune.cli")


@pytest.mark.usefixtures("fresh_import")
def test_the_demo_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without("sklearn", monkeypatch)
    result = invoke("--out", tmp_path)
    assert result.exit_code == 1
    assert "needs sklearn" in result.output
    assert 'pip install "graphprune[demo]"' in result.output
