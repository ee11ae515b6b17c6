"""The files of an artefact: one small manifest, and data files that are named after their content.

A new artefact's data files get names of their own, then its manifest takes the place of the old one, then the old data
files go. So whenever a save is stopped, the directory holds the old artefact or the new one, whole. No name of a file
is read from a file: it follows from the hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from graphprune.errors import ArtefactError
from graphprune.files import write_named, write_whole

FORMAT = 1
"""What this version writes. A later format that this version can still read says so: its `needs` is 1."""
MANIFEST = "artefact.json"
SUFFIXES: Mapping[str, str] = {"structure": ".json", "graph": ".json", "weights": ".safetensors"}
"""The data files, by kind."""
MANIFEST_LIMIT, JSON_LIMIT = 1 << 20, 1 << 28
"""Bytes above which a JSON file is not read."""
STRAY = 3600.0
"""Seconds after which a file that no manifest names is taken for the rest of a save that was stopped."""
_OURS = re.compile(r"\.?(?:structure|graph|weights|artefact\.json)[-.].*")


@dataclass(frozen=True)
class Entry:
    """One data file: what it holds, by hash, and how long it is."""

    kind: str
    sha256: str
    bytes: int

    @property
    def name(self) -> str:
        """The name of the file."""
        return f"{self.kind}-{self.sha256[:16]}{SUFFIXES[self.kind]}"


@dataclass(frozen=True)
class Manifest:
    """What a directory holds.

    Attributes:
        format: of the files.
        made_with: versions of graphprune, torch and Python.
        model: class of the model.
        entries: the data files by kind; there may be no "graph".
    """

    format: int
    made_with: Mapping[str, str]
    model: str
    entries: Mapping[str, Entry]


# -- writing -----------------------------------------------------------------------------------------------------


class _Counted:
    """A file that knows the hash and the length of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.length = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write bytes or a buffer of them."""
        self.digest.update(data)
        self.length += memoryview(data).nbytes
        return self.file.write(data)


Write = Callable[[Any], object]
"""Fills a file that is open for writing."""


def write(directory: Path, contents: Mapping[str, Write], *, model: str, version: str) -> None:
    """Write an artefact in place of what `directory` holds of an older one.

    Args:
        directory: made if it is not there, and taken away again if nothing comes of it.
        contents: what fills the data files, by kind.
        model: class of the model.
        version: of graphprune.
    Raises:
        ArtefactError: the file system refuses; what was there before is there still.
    """
    with _explained(directory), _made(directory):
        before = _named_in(directory)
        written: list[Path] = []
        try:
            entries = {kind: _put(directory, kind, fill, written) for kind, fill in contents.items()}
            text = _text(entries, model, version)
            write_whole(directory / MANIFEST, lambda file: file.write(text))
        except BaseException:
            for path in written:
                if path.name not in before:
                    path.unlink(missing_ok=True)
            raise
        _tidy(directory, before, {entry.name for entry in entries.values()})


def _put(directory: Path, kind: str, fill: Write, written: list[Path]) -> Entry:
    entries: list[Entry] = []

    def fill_counted(file: IO[bytes]) -> str:
        counted = _Counted(file)
        fill(counted)
        entries.append(Entry(kind, counted.digest.hexdigest(), counted.length))
        return entries[0].name

    written.append(write_named(directory, kind, fill_counted))
    return entries[0]


def _text(entries: Mapping[str, Entry], model: str, version: str) -> bytes:
    content = {
        "format": FORMAT,
        "needs": FORMAT,
        "made_with": {"graphprune": version, "torch": torch.__version__, "python": platform.python_version()},
        "model": model,
        "files": {kind: {"sha256": e.sha256, "bytes": e.bytes} for kind, e in entries.items()},
    }
    return json.dumps({**content, "sha256": digest(content)}, indent=1).encode()


def digest(content: Mapping[str, Any]) -> str:
    """The hash of a manifest that goes into it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _named_in(directory: Path) -> set[str]:
    """Names of the data files of the artefact that is there; none if it cannot be read."""
    try:
        return {entry.name for entry in manifest(directory).entries.values()}
    except ArtefactError:
        return set()


def _tidy(directory: Path, before: set[str], now: set[str]) -> None:
    """Take away the files of the old artefact, and what older saves left that were stopped; the rest stays."""
    long_ago = time.time() - STRAY
    for path in directory.iterdir():
        if path.name in now or path.name == MANIFEST or not _OURS.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):  # the new artefact is there, whatever stays beside it
            if path.name in before or path.stat().st_mtime < long_ago:
                path.unlink()


