"""Fine-tuning: a small training loop for networks that were pruned, and that goes on after it was stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from graphprune.calibrate import Loss, require
from graphprune.errors import InputError
from graphprune.files import made
from graphprune.recover.checkpoints import FILE, Checkpoint, shapes
from graphprune.recover.distill import Distillation
from graphprune.recover.fit import Fit, length
from graphprune.recover.options import Name, Options, Tuned


@torch.inference_mode(False)
def finetune(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int,
    loss: Loss | None = None,
    validation: Iterable[Any] | None = None,
    optimizer: Name | Optimizer = "sgd",
    lr: float | None = None,
    weight_decay: float | None = None,
    warm_up: float = 0.05,
    label_smoothing: float = 0.0,
    clip: float | None = None,
    ema: float = 0.0,
    patience: int | None = None,
    amp: bool | None = None,
    teacher: Distillation | None = None,
    penalty: Callable[[], object] | None = None,
    inputs: int = 1,
    directory: str | os.PathLike[str] | None = None,
    every: int | None = None,
    progress: bool | None = None,
) -> Tuned:
    """Train `model`, in place, and leave it with the weights that do best on the validation batches.

    The learning rate rises evenly over `warm_up`, then falls to 0 along half a cosine. Nothing is seeded: seed torch
    before the call to get the same run again. With `directory` the run is kept after every epoch, written whole, and
    the same call on the same model goes on where it stopped, to the same weights bit by bit where the device computes
    so; random generators go along. If the loss explodes or Ctrl-C ends it, the model is as it was kept last.

    Args:
        model: any module whose parameters ask for gradients; those that do not stay as they are.
        loader: training batches, as for `graphprune.calibrate`: inputs and targets, dicts, or a dict and targets.
        epochs: passes over them.
        loss: `loss(output, target)`, a number or one per sample; for dicts without targets the dict takes their place.
            By default cross entropy.
        validation: batches to choose the best epoch by, in accuracy or else in loss; never the test set. Without, the
            last epoch counts.
        optimizer: "sgd" with Nesterov's momentum 0.9, "adamw", or an optimizer over the model, as `gp.migrate` gives.
        lr: the largest learning rate; by default 0.01 for "sgd", 5e-4 for "adamw".
        weight_decay: of weights with two dims or more; by default 5e-4 for "sgd", 0.05 for "adamw".
        warm_up: fraction of the steps in which the learning rate rises.
        label_smoothing: of the default loss while training.
        clip: the largest norm of the gradient; None does not clip.
        ema: decay of an exponential average of the weights, which is then what is measured and returned; 0 for none.
        patience: end after so many epochs without a better one.
        amp: autocast to bfloat16, or to float16 with scaled gradients where there is no other; by default on CUDA only.
        teacher: adds what a teacher says to the loss.
        penalty: called after gradients are there and unscaled, before every step, such as `gp.training.Slimming`.
        inputs: how many parts of a batch go into the model; the rest are targets.
        directory: where the run is kept.
        every: keep it within epochs too, after so many steps; going on passes over the batches that were done.
        progress: show a progress bar with loss and accuracy; by default where the output is a terminal.
    Raises:
        InputError: an argument is out of range, there are no batches, or the directory holds another run or a file that
            is cut off.
        CalibrationError: a batch has too few parts.
        TrainingError: the loss explodes.

    Example:
        >>> import graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> small = gp.prune(net, torch.randn(2, 3), target=gp.Target(channels=0.5)).model
        >>> batches = [(torch.randn(8, 3), torch.arange(8) % 4)]
        >>> tuned = finetune(small, batches, epochs=2, teacher=Distillation(net), progress=False)
        >>> [epoch.number for epoch in tuned.epochs], tuned.model is small
        ([1, 2], True)
    """
    options = Options(epochs, lr, weight_decay, warm_up, label_smoothing, clip, ema, patience, amp)
    require(loader, again=True)
    if validation is not None:
        require(validation, again=True)
    if patience is not None and validation is None:
        raise InputError("finetune: patience needs validation=, batches that are neither trained nor tested on")
    if label_smoothing and loss is not None:
        raise InputError("finetune: label_smoothing is of the default loss; smooth the labels in the loss you pass")
    chosen = options.optimizer(model, optimizer)
    name = type(chosen).__name__
    described = {"model": type(model).__name__, "shapes": shapes(model), "optimizer": name, **asdict(options)}
    path = None if directory is None else made(directory) / FILE
    checkpoint = Checkpoint(path, {**described, "batches": length(loader)})
    fit = Fit(model, loader, validation, options, chosen, loss, teacher, penalty, inputs, checkpoint, every)
    fit.run(None if progress is None else not progress)
    best = len(fit.history) if fit.best is None else fit.best[0]
    return Tuned(model, tuple(fit.history), best, fit.stopped, chosen)
