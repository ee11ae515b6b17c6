"""Optimizers and averaged copies of a pruned model, against slices by hand and against training the zeroed original."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import graphprune as gp
from graphprune.reference import zeroed
from tests.nets import Attention, randomised

torch.manual_seed(0)
X, Y = torch.randn(6, 3, 5, 5), torch.randint(0, 5, (6,))


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(0)


class Lion(torch.optim.Optimizer):
    """Sign of a momentum: an optimizer that torch does not have, with options and state of its own."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})
        self.calls = [0]

    @torch.no_grad()
    def step(self, closure=None):
        self.calls[0] += 1
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    p.sub_((first * m + (1 - first) * p.grad).sign(), alpha=group["lr"])
                    m.mul_(second).add_(p.grad, alpha=1 - second)


class Shampoo(torch.optim.Optimizer):
    """Keeps a matrix per dim: for square weights of the weight's shape."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("preconditioner", torch.eye(p.shape[0]))


class Sharp(torch.optim.Optimizer):
    """Wraps another optimizer, whose groups it shares."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base.param_groups

    def step(self, closure=None):
        self.base.step()


def conv_net():
    torch.manual_seed(0)
    return randomised(
        nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 7, 3), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(7, 5)),
        )
    )


def train(model, optimizer, steps, *, masks=None, x=X, y=Y):
    """Steps of gradient descent; with masks, gradients where they are False are set to 0."""
    x = x.to(next(model.parameters()).dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        for name, parameter in model.named_parameters():
            if masks and name in masks:
                parameter.grad[~masks[name]] = 0
        optimizer.step()


def half(model, x=X, **options):
    return gp.prune(model, x, target=gp.Target(channels=0.5), **options)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, betas=(0.8, 0.9)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": torch.optim.Adadelta,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "rprop": torch.optim.Rprop,
    "asgd": torch.optim.ASGD,
    "lion": Lion,
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_state_is_sliced_as_by_hand(make):
    model = conv_net()
    optimizer = make(model.parameters())
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    result = half(model)
    new = gp.migrate(optimizer, result)

    a, b = (list(result.plan.groups[name]) for name in ("0", "3"))
    assert (len(a), len(b)) == (4, 4)
    first, both, inputs = (lambda t: t[a]), (lambda t: t[b][:, a]), (lambda t: t[:, b])
    by_hand = {
        **dict.fromkeys(("0.weight", "0.bias", "1.weight", "1.bias"), first),
        **dict(
            zip(("3.weight", "3.bias", "6.weight", "6.bias"), (both, lambda t: t[b], inputs, lambda t: t), strict=True)
        ),
    }
    small, compared = dict(result.model.named_parameters()), 0
    for name, parameter in model.named_parameters():
        state, migrated = optimizer.state[parameter], new.state[small[name]]
        assert migrated.keys() == state.keys()
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim():
                assert torch.equal(migrated[key], by_hand[name](value))
                compared += 1
            else:
                assert migrated[key] == value
            if isinstance(value, torch.Tensor):
                assert migrated[key].data_ptr() != value.data_ptr()
    assert compared >= 8
    assert type(new) is type(optimizer)
    assert all(p is q for p, q in zip(new.param_groups[0]["params"], result.model.parameters(), strict=True))
    options = [{k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (new, optimizer)]
    assert options[0] == options[1]
    assert new.defaults == optimizer.defaults
    train(result.model, new, 1)
    torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))


def token_net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 10, 2, 2), nn.Flatten(2), nn.Linear(4, 10), Attention(10, 5, 6), Head())


class Stock(Attention):
    """States its width in code, so it is grafted."""

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(10, 7), nn.Linear(7, 5)

    def forward(self, x):
        return self.out(self.inner(x).relu().mean(1))


def grafted_net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 10, 2, 2), nn.Flatten(2), nn.Linear(4, 12), Stock(12, 3, 4), nn.Linear(12, 10), Head())  # fmt: skip


