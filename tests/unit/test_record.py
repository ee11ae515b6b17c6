"""The recording front end: the same program as an export, from one run without arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp


def groups(program: gp.Program) -> set[tuple[str, int, frozenset]]:
    coupling = gp.couple(program)
    return {(g.name, g.size, frozenset(str(m) for m in g.members)) for g in coupling.groups}


def test_a_recorded_program_has_the_nodes_of_an_exported_one():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 5)).eval()
    x = torch.rand(2, 3, 5, 5)
    recorded, exported = (gp.trace(model, x, front_end=f) for f in ("record", "export"))
    assert [(n.op, n.module, n.source) for n in recorded.nodes] == [(n.op, n.module, n.source) for n in exported.nodes]
    assert [(v.target, v.shape, v.dtype, v.kind) for v in recorded.state] == [
        (v.target, v.shape, v.dtype, v.kind) for v in exported.state
    ]
    assert [v.shape for v in recorded.outputs] == [v.shape for v in exported.outputs]
    assert recorded.source is None
    assert exported.source is not None


def test_recording_neither_computes_nor_copies():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(50_000, 50_000), nn.ReLU(), nn.Linear(50_000, 50_000))
    program = gp.trace(model, torch.empty(1, 50_000, device="meta"), front_end="record")
    assert [g.size for g in gp.couple(program).groups] == [50_000]


class Branching(nn.Module):
    """Takes a branch, sizes and an index from constants that its code makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        table = torch.arange(4)
        table[1] += 5
        if (table.sum() > 10).item():
            x = self.first(x)
        a, b = x.split(torch.tensor([4, 2]).tolist(), dim=1)
        return self.last(torch.cat([a, b.relu()], dim=1))


def test_code_may_branch_on_its_own_constants():
    model, x = Branching(), torch.rand(2, 3)
    program = gp.trace(model, x, front_end="record")
    assert [n.op for n in program.nodes if n.op in ("linear", "split_with_sizes")] == [
        "linear",
        "split_with_sizes",
        "linear",
    ]
    assert {(name, size) for name, size, _ in groups(program)} == {("first[0:4]", 4), ("first[4:6]", 2)}


class OnValues(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("on", torch.tensor(True))

    def forward(self, x):
        y = self.first(x)
        if self.how == "input" and x.sum() > 0:
            y = y.relu()
        if self.how == "buffer" and self.on:
            y = y.relu()
        if self.how == "written":
            table = torch.zeros(2)
            table[0] = x.sum()
            if table.sum() > 0:
                y = y.relu()
        return self.last(y)


@pytest.mark.parametrize("how", ["input", "buffer", "written"])
def test_a_branch_on_values_is_never_guessed(how):
    with pytest.raises(gp.TraceError, match=r"cannot be recorded: .*meta[\s\S]*front_end='auto'"):
        gp.trace(OnValues(how), torch.rand(2, 3), front_end="record")


class Data(nn.Module):
    """Reads its weight, and what it computed, behind the back of the recorder."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        y = F.linear(x, self.first.weight.data)
        return self.last(y.data.relu())


def test_data_is_the_tensor_itself():
    model, x = Data(), torch.rand(2, 3)
    assert groups(gp.trace(model, x, front_end="record")) == {
        ("first", 6, frozenset({"first.weight[0]", "last.weight[1]"})),
    }
    assert gp.prune(model, x, target=gp.Target(channels=0.5), verify=False).model.first.out_features == 3


class Kept(nn.Module):
    """Keeps a part of its weight where nobody looks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.parts = [self.first.weight[:2].detach()]

    def forward(self, x):
        return F.linear(x, self.parts[0])


def test_a_part_of_a_weight_is_not_taken_for_a_constant():
    with pytest.raises(gp.TraceError, match=r"cannot be recorded: .*a tensor appears that no recorded call made"):
        gp.trace(Kept(), torch.rand(2, 3), front_end="record")


class Selecting(nn.Module):
    """The size of what it selects depends on values: an export leaves it open, a recording cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        y = self.first(x).relu()
        return self.last(y), x[x > 0.5].sum()


def test_what_cannot_be_recorded_is_exported():
    model, x = Selecting(), torch.rand(2, 3)
    with pytest.raises(gp.TraceError, match="cannot be recorded"):
        gp.trace(model, x, front_end="record")
    assert gp.trace(model, x).source is not None
    assert gp.prune(model, x, target=gp.Target(channels=0.5)).report.verification.error < 1e-9


class Writing(nn.Module):
    """Writes into tensors it made, and uses the whole afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
        self.scale = torch.linspace(1, 2, 6)

    def forward(self, x):
        y = self.first(x) * self.scale
        y += 1
        held = torch.zeros(y.shape)
        held.copy_(y)
        held.relu_()
        return self.last(held)


def test_what_is_written_in_place_is_what_is_read_later():
    model, x = Writing(), torch.rand(2, 3)
    program = gp.trace(model, x, front_end="record")
    linear = [n for n in program.nodes if n.op == "linear"]
    read = linear[1].arguments["input"]
    assert next(n.op for n in program.nodes if read in n.outputs) == "relu_"
    assert groups(program) == groups(gp.trace(model, x, front_end="export"))
    assert gp.prune(model, x, target=gp.Target(channels=0.5)).report.verification.error < 1e-9


class Takes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)

    def forward(self, x, *more, pair, **named):
        return self.first(x + more[0] + pair["a"] + named["b"])


def test_inputs_are_named_after_the_arguments():
    a = [torch.rand(2, 3) for _ in range(4)]
    program = gp.trace(Takes(), gp.Inputs((a[0], a[1]), {"pair": {"a": a[2]}, "b": a[3]}), front_end="record")
    assert [v.name for v in program.inputs] == ["x", "more_0", "pair_a", "named_b"]


def test_hooks_and_flags_are_gone_after_a_failure():
    before = len(nn.modules.module._global_forward_hooks), torch.compiler.is_exporting()
    with pytest.raises(gp.TraceError, match="cannot be recorded"):
        gp.trace(OnValues("input"), torch.rand(2, 3), front_end="record")
    assert (len(nn.modules.module._global_forward_hooks), torch.compiler.is_exporting()) == before
    assert torch.ones(2).add(1).sum().item() == 4  # nothing is recorded or on the meta device any more


@pytest.mark.parametrize("options", [{"front_end": "jit"}, {"front_end": "record", "dynamic_batch": True}])
def test_an_unknown_front_end_is_refused(options):
    with pytest.raises(gp.InputError, match="it is 'auto', 'record' or, with an open batch size, 'export'"):
        gp.trace(nn.Linear(3, 5), torch.zeros(2, 3), **options)


class Autocasting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.first(x)
        return self.last(y.float())


def test_autocast_is_left_to_the_exporter():
    with pytest.raises(gp.TraceError, match="autocast does not act on the meta device"):
        gp.trace(Autocasting(), torch.rand(2, 3), front_end="record")
    assert gp.trace(Autocasting(), torch.rand(2, 3)).nodes[0].outputs[0].dtype == torch.bfloat16
