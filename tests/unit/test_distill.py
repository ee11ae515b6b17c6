"""Distillation: what a teacher adds to a loss, where features are matched, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphprune as gp
from graphprune.recover import Distillation, finetune


class Stream(nn.Module):
    """Two convolutions that are added, with norms, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
        self.outer, self.linear = nn.Conv2d(5, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.linear((x + self.outer(self.inner(x))).relu().mean((2, 3)))


X = torch.randn(8, 3, 8, 8)
Y = torch.arange(8) % 4


@pytest.fixture
def pair():
    torch.manual_seed(0)
    teacher = Stream().train()
    teacher(X)
    return teacher, gp.prune(teacher, X, target=gp.Target(channels=0.5))


def of(pair, **options):
    teacher, result = pair
    return Distillation(teacher, coupling=result.coupling, plan=result.plan, example_inputs=X[:2], **options)


def test_the_soft_part_is_the_divergence_at_a_temperature(pair):
    teacher, result = pair
    student = result.model
    output, loss = student(X), torch.tensor(2.0)
    got = Distillation(teacher, temperature=3.0, weight=0.25)(loss, output, X)
    with torch.no_grad():
        want = teacher.eval()(X).div(3).softmax(1)
    divergence = (want * (want.log() - output.div(3).log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(got, 0.75 * loss + 0.25 * 9 * divergence)
    raw = Distillation(teacher, temperature=None, weight=1.0)(loss, output, X)
    torch.testing.assert_close(raw, functional.mse_loss(output, teacher(X)).detach(), check_stride=False)


def test_classes_may_be_in_another_dim():
    teacher, student = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 1)
    got = Distillation(teacher, temperature=1.0, weight=1.0, class_dim=1)(torch.zeros(()), student(X), X)
    want, says = teacher(X).softmax(1), student(X).softmax(1)
    torch.testing.assert_close(got, (want * (want / says).log()).sum(1).mean())


def test_features_are_held_against_the_kept_channels_of_the_teacher(pair):
    teacher, result = pair
    distillation = of(pair, weight=0.0, features=["inner", "norm"], feature_weight=3.0)
    student = result.model.eval()
    seen = {}
    for name in ("inner", "norm"):
        student.get_submodule(name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
    with distillation.watching(student):
        got = distillation(torch.tensor(1.0), student(X), X)
    teacher.eval()
    stream = teacher.norm(teacher.stem(X))
    kept = {"norm": stream[:, list(result.plan.groups["stem"])]}
    kept["inner"] = teacher.inner(stream.relu())[:, list(result.plan.groups["inner.0"])]
    assert kept["inner"].shape[1] < 5
    assert kept["norm"].shape[1] < 6
    want = sum((seen[n] - kept[n]).square().sum() / kept[n].square().sum() for n in kept)
    torch.testing.assert_close(got, 1.0 + 1.5 * want)


def test_features_of_the_zeroed_original_are_matched_exactly(pair):
    """Inside a block nothing reaches a channel that a removed one fed, so its features are those of the original."""
    teacher, result = pair
    plan = gp.Plan.of(result.coupling, {"inner.0": [1, 3]})
    student = gp.rewrite(teacher, X, result.coupling, plan).model.eval()
    distillation = Distillation(
        teacher,
        weight=0.0,
        features=["inner", "inner.1"],
        coupling=result.coupling,
        plan=plan,
        example_inputs=X[:2],
    )
    with distillation.watching(student), torch.no_grad():
        assert float(distillation(torch.zeros(()), student(X), X)) < 1e-10


def test_the_teacher_is_left_as_it_was(pair):
    teacher, result = pair
    teacher.train()
    teacher.inner[1].eval()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    distillation = of(pair, features=["inner"])
    tuned = finetune(result.model, [(X, Y)], epochs=3, teacher=distillation, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert [m.training for m in (teacher, teacher.inner, teacher.inner[1])] == [True, True, False]
    assert all(p.grad is None for p in teacher.parameters())
    for model in (teacher, tuned.model):
        assert not any(module._forward_hooks for module in model.modules())


def test_a_student_comes_nearer_to_its_teacher(pair):
    teacher, result = pair
    batches = [(torch.randn(16, 3, 8, 8), torch.zeros(16, dtype=torch.long)) for _ in range(4)]
    distillation = of(pair, temperature=None, weight=1.0, features=["inner"])

    def apart():
        with torch.no_grad():
            return float(functional.mse_loss(result.model.eval()(X), teacher.eval()(X)))

    before = apart()
    finetune(result.model, batches, epochs=20, lr=0.02, teacher=distillation, progress=False)
    assert apart() < 0.3 * before


def test_outputs_with_logits_are_found():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x):
            return {"hidden": torch.zeros(1), "logits": self.layer(x)}

    teacher, student, x = Named(), Named(), torch.randn(2, 3)
    got = Distillation(teacher, temperature=None, weight=1.0)(torch.zeros(()), student(x), {"x": x})
    torch.testing.assert_close(got, functional.mse_loss(student.layer(x), teacher.layer(x)))


# -- refused --------------------------------------------------------------------------------------------------------


def test_a_teacher_with_other_outputs_is_refused(pair):
    _, result = pair
    other = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    match = r"the teacher's output has shape \[8, 5\], the student's \[8, 4\]; a teacher has the same outputs"
    with pytest.raises(gp.InputError, match=match):
        finetune(result.model, [(X, Y)], epochs=1, teacher=Distillation(other), progress=False)


def test_a_student_that_is_its_teacher_is_refused(pair):
    with pytest.raises(gp.InputError, match=r"the student is the teacher; distil from the original into result.model"):
        finetune(pair[0], [(X, Y)], epochs=1, teacher=Distillation(pair[0]), progress=False)


def test_outputs_without_floats_are_refused(pair):
    with pytest.raises(gp.InputError, match="Tensor holds no floating tensor to compare"):
        Distillation(pair[0])(torch.zeros(()), torch.zeros(8, dtype=torch.long), X)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"weight": 1.5}, {"feature_weight": -1.0}])
