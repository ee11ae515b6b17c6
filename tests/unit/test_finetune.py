"""Fine-tuning: it learns, it can be stopped anywhere and goes on to the same weights, and it refuses what is wrong."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import graphprune as gp
from graphprune.recover import finetune


class Noisy(Dataset):
    """Twenty points in three classes, seen through noise of three generators."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.y = torch.arange(20) % 3
        self.x = torch.randn(20, 5, generator=generator) + 2 * functional.one_hot(self.y, 5)

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return self.x[i] + 0.1 * (random.random() + np.random.rand() + torch.rand(5)), self.y[i]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def loader(**options):
    return DataLoader(Noisy(), batch_size=4, shuffle=True, **options)


def points():
    data = Noisy()
    return [(data.x, data.y)]


def seeded(seed=1):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


OPTIONS = {"epochs": 4, "progress": False}


def test_it_learns_and_says_what_each_epoch_gave():
    seeded()
    model = net().eval()
    tuned = finetune(model, loader(), validation=points(), epochs=30, lr=0.05, progress=False)
    assert tuned.model is model
    assert not model.training
    best = tuned.epochs[tuned.best - 1]
    assert best.validation_accuracy == max(e.validation_accuracy for e in tuned.epochs) > 0.9
    data = Noisy()
    assert (model(data.x).argmax(1) == data.y).float().mean() == pytest.approx(best.validation_accuracy)
    assert tuned.epochs[0].loss > tuned.epochs[-1].loss
    assert tuned.epochs[-1].lr < 1e-3
    *lines, last = str(tuned).splitlines()
    assert len(lines) == 30
    assert lines[0].startswith("epoch 1: loss ")
    assert "validation accuracy" in lines[0]
    assert last == f"the model is that of epoch {tuned.best}"


def test_the_learning_rate_rises_and_falls_and_is_put_back():
    seen = []
    sgd = torch.optim.SGD((model := net()).parameters(), lr=0.2)
    sgd.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    finetune(model, loader(), optimizer=sgd, warm_up=0.25, **OPTIONS)
    assert len(seen) == 20
    assert seen[:5] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])
    assert seen[5:] == sorted(seen[5:], reverse=True)
    assert seen[5] == pytest.approx(0.2)
    assert seen[-1] == pytest.approx(0.1 * (1 + np.cos(np.pi * 14 / 15)))
    assert sgd.param_groups[0]["lr"] == 0.2


def test_patience_ends_the_training_with_the_best_weights():
    seeded()
    wrong = [(points()[0][0], (points()[0][1] + 1) % 3)]  # the more is learnt, the worse this gets
    tuned = finetune(model := net(), loader(), validation=wrong, epochs=50, lr=0.05, patience=3, progress=False)
    assert len(tuned.epochs) < 50
    assert len(tuned.epochs) - tuned.best == 3
    assert tuned.stopped == "stopped: nothing better on the validation batches for 3 epochs"
    with torch.no_grad():
        accuracy = (model.eval()(wrong[0][0]).argmax(1) == wrong[0][1]).float().mean()
    assert accuracy == pytest.approx(tuned.epochs[tuned.best - 1].validation_accuracy)


def test_an_average_of_the_weights_is_what_is_measured_and_returned():
    seeded()
    plain = finetune(net(), loader(), lr=0.05, **OPTIONS).model.state_dict()
    seeded()
    tuned = finetune(net(), loader(), validation=points(), lr=0.05, ema=0.9, **OPTIONS)
    averaged = tuned.model.state_dict()
    assert not torch.equal(plain["0.weight"], averaged["0.weight"])
    with torch.no_grad():
        loss = functional.cross_entropy(tuned.model.eval()(points()[0][0]), points()[0][1])
    assert float(loss) == pytest.approx(tuned.epochs[tuned.best - 1].validation_loss, rel=1e-5)


def test_an_average_follows_its_formula():
    batches = [(torch.randn(4, 5), torch.tensor([0, 1, 2, 0])) for _ in range(3)]
    kept = []
    sgd = torch.optim.SGD((model := net()).parameters(), lr=0.1)
    sgd.register_step_post_hook(lambda *_: kept.append(model[0].weight.detach().clone()))
    finetune(model, batches, epochs=1, optimizer=sgd, ema=0.75, progress=False)
    want = kept[0]
    for weight in kept[1:]:
        want = 0.75 * want + 0.25 * weight
    torch.testing.assert_close(model[0].weight.detach(), want)


