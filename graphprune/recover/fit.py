"""The training loop behind `finetune`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from graphprune.calibrate import Batch, Loss, read
from graphprune.errors import InputError, TrainingError, counted
from graphprune.files import fingerprint
from graphprune.recover.checkpoints import Checkpoint, Generators, copied, finite, put_back, weights
from graphprune.recover.distill import Distillation, evaluating
from graphprune.recover.options import Epoch, Options, Tally
from graphprune.trace import held

EXPLODED = 1e3
"""A loss this many times that of the first batch ends the training."""


@dataclass(eq=False)
class Fit:
    """A run: what `finetune` was given, and how far it is.

    Attributes:
        model: trained in place.
        loader, validation: batches; the latter may be None.
        options: numbers of the run.
        optimizer: over the model.
        loss: None for cross entropy.
        teacher: None for none.
        penalty: called before every step of the optimizer, or None.
        inputs: how many parts of a batch the model takes.
        checkpoint: where the run is kept.
        every: steps after which it is kept within an epoch, or None.
    """

    model: nn.Module
    loader: Iterable[Any]
    validation: Iterable[Any] | None
    options: Options
    optimizer: Optimizer
    loss: Loss | None
    teacher: Distillation | None
    penalty: Callable[[], object] | None
    inputs: int
    checkpoint: Checkpoint
    every: int | None

    def __post_init__(self) -> None:
        self.per_epoch = length(self.loader)
        self.device = next(p.device for p in self.model.parameters())
        self.generators = Generators(self.loader)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.ema = _average(self.model, self.options.ema)
        self.amp, self.scaler = _precision(self.device, self.options.amp)
        self.step = self.done = 0
        self.first: float | None = None
        self.tally = Tally()
        self.history: list[Epoch] = []
        self.best: tuple[int, dict[str, torch.Tensor]] | None = None
        self.stopped = ""
        self.start = fingerprint(held(self.model))
        self.begun = self.generators.state()

    # -- the run ---------------------------------------------------------------------------------------------------

    def run(self, hidden: bool | None) -> None:
        """Train until the epochs are done or patience ends; the model is left with the weights that are best.

        Raises:
            TrainingError: the loss explodes; the model is as it was kept last.
            KeyboardInterrupt: likewise.
        """
        found = self.checkpoint.read()
        if found is not None:
            self._load(found)
        self.saved = self._state()
        modes = {module: module.training for module in self.model.modules()}
        watching = nullcontext() if self.teacher is None else self.teacher.watching(self.model)
        steps = self.options.epochs * self.per_epoch
        try:
            with (
                watching,
                tqdm(total=steps, initial=self.step, desc="fine-tuning", unit="batch", disable=hidden) as bar,
            ):
                while len(self.history) < self.options.epochs and not self.stopped:
                    self._epoch(bar)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped in epoch {len(self.history) + 1}; {self._fall_back()}") from None
        except TrainingError as error:
            raise TrainingError(f"{error}; {self._fall_back()}; lower lr, lengthen warm_up, or pass clip=1.0") from None
        finally:
            for module, training in modes.items():
                module.training = training
            for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
                group["lr"] = peak
        last = self.ema.module if self.ema is not None else self.model
        put_back(self.model, weights(last) if self.best is None else self.best[1])

    def _epoch(self, bar: Any) -> None:
        began, skip = time.perf_counter(), self.done
        if not skip:
            self.begun, self.tally = self.generators.state(), Tally()
        now = self.generators.state()
        if skip:  # the same batches again, up to where it stopped
            self.generators.restore(self.begun)
        self.model.train()
        for number, batch in enumerate(self._batches(self.loader, "loader")):
            if number >= skip:
                self._train(batch, number)
                self.done += 1
                bar.update()
                bar.set_postfix_str(self._told())
                if self.every and self.step % self.every == 0 and self.done < self.per_epoch:
                    self._keep()
            elif number == skip - 1:
                self.generators.restore(now)
        self._end(time.perf_counter() - began)
        bar.set_postfix_str(self._told())

    def _end(self, seconds: float) -> None:
        """Measure what an epoch gave, and keep it."""
        begun, tally = time.perf_counter(), self._validated()
        epoch = Epoch(
            number=len(self.history) + 1,
            loss=self.tally.mean,
            accuracy=self.tally.accuracy,
            validation_loss=None if tally is None else tally.mean,
            validation_accuracy=None if tally is None else tally.accuracy,
            lr=float(self.optimizer.param_groups[0]["lr"]),
            seconds=seconds + time.perf_counter() - begun,
        )
        self.history.append(epoch)
        if tally is not None and (self.best is None or epoch.better(self.history[self.best[0] - 1])):
            self.best = epoch.number, weights(self.model if self.ema is None else self.ema.module)
        since = epoch.number - (self.best or (epoch.number,))[0]
        if self.options.patience is not None and since >= self.options.patience:
            self.stopped = f"stopped: nothing better on the validation batches for {since} epochs"
        self.done = 0
        self._keep()

    def _train(self, batch: Batch, number: int) -> None:
        """One step.

        Raises:
            TrainingError: the loss is not finite, or far above what it was at first.
        """
        factor = self.options.factor(self.step, self.options.epochs * self.per_epoch)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.optimizer.zero_grad(set_to_none=True)
        with self.amp():
            output = batch.inputs.call(self.model)
            loss = self._loss(output, batch.target, self.options.label_smoothing)
            if self.teacher is not None:
                loss = self.teacher(loss, output, batch.inputs)
        value = float(loss.detach())
        self.first = value if self.first is None else self.first
        if not abs(value) <= EXPLODED * max(1.0, abs(self.first)):  # NaN too
            raise TrainingError(f"the loss is {value:.4g} in epoch {len(self.history) + 1}, batch {number}")
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        if self.options.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip)
        if self.penalty is not None:
            self.penalty()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        self.tally.add(value, _samples(batch), output, batch.target)
        self.step += 1

    def _loss(self, output: Any, target: Any, smoothing: float = 0.0) -> torch.Tensor:
        if self.loss is None:
            return functional.cross_entropy(output, target, label_smoothing=smoothing)
        return (self.loss(output) if target is None else self.loss(output, target)).mean()

    @torch.no_grad()
    def _validated(self) -> Tally | None:
        """Of the validation batches, with averaged weights where there are any; None without batches."""
        if self.validation is None:
            return None
        model: nn.Module = self.model if self.ema is None else self.ema.module
        tally = Tally()
        with evaluating(model):
            for batch in self._batches(self.validation, "validation"):
                with self.amp():
                    output = batch.inputs.call(model)
                    loss = self._loss(output, batch.target)
                tally.add(float(loss), _samples(batch), output, batch.target)
        return tally

    def _batches(self, loader: Iterable[Any], name: str) -> Iterator[Batch]:
        empty = True
        for given in loader:
            empty = False
            yield from read([given], self.inputs, self.device)
        if empty:
            raise InputError(f"finetune: {name} yields no batches; {EMPTY}")

    def _told(self) -> str:
        told = f"loss={self.tally.mean:.4f}"
        told += "" if self.tally.accuracy is None else f", acc={self.tally.accuracy:.4f}"
        if self.history and self.history[-1].validation_loss is not None:
            last = self.history[-1]
            known = last.validation_loss if last.validation_accuracy is None else last.validation_accuracy
            told += f", validation={known:.4f}"
        return told

    # -- keeping it ------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Keep the run as it is now.

        Raises:
            TrainingError: its weights are not fit for that.
        """
        spoilt = next(finite(self.model), None)
        if spoilt is not None:
            raise TrainingError(f"{spoilt} holds NaN or infinity after {counted(self.step, 'step')}")
        state = self._state()
        self.checkpoint.write(state)
        self.saved = state

    def _state(self) -> dict[str, Any]:
        """All that a run needs to go on as if it had not stopped."""
        model = weights(self.model)
        prints = [self.start, fingerprint(model.items())]
        prints += [] if self.best is None else [fingerprint(self.best[1].items())]
        return {
            "weights": prints,
            "model": model,
            "optimizer": copied(self.optimizer.state_dict()),
            "ema": None if self.ema is None else copied(self.ema.state_dict()),
            "scaler": self.scaler.state_dict(),
            "penalty": copied(getattr(self.penalty, "state_dict", dict)()),
            "peaks": list(self.peaks),
            "step": self.step,
            "done": self.done,
            "first": self.first,
            "tally": asdict(self.tally),
            "history": [epoch.plain() for epoch in self.history],
            "best": self.best,
            "stopped": self.stopped,
            "begun": self.begun,
            "generators": self.generators.state(),
        }

    def _load(self, found: dict[str, Any]) -> None:
        """Go on where a checkpoint was written.

        Raises:
            InputError: it was written for other weights.
        """
        if self.start not in found["weights"]:
            raise InputError(
                f"{self.checkpoint.path} is of another run: that model had other weights at the start; pass the model "
                "it began with, or another directory"
            )
        self.start = found["weights"][0]
        put_back(self.model, found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(found["ema"])
        self.scaler.load_state_dict(found["scaler"])
        if found["penalty"]:
            getattr(self.penalty, "load_state_dict", lambda state: None)(found["penalty"])
        self.peaks, self.step, self.done = list(found["peaks"]), found["step"], found["done"]
        self.first, self.tally = found["first"], Tally(**found["tally"])
        self.history = [Epoch(**epoch) for epoch in found["history"]]
        self.best, self.stopped, self.begun = found["best"], found["stopped"], found["begun"]
        self.generators.restore(found["generators"])

    def _fall_back(self) -> str:
        """Put the model and the optimizer back to what was kept last; says so."""
        put_back(self.model, self.saved["model"])
        self.optimizer.load_state_dict(self.saved["optimizer"])
        where = f"after epoch {len(self.saved['history'])}" if self.saved["step"] else "at the start"
        if self.saved["done"]:
            where += f" and {self.saved['done']} batches"
        path = self.checkpoint.path
        if path is None or not path.exists():
            return f"the model is as it was {where}"
        return f"the model is as it was {where}, which {path} holds; the same call goes on from there"


EMPTY = "the dataset is empty, smaller than one batch of a loader with drop_last=True, or an iterator already used up"


def length(loader: Any) -> int:
    """How many batches a loader has.

    Raises:
        InputError: none, or it cannot say.
    """
    try:
        found = len(loader)
    except TypeError as error:
        raise InputError(
            f"finetune: {type(loader).__name__} does not say how many batches it has, which the schedule needs; pass a "
            "list, or a DataLoader over a dataset with a length"
        ) from error
    if not found:
        raise InputError(f"finetune: loader yields no batches; {EMPTY}")
    return found


def _samples(batch: Batch) -> int:
    return next((int(t.shape[0]) for t in batch.inputs.tensors() if t.dim()), 1)


def _average(model: nn.Module, decay: float) -> AveragedModel | None:
    """An average that begins with the model; its buffers are averaged, too."""
    if not decay:
        return None
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


def _precision(device: torch.device, wanted: bool | None) -> tuple[Callable[[], Any], torch.amp.GradScaler]:
    """The autocast to run in, and a scaler that does nothing unless float16 needs it."""
    cuda = device.type == "cuda"
    use = cuda if wanted is None else wanted
    dtype = torch.bfloat16 if not cuda or torch.cuda.is_bf16_supported() else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=use and dtype is torch.float16)
    return lambda: torch.autocast(device.type, dtype=dtype, enabled=use), scaler