@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adam", "amsgrad"])
@pytest.mark.parametrize(
    ("build", "emit"),
    [(conv_net, "module"), (conv_net, "graph"), (token_net, "module"), (grafted_net, "graft")],
    ids=["conv", "conv-graph", "attention", "attention-graft"],
)
def test_training_goes_on_as_that_of_the_zeroed_original_with_masked_gradients(build, emit, kind):
    """Removed weights and their state are zero there and stay it, so all others must move alike."""
    model = build().double().train()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, 3)
    result = half(model, X.double(), emit=emit)
    assert result.report.emitter == emit
    assert result.plan.removed
    small, new = result.model, gp.migrate(optimizer, result)

    masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    for name, mask in masks.items():
        kept = result.plan.kept.get(name, {})
        index = [kept.get(d, torch.arange(n)) for d, n in enumerate(mask.shape)]
        mask[torch.meshgrid(*index, indexing="ij")] = True
    with torch.no_grad():
        for name, value in zeroed(model, result.plan).items():
            model.get_parameter(name).copy_(value) if name in masks else model.get_buffer(name).copy_(value)
        for name, parameter in model.named_parameters():
            for value in optimizer.state[parameter].values():
                if value.dim():
                    value[~masks[name]] = 0
    assert sum(int((~mask).sum()) for mask in masks.values()) > 50

    before = [p.detach().clone() for p in small.parameters()]
    train(model, optimizer, 4, masks=masks)
    train(small, new, 4)
    after = dict(small.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(after[name].flatten(), parameter[masks[name]].flatten(), rtol=1e-9, atol=1e-11)
    moved = [(p - q).abs().max() > 1e-4 for p, q in zip(small.parameters(), before, strict=True)]
    assert sum(moved) >= len(moved) - 1  # a bias before a batch norm does not


# -- which parameters ----------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding and the head that shares its weight; a frozen layer; and one that the forward does not read."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner = nn.Embedding(7, 8), nn.Linear(8, 6)
        self.out, self.head, self.unread = nn.Linear(6, 8), nn.Linear(8, 7, bias=False), nn.Linear(2, 3)
        self.head.weight = self.embedding.weight
        self.out.requires_grad_(False)

    def forward(self, tokens):
        return self.head(self.out(self.inner(self.embedding(tokens)).relu()))


TOKENS = torch.randint(0, 7, (2, 5))


def tied():
    torch.manual_seed(0)
    model, extra = Tied(), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam(
        [
            {"params": [("unread", model.unread.weight)], "lr": 0.3},
            {
                "params": [("extra", extra), ("e", model.embedding.weight), ("u", model.unread.bias)],
                "weight_decay": 0.1,
            },
            {"params": [(n, p) for n, p in model.out.named_parameters()], "betas": (0.5, 0.6)},
        ],
        lr=0.2,
    )
    (model(TOKENS).square().sum() + extra.sum() + model.unread(torch.ones(2)).sum()).backward()
    optimizer.step()
    return model, extra, optimizer


@pytest.mark.parametrize("emit", ["module", "graph"])
@pytest.mark.parametrize("gone", [False, True])
def test_groups_keep_their_order_and_options_whatever_parameters_they_have(emit, gone):
    model, extra, optimizer = tied()
    result = half(model, TOKENS, emit=emit)
    if gone:
        del result.model.unread
    small, new = result.model, gp.migrate(optimizer, result)
    named = dict(small.named_parameters(remove_duplicate=False))
    weight = named["head.weight"]
    assert weight is named.get("embedding.weight", weight)  # a graph module has it once
    assert weight.shape == (7, 4)
    unread, mixed, frozen = new.param_groups
    assert [unread["lr"], mixed["weight_decay"], frozen["betas"]] == [0.3, 0.1, (0.5, 0.6)]
    assert unread["params"] == [] if gone else unread["params"][0] is named["unread.weight"]
    assert mixed["param_names"] == (["extra", "e"] if gone else ["extra", "e", "u"])
    assert mixed["params"][0] is extra
    assert mixed["params"][1] is weight
    assert [p.requires_grad for p in frozen["params"]] == [False, False]
    assert frozen["params"][0].shape == (4, 3)
    assert len(new.state) == (2 if gone else 4)
    kept = result.plan.kept["embedding.weight"][1].tolist()
    assert kept != [0, 1, 2, 3]
    assert torch.equal(new.state[weight]["exp_avg"], optimizer.state[model.embedding.weight]["exp_avg"][:, kept])
    assert torch.equal(new.state[extra]["exp_avg"], optimizer.state[extra]["exp_avg"])
    assert new.state[extra]["exp_avg"] is not optimizer.state[extra]["exp_avg"]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3, 2]


