"""The finished steps of a run, in a directory: one file per step, whole or not there, without pickled code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from graphprune.errors import InputError
from graphprune.files import made, write_whole
from graphprune.plan import Plan
from graphprune.trace import held

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Saved:
    """One finished step.

    Attributes:
        path: the file it is in.
        plan: of the model before the step.
        state: parameters and buffers after its training.
        optimizer: the state dict of the optimizer; None if there was none.
    """

    path: Path
    plan: Plan
    state: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, Any] | None

    def restore(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Write what was saved into the model and the optimizer of the step, made anew.

        Raises:
            InputError: they are others.
        """
        own = dict(held(model))
        wrong = sorted(own.keys() ^ self.state.keys())
        wrong += [name for name in own if name in self.state and own[name].shape != self.state[name].shape]
        if wrong:
            raise InputError(f"{self.path} holds another model: {wrong[0]} differs; pass another directory")
        if (optimizer is None) != (self.optimizer is None):
            raise InputError(f"{self.path} was written with{'out' if optimizer else ''} an optimizer; pass it again so")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(self.state[name])
        if optimizer is not None:
            optimizer.load_state_dict(dict(self.optimizer or {}))


class Store:
    """The directory of a run.

    Args:
        directory: made if it is not there; with None nothing is kept.
        run: what must be the same to go on, as JSON.
    Raises:
        InputError: the directory holds another run, or something else.
    """

    def __init__(self, directory: str | os.PathLike[str] | None, run: Mapping[str, Any]) -> None:
        self.directory = None if directory is None else made(directory)
        if self.directory is None:
            return
        described = json.loads(json.dumps({"format": FORMAT, **run}))
        path = self.directory / "run.json"
        if not path.exists():
            if any(self.directory.iterdir()):
                raise InputError(f"{self.directory} holds other files and no run.json; pass an empty directory")
            text = json.dumps(described, indent=1).encode()
            write_whole(path, lambda file: file.write(text))
            return
        try:
            found = json.loads(path.read_text())
            wrong = [key for key in described if found[key] != described[key]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not readable ({error!r}); pass another directory") from error
        if wrong:
            key = wrong[0]
            was, now = (f"{given[key]!s:.80}" for given in (found, described))  # of a model it is every shape
            raise InputError(
                f"{self.directory} holds another run: {key} was {was} and is {now}; pass another "
                "directory, or the arguments of that run to go on with it"
            )

    def read(self, number: int) -> Saved | None:
        """A step, if it was finished.

        Raises:
            InputError: its file is cut off or something else.
        """
        path = self._path(number)
        if path is None or not path.exists():
            return None
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            return Saved(path, Plan.from_json(found["plan"]), found["state"], found["optimizer"])
        except Exception as error:  # of zip files, pickles and JSON
            said = str(error).splitlines()[0]
            raise InputError(
                f"{path} cannot be read ({type(error).__name__}: {said}); delete it to do step {number} again"
            ) from error

    def write(self, number: int, plan: Plan, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Keep a finished step."""
        path = self._path(number)
        if path is not None:
            state = {name: tensor.detach() for name, tensor in held(model)}
            kept = None if optimizer is None else optimizer.state_dict()
            content = {"plan": plan.to_json(), "state": state, "optimizer": kept}
            write_whole(path, lambda file: torch.save(content, file))

    def _path(self, number: int) -> Path | None:
        return None if self.directory is None else self.directory / f"step-{number:03d}.pt"
