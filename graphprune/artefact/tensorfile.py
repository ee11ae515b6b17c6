"""Tensors in a safetensors file: written one after the other, and checked against what is expected before any is made.

The format: eight bytes with the length of the header, the header as JSON, and the tensors' bytes without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from graphprune.artefact.store import Entry, Write, check_same, opened, parsed
from graphprune.errors import ArtefactError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Element types that safetensors has a name for."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000
"""Bytes above which safetensors refuses a header."""

Sizes = tuple[str, tuple[int, ...]]
"""Element type and shape of a tensor."""


def sizes_of(tensor: torch.Tensor, name: str) -> Sizes:
    """Element type and shape.

    Raises:
        ArtefactError: the tensor cannot be stored.
    """
    if tensor.is_meta:
        raise ArtefactError(f"{name} is on the meta device and has no values; load weights first")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.dtype not in _NAMES:
        kind = tensor.layout if tensor.layout is not torch.strided else tensor.dtype
        raise ArtefactError(f"{name} is {kind}, which safetensors cannot hold; convert it first")
    return _NAMES[tensor.dtype], tuple(tensor.shape)


def writer(tensors: Mapping[str, torch.Tensor]) -> Write:
    """What writes tensors as a safetensors file; one at a time is copied."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        dtype, shape = sizes_of(tensor, name)
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(file: Any) -> None:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)

    return write


def load(
    path: Path, entry: Entry, expected: Mapping[str, Sizes], names: Collection[str], device: str
) -> dict[str, torch.Tensor]:
    """The tensors of these names, read in one pass in which the hash is taken of all.

    They lie where torch allocates them, as the last bits of some kernels depend on alignment.

    Args:
        path: the file.
        entry: its length and hash.
        expected: every tensor that it must hold.
        names: which of them are wanted.
        device: where they are put.
    Raises:
        ArtefactError: the file is missing, cut off or changed, or holds other tensors; nothing is allocated unless its
            length and its header fit.
    """
    found: dict[str, torch.Tensor] = {}
    digest = hashlib.sha256()
    with opened(path, entry) as file:
        spans = _spans(_header(file, path, entry, digest), path, expected, entry.bytes - file.tell())
        for name, length in spans:
            if name not in names:
                _pass_over(file, length, digest)
                continue
            dtype, shape = expected[name]
            tensor = torch.empty(shape, dtype=DTYPES[dtype])
            if length:
                bytes_of = tensor.reshape(-1).view(torch.uint8).numpy().data
                file.readinto(bytes_of)
                digest.update(bytes_of)
            found[name] = tensor
    check_same(path, entry, entry.bytes, digest.hexdigest())
    return {name: tensor.to(device) for name, tensor in found.items()}


def _pass_over(file: IO[bytes], length: int, digest: Any) -> None:
    while length > 0 and (chunk := file.read(min(length, 1 << 20))):
        digest.update(chunk)
        length -= len(chunk)


def _header(file: IO[bytes], path: Path, entry: Entry, digest: Any) -> Mapping[str, Any]:
    """The table at the start of the file.

    Raises:
        ArtefactError: there is none.
    """
    start = file.read(8)
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else entry.bytes
    if size > min(HEADER_LIMIT, entry.bytes - 8):
        raise ArtefactError(f"{path} is no safetensors file: its header is longer than the file")
    text = file.read(size)
    digest.update(start + text)
    header = parsed(text, path)
    if not isinstance(header, dict):
        raise ArtefactError(f"{path} is no safetensors file: its header is no table")
    header.pop("__metadata__", None)
    return header


def _spans(header: Mapping[str, Any], path: Path, expected: Mapping[str, Sizes], length: int) -> list[tuple[str, int]]:
    """The tensors and their lengths, in the order of the file.

    Raises:
        ArtefactError: the header does not announce exactly the tensors expected and the bytes that follow it.
    """
    if different := header.keys() ^ expected.keys():
        name = min(different)
        where = "is missing in" if name in expected else "is not expected in"
        raise ArtefactError(f"{name!r:.120} {where} {path}")
    spans = []
    for name, (dtype, shape) in expected.items():
        said = header[name] if isinstance(header[name], dict) else {}
        if said.get("dtype") != dtype or said.get("shape") != list(shape):
            raise ArtefactError(
                f"{name} is {said.get('dtype')!r:.20} {said.get('shape')!r:.80} in {path} and {dtype} {list(shape)} "
                "in the structure; the files are of different artefacts"
            )
        span = said.get("data_offsets")
        spans.append((_start(span), math.prod((DTYPES[dtype].itemsize, *shape)), name, span))
    spans.sort(key=lambda s: s[:2])
    at = 0
    for _, wanted, name, span in spans:
        if span != [at, at + wanted]:
            raise ArtefactError(f"{path} has no place for {name}: {span!r:.60}, where {[at, at + wanted]} is expected")
        at += wanted
    if at != length:
        raise ArtefactError(f"{path} has {length} bytes of tensors and should have {at}")
    return [(name, wanted) for _, wanted, name, _ in spans]


def _start(span: Any) -> int:
    """Where a span begins; -1 if it is none."""
    return span[0] if isinstance(span, list) and len(span) == 2 and type(span[0]) is int else -1
