"""What deployment wants: ONNX, `torch.export`, and a folder of plain Python; each is compared with the model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from graphprune.errors import ArtefactError, GraphpruneError
from graphprune.export import onnx, python
from graphprune.program import Program
from graphprune.trace import Inputs, run, trace

__all__ = ["Exported", "Format", "export"]

Format = Literal["onnx", "torch_export", "python"]
Runs = Callable[[Inputs], list[torch.Tensor]]
"""Runs what was exported."""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        path: the file, or the folder.
        format: of it.
        files: all files, the one with the weights among them.
        bytes: of all files.
        error: largest difference of any output to that of the model, relative to that output's largest value.
        batch_sizes: at which they were compared.
        limits: why the batch size is fixed; empty if it is open.
    """

    path: Path
    format: Format
    files: tuple[Path, ...]
    bytes: int
    error: float
    batch_sizes: tuple[int, ...]
    limits: str


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    format: Format = "onnx",
    *,
    tolerance: float = 1e-4,
) -> Exported:
    """Write a model in a format for deployment, and compare what was written with it.

    The batch size stays open where the model can be traced so, and then two sizes are compared. The model is exported
    in eval mode and is left as it was.

    Args:
        model: any module, such as `result.model`.
        path: of the file, or for "python" of the folder. What is there is replaced once all is written and compared.
        example_inputs: as for `graphprune.trace`.
        format: "onnx" for an ONNX file, by torch's exporter and run by onnxruntime; "torch_export" for a `.pt2` file
            that `torch.export.load` reads; "python" for a folder with `model.py`, whose `load()` gives the model and
            which imports nothing but torch, and its weights as safetensors.
        tolerance: largest error accepted.
    Raises:
        ArtefactError: a package is missing, the model cannot be written in this format, what was written gives
            something else, or the path cannot be written to. Nothing is written then.
        InputError, TraceError: the model cannot be traced with these inputs.

    Example:
        >>> import tempfile, torch, graphprune as gp
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     done = gp.export(nn.Linear(3, 5), f"{directory}/linear", torch.rand(2, 3), format="python")
        >>> done.error, done.batch_sizes
        (0.0, (2, 3))
    """
    if format not in _WRITERS:
        raise ArtefactError(f"format={format!r:.40}; it is {', '.join(map(repr, _WRITERS))}")
    target, inputs = Path(path), Inputs.of(example_inputs)
    with _in_place_of(target, folder=format == "python") as temporary:
        runs, limits = _WRITERS[format](model, inputs, temporary)
        sizes = _batches(inputs) if not limits else {min(_sizes(inputs), default=1): inputs}
        error = max(_difference(model, given, runs) for given in sizes.values())
        if not error <= tolerance:
            raise ArtefactError(
                f"what was exported as {format} is off by {error:.1e} (tolerance {tolerance:.0e}); nothing was written"
            )
        names = sorted(p.name for p in temporary.iterdir()) if temporary.is_dir() else [temporary.name]
        lengths = sum(p.stat().st_size for p in (temporary.iterdir() if temporary.is_dir() else [temporary]))
        beside = [p for p in temporary.parent.iterdir() if p != temporary]
        lengths += sum(p.stat().st_size for p in beside)
    files = [target / n for n in names] if format == "python" else [target, *(target.parent / p.name for p in beside)]
    return Exported(target, format, tuple(files), lengths, error, tuple(sizes), limits)


# -- formats -----------------------------------------------------------------------------------------------------


def _onnx(model: nn.Module, inputs: Inputs, path: Path) -> tuple[Runs, str]:
    program, limits = traced_open(model, inputs)
    onnx.write(program.source, path)
    return onnx.runner(path, program), limits


def _torch_export(model: nn.Module, inputs: Inputs, path: Path) -> tuple[Runs, str]:
    """As `export`.

    Raises:
        ArtefactError: the program takes or gives an object that torch cannot store.
    """
    program, limits = traced_open(model, inputs)
    with path.open("wb") as file:
        try:
            torch.export.save(program.source, file)
        except NotImplementedError as error:
            raise ArtefactError(
                f"torch cannot store this program: {error}\nleave such objects out of the inputs and outputs, as "
                "use_cache=False among the inputs does for a language model"
            ) from error
    with path.open("rb") as file:
        module: Any = torch.export.load(file).module()
    return lambda given: _outputs(given.map(torch.clone).call(module)), limits


