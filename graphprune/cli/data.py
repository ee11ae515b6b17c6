"""Batches by name: a folder of images, an npz file, a dataset of torchvision or Hugging Face, or a Python file."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from graphprune.cli.models import Loaded, attribute, called
from graphprune.errors import InputError

FORMS = "a folder of images, FILE.npz, torchvision:NAME:DIR, hf:NAME[:SPLIT], or FILE.py:LOADER"
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
LOSSES: Mapping[str, Callable[..., torch.Tensor]] = {
    "cross_entropy": nn.functional.cross_entropy,
    "mse": nn.functional.mse_loss,
    "l1": nn.functional.l1_loss,
    "bce": nn.functional.binary_cross_entropy_with_logits,
}
Sample = tuple[torch.Tensor, Any]


@dataclass(frozen=True)
class Wanted:
    """How much of the data is read.

    Attributes:
        batch_size: samples in a batch.
        samples: at most so many; spread evenly over a folder's classes.
    """

    batch_size: int = 32
    samples: int = 256


def load(spec: str, loaded: Loaded, wanted: Wanted) -> list[Any]:
    """The batches that `spec` names, each a pair of inputs and targets, in the size and colours of the model.

    What a file's loader draws at random is the same in each command, so that a scan can go on.

    Raises:
        InputError: there is no such data, or it holds nothing.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _read(spec, loaded, wanted)


def _read(spec: str, loaded: Loaded, wanted: Wanted) -> list[Any]:
    """As `load`.

    Raises:
        InputError: there is no such data, or it holds nothing.
    """
    source, _, name = spec.partition(":")
    if ".py:" in spec:
        return _from_file(spec, wanted)
    if Path(spec).is_dir():
        samples = _folder(Path(spec), loaded)
    elif spec.endswith(".npz"):
        samples = _npz(Path(spec), loaded)
    elif source in _SETS and name:
        samples = _SETS[source](name, loaded)
    else:
        raise InputError(f"no data {spec!r}: it is {FORMS}")
    found = list(itertools.islice(samples, wanted.samples))
    if not found:
        raise InputError(f"{spec} holds no samples")
    starts = range(0, len(found), wanted.batch_size)
    return [_batch(found[start : start + wanted.batch_size]) for start in starts]


def loss(name: str) -> Callable[..., torch.Tensor]:
    """A loss by name, or `FILE.py:FUNCTION`.

    Raises:
        InputError: there is none of that name.
    """
    if ".py:" in name:
        found: Callable[..., torch.Tensor] = attribute(name)
        return found
    if name not in LOSSES:
        raise InputError(f"--loss {name}: it is {', '.join(LOSSES)}, or FILE.py:FUNCTION")
    return LOSSES[name]


def _batch(samples: list[Sample]) -> Any:
    inputs = torch.stack([x for x, _ in samples])
    if any(y is None for _, y in samples):
        return inputs
    return inputs, torch.stack([torch.as_tensor(y) for _, y in samples])


def _from_file(spec: str, wanted: Wanted) -> list[Any]:
    """As many batches as the samples wanted fill.

    Raises:
        InputError: it gives no batches.
    """
    given = called(spec)
    if isinstance(given, (torch.Tensor, str, Mapping)) or not isinstance(given, Iterable):
        raise InputError(f"{spec} gives {type(given).__name__}; it gives a DataLoader, or a list of batches")
    batches: list[Any] = []
    seen = 0
    for batch in given:
        batches.append(batch)
        first = next((t for t in _leaves(batch) if t.dim()), None)
        seen += 1 if first is None else len(first)
        if seen >= wanted.samples:
            break
    if not batches:
        raise InputError(f"{spec} gives no batches")
    return batches