def test_a_migrated_optimizer_can_be_migrated_again():
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 1)
    first = half(model)
    once = gp.migrate(optimizer, first)
    train(first.model, once, 1)
    second = half(first.model)
    twice = gp.migrate(once, second)
    weight = second.model[3].weight
    assert twice.state[weight]["momentum_buffer"].shape == weight.shape == (2, 2, 3, 3)
    with pytest.raises(
        gp.InputError, match="SGD has no parameter of the model that was pruned; pass the optimizer over"
    ):
        gp.migrate(once, first)


def test_what_an_optimizer_holds_goes_along_by_reference_where_it_is_the_users():
    model, seen = conv_net(), []

    class Watcher:
        def hook(self, optimizer, args, kwargs):
            seen.append(optimizer)

    optimizer = Lion(model.parameters())
    optimizer.register_step_pre_hook(Watcher().hook)
    train(model, optimizer, 1)
    result = half(model)
    new = gp.migrate(optimizer, result)
    train(result.model, new, 2)
    assert seen == [optimizer, new, new]
    assert (optimizer.calls, new.calls) == ([1], [3])


def test_an_optimizer_within_an_optimizer_goes_along():
    model = conv_net()
    optimizer = Sharp(model.parameters())
    train(model, optimizer, 2)
    result = half(model)
    new = gp.migrate(optimizer, result)
    assert new.base is not optimizer.base
    assert new.base.param_groups is new.param_groups
    parameter = result.model[6].weight
    kept = list(result.plan.groups["3"])
    want = optimizer.base.state[model[6].weight]["momentum_buffer"][:, kept]
    assert torch.equal(new.base.state[parameter]["momentum_buffer"], want)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=6),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ],
    ids=["cosine", "one-cycle", "plateau"],
)
def test_a_scheduler_goes_on_over_the_new_optimizer(schedule):
    def rates(prune):
        model = conv_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        scheduler, found = schedule(optimizer), []
        for epoch in range(5):
            if prune and epoch == 2:
                result = half(model)
                model, optimizer = result.model, gp.migrate(optimizer, result)
                scheduler.optimizer = optimizer
            before = model[6].weight.detach().clone()
            train(model, optimizer, 1)
            assert not torch.equal(model[6].weight, before)
            scheduler.step(*([1.0] if hasattr(scheduler, "patience") else []))
            found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        return found

    assert rates(True) == rates(False)
    assert len(set(rates(True))) > 1


def test_a_result_does_not_keep_the_original_alive():
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result, alive = half(model), weakref.ref(model[0])
    del model
    gc.collect()
    assert alive() is None
    assert len(gp.migrate(optimizer, result).param_groups[0]["params"]) == 8  # it holds its parameters itself


# -- state that cannot be sliced -----------------------------------------------------------------------------------


def test_factored_state_is_an_error_or_starts_anew():
    model = conv_net()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
    train(model, optimizer, 2)
    result = half(model)
    with pytest.raises(gp.InputError, match=r"Adafactor keeps 'row_var' of shape \[8, 3, 3, 1\] for 0.weight.*restart"):
        gp.migrate(optimizer, result)
    new = gp.migrate(optimizer, result, unfit="restart")
    assert result.model[0].weight not in new.state
    assert new.state[result.model[1].bias]["variance"].shape == (4,)
    train(result.model, new, 1)
    assert new.state[result.model[0].weight]["row_var"].shape == (4, 3, 3, 1)


