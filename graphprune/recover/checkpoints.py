"""What a training run needs to go on as if it had not stopped, and the file it is kept in."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from graphprune.errors import InputError
from graphprune.files import write_whole
from graphprune.trace import held

FORMAT = 1
FILE = "finetune.pt"


class Checkpoint:
    """A file that is written whole, and read only for the run that wrote it.

    Args:
        path: of the file; None keeps nothing.
        run: what must be the same to go on.
    """

    def __init__(self, path: Path | None, run: Mapping[str, Any]) -> None:
        self.path, self.run = path, {"format": FORMAT, **run}

    def write(self, state: Mapping[str, Any]) -> None:
        """Put this in the place of what was there."""
        if self.path is not None:
            content = {"run": self.run, **state}
            write_whole(self.path, lambda file: torch.save(content, file))

    def read(self) -> dict[str, Any] | None:
        """What was written last; None if nothing was.

        Raises:
            InputError: the file is cut off or something else, or another run wrote it.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            run = dict(found["run"])
        except Exception as error:  # of zip files and pickles
            said = (str(error).splitlines() or [""])[0]
            raise InputError(
                f"{self.path} cannot be read ({type(error).__name__}: {said}); delete it to begin anew"
            ) from error
        wrong = [key for key in self.run if run.get(key) != self.run[key]]
        if wrong:
            was, now = _difference(run.get(wrong[0]), self.run[wrong[0]])
            raise InputError(
                f"{self.path} is of another run: {wrong[0]} was {was} and is {now}; pass another directory, or the "
                "model and the arguments of that run to go on with it"
            )
        return dict(found)


def _difference(was: Any, now: Any) -> tuple[Any, Any]:
    """The parts in which two mappings differ first; other values as they are."""
    if not (isinstance(was, Mapping) and isinstance(now, Mapping)):
        return was, now
    key = next(key for key in [*now, *was] if was.get(key) != now.get(key))
    return tuple(f"{key}: {held[key]}" if key in held else f"without {key}" for held in (was, now))  # type: ignore[return-value]


def shapes(model: nn.Module) -> dict[str, list[int]]:
    """Shape of every parameter and buffer: what tells models apart."""
    return {name: list(tensor.shape) for name, tensor in held(model)}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in held(model)}


def put_back(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Write what `weights` gave into the model."""
    with torch.no_grad():
        for name, tensor in held(model):
            tensor.copy_(state[name])


class Generators:
    """The random generators that training draws from: Python's, NumPy's, torch's, and those of a loader.

    Args:
        loader: a DataLoader, or anything.
    """

    def __init__(self, loader: Any) -> None:
        inner = getattr(loader, "batch_sampler", None)
        places = (loader, getattr(loader, "sampler", None), inner, getattr(inner, "sampler", None))
        found = {id(g): g for p in places if isinstance(g := getattr(p, "generator", None), torch.Generator)}
        self.own = list(found.values())

    def state(self) -> dict[str, Any]:
        """As they are now."""
        kind, keys, *rest = np.random.get_state()
        cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return {
            "python": random.getstate(),
            "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if cuda else [],
            "loader": [generator.get_state() for generator in self.own],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """As they were."""
        random.setstate(state["python"])
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        for number, kept in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(kept, number)
        for generator, kept in zip(self.own, state["loader"], strict=False):
            generator.set_state(kept)


def copied(tree: Any) -> Any:
    """A state dict with tensors of its own, on the CPU."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(copied(value) for value in tree)
    return tree


def finite(model: nn.Module) -> Iterator[str]:
    """Names of the tensors that hold NaN or infinity."""
    return (name for name, tensor in held(model) if tensor.is_floating_point() and not tensor.isfinite().all())
