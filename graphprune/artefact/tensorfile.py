"""Tensors in a safetensors file: written one after the other, and checked against what is expected before any is made.

The format: eight bytes with the length of the header, the header as JSON, and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from graphprune.artefact.store import Write
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


def check_header(path: Path, expected: Mapping[str, Sizes]) -> None:
    """Refuse a file whose header does not announce exactly these tensors, or not the bytes that follow it.

    Raises:
        ArtefactError: it does not; the message names the first tensor.
    """
    length = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else length
        if size > min(HEADER_LIMIT, length - 8):
            raise ArtefactError(f"{path} is no safetensors file: its header is longer than the file")
        text = file.read(size)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is no safetensors file: {type(error).__name__}: {error}") from error
    if not isinstance(header, dict):
        raise ArtefactError(f"{path} is no safetensors file: its header is no table")
    header.pop("__metadata__", None)
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
        spans.append((_start(span), span, _bytes(dtype, shape), name))
    at = 0
    for start_of, span, wanted, name in sorted(spans, key=lambda s: s[0]):
        if start_of != at or span != [at, at + wanted]:
            raise ArtefactError(f"{path} has no place for {name}: {span!r:.60}, where {[at, at + wanted]} is expected")
        at += wanted
    if at != length - 8 - size:
        raise ArtefactError(f"{path} has {length - 8 - size} bytes of tensors and should have {at}")


def _start(span: Any) -> int:
    """Where a span begins; -1 if it is none."""
    return span[0] if isinstance(span, list) and len(span) == 2 and type(span[0]) is int else -1


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = DTYPES[dtype].itemsize
    for size in shape:
        count *= size
    return count


def load(path: Path, names: list[str], device: str) -> dict[str, torch.Tensor]:
    """The tensors of these names, of a file that was checked.

    Raises:
        ArtefactError: safetensors refuses the file.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ArtefactError(f"{path} cannot be read: {error}") from error