def test_a_preconditioner_of_a_square_weight_is_not_taken_for_one_number_per_element():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    optimizer = Shampoo(model.parameters())
    optimizer.step()
    assert optimizer.state[model[0].weight]["preconditioner"].shape == model[0].weight.shape
    result = half(model, torch.randn(2, 8))
    with pytest.raises(gp.InputError, match=r"Shampoo keeps 'preconditioner'.*not one number per element"):
        gp.migrate(optimizer, result)
    assert not gp.migrate(optimizer, result, unfit="restart").state


def test_state_of_a_model_that_loses_nothing_is_copied_whatever_it_is():
    model = conv_net()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
    train(model, optimizer, 1)
    result = gp.prune(model, X, target=gp.Target(channels=1.0))
    new = gp.migrate(optimizer, result)
    assert isinstance(new.state, defaultdict)
    torch.testing.assert_close(new.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


# -- averaged copies -----------------------------------------------------------------------------------------------


def part_of(ema):
    """The averaged copy itself."""
    return ema.module if isinstance(ema, AveragedModel) else ema["ema"] if isinstance(ema, nn.ModuleDict) else ema


def averaged(model, wrap):
    ema = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        train(model, optimizer, 1)
        if isinstance(ema, AveragedModel):
            ema.update_parameters(model)
        else:
            own = dict(part_of(ema).named_parameters())
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    own[name].lerp_(parameter, 0.1)
    return ema.eval()


@pytest.mark.parametrize("emit", ["module", "graph"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
        lambda m: copy.deepcopy(m).requires_grad_(False),
        lambda m: nn.ModuleDict({"other": nn.Linear(2, 2), "ema": copy.deepcopy(m)}),
    ],
    ids=["AveragedModel", "deepcopy", "held"],
)
def test_an_averaged_copy_becomes_the_zeroed_averaged_copy(wrap, emit):
    model = conv_net().double()
    ema = averaged(model, wrap)
    result = half(model.train(), X.double(), emit=emit)
    before = copy.deepcopy(ema.state_dict())
    small = gp.migrate(ema, result)
    part = part_of(small)
    found = gp.verify(part_of(ema), part, X.double(), result.coupling, result.plan)
    assert found.error < 1e-9 < found.effect
    assert not torch.equal(part(X.double()), result.model.eval()(X.double()))
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in ema.parameters()]
    assert not any(m.training for m in small.modules())
    torch.testing.assert_close(ema.state_dict(), before, rtol=0, atol=0)
    if isinstance(ema, AveragedModel):
        assert type(small) is AveragedModel
        assert (small.n_averaged, small.multi_avg_fn) == (2, ema.multi_avg_fn)
        small.update_parameters(result.model)
        assert small.n_averaged == 3


def test_an_averaged_copy_keeps_its_precision_and_ties():
    model = Tied()
    ema = copy.deepcopy(model).double()
    small = gp.migrate(ema, half(model, TOKENS))
    assert small.embedding.weight is small.head.weight
    assert small.embedding.weight.dtype == torch.float64


# -- refused -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_migrated_is_refused_with_what_to_do():
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = half(model)
    with pytest.raises(gp.InputError, match=r"StepLR cannot be migrated; .* scheduler.optimizer = gp.migrate"):
        gp.migrate(torch.optim.lr_scheduler.StepLR(optimizer, 1), result)
    with pytest.raises(gp.InputError, match="list cannot be migrated; pass an optimizer, or an averaged copy"):
        gp.migrate([optimizer], result)
    with pytest.raises(gp.InputError, match="unfit='drop'; it is 'error' or 'restart'"):
        gp.migrate(optimizer, result, unfit="drop")
    with pytest.raises(gp.InputError, match="Adam has no parameter of the model that was pruned"):
        gp.migrate(torch.optim.Adam(conv_net().parameters()), result)
    with pytest.raises(gp.InputError, match="Linear neither is nor holds a copy of the model that was pruned"):
        gp.migrate(nn.Linear(3, 5), result)
    with pytest.raises(gp.InputError, match="Sequential neither is nor holds a copy"):
        gp.migrate(copy.deepcopy(result.model), result)
