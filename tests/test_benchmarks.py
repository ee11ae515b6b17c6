"""The zoo's harness: its check can fail, its limits are kept, and what is done is not done again."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

import graphprune as gp
from tests import shim, workers

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
sys.modules.setdefault("shim", shim)  # it does the same; torchvision's operators can be declared only once

import zoo  # noqa: E402
import zoo_check  # noqa: E402
import zoo_models  # noqa: E402
import zoo_run  # noqa: E402
import zoo_table  # noqa: E402
import zoo_tools  # noqa: E402


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 5, 1)
    )
    return zoo_check.randomise(net)


IMAGES = zoo_models.images(1, 3, 7, 7)


def test_a_model_pruned_right_passes_the_check():
    net = network()
    result = gp.prune(net, IMAGES.args, target=gp.Target(channels=0.5))
    found = zoo_check.check(net, result.model, IMAGES)
    assert found.removed > 0
    assert found.exact
    assert found.precision == "float64"
    assert found.error < 1e-9 < 1e-3 < found.effect


def test_the_check_reads_off_what_the_plan_removed():
    net = network()
    result = gp.prune(net, IMAGES.args, target=gp.Target(channels=0.5), importance=gp.importance.Random(seed=3))
    gone = zoo_check.removal(net, result.model)
    assert gone.keys() == {n for n in result.plan.kept if not n.endswith("num_batches_tracked")}
    for name, dims in gone.items():
        for dim, positions in dims.items():
            size = dict(zoo_check.held(net))[name].shape[dim]
            assert set(positions.tolist()) == set(range(size)) - set(result.plan.kept[name][dim].tolist())


def halved(first: list[int], second: list[int]) -> tuple[nn.Module, nn.Module]:
    """Two layers, and a copy with these rows of the first and columns of the second."""
    torch.manual_seed(0)
    net = zoo_check.randomise(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5)))
    small = nn.Sequential(nn.Linear(3, len(first)), nn.ReLU(), nn.Linear(len(second), 5))
    with torch.no_grad():
        small[0].weight.copy_(net[0].weight[first])
        small[0].bias.copy_(net[0].bias[first])
        small[2].weight.copy_(net[2].weight[:, second])
        small[2].bias.copy_(net[2].bias)
    return net, small.eval()


VECTOR = zoo_check.Arguments((torch.linspace(-1, 1, 6).reshape(2, 3),))


def test_wrong_columns_fail_the_check():
    assert zoo_check.check(*halved([0, 2, 5], [0, 2, 5]), VECTOR).exact
    found = zoo_check.check(*halved([0, 2, 5], [1, 2, 5]), VECTOR)
    assert found.runs
    assert found.same_shape
    assert not found.exact
    assert found.error > 1e-3


def test_values_that_are_not_the_originals_fail_the_check():
    net, small = halved([0, 2, 5], [0, 2, 5])
    with torch.no_grad():
        small[2].weight[0, 0] += 1e-3
    found = zoo_check.check(net, small, VECTOR)
    assert not found.exact
    assert found.removed == -1
    assert "2.weight ([5, 3] of [5, 6])" in found.why


def test_positions_are_found_in_any_number_of_dims_and_not_where_values_are_all_the_same():
    whole = torch.randn(2, 7, 5, 3, generator=torch.Generator().manual_seed(0))
    found = zoo_check.kept(whole, whole[:, [0, 3, 6]][:, :, [1, 4]])
    assert {d: p.tolist() for d, p in found.items()} == {1: [0, 3, 6], 2: [1, 4]}
    assert zoo_check.kept(whole, whole) == {}
    assert zoo_check.kept(whole[0], whole[1, :3]) is None
    assert zoo_check.kept(torch.ones(7), torch.ones(3)) is None


def test_removing_nothing_fails_the_check():
    found = zoo_check.check(*halved(list(range(6)), list(range(6))), VECTOR)
    assert found.error == 0
    assert not found.exact
    assert found.why == "nothing was removed"


def test_a_forward_that_fails_and_another_output_shape_are_told_apart():
    net, small = halved([0, 2, 5], [0, 2])
    assert not zoo_check.check(net, small, VECTOR).runs
    net, small = halved([0, 2, 5], [0, 2, 5])
    small[2] = nn.Linear(3, 4)
    with torch.no_grad():
        small[2].weight.copy_(net[2].weight[:4, [0, 2, 5]])
        small[2].bias.copy_(net[2].bias[:4])
    found = zoo_check.check(net, small, VECTOR)
    assert found.runs
    assert not found.same_shape
    assert not found.exact


def test_a_normalisation_over_fewer_channels_runs_but_is_not_exact():
    torch.manual_seed(0)
    net = zoo_check.randomise(nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 5)))
    result = gp.prune(net, VECTOR.args, target=gp.Target(channels=0.5), norms="prune")
    found = zoo_check.check(net, result.model, VECTOR)
    assert found.same_shape
    assert not found.exact


def test_the_last_layers_are_those_that_the_outputs_come_out_of():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.place = nn.Parameter(torch.randn(1, 3, 6))
            self.inner, self.outer, self.norm = nn.Linear(6, 7), nn.Linear(7, 6), nn.LayerNorm(6)
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            x = self.embed(x) + self.place
            x = self.norm(x + self.outer(self.inner(x).relu()))
            return self.head(x).softmax(-1).transpose(1, 2), x

    net = Net().eval()
    found = zoo_tools.last_layers(net, zoo_check.Arguments((torch.arange(3)[None],)))
    assert {id(f) for f in found} == {id(f) for f in (net.head, net.outer, net.embed, net.place)}


def supervised(job, *arguments, seconds=60.0, memory=2.0**36, **limits):
    return zoo_run.supervise(job, arguments, seconds=seconds, memory=memory, **limits)


def test_limits_of_time_and_memory_are_recorded_with_what_was_reported_before():
    assert supervised(workers.done, 7).items() >= {"value": 7}.items()
    late = supervised(workers.sleeping, seconds=1)
    assert late["first"] == 1
    assert late["error"] == "waiting: not done after 1 s"
    assert late["wall_s"] < 10


def test_some_steps_may_have_a_limit_of_their_own():
    late = supervised(workers.sleeping, steps=("waiting",), step_seconds=1)
    assert late["error"] == "waiting: not done after 1 s"
    assert supervised(workers.done, 7, steps=("another",), step_seconds=0).items() >= {"value": 7}.items()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what a process holds")
def test_a_process_that_grows_too_large_is_ended():
    large = supervised(workers.growing, memory=2.0**28)
    assert large["first"] == 1
    assert large["error"] == "growing: took more than 0.25 GiB"


def test_a_job_that_dies_or_raises_is_recorded():
    dead = supervised(workers.dying)
    assert dead["first"] == 1
    assert dead["error"] == "the process died with exit code 7"
    assert supervised(workers.raising)["error"] == "ValueError: seven is too many"


def record(model: str, tool: str = "graphprune", **fields: object) -> dict[str, object]:
    versions = zoo_tools.versions("transformers", tool)
    return {"model": model, "tool": tool, "versions": versions, "date": "2000-01-01", "threads": 1,
            "load_average": 0.5} | fields  # fmt: skip


def test_resume_skips_what_the_same_versions_have_done(tmp_path):
    args = Namespace(only=["BERT", "T5"], all=False, peers=["torch-pruning"], resume=True)
    path = tmp_path / "zoo_transformers.json"
    results = zoo_run.Results(path, "transformers")
    results.put(record("BERT"))
    results.put(record("T5", "torch-pruning", versions={"torch": "0"}))
    again = zoo_run.Results(path, "transformers")
    left = [(job.model, job.tool) for job in zoo.jobs("transformers", args, again)]
    assert left == [("BERT", "torch-pruning"), ("T5", "graphprune"), ("T5", "torch-pruning")]
    args.resume = False
    assert len(list(zoo.jobs("transformers", args, again))) == 4


def test_a_record_takes_the_place_of_an_older_one_and_the_file_is_whole(tmp_path):
    results = zoo_run.Results(tmp_path / "zoo.json", "timm")
    results.put(record("a", error="first"))
    results.put(record("b"))
    results.put(record("a", error="second"))
    held = json.loads((tmp_path / "zoo.json").read_text())["records"]
    assert [(r["model"], r.get("error")) for r in held] == [("b", None), ("a", "second")]
    assert [p.name for p in tmp_path.iterdir()] == ["zoo.json"]


def test_the_summary_counts_what_the_records_say(tmp_path):
    good = {"runs": True, "same_shape": True, "exact": True, "error": 1e-15, "effect": 0.5, "why": ""}
    seconds = {"trace": 0.25, "couple": 0.125, "plan": 0.0625, "rewrite": 0.0625, "verify": 1.0}
    proved = {"halved": True, "verified": {"error": 2e-14}, "emitter": "module", "traced": True, "seconds": seconds}
    misread = {k: v for k, v in seconds.items() if k != "verify"} | {"unverified": 3.0}
    results = zoo_run.Results(tmp_path / "zoo.json", "transformers")
    results.data["environment"] = {"memory_gib": 1.0} | {
        "jobs": 1, "cpus": 2, "machine": "m"
    }  # fmt: skip
    results.put(record("fast", check=good, **proved))
    results.put(record("slow", check=good, **proved))
    results.put(record("unproved", check=good, **(proved | {"halved": False})))
    results.put(record("misread", check=good, **(proved | {"seconds": misread})))
    results.put(record("late", error="trace: not done after 1 s"))
    results.put(record("odd", skipped="no channels"))
    results.put(record("fast", "torch-pruning", check=good, seconds={"build": 0.5, "prune": 0.25}))
    results.put(record("slow", "torch-pruning", check=good, seconds={"build": 0.125, "prune": 0.125}))
    results.put(record("misread", "torch-pruning", check=good, seconds={"build": 1.0, "prune": 1.0}))
    results.put(record("unproved", "torch-pruning", check=good | {"exact": False}, seconds={"build": 9, "prune": 9}))
    text = zoo_table.text([results])
    assert "| transformers | graphprune | 5 | 4 | 4 | 3 | 1 |" in text
    assert "| transformers | torch-pruning | 4 | 4 | 4 | 3 | 0 |" in text
    assert "module 3; largest relative error 2.0e-14; traced 4 of 5" in text
    assert "| transformers | same shape | 4 | 3 | 1 | 4.000 | 0.500 | 3.000 | 0.750 |" in text
    assert "| transformers | exact | 3 | 3 | 1 | 4.000 | 0.500 | 3.000 | 0.750 |" in text
    assert "* late: trace: not done after 1 s" in text
    assert "* unproved: not every group was halved" in text
