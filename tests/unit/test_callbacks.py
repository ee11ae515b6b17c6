"""Callbacks for the loops of others: with the packages themselves where they are installed, and with stand-ins."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphprune as gp
from graphprune.training import GroupFisher, Slimming, lightning_callback, transformers_callback

HAS = {name: importlib.util.find_spec(name) is not None for name in ("transformers", "accelerate", "lightning")}


class Net(nn.Module):
    """A classifier that gives its loss, as transformers' models do."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x, labels=None):
        logits = self.last(self.norm(self.first(x)).relu())
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits} if labels is not None else logits


def made():
    torch.manual_seed(0)
    net = Net()
    x, y = torch.randn(64, 3), torch.arange(64) % 4
    coupling = gp.couple(gp.trace(net, x[:2]))
    return net, coupling, x, y


def steps(net, x, y, optimizer, step_end):
    """A loop of somebody else's."""
    for k in range(0, 64, 8):
        optimizer.zero_grad()
        functional.cross_entropy(net.train()(x[k : k + 8]), y[k : k + 8]).backward()
        optimizer.step()
        step_end()


# -- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS["transformers"], reason="transformers is not installed")
def test_parts_act_from_the_beginning_to_the_end_of_training():
    net, coupling, x, y = made()
    slimming = Slimming(net, coupling, 0.1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    callback = transformers_callback(slimming)
    control = types.SimpleNamespace(should_training_stop=False)
    wrapped = types.SimpleNamespace(optimizer=sgd)  # as accelerate wraps it
    for _ in range(2):  # twice: a part is attached once
        callback.on_train_begin(None, None, control, model=net, optimizer=wrapped)
    steps(net, x, y, sgd, lambda: callback.on_step_end(None, None, control))
    assert slimming.step == 8
    assert not control.should_training_stop
    callback.on_train_end(None, None, control)
    sgd.step()
    assert slimming.step == 8


@pytest.mark.skipif(not HAS["transformers"], reason="transformers is not installed")
def test_training_ends_when_the_target_is_met():
    net, _, x, y = made()
    pruner = GroupFisher(net, x[:2], target=gp.Target(channels=0.7), every=2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    callback, control = transformers_callback(pruner), types.SimpleNamespace(should_training_stop=False)
    callback.on_train_begin(None, None, control, optimizer=sgd)
    told = []

    def end():
        callback.on_step_end(None, None, control)
        told.append(control.should_training_stop)

    steps(net, x, y, sgd, end)
    assert told == [False] * 5 + [True] * 3
    assert len(pruner.finish().model.first.weight) == 5


@pytest.mark.skipif(not (HAS["transformers"] and HAS["accelerate"]), reason="transformers or accelerate is missing")
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_transformers_slims_and_prunes(tmp_path):
    from transformers import Trainer, TrainingArguments

    net, coupling, x, y = made()
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    slimming = Slimming(net, coupling, 0.1)
    pruner = GroupFisher(net, x[:2], target=gp.Target(channels=0.7), every=2)
    options = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options
    )
    trainer = Trainer(net, arguments, train_dataset=data, callbacks=[transformers_callback(slimming, pruner)])
    trainer.train()
    assert trainer.state.global_step == slimming.step == pruner.step == 6
    assert pruner.finish().report.verification.error < 1e-9


# -- Lightning ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch):
    """A package that has no more than a base class."""
    package, module = types.ModuleType("lightning"), types.ModuleType("lightning.pytorch")
    module.Callback = type("Callback", (), {})
    package.pytorch = module
    monkeypatch.setitem(sys.modules, "lightning", package)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", module)
    return module


def test_parts_act_in_a_loop_like_lightnings(stand_in):
    net, coupling, x, y = made()
    slimming = Slimming(net, coupling, 0.1)
    pruner = GroupFisher(net, x[:2], target=gp.Target(channels=0.7), every=2)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01)
    callback = lightning_callback(slimming, pruner)
    assert isinstance(callback, stand_in.Callback)
    trainer = types.SimpleNamespace(optimizers=[sgd], should_stop=False)
    callback.on_train_start(trainer, net)
    steps(net, x, y, sgd, lambda: callback.on_train_batch_end(trainer, net, None, None, 0))
    assert trainer.should_stop
    assert slimming.step == pruner.step == 8
    state = callback.state_dict()
    callback.on_train_end(trainer, net)
    sgd.step()
    assert slimming.step == 8
    slimming.step, pruner.keep = 0, {}
    callback.load_state_dict(state)
    assert slimming.step == 8
    assert [len(kept) for kept in pruner.keep.values()] == [5]
    callback.on_train_start(trainer, net)
    callback.on_exception(trainer, net, KeyboardInterrupt())
    sgd.step()
    assert slimming.step == 8


@pytest.mark.skipif(not HAS["lightning"], reason="lightning is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_lightning_slims_and_prunes(tmp_path):
    import lightning.pytorch as pl

    net, coupling, x, y = made()

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch):
            return self.net(*batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    slimming = Slimming(net, coupling, 0.1)
    pruner = GroupFisher(net, x[:2], target=gp.Target(channels=0.7), every=2)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        max_epochs=4,
        accumulate_grad_batches=2,
        callbacks=[lightning_callback(slimming, pruner)],
        default_root_dir=tmp_path,
        **quiet,
    )
    trainer.fit(Module(), loader)
    assert slimming.step == pruner.step == 6
    assert pruner.finish().report.verification.error < 1e-9


def test_packages_that_are_not_there_are_named(monkeypatch):
    for name in ("transformers", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(gp.InputError, match="transformers is not installed: pip install transformers; or attach"):
        transformers_callback()
    with pytest.raises(gp.InputError, match="lightning is not installed: pip install lightning; or attach the parts"):
        lightning_callback()
