"""`verify`, `compare` and `bench`: what a smaller model computes, and what it costs."""

from __future__ import annotations

import dataclasses
import json as json_text
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

import torch
import typer
from torch import nn

from graphprune.artefact import Artefact
from graphprune.calibrate import Criterion, read
from graphprune.cli import data, models, options
from graphprune.cli.output import as_json, doing, explained, show, table, told
from graphprune.cli.root import app, examples
from graphprune.cost import COSTS
from graphprune.couple import couple
from graphprune.errors import ArtefactError, GraphpruneError, InputError, VerificationError, counted
from graphprune.plan import Plan
from graphprune.recover.quality import qualities
from graphprune.report import Report
from graphprune.trace import Inputs, held, trace, untouched
from graphprune.verify import Verification
from graphprune.verify import verify as compare_with_zeroed

Repeats = Annotated[int, typer.Option(min=1, help="Runs that are timed.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default what torch takes.")]
WARM_UP = 3
"""Runs that do not count."""


@app.command(
    short_help="Hold an artefact against the original.",
    epilog=examples("verify timm:resnet18 small --weights resnet18.safetensors"),
)
def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"The original: {models.FORMS}.")],
    artefact: Annotated[str, typer.Argument(metavar="ARTEFACT", help="Directory that `prune` wrote.")],
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Check the plan with the original's weights, where the saved ones were repaired."),
    ] = False,
    weights: options.Weights = None,
    given: options.Given = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare an artefact with the original whose removed channels are zeroed; the exit code is 1 if they differ."""
    with explained():
        try:
            with doing("verifying", quiet or json):
                found = _held_against(models.load(model, weights, given or ()), Artefact.read(artefact), plan=plan)
        except VerificationError as error:
            _different(error, json=json)
    if json:
        as_json({"equal": True, **dataclasses.asdict(found)})
        return
    show(
        f"equal to the zeroed original: relative error {found.error:.1e} in {found.precision} "
        f"on {counted(found.inputs, 'input')}"
    )
    show(f"zeroing itself moved the output by {found.effect:.1e}")


def _held_against(original: models.Loaded, saved: Artefact, *, plan: bool) -> Verification:
    """An artefact beside the zeroed original; with `plan`, with the weights of the original.

    Raises:
        VerificationError: they differ.
        InputError: a graph module is to take other weights, or the artefact's report cannot be read.
        GraphpruneError: the artefact is of another model, or cannot be loaded.
    """
    report = Report.from_json(json_text.dumps(dict(saved.report)))
    renormalised = any(width.exactness != "exact" for width in report.groups)
    coupling = couple(trace(original.model, original.example), norms="prune" if renormalised else "pin")
    kept = Plan.of(coupling, saved.plan.groups)  # groups that were kept whole by name are whole in it
    if saved.structure.emitter != "graph":
        small = saved.load(original.model, weights="model" if plan else "saved")
    elif plan:
        raise InputError("--plan: this artefact is a graph module, which has no other weights than the saved ones")
    else:
        small = saved.load()
    return compare_with_zeroed(original.model, small, original.example, coupling, kept)


def _different(error: VerificationError, *, json: bool) -> NoReturn:
    """Say so, and end the command.

    Raises:
        typer.Exit: always; the code is 1.
    """
    if json:
        as_json({"equal": False, "why": str(error)})
        raise typer.Exit(1) from error
    raise typer.Exit(told(_why(error), 1)) from error


def _why(error: VerificationError) -> str:
    first = str(error).splitlines()[:2]
    return (
        "\n".join(first)
        + "\nweights that were repaired or trained since, or an original with other weights than those "
        "that were pruned, differ; --plan checks the plan alone, --weights names the original's weights"
    )


@dataclass(frozen=True)
class Figures:
    """What one model costs and does.

    Attributes:
        name: how it was asked for.
        params: number of parameter elements.
        macs: multiply-adds at the example inputs; None where it cannot be traced.
        bytes: of its parameters and buffers.
        seconds: median time of a run.
        loss: mean loss of a sample; None without data.
        accuracy: fraction of the samples whose largest output is the target; None without data of that kind.
    """

    name: str
    params: int
    macs: int | None
    bytes: int
    seconds: float
    loss: float | None = None
    accuracy: float | None = None


@app.command(
    short_help="Two models side by side.",
    epilog=examples("compare timm:resnet18 small --data val/", "compare net.py:make small --json"),
)
def compare(
    model: Annotated[str, typer.Argument(metavar="BEFORE", help=f"{models.FORMS}.")],
    other: Annotated[str, typer.Argument(metavar="AFTER", help="Another one, such as the artefact.")],
    data_: options.Data = None,
    loss: options.Loss = "cross_entropy",
    batch_size: options.BatchSize = 32,
    samples: options.Samples = 256,
    repeats: Repeats = 20,
    threads: Threads = None,
    weights: options.Weights = None,
    given: options.Given = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Set two models side by side: parameters, multiply-adds, size, time and, with data, how well they do."""
    with explained(), doing("comparing", quiet or json):
        first = models.load(model, weights, given or ())
        second = beside(other, first, given or ())
        batches = options.batches(data_, first, batch_size, samples)
        judged = [(None, None)] * 2 if batches is None else [_judged(m, batches, loss) for m in (first, second)]
        seconds = timed([first, second], [first.example] * 2, repeats, threads)
        found = [
            Figures(m.name, *costs(m), taken, *marks)
            for m, taken, marks in zip((first, second), seconds, judged, strict=True)
        ]
        apart = None
        if batches is not None:
            given_to = len(first.example.tensors())
            parts = read(batches, given_to, torch.device("cpu"))
            apart = qualities(first.model, second.model, parts, None, 0)[1]
    if json:
        near = None if apart is None else {"error": apart.error, "agreement": apart.agreement}
        as_json({"before": dataclasses.asdict(found[0]), "after": dataclasses.asdict(found[1]), "outputs": near})
        return
    table(("", "before", "after", "kept"), _lines(*found))
    if apart is not None:
        same = "" if apart.agreement is None else f"; the same largest output for {apart.agreement:.1%}"
        show(f"outputs off by {apart.error:.3g} of their norm{same}")
    show(f"time is the median of {repeats} runs in turns, {threads or torch.get_num_threads()} CPU threads")