def test_numbers_out_of_range_are_refused(pair, options):
    with pytest.raises(gp.InputError, match=r"the temperature is positive, the weight in \[0, 1\]"):
        Distillation(pair[0], **options)


def test_features_that_cannot_be_followed_are_refused(pair):
    teacher, _ = pair
    with pytest.raises(gp.InputError, match="features need coupling=, plan= and example_inputs= of the teacher"):
        Distillation(teacher, features=["inner"])
    with pytest.raises(gp.UnknownName, match="no module 'iner' in Stream; did you mean 'inner'"):
        of(pair, features=["iner"])
    teacher.idle = nn.ReLU()
    with pytest.raises(gp.InputError, match="what 'idle' returns cannot be followed; name modules that run"):
        of(pair, features=["idle"])


def test_an_exported_model_has_no_features_to_follow():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.last(self.first(x).relu())

    net, x = Branches(), torch.randn(2, 3)
    coupling = gp.couple(gp.trace(net, x, front_end="export"))
    plan = gp.Plan.of(coupling, {"first": [0, 1]})
    with pytest.raises(gp.InputError, match="of a model that was recorded and not exported"):
        Distillation(net, features=["first"], coupling=coupling, plan=plan, example_inputs=x)


def test_students_without_the_modules_are_refused(pair):
    teacher, result = pair
    distillation = of(pair, features=["inner"])
    flat = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(gp.InputError, match=r"the student, Sequential, has no module 'inner'; prune with emit='graft'"):
        finetune(flat, [(X, Y)], epochs=1, teacher=distillation, progress=False)
    with pytest.raises(gp.InputError, match=r"was not seen to run 'inner'; run it inside `with distillation.watching"):
        distillation(torch.zeros(()), result.model(X), X)
    other = gp.prune(teacher, X, target=gp.Target(channels=0.4)).model
    with (
        distillation.watching(other),
        pytest.raises(gp.InputError, match=r"'inner' gives .* in the student, and the teacher's kept channels are"),
    ):
        distillation(torch.zeros(()), other(X), X)


def test_a_plan_of_another_model_is_refused(pair):
    _, result = pair
    wide = Stream()
    wide.inner = nn.Sequential(nn.Conv2d(6, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU())
    wide.outer = nn.Conv2d(7, 6, 3, padding=1)
    with pytest.raises(gp.PlanError, match="the plan was made for another model"):
        Distillation(wide, features=["inner"], coupling=result.coupling, plan=result.plan, example_inputs=X)
