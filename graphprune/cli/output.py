"""What every command does alike: results on stdout, all else on stderr, errors in words, and exit codes.

0: done, and the answer is yes. 1: done, and the answer is no, or a file could not be written. 2: an argument cannot be
used. 130: interrupted.
"""

from __future__ import annotations

import contextlib
import json
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from graphprune.errors import GraphpruneError, RewriteError, TargetError, VerificationError

INDENT = 12
"""Where the second column of a report's summary begins."""
EXTRAS = {
    "matplotlib": "plot",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "sklearn": "demo",
    "timm": "zoo",
    "torchvision": "zoo",
    "transformers": "zoo",
}
"""Packages that a command may need, and the extra that brings them."""
PACKAGES = {"datasets": "datasets", "PIL": "Pillow"}
"""Packages that no extra brings."""


@contextmanager
def explained(option: str = "the target") -> Iterator[None]:
    """Errors that the user can mend, shown without a traceback.

    Args:
        option: where a target comes from.
    Raises:
        typer.BadParameter: the target is out of range or out of reach; the exit code is 2.
        typer.Exit: anything else went wrong that graphprune or the file system speaks of.
        ModuleNotFoundError: a module is missing that is none of graphprune's.
    """
    try:
        yield
    except TargetError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
    except (VerificationError, RewriteError, OSError) as error:
        raise typer.Exit(told(str(error), 1)) from error
    except GraphpruneError as error:
        raise typer.Exit(told(str(error), 2)) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(told("interrupted; what was not finished was not written", 130)) from error
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in PACKAGES:
            advice = f"this command needs {package}; type: pip install {PACKAGES[package]}"
            raise typer.Exit(told(advice, 1)) from error
        if package not in EXTRAS:
            raise
        advice = f'this command needs {package}; type: pip install "graphprune[{EXTRAS[package]}]"'
        raise typer.Exit(told(advice, 1)) from error


def told(message: str, code: int) -> int:
    """The exit code, once stderr says what is wrong."""
    show(f"graphprune: {message}", err=True)
    return code


@contextmanager
def doing(what: str, quiet: bool) -> Iterator[None]:
    """A sign on stderr, where that is a terminal, that something is going on."""
    console = Console(stderr=True)
    with contextlib.nullcontext() if quiet or not console.is_terminal else console.status(what):
        yield


def show(text: str, *, err: bool = False) -> None:
    """Text as it is, long lines broken where the terminal ends and indented below what they say."""
    width = Console().width
    for line in text.splitlines() or [""]:
        inner = " " * (INDENT if line.startswith("  ") else len(line) - len(line.lstrip()))
        options = {"break_long_words": False, "break_on_hyphens": False}
        for part in textwrap.wrap(line, width, subsequent_indent=inner, **options) or [""]:  # type: ignore[arg-type]
            typer.echo(part, err=err)


def as_json(data: Any) -> None:
    """Data for machines."""
    typer.echo(json.dumps(data, indent=1))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", limit: int | None = None) -> None:
    """A table with names on the left and figures on the right, that says how many rows it leaves out."""
    drawn = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for k, name in enumerate(head):
        drawn.add_column(name, justify="left" if not k else "right", overflow="fold", no_wrap=bool(k))
    for row in rows[:limit]:
        drawn.add_row(*row)
    console = Console(highlight=False, markup=False)
    console.print(drawn)
    if limit is not None and len(rows) > limit:
        console.print(f"and {len(rows) - limit} more; --all shows them")