def _python(model: nn.Module, inputs: Inputs, path: Path) -> tuple[Runs, str]:
    limits = python.write(model, inputs, path)
    module = python.imported(path)
    return lambda given: _outputs(given.map(torch.clone).call(module)), limits


_WRITERS: Mapping[str, Callable[[nn.Module, Inputs, Path], tuple[Runs, str]]] = {
    "onnx": _onnx,
    "torch_export": _torch_export,
    "python": _python,
}


def traced_open(model: nn.Module, inputs: Inputs) -> tuple[Program, str]:
    """An exported program with an open batch size, or one without, and then why.

    Raises:
        TraceError: it cannot be exported at all.
    """
    sizes = set(_sizes(inputs))
    wider = inputs.map(lambda t: torch.cat([t, t]) if t.dim() else t) if sizes == {1} else inputs
    for attempt in (wider, inputs):
        try:
            program = trace(model, attempt, dynamic_batch=True)
        except GraphpruneError:
            continue
        if program.dynamic_batch:
            return program, ""
    program = trace(model, inputs, front_end="export")
    return program, f"the batch size stays {min(sizes, default=1)}, the model cannot be traced with an open one"


# -- comparing ---------------------------------------------------------------------------------------------------


def _sizes(inputs: Inputs) -> list[int]:
    return [t.shape[0] for t in inputs.tensors() if t.dim()]


def _batches(inputs: Inputs) -> dict[int, Inputs]:
    """The inputs, and the same with one more in the batch, by batch size; the first is repeated."""
    more = inputs.map(lambda t: torch.cat([t, t[:1]]) if t.dim() else t)
    return {min(_sizes(inputs), default=1): inputs, min(_sizes(more), default=1): more}


@torch.no_grad()
def _difference(model: nn.Module, inputs: Inputs, runs: Runs) -> float:
    """How far what was exported is from the model.

    Raises:
        ArtefactError: it fails, or gives other outputs.
    """
    want = run(model, inputs)
    try:
        got = runs(inputs)
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else ""
        raise ArtefactError(f"what was exported does not run: {type(error).__name__}: {said}") from error
    if [g.shape for g in got] != [w.shape for w in want]:
        raise ArtefactError(
            f"what was exported gives outputs {[list(g.shape) for g in got]}, the model {[list(w.shape) for w in want]}"
        )
    return max((_relative(g, w) for g, w in zip(got, want, strict=True)), default=0.0)


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    wide = torch.complex128 if want.is_complex() else torch.float64
    got, want = got.to(wide), want.to(wide)
    if not want.numel() or torch.equal(got, want):
        return 0.0
    same = (got == want) | (got.isnan() & want.isnan())  # infinities of masks are what they are
    apart = torch.where(same, 0, got - want).abs().max()
    return float(apart / torch.where(want.isfinite(), want, 0).abs().max().clamp(min=1e-6))


def _outputs(output: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]


# -- places ------------------------------------------------------------------------------------------------------


@contextmanager
def _in_place_of(target: Path, *, folder: bool) -> Iterator[Path]:
    """A place beside `target` to write to; if the block ends well, what is there takes the place of `target`.

    Raises:
        ArtefactError: the path is no place for it, or cannot be written to.
    """
    if folder and target.exists() and not (target.is_dir() and {p.name for p in target.iterdir()} <= python.FILES):
        raise ArtefactError(f"{target} holds something else than an export; pass another folder")
    if not folder and target.is_dir():
        raise ArtefactError(f"{target} is a folder; pass the path of a file")
    if not target.parent.is_dir():
        raise ArtefactError(f"there is no folder {target.parent}; make it first")
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as directory:
            written = Path(directory) / target.name
            if folder:
                written.mkdir()
            yield written
            if folder and target.exists():
                target.rename(Path(directory) / "before")
            for path in sorted(Path(directory).iterdir(), key=lambda p: p == written):  # the weights first
                if path.name != "before":
                    path.replace(target.parent / path.name)
    except OSError as error:
        raise ArtefactError(
            f"cannot write to {target}: {error.strerror or error}; nothing there was changed"
        ) from error