def beside(spec: str, first: models.Loaded, given: Sequence[str]) -> models.Loaded:
    """Another model; an artefact that holds no graph module is loaded into the class of the first.

    Raises:
        GraphpruneError: it cannot be loaded.
    """
    try:
        return models.load(spec, None, given)
    except ArtefactError:
        return models.load(spec, None, given, original=first.model)


def costs(loaded: models.Loaded) -> tuple[int, int | None, int]:
    """Parameters, multiply-adds and bytes of a model."""
    params = sum(p.numel() for p in loaded.model.parameters())
    size = sum(t.numel() * t.element_size() for t in {id(t): t for _, t in held(loaded.model)}.values())
    try:
        macs = COSTS["macs"](couple(trace(loaded.model, loaded.example))).at({})
    except GraphpruneError:
        macs = None
    return params, macs, size


def _judged(loaded: models.Loaded, batches: list[Any], loss: str) -> tuple[float, float | None]:
    """Loss and accuracy of a model."""
    criterion, total, right, places, seen = Criterion(data.loss(loss), 0), 0.0, 0, 0, 0
    for batch in read(batches, len(loaded.example.tensors()), torch.device("cpu")):
        samples = next((len(t) for t in batch.inputs.tensors() if t.dim()), 1)
        with untouched(loaded.model), torch.no_grad():
            output = batch.inputs.call(loaded.model)
            total += float(criterion.total(output, batch.target, samples))
        seen += samples
        target = batch.target
        fits = isinstance(output, torch.Tensor) and isinstance(target, torch.Tensor) and output.dim() > 1
        if fits and not target.is_floating_point() and target.shape == output.argmax(1).shape:
            right, places = right + int((output.argmax(1) == target).sum()), places + target.numel()
    return total / max(1, seen), right / places if places else None


