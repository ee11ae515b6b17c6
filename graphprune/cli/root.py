"""The application that the commands belong to."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup


def examples(*lines: str) -> str:
    """The end of a help text, one command a line."""
    return "\b\nExamples:\n" + "\n".join(f"  graphprune {line}" for line in lines)


ORDER = ("demo", "inspect", "explain", "sensitivity", "prune", "verify", "compare", "bench", "export")


class InOrder(TyperGroup):
    """Commands in the order in which they are used."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names."""
        return list(ORDER)


app = typer.Typer(
    name="graphprune",
    cls=InOrder,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Structural pruning for any PyTorch module, proved equal to the original with the same channels zeroed.",
    epilog=examples(
        "inspect timm:resnet18",
        "prune timm:resnet18 --macs 0.5 --out small --report small.html",
        "verify timm:resnet18 small --plan",
        "compare timm:resnet18 small",
        "export small small.onnx",
    ),
)