def test_labels_are_smoothed_and_gradients_clipped():
    norms = []
    sgd = torch.optim.SGD((model := net()).parameters(), lr=0.1)

    def note(optimizer, *_):
        norms.append(torch.cat([p.grad.flatten() for p in model.parameters()]).norm())

    sgd.register_step_pre_hook(note)
    seeded()
    smoothed = finetune(model, points(), optimizer=sgd, label_smoothing=0.3, clip=0.05, **OPTIONS).epochs[0].loss
    assert max(norms) <= 0.05 + 1e-6
    seeded()
    assert finetune(net(), points(), **OPTIONS).epochs[0].loss != pytest.approx(smoothed, rel=1e-3)


def test_adamw_and_bfloat16_learn_too():
    seeded()
    options = {"epochs": 40, "optimizer": "adamw", "lr": 0.02, "amp": True, "progress": False}
    tuned = finetune(net(), loader(), validation=points(), **options)
    assert type(tuned.optimizer).__name__ == "AdamW"
    assert [group["weight_decay"] for group in tuned.optimizer.param_groups] == [0.05, 0.0]
    assert max(e.validation_accuracy for e in tuned.epochs) > 0.9


def test_dicts_and_losses_of_ones_own():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 1)

        def forward(self, *, points):
            return {"value": self.layer(points)}

    x, model = torch.randn(12, 5), Named()
    pairs = [({"points": x}, x.sum(1, keepdim=True))]

    def loss(output, want):
        return (output["value"] - want).square().flatten()

    tuned = finetune(model, pairs, validation=pairs, loss=loss, epochs=60, lr=0.1, progress=False)
    assert tuned.epochs[-1].accuracy is None
    assert tuned.epochs[-1].validation_accuracy is None
    assert tuned.epochs[tuned.best - 1].validation_loss < 0.05


def test_a_penalty_is_called_once_a_step_and_goes_along():
    class Counts:
        step = 0

        def __call__(self):
            assert model[0].weight.grad is not None
            self.step += 1

        def state_dict(self):
            return {"step": self.step}

    model, counts = net(), Counts()
    finetune(model, loader(), penalty=counts, **OPTIONS)
    assert counts.step == 20


def test_the_bar_tells_loss_and_accuracy(capsys):
    finetune(net(), loader(), validation=points(), epochs=2, progress=True)
    told = capsys.readouterr().err
    assert "fine-tuning: 100%" in told
    assert "10/10" in told
    assert "loss=" in told
    assert "acc=" in told
    assert "validation=" in told


def test_slimming_while_tuning_goes_on_with_its_schedule(tmp_path):
    model = net().eval()
    coupling = gp.couple(gp.trace(model, torch.zeros(2, 5)))
    slimming = gp.training.Slimming(model, coupling, gp.training.ramp(0.1, 40))
    finetune(model, loader(), penalty=slimming, directory=tmp_path, **OPTIONS)
    assert slimming.step == 20
    again = gp.training.Slimming(model, coupling, gp.training.ramp(0.1, 40))
    finetune(model, loader(), penalty=again, directory=tmp_path, **OPTIONS)
    assert again.step == 20


# -- stopped, and gone on with --------------------------------------------------------------------------------------


class Stops:
    """A loader that breaks off, once, before its n-th batch."""

    def __init__(self, inner, at):
        self.inner, self.left = inner, at

    def __len__(self):
        return len(self.inner)

    def __iter__(self):
        for batch in self.inner:
            if self.left == 0:
                self.left = -1
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