@contextmanager
def _made(directory: Path) -> Iterator[None]:
    """Make a directory; if the block fails, those that were made for it go again.

    Raises:
        ArtefactError: something else is there.
    """
    if directory.exists() and not directory.is_dir():
        raise ArtefactError(f"{directory} is a file; pass a directory")
    new = [p for p in (directory, *directory.parents) if not p.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Errors of the file system as ours.

    Raises:
        ArtefactError: there was one.
    """
    try:
        yield
    except OSError as error:
        raise ArtefactError(f"cannot write to {path}: {error.strerror or error}; nothing there was changed") from error


# -- reading -----------------------------------------------------------------------------------------------------


def manifest(directory: Path) -> Manifest:
    """What a directory says that it holds.

    Raises:
        ArtefactError: it holds no artefact, one of a newer format, or one that was changed.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise ArtefactError(f"{directory} holds no {MANIFEST}; pass a directory that gp.save wrote")
    with opened(path) as file:
        text = file.read(MANIFEST_LIMIT + 1)
    if len(text) > MANIFEST_LIMIT:
        raise ArtefactError(f"{path} is longer than {MANIFEST_LIMIT} bytes")
    found = parsed(text, path)
    if not isinstance(found, dict) or type(found.get("needs")) is not int:
        raise ArtefactError(f"{path} is no manifest of an artefact")
    if found["needs"] > FORMAT:
        by = found["made_with"].get("graphprune") if isinstance(found.get("made_with"), dict) else None
        raise ArtefactError(
            f"{path} has format {found['needs']}, written by graphprune {by!r:.40}; this version reads formats up to "
            f"{FORMAT}: update graphprune"
        )
    said = found.pop("sha256", None)
    if said != digest(found):
        raise ArtefactError(f"{path} was changed after it was written: its hash is another one; save the model again")
    files, made_with = found.get("files"), found.get("made_with")
    if not isinstance(files, dict) or not isinstance(made_with, dict) or not isinstance(found.get("model"), str):
        raise ArtefactError(f"{path} is no manifest of an artefact")
    entries = {kind: _entry(kind, files[kind], path) for kind in SUFFIXES if kind in files}
    if missing := {"structure", "weights"} - entries.keys():
        raise ArtefactError(f"{path} names no {missing.pop()}")
    return Manifest(found["needs"], {str(k): str(v) for k, v in made_with.items()}, found["model"], entries)


def _entry(kind: str, said: Any, path: Path) -> Entry:
    """One data file, as the manifest has it.

    Raises:
        ArtefactError: it is not a hash and a length.
    """
    sha256, length = (said.get("sha256"), said.get("bytes")) if isinstance(said, dict) else (None, None)
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256) or type(length) is not int or length < 0:
        raise ArtefactError(f"{path} does not say what its {kind} is")
    return Entry(kind, sha256, length)


@contextmanager
def opened(path: Path, entry: Entry | None = None) -> Iterator[Any]:
    """A file open for reading; with an entry, only if it is as long as that says.

    Raises:
        ArtefactError: it is no file, has another length, or cannot be read.
    """
    try:
        if not path.is_file():
            raise ArtefactError(f"{path} is missing" if not path.exists() else f"{path} is no file")
        if entry is not None:
            check_same(path, entry, path.stat().st_size, entry.sha256)
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror or error}") from error


def read_json(directory: Path, entry: Entry) -> Any:
    """The content of a JSON file, whose hash is checked.

    Raises:
        ArtefactError: the file is missing, too long, was changed, or is no JSON.
    """
    path = directory / entry.name
    if entry.bytes > JSON_LIMIT:
        raise ArtefactError(f"{path} is longer than {JSON_LIMIT} bytes")
    with opened(path, entry) as file:
        text = file.read(entry.bytes + 1)
    check_same(path, entry, len(text), hashlib.sha256(text).hexdigest())
    return parsed(text, path)


def check_same(path: Path, entry: Entry, length: int, sha256: str) -> None:
    """Refuse a file that is not what was written.

    Raises:
        ArtefactError: it is cut off, longer, or changed.
    """
    if length != entry.bytes:
        raise ArtefactError(f"{path} has {length} bytes and was written with {entry.bytes}; copy or save it again")
    if sha256 != entry.sha256:
        raise ArtefactError(f"{path} was changed after it was written: its hash is another one; copy or save it again")


def parsed(text: bytes, path: Path) -> Any:
    """JSON as data.

    Raises:
        ArtefactError: it is none.
    """
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_refused)  # bytes would be looked at for other encodings
    except (ValueError, RecursionError, MemoryError) as error:
        said = str(error).splitlines()[0][:200] if str(error) else ""
        raise ArtefactError(f"{path} is no JSON that can be read: {type(error).__name__}: {said}") from error


def _refused(name: str) -> Any:
    """Numbers that are none.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{name} is no number")


def as_json(data: Any) -> Write:
    """What writes data as JSON."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
    return lambda file: file.write(text)


def directory_of(path: str | os.PathLike[str]) -> Path:
    """A directory as the caller names it.

    Raises:
        ArtefactError: it is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArtefactError(f"directory={path!r:.60}: pass a path")
    return Path(path)