def _lines(before: Figures, after: Figures) -> list[tuple[str, str, str, str]]:
    rows: list[tuple[str, Any, Any, str]] = [
        ("parameters", before.params, after.params, ",d"),
        ("MACs", before.macs, after.macs, ",d"),
        ("bytes", before.bytes, after.bytes, ",d"),
        ("ms", 1000 * before.seconds, 1000 * after.seconds, ".2f"),
        ("loss", before.loss, after.loss, ".4g"),
        ("accuracy", before.accuracy, after.accuracy, ".4f"),
    ]
    return [
        (name, format(a, form), format(b, form), f"{b / a:.3f}" if a and name not in ("loss", "accuracy") else "")
        for name, a, b, form in rows
        if a is not None and b is not None
    ]


# -- time -------------------------------------------------------------------------------------------------------------


@app.command(
    short_help="Time models on this CPU.", epilog=examples("bench timm:resnet18 small --batch 1 --batch 8 --threads 1")
)
def bench(
    names: Annotated[list[str], typer.Argument(metavar="MODEL...", help=f"{models.FORMS}.")],
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch size; by default that of the input.")] = None,
    repeats: Repeats = 30,
    threads: Threads = None,
    given: options.Given = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Time models on this CPU: they take turns, so that whatever else runs slows all of them."""
    rows: list[dict[str, Any]] = []
    with explained(), doing("timing", quiet or json):
        loaded = [models.load(names[0], None, given or ())]
        loaded += [beside(name, loaded[0], given or ()) for name in names[1:]]
        sizes: list[int | None] = [*batch] if batch else [None]
        for size in sizes:
            inputs = [m.example if size is None else _resized(m, size) for m in loaded]
            seconds = timed(loaded, inputs, repeats, threads)
            rows += [
                {"model": m.name, "batch": len(i.tensors()[0]), "seconds": taken, "of_first": taken / seconds[0]}
                for m, i, taken in zip(loaded, inputs, seconds, strict=True)
            ]
    if json:
        as_json({"threads": threads or torch.get_num_threads(), "repeats": repeats, "runs": rows})
        return
    table(
        ("model", "batch", "ms", "of the first"),
        [(r["model"], str(r["batch"]), f"{1000 * r['seconds']:.2f}", f"{r['of_first']:.3f}") for r in rows],
    )
    show(f"median of {repeats} runs in turns, {threads or torch.get_num_threads()} CPU threads")


def _resized(loaded: models.Loaded, size: int) -> Inputs:
    """The example with so many samples."""
    return loaded.example.map(lambda t: t[:1].expand(size, *t.shape[1:]).contiguous() if t.dim() else t)


def timed(loaded: Sequence[models.Loaded], inputs: Sequence[Inputs], repeats: int, threads: int | None) -> list[float]:
    """Median seconds of a run of each model, after a few that do not count; they take turns.

    Raises:
        InputError: a model does not run on its inputs.
    """
    times: list[list[float]] = [[] for _ in loaded]
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.inference_mode():
            for turn in range(-WARM_UP, repeats):
                for k, m in enumerate(loaded):
                    taken = _run(m.model, inputs[k], m.name)
                    if turn >= 0:
                        times[k].append(taken)
    finally:
        torch.set_num_threads(before)
    return [statistics.median(taken) for taken in times]


def _run(model: nn.Module, inputs: Inputs, name: str) -> float:
    start = time.perf_counter()
    try:
        inputs.call(model)
    except Exception as error:
        what = next(iter(str(error).splitlines()), "")
        raise InputError(f"{name} does not run on these inputs: {type(error).__name__}: {what}") from error
    return time.perf_counter() - start