@pytest.mark.parametrize(
    ("at", "every", "workers"), [(5, None, 0), (7, None, 0), (7, 2, 0), (13, 1, 0), (19, 3, 0), (13, 1, 2)]
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker")  # on a machine of one core
def test_a_run_that_was_stopped_ends_with_the_same_weights_bit_by_bit(tmp_path, at, every, workers):
    options = {"validation": points(), "lr": 0.05, "ema": 0.5, "every": every, **OPTIONS}
    seeded()
    want = finetune(net(), loader(num_workers=workers), directory=tmp_path / "whole", **options)
    seeded()
    model, stops = net(), Stops(loader(num_workers=workers), at)
    with pytest.raises(KeyboardInterrupt, match=r"stopped in epoch \d; the model is as it was after epoch \d"):
        finetune(model, stops, directory=tmp_path / "parts", **options)
    seeded(99)
    torch.rand(5)
    got = finetune(net(), loader(num_workers=workers), directory=tmp_path / "parts", **options)
    assert [e.plain() | {"seconds": 0} for e in got.epochs] == [e.plain() | {"seconds": 0} for e in want.epochs]
    for name, tensor in want.model.state_dict().items():
        assert torch.equal(got.model.state_dict()[name], tensor), name
    for p, q in zip(want.optimizer.state.values(), got.optimizer.state.values(), strict=True):
        assert torch.equal(p["momentum_buffer"], q["momentum_buffer"])


def test_the_same_call_goes_on_with_the_model_that_was_interrupted(tmp_path):
    sgd = torch.optim.SGD((model := net()).parameters(), lr=0.01, momentum=0.9)
    seeded()
    plain = {"optimizer": sgd, "directory": tmp_path, **OPTIONS}
    with pytest.raises(KeyboardInterrupt, match=r"after epoch 1, which .*finetune.pt holds; the same call goes on"):
        finetune(model, Stops(loader(), 8), **plain)
    got = finetune(model, loader(), **plain).model.state_dict()
    sgd = torch.optim.SGD((whole := net()).parameters(), lr=0.01, momentum=0.9)
    seeded()
    want = finetune(whole, loader(), optimizer=sgd, **OPTIONS).model.state_dict()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_run_that_is_done_is_not_done_again(tmp_path):
    seeded()
    first = finetune(model := net(), loader(), validation=points(), directory=tmp_path, **OPTIONS)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = finetune(model, loader(), validation=points(), directory=tmp_path, **OPTIONS)
    assert again.epochs == first.epochs
    assert all(torch.equal(model.state_dict()[name], kept[name]) for name in kept)


def test_ctrl_c_without_a_directory_says_where_the_model_is():
    with pytest.raises(KeyboardInterrupt, match="stopped in epoch 1; the model is as it was at the start"):
        finetune(model := net(), Stops(loader(), 3), **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), net().state_dict().values(), strict=True))


# -- refused --------------------------------------------------------------------------------------------------------


class Explodes(Stops):
    """A loader whose n-th batch is not to be learnt from."""

    def __iter__(self):
        for x, y in self.inner:
            self.left -= 1
            yield (x * float("nan") if self.left == -1 else x), y


def test_an_exploding_loss_stops_with_the_last_good_weights(tmp_path):
    seeded()
    want = finetune(net(), loader(), lr=0.05, directory=tmp_path / "a", **OPTIONS)
    seeded()
    model = net()
    match = r"the loss is nan in epoch 3, batch 2; the model is as it was after epoch 2, which .* holds; .*; lower lr, "
    with pytest.raises(gp.TrainingError, match=match):
        finetune(model, Explodes(loader(), 12), lr=0.05, directory=tmp_path / "b", **OPTIONS)
    kept = torch.load(tmp_path / "b" / "finetune.pt", weights_only=True)
    assert len(kept["history"]) == 2
    assert all(torch.equal(kept["model"][name], tensor) for name, tensor in model.state_dict().items())
    seeded(5)
    got = finetune(model, loader(), lr=0.05, directory=tmp_path / "b", **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(got.model.parameters(), want.model.parameters(), strict=True))


def test_a_loss_that_grows_out_of_bounds_stops_too():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(
        gp.TrainingError, match=r"the loss is \S+ in epoch \d, batch \d; the model is as it was .*clip=1"
    ):
        finetune(model, loader(), lr=1e4, epochs=9, warm_up=0, progress=False)
    assert all(p.isfinite().all() for p in model.parameters())


def test_weights_that_are_not_finite_are_never_kept(tmp_path):
    model = net()

    def spoil():
        if model[0].weight.grad is not None and spoil.left == 0:
            model[0].weight.grad.fill_(float("nan"))
        spoil.left -= 1

    spoil.left = 9  # the last step of the second epoch
    with pytest.raises(
        gp.TrainingError, match=r"0.weight holds NaN or infinity after 10 steps; .* after epoch 1, which"
    ):
        finetune(model, loader(), penalty=spoil, directory=tmp_path, **OPTIONS)
    assert len(torch.load(tmp_path / "finetune.pt", weights_only=True)["history"]) == 1


def test_a_loader_that_yields_nothing_is_refused():
    class Dry:
        def __len__(self):
            return 3

        def __iter__(self):
            return iter(())

    with pytest.raises(gp.InputError, match="loader yields no batches; the dataset is empty, smaller than one batch"):
        finetune(net(), [], **OPTIONS)
    with pytest.raises(gp.InputError, match="loader yields no batches; the dataset is empty"):
        finetune(net(), Dry(), **OPTIONS)
    with pytest.raises(gp.InputError, match="loader yields no batches"):
        finetune(net(), DataLoader(Noisy(), batch_size=64, drop_last=True), **OPTIONS)
    with pytest.raises(gp.InputError, match="validation yields no batches"):
        finetune(net(), loader(), validation=[], **OPTIONS)
    with pytest.raises(gp.InputError, match="used up after one pass"):
        finetune(net(), iter(points()), **OPTIONS)
    with pytest.raises(gp.InputError, match="Tensor is no iterable of batches"):
        finetune(net(), points()[0][0], **OPTIONS)


