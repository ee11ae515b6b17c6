"""How long each step of graphprune takes, beside torch-pruning, and how time and memory grow with the network.

    python benchmarks/speed.py                                 # everything, to benchmarks/results/speed.{json,md}
    python benchmarks/speed.py --models resnet18 --parts models

Three parts: `models` times the steps on torchvision models with random weights, graphprune and torch-pruning in turn
in one process; `scaling` times them on networks of growing depth and fits slopes; `memory` traces and couples a
network too large to hold, in fresh processes. Every time is the median of `--repeats` runs after one run that is not
counted, with the garbage collected before each.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import shim
import torch
from torch import nn

import graphprune as gp

shim.install()

Record = dict[str, Any]
MODELS = (
    "resnet18",
    "resnet50",
    "vgg16_bn",
    "googlenet",
    "densenet121",
    "mobilenet_v2",
    "efficientnet_b0",
    "regnet_x_400mf",
    "convnext_tiny",
    "vit_b_16",
)
STEPS = ("trace", "couple", "plan", "rewrite", "verify")
PEER_STEPS = ("graph", "groups", "prune")
TARGET = gp.Target(channels=0.5)
MIB = 2**20


# -- timing ------------------------------------------------------------------------------------------------------


class OverLimit(BaseException):
    """A timed region ran too long; not an `Exception`, so that what it interrupts cannot swallow it."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stop the block when its time is up; it is interrupted again every second, in case it caught the first one."""

    def stop(signum: int, frame: object) -> None:
        raise OverLimit

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Clock:
    """Times of named steps over several runs; what a step raised stands in the place of its time.

    Attributes:
        limit: seconds a step may take.
        times: seconds of every counted run, per step.
        errors: per step that failed, what it raised.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.times: dict[str, list[float]] = {}
        self.errors: dict[str, str] = {}

    def run(self, step: str, action: Callable[[], Any]) -> Any:
        """What `action` returns, timed; None if it or an earlier run of this step failed."""
        if step in self.errors:
            return None
        gc.collect()
        try:
            with at_most(self.limit):
                start = time.perf_counter()
                result = action()
                self.times.setdefault(step, []).append(time.perf_counter() - start)
        except OverLimit:
            self.errors[step] = f"not done after {self.limit:.0f} s"
        except Exception as error:
            self.errors[step] = said(error)
        return None if step in self.errors else result

    def add(self, name: str, steps: Sequence[str]) -> None:
        """Count what the latest run of `steps` took together as a step of its own, if none of them failed."""
        if not self.errors.keys() & set(steps):
            self.times.setdefault(name, []).append(sum(self.times[step][-1] for step in steps))

    def record(self) -> Record:
        """Per step, in seconds, the median and the extremes; or the error."""
        done = {
            step: {"median_s": statistics.median(t), "min_s": min(t), "max_s": max(t)} for step, t in self.times.items()
        }
        return done | {step: {"error": text} for step, text in self.errors.items()}


def said(error: Exception) -> str:
    """Type and first line of an error, without the paths of this machine."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {re.sub(r'(/[^/ ]+)+/', '', line)}"[:200]


# -- one model, two libraries ------------------------------------------------------------------------------------


def zoo(name: str) -> nn.Module:
    """A torchvision model with random weights, none of which is the same for all channels.

    Zero heads, layer scales of 1e-6 and fresh BatchNorm statistics would hide what was removed, and `verify` with it.
    """
    import torchvision  # only now, since it needs the shim

    options = {"init_weights": False} if name == "googlenet" else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def run_steps(clock: Clock, model: nn.Module, x: torch.Tensor, emit: str) -> Record:
    """What each step of graphprune makes, in order, up to the first that fails."""
    made: Record = {}
    steps = {
        "trace": lambda: gp.trace(model, x),
        "couple": lambda: gp.couple(made["trace"]),
        "plan": lambda: gp.allocate(gp.importance.Magnitude()(model, made["couple"]), TARGET, made["couple"]),
        "rewrite": lambda: gp.rewrite(model, x, made["couple"], made["plan"], emit=emit),
        "verify": lambda: gp.verify(model, made["rewrite"].model, x, made["couple"], made["plan"]),
    }
    for step, action in steps.items():
        made[step] = clock.run(step, action)
        if step in clock.errors:
            break
    return made


