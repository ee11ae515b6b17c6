"""The command line: arguments in, tables or JSON out; the work is done elsewhere.

A file for each few commands; `models` and `data` say what the texts for models and batches mean, `options` what the
other options do, `output` how results and errors look.
"""

from __future__ import annotations

INSTALL = 'graphprune: the command line needs {}; type: pip install "graphprune[demo]"'

try:
    import rich  # noqa: F401
    import typer  # noqa: F401

    from graphprune.cli import check, demo, look, make  # noqa: F401 - each adds its commands
    from graphprune.cli.root import app
except ModuleNotFoundError as error:  # the script imports this module first, so there is nobody else to say it
    if error.name not in ("rich", "typer"):
        raise
    raise SystemExit(INSTALL.format(error.name)) from error

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line."""
    app()