def test_a_loader_without_a_length_is_refused():
    class Endless:
        def __iter__(self):
            return iter(points())

    with pytest.raises(gp.InputError, match="Endless does not say how many batches it has, which the schedule needs"):
        finetune(net(), Endless(), **OPTIONS)


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    finetune(net(), loader(), directory=tmp_path, **OPTIONS)
    with pytest.raises(gp.InputError, match=r"finetune.pt is of another run: epochs was 4 and is 5; pass another"):
        finetune(net(), loader(), directory=tmp_path, **{**OPTIONS, "epochs": 5})
    wide = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(0.2), nn.Linear(7, 3))
    with pytest.raises(
        gp.InputError, match=r"shapes was 0.weight: \[8, 5\] and is 0.weight: \[7, 5\]; pass another dir"
    ):
        finetune(wide, loader(), directory=tmp_path, **OPTIONS)
    with pytest.raises(gp.InputError, match=r"shapes was without 5.weight and is 5.weight: \[2, 3\]"):
        finetune(nn.Sequential(*net(), nn.Linear(3, 2)), loader(), directory=tmp_path, **OPTIONS)
    with pytest.raises(gp.InputError, match="had other weights at the start; pass the model it began with, or another"):
        finetune(net(seed=1), loader(), directory=tmp_path, **OPTIONS)


def test_a_truncated_checkpoint_is_refused_by_name(tmp_path):
    finetune(net(), loader(), directory=tmp_path, **OPTIONS)
    path = tmp_path / "finetune.pt"
    path.write_bytes(path.read_bytes()[:-700])
    with pytest.raises(gp.InputError, match=r"finetune.pt cannot be read \(\w+: .*\); delete it to begin anew"):
        finetune(net(), loader(), directory=tmp_path, **OPTIONS)
    torch.save([1, 2], path)
    with pytest.raises(gp.InputError, match="cannot be read"):
        finetune(net(), loader(), directory=tmp_path, **OPTIONS)


def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        finetune(net(), Stops(loader(), 12), directory=tmp_path, **OPTIONS)
    before = (tmp_path / "finetune.pt").read_bytes()

    def fails(content, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space left"):
        finetune(net(), loader(), directory=tmp_path, **OPTIONS)
    assert (tmp_path / "finetune.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["finetune.pt"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epochs": 0}, r"epochs=0\): it is a number of passes"),
        ({"lr": 0}, r"lr=0\): it is more than 0"),
        ({"weight_decay": -1}, r"weight_decay=-1\): it is 0 or more"),
        ({"warm_up": 1}, r"warm_up=1\): it is a fraction of all steps"),
        ({"label_smoothing": 1.5}, r"label_smoothing=1.5\): it is in \[0, 1\)"),
        ({"clip": 0}, r"clip=0\): it is the largest norm"),
        ({"ema": 1}, r"ema=1\): it is a decay in \[0, 1\)"),
        ({"patience": 0}, r"patience=0\): it is a number of epochs"),
        ({"patience": 2}, "patience needs validation="),
        ({"label_smoothing": 0.1, "loss": functional.mse_loss}, "smooth the labels in the loss you pass"),
        ({"optimizer": "rmsprop"}, "it is one of sgd, adamw, or an optimizer"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, match):
    with pytest.raises(gp.InputError, match=match):
        finetune(net(), loader(), **{**OPTIONS, **options})


def test_optimizers_and_models_that_do_not_go_together_are_refused():
    sgd = torch.optim.SGD(net().parameters(), lr=0.1)
    with pytest.raises(gp.InputError, match=r"holds no parameter of this model; after pruning, pass gp.migrate"):
        finetune(net(), loader(), optimizer=sgd, **OPTIONS)
    with pytest.raises(gp.InputError, match="lr and weight_decay are those of the optimizer given"):
        finetune(net(), loader(), optimizer=sgd, lr=0.1, **OPTIONS)
    with pytest.raises(gp.InputError, match="Sequential has no parameter that asks for a gradient"):
        finetune(net().requires_grad_(False), loader(), **OPTIONS)