def about_steps(model: nn.Module, made: Record) -> Record:
    """What the steps found, beside the time they took."""
    about: Record = {}
    if coupling := made.get("couple"):
        about |= {"groups": len(coupling.groups), "slots": slots(coupling)}
    if rewritten := made.get("rewrite"):
        about |= {"emitter": rewritten.emitter, "params_kept": parameters(rewritten.model) / parameters(model)}
    if found := made.get("verify"):
        about |= {"error": found.error, "effect": found.effect, "precision": found.precision}
    return about


def run_peer(clock: Clock, model: nn.Module, x: torch.Tensor) -> Record:
    """Each step of torch-pruning once, on copies made outside the clock, since it edits what it is given."""
    import torch_pruning as tp

    first, second = copy.deepcopy(model), copy.deepcopy(model)
    head = [m for m in second.modules() if isinstance(m, nn.Linear)][-1]
    about: Record = {}

    def prune() -> None:
        importance = tp.importance.MagnitudeImportance()
        tp.pruner.MagnitudePruner(second, x, importance=importance, pruning_ratio=0.5, ignored_layers=[head]).step()

    graph = clock.run("graph", lambda: tp.DependencyGraph().build_dependency(first, example_inputs=x))
    if graph is not None:
        about["groups"] = clock.run("groups", lambda: len(list(graph.get_all_groups())))
    clock.run("prune", prune)
    if "prune" in clock.errors:
        return about
    try:
        with torch.no_grad():
            second(x)
    except Exception as error:
        clock.errors["prune"] = f"the forward of what it made fails: {said(error)}"
        clock.times.pop("prune")
    return about | {"params_kept": parameters(second) / parameters(model)}


def parameters(model: nn.Module) -> int:
    """How many parameter elements `model` has."""
    return sum(p.numel() for p in model.parameters())


def measure_model(name: str, repeats: int, limit: float) -> Record:
    """Both libraries on one model, in turn; which goes first alternates."""
    torch.manual_seed(0)
    model, x = zoo(name), torch.randn(1, 3, 224, 224)
    ours, peer = Clock(limit), Clock(limit)
    whole = ours.run("prune", lambda: gp.prune(model, x, target=TARGET))
    emit = whole.report.emitter if whole else "auto"
    about, about_peer = about_steps(model, run_steps(ours, model, x, emit)), run_peer(peer, model, x)
    ours.times.clear()
    peer.times.clear()

    def ours_once() -> None:
        run_steps(ours, model, x, emit)
        ours.run("prune", lambda: gp.prune(model, x, target=TARGET))
        ours.add("unverified", STEPS[:4])

    for k in range(repeats):
        turns = [ours_once, lambda: run_peer(peer, model, x)]
        for turn in turns if k % 2 == 0 else turns[::-1]:
            turn()
    return {
        "input": list(x.shape),
        "params": parameters(model),
        "graphprune": {"steps": ours.record()} | about,
        "torch_pruning": {"steps": peer.record()} | about_peer,
    }


def slots(coupling: gp.Coupling) -> int:
    """How many (tensor, dim, group) triples there are: what the groups list as members."""
    return sum(len(group.members) for group in coupling.groups)


# -- scaling -----------------------------------------------------------------------------------------------------


