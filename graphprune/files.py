"""Files that are whole or not there, and a short name for the weights of a model."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import torch

from graphprune.errors import InputError


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file that takes the place of `path` once it is written; whatever happens, none is cut off."""
    write_named(path.parent, path.name, lambda file: (write(file), path.name)[1])


def write_named(directory: Path, hint: str, write: Callable[[IO[bytes]], str]) -> Path:
    """As `write_whole`, for a file whose name in `directory` is known once it is written: `write` returns it.

    Until then it has a name of its own that begins with a dot and `hint`.
    """
    name = directory / f".{hint}.{secrets.token_hex(6)}"
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            path = directory / write(file)
            file.flush()
            os.fsync(file.fileno())
        name.replace(path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise
    return path


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
