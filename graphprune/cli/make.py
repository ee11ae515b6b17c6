"""`prune` and `export`: smaller models, and files of them."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from graphprune.allocate import Target
from graphprune.artefact import save
from graphprune.cli import data, models, options
from graphprune.cli.output import as_json, doing, explained, show
from graphprune.cli.root import app, examples
from graphprune.export import export as write_as
from graphprune.latency import Latency
from graphprune.pruning import Result
from graphprune.pruning import prune as prune_model

Fraction = Annotated[float | None, typer.Option(help="Fraction to keep, in (0, 1].", show_default=False)]
FORMATS = {".onnx": "onnx", ".pt2": "torch_export"}
"""Formats by suffix; whatever has none of these is a folder of Python."""


@app.command(
    short_help="A smaller model, proved and written.",
    epilog=examples(
        "prune timm:resnet18 --macs 0.5 --out small --report small.html",
        "prune net.py:make --params 0.4 --importance taylor --data val.npz",
        "prune timm:vit_tiny_patch16_224 --channels 0.5 --multiple-of 8",
    ),
)
def prune(
    model: options.Model,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Directory for the artefact.")] = None,
    report: Annotated[
        list[Path] | None, typer.Option(dir_okay=False, help="File for the report: .html, .md, .json or .txt.")
    ] = None,
    macs: Fraction = None,
    params: Fraction = None,
    memory: Fraction = None,
    latency: Fraction = None,
    channels: Fraction = None,
    multiple_of: Annotated[int, typer.Option(help="Widths are multiples of this, or stay as they are.")] = 1,
    max_removed: Annotated[float, typer.Option(help="Most of each group that goes, a fraction.")] = 1.0,
    floor: Annotated[str, typer.Option(help="Least that a group keeps: channels (4), or a fraction (0.1).")] = "1",
    protect: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Group or pattern that stays whole.")
    ] = None,
    importance: options.Criterion = "magnitude",
    otherwise: Annotated[
        str | None, typer.Option(metavar="NAME", help="Scores groups of which the criterion says nothing.")
    ] = None,
    allocation: Annotated[str, typer.Option(help="uniform, global, greedy or knapsack.")] = "uniform",
    norms: options.Norms = False,
    keep: options.Keep = None,
    emit: Annotated[str, typer.Option(help="auto, module, graft or graph.")] = "auto",
    verify: Annotated[bool, typer.Option(help="Compare with the zeroed original.")] = True,
    repair: Annotated[str, typer.Option(help="none, bias or least_squares; needs --data.")] = "none",
    batchnorm: Annotated[
        bool, typer.Option("--batchnorm", help="New statistics of batch norms; needs --data.")
    ] = False,
    seconds: Annotated[
        float | None,
        typer.Option(help="How long is measured for --latency, about; by default 60. Without it, to report times."),
    ] = None,
    data_: options.Data = None,
    loss: options.Loss = "cross_entropy",
    batch_size: options.BatchSize = 32,
    samples: options.Samples = 256,
    weights: options.Weights = None,
    given: options.Given = None,
    every: options.Every = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Make a smaller model, prove it equal to the zeroed original, and write it and its report."""
    reports = options.check_report(report or [])
    with explained("the target"):
        target = Target(
            macs=macs, params=params, memory=memory, latency=latency, channels=channels, multiple_of=multiple_of,
            max_removed=max_removed, floor=_floor(floor), protect=tuple(protect or ()),
        )  # fmt: skip
        with doing("loading", quiet or json):
            loaded = models.load(model, weights, given or ())
            example = loaded.example
            batches = options.batches(data_, loaded, batch_size, samples)
        criterion = options.criterion(importance, batches, loss, otherwise)
        ways: Any = {"allocation": allocation, "emit": emit, "repair": repair}
        asked = seconds is not None or latency is not None
        clock = Latency(seconds=60.0 if seconds is None else seconds, progress=False if quiet or json else None)
        with doing("pruning", quiet or json):
            result = prune_model(
                loaded.model,
                example,
                target=target,
                importance=criterion,
                latency=clock if asked else None,
                norms="prune" if norms else "pin",
                verify=verify,
                keep_names=keep or (),
                batchnorm=batchnorm,
                batches=batches,
                loss=None if batches is None else data.loss(loss),
                **ways,
            )
        if out is not None:
            with doing("writing", quiet or json):
                save(result, out)
        written = [str(out)] * (out is not None) + [str(result.report.write(path)) for path in reports]
    _say(result, written, every=every, json=json)


def _say(result: Result, written: list[str], *, every: bool, json: bool) -> None:
    if json:
        as_json({"written": written, "report": json_text.loads(result.report.to_json())})
        return
    show(str(result.report))
    if every:
        show("\n" + result.report.table())
    if written:
        show("\nwrote " + ", ".join(written))


def _floor(text: str) -> int | float:
    """A number of channels, or a fraction.

    Raises:
        typer.BadParameter: it is neither.
    """
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is neither a number of channels, such as 4, nor a fraction") from error


@app.command(
    short_help="ONNX, exported program or Python code.",
    epilog=examples(
        "export small small.onnx",
        "export small small-code --format python",
        "export timm:resnet18 r18.pt2 --weights pretrained",
    ),
)
def export(
    model: options.Model,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File, or folder for Python code.")],
    format_: Annotated[
        Literal["onnx", "torch_export", "python"] | None,
        typer.Option("--format", help="By default what the suffix says: .onnx, .pt2, or a folder of Python."),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference accepted, relative.")] = 1e-4,
    weights: options.Weights = None,
    given: options.Given = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a model or an artefact as ONNX, an exported program or Python code, and compare it with the model."""
    with explained(), doing("exporting", quiet or json):
        loaded = models.load(model, weights, given or ())
        chosen: Any = format_ or FORMATS.get(path.suffix, "python")
        done = write_as(loaded.model, path, loaded.example, chosen, tolerance=tolerance)
    if json:
        as_json(
            {
                "path": str(done.path),
                "format": done.format,
                "files": [str(f) for f in done.files],
                "bytes": done.bytes,
                "error": done.error,
                "batch_sizes": list(done.batch_sizes),
                "limits": done.limits,
            }
        )
        return
    sizes = ", ".join(map(str, done.batch_sizes))
    show(f"wrote {done.path} as {done.format}, {done.bytes:,} bytes")
    show(f"off by {done.error:.1e} from the model, at batch sizes {sizes}")
    if done.limits:
        show(f"the batch size is fixed: {done.limits}")