class DenseBlock(nn.Module):
    """Layers that each read all features before them; the convolutions are 1 x 1, so that bookkeeping dominates."""

    def __init__(self, depth: int, growth: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, growth, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(growth * n), nn.ReLU(), nn.Conv2d(growth * n, growth, 1))
            for n in range(1, depth + 1)
        )
        self.head = nn.Linear(growth * (depth + 1), 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class ResidualNet(nn.Module):
    """Blocks of two 3 x 3 convolutions around one residual stream."""

    def __init__(self, depth: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.BatchNorm2d(width),
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def measure_scaling(family: Callable[[int], nn.Module], depths: Sequence[int], repeats: int, limit: float) -> Record:
    """Times at every depth, all depths once per round so that drift of the machine hits them alike, and slopes."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    models = {depth: family(depth).eval() for depth in depths}
    clocks = {depth: Clock(limit) for depth in depths}
    sizes: dict[int, int] = {}
    for k in range(repeats + 1):
        for depth, model in models.items():
            if k == 1:
                clocks[depth].times.clear()
            sizes[depth] = slots(run_steps(clocks[depth], model, x, "auto")["couple"])
    points = [{"depth": d, "slots": sizes[d], "params": parameters(models[d])} | clocks[d].record() for d in depths]
    whole = [s for s in STEPS if all("median_s" in point[s] for point in points)]
    slopes = {
        step: {
            f"{by}, {of}": slope([p[by] for p in points], [p[step][f"{of}_s"] for p in points])
            for by in ("depth", "slots")
            for of in ("median", "min")
        }
        for step in whole
    }
    return {"input": list(x.shape), "points": points, "slopes": slopes}


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Exponent k of the power law seconds ~ size**k, least squares in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


# -- memory ------------------------------------------------------------------------------------------------------


def measure_memory(depth: int, width: int, device: str) -> Record:
    """Resident memory that tracing and coupling a residual network take; call it in a fresh process.

    The increase of the peak misses what fits under the peak reached before; the peak over what was resident does not,
    but counts what was freed in between as if it were new. The truth lies between the two.
    """
    torch.set_num_threads(1)
    small = ResidualNet(1).eval()
    start = time.perf_counter()
    gp.couple(gp.trace(small, torch.zeros(1, 3, 8, 8)))  # imports, which are not the network's
    first = time.perf_counter() - start
    with torch.device(device):
        model, x = ResidualNet(depth, width).eval(), torch.zeros(1, 3, 8, 8)
    gc.collect()
    resident, before = status("VmRSS"), peak()
    start = time.perf_counter()
    coupling = gp.couple(gp.trace(model, x))
    seconds = time.perf_counter() - start
    after = peak()
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) if device != "meta" else 0
    return {
        "device": device,
        "depth": depth,
        "width": width,
        "params": parameters(model),
        "weight_bytes": weights,
        "groups": len(coupling.groups),
        "channels": sum(group.size for group in coupling.groups),
        "trace_and_couple_s": seconds,
        "first_in_process_s": first,
        "peak_before_bytes": before,
        "peak_increase_bytes": after - before,
        "peak_over_resident_bytes": after - resident if resident else None,
    }


def peak() -> int:
    """Largest resident size of this process so far, in bytes.

    Linux hands the `ru_maxrss` of a parent down to the programs it starts, so the process's own mark is preferred.
    """
    unit = 1 if platform.system() == "Darwin" else 1024
    return status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def status(key: str) -> int:
    """A size in bytes that Linux reports about this process; 0 elsewhere."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def in_fresh_process(function: Callable[..., Record], *args: Any) -> Record:
    """`function(*args)` in an interpreter of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


# -- results -----------------------------------------------------------------------------------------------------


def environment(args: argparse.Namespace) -> Record:
    """What the numbers depend on, without naming the machine."""
    versions = {"python": platform.python_version(), "graphprune": gp.__version__}
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "torch-pruning", "numpy")}
    return {
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "device": "cpu",
        "threads": args.threads,
        "repeats": args.repeats,
        "limit_s": args.limit,
        "load_average_before": os.getloadavg()[0],
        "seed": 0,
    }


def cell(found: Mapping[str, Any] | None) -> str:
    """Median and extremes of a step, in seconds."""
    if not found or "median_s" not in found:
        return "-" if not found else "fails"
    return f"{found['median_s']:.3f} ({found['min_s']:.3f}-{found['max_s']:.3f})"


def fraction(value: float | None) -> str:
    """A fraction kept, or a dash."""
    return "-" if value is None else f"{value:.3f}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(item) for item in line) + " |" for line in lines]


def models_text(models: Mapping[str, Record]) -> list[str]:
    """The tables of the first part, what failed, and in words who is faster."""
    steps, against, failures = [], [], []
    for name, found in models.items():
        ours, peer = found["graphprune"], found["torch_pruning"]
        mine, theirs = ours["steps"], peer["steps"]
        about = (ours.get(key, "-") for key in ("groups", "slots", "emitter"))
        steps.append([name, *about, *(cell(mine.get(step)) for step in STEPS)])
        times = (
            cell(mine.get("unverified")),
            cell(mine.get("prune")),
            *(cell(theirs.get(step)) for step in PEER_STEPS),
        )
        against.append([name, *times, *(fraction(record.get("params_kept")) for record in (ours, peer))])
        for library, record in (("graphprune", mine), ("torch-pruning", theirs)):
            failures += [f"* {library}, {name}, {step}: {r['error']}" for step, r in record.items() if "error" in r]
    return [
        "## Steps of graphprune",
        "",
        *table(["model", "groups", "slots", "emitter", *STEPS], steps),
        "",
        "## Beside torch-pruning",
        "",
        "`unchecked` is trace, couple, plan and rewrite without any check. Compare it with torch-pruning's `prune`,",
        "which builds its graph, ranks, removes and checks nothing; `graph` and `groups` are its first steps alone.",
        "`gp.prune` adds the choice of emitter and the proof. The two do not remove the same channels everywhere:",
        "torch-pruning also narrows what a LayerNorm takes statistics over. Its `prune` is given nothing but the",
        "classifier to leave alone; a model whose forward then fails may need arguments or edits it was not given.",
        "",
        *table(
            [
                "model",
                "unchecked",
                "gp.prune",
                *(f"torch-pruning {step}" for step in PEER_STEPS),
                "params kept",
                "params kept, torch-pruning",
            ],
            against,
        ),
        "",
        *(["What failed:", "", *failures, ""] if failures else []),
        *faster_text(models),
        "",
    ]


def faster_text(models: Mapping[str, Record]) -> list[str]:
    """Who is faster at what, model by model, by the medians."""

    def median(record: Record, steps: Sequence[str]) -> float | None:
        found = [record["steps"].get(step, {}).get("median_s") for step in steps]
        return None if None in found else sum(found)

    pairs = (
        ("from a model to its groups", ("trace", "couple"), ("graph", "groups")),
        ("groups alone, once the model is traced", ("couple",), ("groups",)),
        ("from a model to a smaller one, unchecked", ("unverified",), ("prune",)),
        ("from a model to a smaller one, `gp.prune` with its proof", ("prune",), ("prune",)),
    )
    lines = ["Who is faster, by the medians:", ""]
    for title, ours, peers in pairs:
        ratios = {}
        for name, found in models.items():
            a, b = median(found["graphprune"], ours), median(found["torch_pruning"], peers)
            if a is not None and b is not None:
                ratios[name] = a / b
        behind = ", ".join(f"{name} ({ratio:.1f} x)" for name, ratio in ratios.items() if ratio > 1) or "none"
        ahead = ", ".join(f"{name} ({1 / ratio:.1f} x)" for name, ratio in ratios.items() if ratio <= 1) or "none"
        lines.append(f"* {title}: torch-pruning on {behind}; graphprune on {ahead}.")
    return lines


def scaling_text(scaling: Mapping[str, Record]) -> list[str]:
    """Times by depth and the slopes fitted to them."""
    lines = [
        "## Growth with depth",
        "",
        "Slopes are exponents k of time ~ size**k, fitted to the medians and to the minima.",
        "",
    ]
    for name, found in scaling.items():
        rows = [[p["depth"], p["slots"], p["params"], *(cell(p.get(s)) for s in STEPS)] for p in found["points"]]
        for by in ("depth, median", "depth, min", "slots, median", "slots, min"):
            fitted = (f"{found['slopes'][s][by]:.2f}" if s in found["slopes"] else "-" for s in STEPS)
            rows.append([f"slope by {by}", "", "", *fitted])
        lines += [f"### {name}", "", *table(["depth", "slots", "params", *STEPS], rows), ""]
    return lines


def memory_text(memory: Sequence[Record]) -> list[str]:
    """Memory of tracing and coupling."""
    rows = []
    for m in memory:
        over, weights = m["peak_over_resident_bytes"], m["weight_bytes"]
        high = m["peak_increase_bytes"] if over is None else over
        relative = f"{m['peak_increase_bytes'] / weights:.3f}-{high / weights:.3f}" if weights else "-"
        sizes = (m["device"], m["depth"], m["width"], f"{m['params']:,}", f"{weights / MIB:.0f}", m["groups"])
        grown = f"{m['peak_increase_bytes'] / MIB:.1f}-{high / MIB:.1f}"
        rows.append([*sizes, grown, relative, f"{m['trace_and_couple_s']:.2f}", f"{m['first_in_process_s']:.2f}"])
    header = ["device", "blocks", "width", "params", "weights, MiB", "groups", "peak grows by, MiB", "of the weights"]
    return [
        "## Memory of trace and couple",
        "",
        "A residual network in a fresh process, between the increase of the peak and the peak over what was resident.",
        "`first` is a one-block network traced and coupled before it: the first call in a process pays for imports.",
        "",
        *table([*header, "seconds", "first, seconds"], rows),
        "",
    ]


def text(results: Record) -> str:
    """The results as Markdown."""
    env = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    lines = [
        "# Speed",
        "",
        f"Written by `benchmarks/speed.py` on {env['date']}: {versions}; {env['threads']} thread(s) of "
        f"{env['cpus']} CPUs ({env['machine']}), load average {env['load_average_before']:.1f} before and "
        f"{env['load_average_after']:.1f} after. Seconds, median (min-max) of {env['repeats']} runs.",
        "",
    ]
    for part, write in (("models", models_text), ("scaling", scaling_text), ("memory", memory_text)):
        if part in results:
            lines += write(results[part])
    return "\n".join(lines)


def main() -> None:
    """Run the parts asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help="torchvision models to time")
    parser.add_argument("--parts", nargs="+", default=["models", "scaling", "memory"], help="which parts to run")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each step")
    parser.add_argument("--depths", nargs="+", type=int, default=[50, 100, 200, 400], help="depths of the scaling part")
    parser.add_argument("--limit", type=float, default=120, help="seconds a step may take")
    parser.add_argument("--threads", type=int, default=1, help="threads that torch may use")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    results: Record = {"environment": environment(args)}
    if "models" in args.parts:
        results["models"] = {name: measure_model(name, args.repeats, args.limit) for name in args.models}
    if "scaling" in args.parts:
        families = {"dense block": DenseBlock, "residual network": ResidualNet}
        results["scaling"] = {
            name: measure_scaling(family, args.depths, args.repeats, args.limit) for name, family in families.items()
        }
    if "memory" in args.parts:
        networks = ((54, 1024, "meta"), (21, 512, "cpu"))
        results["memory"] = [in_fresh_process(measure_memory, *network) for network in networks]
    results["environment"]["load_average_after"] = os.getloadavg()[0]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "speed.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "speed.md").write_text(text(results))
    print(text(results))


if __name__ == "__main__":
    main()
