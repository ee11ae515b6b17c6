"""The tools of the zoo, each run on one model: what it made, how long its steps took, and what the check says.

Every function here runs in a worker process of its own and reports as it goes, so that a time limit keeps what is done.
"""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import logging
import platform
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import zoo_models
from torch import nn
from torch.utils import _pytree as pytree
from zoo_check import Arguments, check, said

import graphprune as gp

Record = dict[str, Any]
Report = Callable[[Record], None]
TARGET = gp.Target(channels=0.5)
PACKAGES: Mapping[str, tuple[str, str]] = {
    "graphprune": ("graphprune", ""),
    "torch-pruning": ("torch-pruning", "1.6.1"),
    "torch-kirigami": ("torch-kirigami", "0.2.1"),
}
"""Per tool, its distribution and the version that is compared with; empty where any will do."""


def versions(section: str, tool: str) -> dict[str, str]:
    """What the figures of a tool depend on; a package that is missing is left out."""
    found = {"python": platform.python_version()}
    for package in ("torch", section, PACKAGES[tool][0]):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | ({"graphprune": gp.__version__} if tool == "graphprune" else {})


def missing(tool: str) -> str:
    """Why a tool cannot be run here; empty if it can."""
    package, wanted = PACKAGES[tool]
    if not wanted:
        return ""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed"
    return "" if found == wanted else f"{package} {found} is installed, not {wanted}"


def measure(section: str, name: str, tool: str, threads: int, report: Report) -> None:
    """Build a model, let a tool halve it, check the result; what was found goes to `report` piece by piece."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    logging.disable()
    try:
        model, inputs = zoo_models.build(section, name)
    except zoo_models.NotApplicable as reason:
        report({"skipped": str(reason)})
        return
    shapes = [list(t.shape) for t in (*inputs.args, *(inputs.kwargs or {}).values()) if isinstance(t, torch.Tensor)]
    report({"params": parameters(model), "inputs": shapes, "at": "warming up"})
    run = TOOLS[tool]
    run(*_small(), lambda record: None)  # first calls pay for imports
    gc.collect()
    gc.freeze()  # what the worker has loaded is not searched for garbage within the times of any tool
    pruned = run(model, inputs, report)
    if pruned is not None:
        report({"params_kept": parameters(pruned) / parameters(model), "at": "check"})
        report({"check": check(model, pruned, inputs).record()})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    report({"peak_bytes": peak, "at": ""})


def parameters(model: nn.Module) -> int:
    """How many parameter elements `model` has."""
    return sum(p.numel() for p in model.parameters())


def _small() -> tuple[nn.Module, Arguments]:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )
    return net.eval(), zoo_models.images(1, 3, 9, 9)


class Steps:
    """Runs steps one after the other and reports the seconds of each, or what it raised."""

    def __init__(self, report: Report) -> None:
        self.report, self.seconds = report, {}
        self.failed = ""

    def run(self, step: str, action: Callable[[], Any], key: str = "error") -> Any:
        """What `action` returns; None if it fails, which is reported under `key`, or an earlier step did."""
        if self.failed:
            return None
        self.report({"at": step})
        start = time.perf_counter()
        try:
            result = action()
        except Exception as error:
            self.failed = step
            self.report({key: f"{step}: {said(error)}"})
            return None
        self.seconds[step] = time.perf_counter() - start
        self.report({"seconds": dict(self.seconds)})
        return result


# -- graphprune --------------------------------------------------------------------------------------------------


MISREAD = "unchecked_error"


def graphprune(model: nn.Module, inputs: Arguments, report: Report) -> nn.Module | None:
    """Half of every exact group, by magnitude.

    The steps are timed on their first run. `rewrite` is the emitter that `gp.prune` chose, without any check; `prune`
    is `gp.prune` with its proof. Where several readings of the model's attributes fit, `rewrite` without a check may
    take a wrong one: then `verify` says so and has no time, and `unverified` is `gp.prune` without its proof.
    """
    steps, given = Steps(report), gp.Inputs.of(inputs.example())
    program = steps.run("trace", lambda: gp.trace(model, given))
    coupling = steps.run("couple", lambda: gp.couple(program))
    if coupling is not None:
        report(about(coupling) | {"front_end": "record" if program.source is None else "export"})
        if not coupling.groups:
            report({"error": "couple: no channels may be removed"})
            return None
    scores = gp.importance.Magnitude()
    plan = steps.run("plan", lambda: gp.allocate(scores(model, coupling), TARGET, coupling))
    result = steps.run("prune", lambda: gp.prune(model, given, target=TARGET))
    if result is None:
        return None
    proof = result.report.verification
    report(
        {
            "emitter": result.report.emitter,
            "reason": result.report.reason,
            "halved": all(w.after == max(1, int(w.before / 2 + 0.5)) for w in result.report.groups),
            "macs_kept": result.report.costs["macs"].kept,
            "verified": {"error": proof.error, "effect": proof.effect, "precision": proof.precision},
        }
    )
    emitter = result.report.emitter
    small = steps.run("rewrite", lambda: gp.rewrite(model, given, coupling, plan, emit=emitter).model)
    if (
        small is not None
        and steps.run("verify", lambda: gp.verify(model, small, given, coupling, plan), MISREAD) is None
    ):
        steps.failed = ""
        steps.run("unverified", lambda: gp.prune(model, given, target=TARGET, verify=False))
    steps.failed = ""
    exported = steps.run("export", lambda: gp.trace(model, given, front_end="export"), "export_error")
    if exported is not None:
        report({"same_groups": coupling.alike(gp.couple(exported))})
    return result.model


def about(coupling: gp.Coupling) -> Record:
    """Groups, what is pinned and for which causes, and the ops without a rule."""
    causes = Counter(pin.reason for pin in coupling.pinned)
    return {
        "traced": True,
        "groups": len(coupling.groups),
        "channels": sum(group.size for group in coupling.groups),
        "pinned": len(coupling.pinned),
        "causes": dict(causes.most_common()),
        "unknown": {unknown.op: len(unknown.nodes) for unknown in coupling.unknown},
        "unknown_pins": sum(n for cause, n in causes.items() if cause.startswith("no rule covers")),
    }


# -- peers -------------------------------------------------------------------------------------------------------


def torch_pruning(model: nn.Module, inputs: Arguments, report: Report) -> nn.Module | None:
    """Half of the channels of every group, by its high-level pruner, which builds its graph when it is made.

    It is told to leave alone the layers that the outputs come out of: the classifier, in its documentation.
    """
    import torch_pruning as tp

    pruned = copy.deepcopy(model)
    ignored = last_layers(pruned, inputs)
    steps = Steps(report)
    pruner = steps.run(
        "build",
        lambda: tp.pruner.MagnitudePruner(
            pruned,
            inputs.example(),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=ignored,
            **{name: {} for name in ("in_channel_groups", "out_channel_groups", "num_heads")},  # else shared
            output_transform=differentiable,
        ),
    )
    steps.run("prune", lambda: pruner.step())
    return None if steps.failed else pruned


def torch_kirigami(model: nn.Module, inputs: Arguments, report: Report) -> nn.Module | None:
    """Half of the channels of every axis it discovers; it protects inputs and outputs by itself."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import ChannelRatio, Greedy, GroupMagnitude, Pruner

    pruned = copy.deepcopy(model)
    steps = Steps(report)
    graph = steps.run(
        "build", lambda: DependencyGraph.build(pruned, args=inputs.args, kwargs=dict(inputs.kwargs or {}))
    )

    def prune() -> None:
        pruner = Pruner(pruned, graph=graph)
        space = pruner.discover_candidates()
        pruner.prune(space, budget=ChannelRatio(0.5), strategy=Greedy(GroupMagnitude(p=2)))

    steps.run("prune", prune)
    return None if steps.failed else pruned