def _leaves(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _leaves(part)
    elif isinstance(tree, Mapping):
        yield from _leaves(list(tree.values()))


# -- images -----------------------------------------------------------------------------------------------------------


def _folder(folder: Path, loaded: Loaded) -> Iterator[Sample]:
    """Images of each subfolder in turn, the subfolder's position among them being the class; or of the folder alone.

    Raises:
        InputError: there are no images.
    """
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    listed = [sorted(f for f in c.rglob("*") if f.suffix.lower() in SUFFIXES) for c in classes or [folder]]
    if not any(listed):
        raise InputError(f"{folder} holds no images ({', '.join(SUFFIXES)}), in subfolders by class or by themselves")
    from PIL import Image, UnidentifiedImageError

    for files in itertools.zip_longest(*listed):
        for label, file in enumerate(files):
            if file is not None:
                try:
                    with Image.open(file) as image:
                        yield _seen(image, loaded), label if classes else None
                except UnidentifiedImageError as error:
                    raise InputError(f"{file} is no image") from error


def _seen(image: Any, loaded: Loaded) -> torch.Tensor:
    """An image as the model takes it: its middle, at the size of the example, in the colours it was trained with.

    Raises:
        InputError: the model takes no images.
    """
    shapes = [t.shape for t in loaded.example.tensors()]
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] not in (1, 3):
        raise InputError(f"{loaded.name} takes {[list(s) for s in shapes]}, no images; pass batches: FILE.py:LOADER")
    channels, high, wide = shapes[0][1:]
    image = image.convert("L" if channels == 1 else "RGB")
    scale = max(wide / image.width, high / image.height)
    image = image.resize((max(wide, round(image.width * scale)), max(high, round(image.height * scale))))
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    pixels = np.asarray(image.crop((left, top, left + wide, top + high)), dtype=np.float32) / 255
    tensor = torch.from_numpy(pixels).reshape(high, wide, channels).permute(2, 0, 1)
    mean, std = (torch.tensor(v[:channels]).reshape(-1, 1, 1) for v in (loaded.mean, loaded.std))
    return (tensor - mean) / std


def _npz(file: Path, loaded: Loaded) -> Iterator[Sample]:
    """Arrays `x` and, for targets, `y`; bytes in x are pixels, channels last, and are scaled to the model's colours.

    Raises:
        InputError: the file is none, or has no x.
    """
    try:
        with np.load(file, allow_pickle=False) as found:
            arrays = {name: found[name] for name in ("x", "y") if name in found}
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: {error}") from error
    if "x" not in arrays or ("y" in arrays and len(arrays["y"]) != len(arrays["x"])):
        raise InputError(f"{file} has {found.files}; it has an array x of samples, and y of as many targets")
    x = torch.from_numpy(arrays["x"])
    if x.dtype == torch.uint8 and x.dim() == 4:
        mean, std = (torch.tensor(v[: x.shape[3]]) for v in (loaded.mean, loaded.std))
        x = ((x / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
    yield from zip(x, torch.from_numpy(arrays["y"]) if "y" in arrays else itertools.repeat(None), strict=False)


def _torchvision(name: str, loaded: Loaded) -> Iterator[Sample]:
    """The test part of a dataset that is on disk.

    Raises:
        InputError: there is none of that name, or not there.
    """
    datasets: Any = importlib.import_module("torchvision.datasets")
    kind, _, root = name.partition(":")
    if not hasattr(datasets, kind) or not root:
        raise InputError(f"--data torchvision:{name}: it is torchvision:NAME:DIR, such as torchvision:CIFAR10:data")
    make = getattr(datasets, kind)
    try:
        try:
            found = make(root, train=False)
        except TypeError:
            found = make(root, split="test")
    except Exception as error:
        raise InputError(f"--data torchvision:{name}: {type(error).__name__}: {error}") from error
    for image, label in found:
        yield _seen(image, loaded), label


def _hugging_face(name: str, loaded: Loaded) -> Iterator[Sample]:
    """A dataset with images.

    Raises:
        InputError: it cannot be loaded, or has no images.
    """
    datasets: Any = importlib.import_module("datasets")
    title, _, split = name.partition(":")
    try:
        found = datasets.load_dataset(title, split=split or "test")
    except Exception as error:
        raise InputError(f"--data hf:{name}: {type(error).__name__}: {error}") from error
    for row in found:
        image = next((row[k] for k in ("image", "img") if k in row), None)
        if image is None:
            raise InputError(f"--data hf:{name} has {list(row)}, no images; pass batches: FILE.py:LOADER")
        yield _seen(image, loaded), next((row[k] for k in ("label", "fine_label", "labels") if k in row), None)


_SETS: Mapping[str, Callable[[str, Loaded], Iterator[Sample]]] = {"torchvision": _torchvision, "hf": _hugging_face}
