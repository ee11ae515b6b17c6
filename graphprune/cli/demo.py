"""`demo`: the whole path from a trained network to a smaller one, on built-in data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from graphprune.allocate import Target
from graphprune.cli.output import explained, show
from graphprune.cli.root import app

if TYPE_CHECKING:
    from graphprune.demo import Advance, Demo


@app.command(
    short_help="Train, prune and fine-tune on built-in data.",
    help="Train a small network on scikit-learn's digits, prune it, fine-tune it, and show what that did.",
)
def demo(
    out: Annotated[
        Path,
        typer.Option(exists=True, file_okay=False, writable=True, help="Directory for the weights and the plan."),
    ] = Path(),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first weights and of the order of the images.")] = 0,
    macs: Annotated[float, typer.Option(help="Fraction of the multiply-adds to keep, in (0, 1].")] = 0.5,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,
) -> None:
    """Show the whole path from a trained network to a smaller one."""
    with explained("'--macs'"):
        from graphprune.demo import EPOCHS, run_demo, save_to

        with _progress(quiet) as advance:
            found = run_demo(Target(macs=macs), seed=seed, epochs=epochs or EPOCHS, advance=advance)
    Console().print(_table(found))
    for text in (str(found.result.report), found.result.report.table()):
        show(f"\n{text}")
    weights, plan = save_to(out, found)
    show(f"\nwrote {weights} and {plan}")


@contextmanager
def _progress(quiet: bool) -> Iterator[Advance]:
    """A bar per thing being done, on stderr, so that stdout holds only results."""
    columns = TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
        tasks = {}

        def advance(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done)

        yield advance


def _table(found: Demo) -> Table:
    """What each stage costs and can do."""
    before = found.stages[0]
    table = Table(
        title=f"DigitsNet on {found.test_images} test images of scikit-learn's digits",
        caption=f"latency of all images at once, median of {found.repeats} runs, {found.threads} CPU threads; "
        "the last two models have the same shape, so they differ by noise",
    )
    table.add_column("")
    for title in ("before", "after pruning", "after fine-tuning"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_row("test accuracy", *(f"{s.accuracy:.3f}" for s in found.stages))
    table.add_row("MACs", *(f"{s.macs:,} ({s.macs / before.macs:.3f})" for s in found.stages))
    table.add_row("parameters", *(f"{s.params:,} ({s.params / before.params:.3f})" for s in found.stages))
    table.add_row(
        "latency in ms", *(f"{1000 * s.latency:.2f} ({s.latency / before.latency:.3f})" for s in found.stages)
    )
    return table
