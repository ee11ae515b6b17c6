"""`inspect`, `explain` and `sensitivity`: what a model is made of, and what each part is worth."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from graphprune.cli import data, models, options
from graphprune.cli.output import as_json, doing, explained, show, table
from graphprune.cli.root import app, examples
from graphprune.cost import COSTS
from graphprune.couple import couple
from graphprune.coupling import Coupling
from graphprune.errors import counted
from graphprune.files import write_whole
from graphprune.sensitivity import sensitivity as scan
from graphprune.trace import trace

ROWS = 40


def coupled(
    spec: str, weights: str | None, given: list[str] | None, *, norms: bool = False, keep: list[str] | None = None
) -> tuple[models.Loaded, Coupling]:
    """A model and its coupling.

    Raises:
        GraphpruneError: there is no such model, or it cannot be traced.
    """
    loaded = models.load(spec, weights, given or ())
    program = trace(loaded.model, loaded.example)
    return loaded, couple(program, norms="prune" if norms else "pin", keep_names=keep or ())


@app.command(short_help="Groups of channels, and what stays and why.", epilog=examples("inspect timm:resnet18"))
def inspect(
    model: options.Model,
    weights: options.Weights = None,
    given: options.Given = None,
    norms: options.Norms = False,
    keep: options.Keep = None,
    every: options.Every = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show which channels of a model can be removed together, and what must stay and why."""
    with explained(), doing("tracing", quiet or json):
        _, found = coupled(model, weights, given, norms=norms, keep=keep)
    costs = {name: make(found).at({}) for name, make in COSTS.items()}
    if json:
        as_json(
            {
                "model": found.program.model_class,
                "costs": costs,
                "groups": [
                    {"name": g.name, "size": g.size, "exactness": g.exactness, "members": [str(m) for m in g.members]}
                    for g in found.groups
                ],
                "pinned": [{"name": p.name, "size": p.size, "reason": p.reason, "at": p.where} for p in found.pinned],
                "unknown": [{"op": u.op, "nodes": list(u.nodes), "why": u.why} for u in found.unknown],
            }
        )
        return
    show(f"{found.program.model_class}: " + ", ".join(f"{value:,} {name}" for name, value in costs.items()))
    show("")
    rows = [(g.name, str(g.size), str(len(g.members)), g.exactness) for g in found.groups]
    table(("group", "channels", "members", "class"), rows, limit=None if every else ROWS)
    if found.pinned:
        show("")
        causes = Counter(p.reason for p in found.pinned)
        first = {p.reason: p.name for p in reversed(found.pinned)}
        table(
            ("pinned because", "axes", "such as"),
            [(reason, str(n), _brief(first[reason])) for reason, n in causes.most_common()],
        )
    for u in found.unknown:
        show(f"\nno rule for {u.op} ({counted(len(u.nodes), 'node')}, first at {u.nodes[0]}): {u.why}")


def _brief(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


@app.command(
    short_help="Why parameters are tied, or cannot shrink.",
    epilog=examples("explain timm:resnet18 conv1.weight layer1.0.conv2.weight"),
)
def explain(
    model: options.Model,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Parameter or buffer.")],
    other: Annotated[str | None, typer.Argument(metavar="[OTHER]", help="Another one: why are they tied?")] = None,
    weights: options.Weights = None,
    given: options.Given = None,
    norms: options.Norms = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Say why two parameters are tied, or of one which dims can shrink and why the others cannot."""
    with explained():
        with doing("tracing", quiet or json):
            _, found = coupled(model, weights, given, norms=norms)
        if other is not None:
            lines = [found.explain(name, other)]
        else:
            lines = [found.why_not(name, dim) for dim in range(len(found.slot(name).shape))]
    if json:
        as_json({"name": name, "other": other, "lines": [part for line in lines for part in line.splitlines()]})
    else:
        show("\n".join(lines))


@app.command(
    short_help="What each group is worth to the loss.",
    epilog=examples("sensitivity timm:resnet18 --data val/ --by class"),
)
def sensitivity(
    model: options.Model,
    data_: Annotated[str, typer.Option("--data", metavar="DATA", help=f"{data.FORMS}.")],
    weights: options.Weights = None,
    given: options.Given = None,
    loss: options.Loss = "cross_entropy",
    fraction: Annotated[
        list[float] | None, typer.Option(help="Fraction that stays; by default 0.25, 0.5, 0.75.")
    ] = None,
    group: Annotated[list[str] | None, typer.Option(help="Group or pattern to scan; by default all.")] = None,
    by: Annotated[str, typer.Option(help="'group', or 'class' to cut alike groups together.")] = "group",
    importance: options.Criterion = "magnitude",
    batch_size: options.BatchSize = 32,
    samples: options.Samples = 256,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="File for the scan as JSON.")] = None,
    directory: Annotated[Path | None, typer.Option(file_okay=False, help="Keeps what is measured, to go on.")] = None,
    every: options.Every = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure by how much the loss rises when each group alone keeps a fraction of its channels."""
    with explained():
        with doing("tracing", quiet or json):
            loaded, found = coupled(model, weights, given)
            batches = data.load(data_, loaded, data.Wanted(batch_size, samples))
        measured = scan(
            loaded.model,
            found,
            batches,
            data.loss(loss),
            fractions=tuple(fraction or (0.25, 0.5, 0.75)),
            importance=options.criterion(importance, batches, loss),
            groups=group,
            by=by,  # type: ignore[arg-type]  # checked there
            directory=directory,
            progress=False if quiet or json else None,
        )
        if out is not None:
            write_whole(out, lambda file: file.write(measured.to_json().encode()))
    if json:
        typer.echo(measured.to_json())
        return
    show(f"loss {measured.loss:.4g} on {counted(measured.samples, 'sample')}; by how much it rises at each width")
    rows = [
        (name, str(curve.size), "  ".join(f"{w}: {i:+.4f}" for w, i in zip(curve.widths, curve.increases, strict=True)))
        for name, curve in measured.worst_first()
    ]
    table(("group", "channels", "rise at each width"), rows, limit=None if every else ROWS)
