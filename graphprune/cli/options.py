"""Options that several commands share, and what their texts mean."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from graphprune import importance
from graphprune.cli import data, models
from graphprune.cli.models import Loaded
from graphprune.errors import InputError, nearest
from graphprune.importance import Importance

Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"{models.FORMS}.")]
Weights = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="State dict (.safetensors, or of torch.save), 'pretrained' or 'random'."),
]
Given = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="SHAPE", help="Example input: 1x3x224x224, int:1x16, or FILE.py:FUNCTION."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No signs of progress.")]
Every = Annotated[bool, typer.Option("--all", help="Every row of long tables.")]
Norms = Annotated[bool, typer.Option("--prune-norms", help="Also channels that a normalisation takes statistics over.")]
Keep = Annotated[
    list[str] | None, typer.Option("--keep", metavar="NAME", help="Parameter or module whose widths stay.")
]
Data = Annotated[str | None, typer.Option("--data", metavar="DATA", help=f"{data.FORMS}.")]
Loss = Annotated[str, typer.Option(help=f"{', '.join(data.LOSSES)}, or FILE.py:FUNCTION.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples in a batch.")]
Samples = Annotated[int, typer.Option(min=1, help="At most so many samples are read.")]
Criterion = Annotated[
    str, typer.Option(metavar="NAME", help="What ranks channels, with its options: magnitude:p=1,normalize=mean.")
]

CRITERIA = {
    name.lower(): kind
    for name, kind in vars(importance).items()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and name not in ("Removal",)
}
"""Criteria by the name an option uses."""


def batches(spec: str | None, loaded: Loaded, batch_size: int, samples: int) -> list[Any] | None:
    """The data that was asked for, if any was."""
    return None if spec is None else data.load(spec, loaded, data.Wanted(batch_size, samples))


def criterion(text: str, given: list[Any] | None, loss: str, otherwise: str | None = None) -> Importance:
    """The criterion that a text names.

    Args:
        text: a name, or a name, a colon and options.
        given: batches, for criteria that read them.
        loss: of those that read gradients.
        otherwise: scores groups that the criterion has nothing to say about.
    Raises:
        InputError: there is none of that name, it does not take such options, or it needs data.
    """
    name, _, rest = text.partition(":")
    kind: Any = CRITERIA.get(name.lower())
    if kind is None:
        raise InputError(f"no criterion {name!r}{nearest(name, CRITERIA)}; it is one of {', '.join(sorted(CRITERIA))}")
    fields = {f.name for f in dataclasses.fields(kind)}
    options: dict[str, Any] = dict(_option(part, fields, text) for part in rest.split(",") if part)
    if "batches" in fields:
        if given is None:
            raise InputError(f"{kind.__name__} reads data; pass --data ({data.FORMS})")
        options["batches"] = given
    if "loss" in fields:
        options["loss"] = data.loss(loss)
    if otherwise is not None:
        if "otherwise" not in fields:
            raise InputError(f"{kind.__name__} scores every group, so --otherwise has nothing to do")
        options["otherwise"] = criterion(otherwise, given, loss)
    found: Importance = kind(**options)
    return found


def _option(part: str, fields: set[str], text: str) -> tuple[str, Any]:
    """The name and the value of one option.

    Raises:
        InputError: the criterion does not take it.
    """
    name, equals, value = part.partition("=")
    if not equals or name not in fields - {"batches", "loss", "otherwise"}:
        known = ", ".join(sorted(fields - {"batches", "loss", "otherwise"})) or "none"
        raise InputError(f"{text}: {part!r} is no option of it, such as name=value; it has {known}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def check_report(paths: list[Path]) -> list[Path]:
    """Refuse names of reports that cannot be written, before the work begins.

    Raises:
        typer.BadParameter: the suffix or the folder will not do.
    """
    for path in paths:
        if path.suffix.lower() not in (".html", ".md", ".json", ".txt"):
            raise typer.BadParameter(f"{path.name}: a report ends in .html, .md, .json or .txt")
        if not path.parent.is_dir():
            raise typer.BadParameter(f"{path.parent} is not a directory")
    return paths