TOOLS: Mapping[str, Callable[[nn.Module, Arguments, Report], nn.Module | None]] = {
    "graphprune": graphprune,
    "torch-pruning": torch_pruning,
    "torch-kirigami": torch_kirigami,
}


def differentiable(found: Any) -> list[torch.Tensor]:
    """The tensors of an output that a gradient flows into."""
    leaves = pytree.tree_leaves(found)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.grad_fn is not None]


def last_layers(model: nn.Module, inputs: Arguments) -> list[nn.Module | nn.Parameter]:
    """The layers between which and an output stands no other layer: their widths are the outputs'.

    Found by walking back from each output until a contraction or a look-up with a weight.
    """
    grown = inputs.map(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)
    leaves = [t for t in (*grown.args, *(grown.kwargs or {}).values()) if isinstance(t, torch.Tensor)]
    found = differentiable(grown.call(model))
    data = _with_data([t.grad_fn for t in found], leaves)
    weights: dict[int, torch.Tensor] = {}
    seen: set[Any] = set()
    stack = [t.grad_fn for t in found]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        nexts = [n for n, _ in node.next_functions if n is not None]
        own = [p for n in nexts if n not in data for p in _parameters_behind(n)]
        large = [p for p in own if p.dim() > 1]
        weights |= {id(p): p for p in large}
        layer = large and any(kind in node.name().lower() for kind in ("mm", "conv", "linear", "embedding"))
        stack += [] if layer else [n for n in nexts if n in data]
    owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    layers = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    chosen = (owners[k] if isinstance(owners.get(k), layers) else p for k, p in weights.items())
    return list({id(c): c for c in chosen}.values())


def _with_data(roots: list[Any], leaves: list[torch.Tensor]) -> set[Any]:
    """The nodes of a gradient graph that what the model was given flows through, look-ups of integers included."""
    given = {id(t) for t in leaves}
    order, stack, seen = [], list(roots), set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            order.append(node)
            stack += [n for n, _ in node.next_functions if n is not None]
    data = {n for n in order if "embedding" in n.name().lower() or id(getattr(n, "variable", None)) in given}
    behind: dict[Any, list[Any]] = {}
    for node in order:
        for n, _ in node.next_functions:
            behind.setdefault(n, []).append(node)
    stack = list(data)
    while stack:
        for node in behind.get(stack.pop(), ()):
            if node not in data:
                data.add(node)
                stack.append(node)
    return data


def _parameters_behind(node: Any) -> list[torch.Tensor]:
    """The parameters that a node without data is computed from."""
    found, stack, seen = [], [node], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack += [n for n, _ in node.next_functions if n is not None]
    return found
