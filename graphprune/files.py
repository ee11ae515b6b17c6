"""Files that are whole or not there, and a short name for the weights of a model."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import torch

from graphprune.errors import InputError


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file that takes the place of `path` once it is written; whatever happens, none is cut off."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink()
        raise


def made(directory: str | os.PathLike[str]) -> Path:
    """The directory, made if need be.

    Raises:
        InputError: something else is there.
    """
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise InputError(f"directory={str(path)!r} is a file; pass a directory")
    path.mkdir(parents=True, exist_ok=True)
    return path


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The same for the same names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta:
            flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
