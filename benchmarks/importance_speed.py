"""What criteria and repair cost, in seconds and memory, beside torch-pruning's; each in a process of its own.

A criterion's time is that of its call, with its own pass over the images: no statistics are shared. What is done once
for all of them, tracing and coupling, is measured apart, and so is torch-pruning's graph. Memory is the peak of the
process's resident memory over what was resident before the call.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from importance_accuracy import CRITERIA, LOSS
from importance_data import calibration, cifar, networks, training
from importance_peer import GRADIENTS, PEERS
from speed import status, zoo
from torch import nn

import graphprune as gp
from graphprune.calibrate import statistics as sums
from graphprune.solvers import forward_selection, greedy_removal

Record = dict[str, Any]
SIZES = {"resnet56": (500, 125), "resnet50": (64, 8)}
"""Images, and images per batch."""
FEW = {"resnet50": 2, "resnet56": 25}
"""Images whose maps are ranked one by one."""
ROUNDS = 3


def subject(name: str, data: Path | None, weights: Path | None) -> tuple[nn.Module, list[Any]]:
    """A network and batches: ResNet-56 with its weights and training images where they are given, else random."""
    torch.manual_seed(0)
    count, size = SIZES[name]
    if name == "resnet56" and data and weights:
        return networks([weights])[name], calibration(*training(data), 0, count)
    network = zoo(name) if name == "resnet50" else cifar.ResNet(9).eval()
    side, classes = (224, 1000) if name == "resnet50" else (32, 10)
    x, y = torch.randn(count, 3, side, side), torch.randint(classes, (count,))
    return network, list(zip(x.split(size), y.split(size), strict=True))


def timed(action: Callable[[], Any]) -> tuple[Any, Record]:
    """What an action returns, its seconds, and how far memory rose."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, start = status("VmRSS"), time.perf_counter()
    result = action()
    seconds = time.perf_counter() - start
    return result, {"seconds": seconds, "peak_bytes": max(0, status("VmHWM") - before)}


# -- one measurement, called in a fresh process ------------------------------------------------------------------


def measure(name: str, what: str, data: Path | None, weights: Path | None, threads: int) -> Record:
    """One row: a criterion, a peer, or a key of `OTHERS`."""
    torch.set_num_threads(threads)
    network, batches = subject(name, data, weights)
    if what in PEERS:
        return _peer(network, batches, what)
    if what == "plain":
        return timed(lambda: plain(network, batches))[1]
    coupling, once = timed(lambda: gp.couple(gp.trace(network, batches[0][0][:2])))
    if what == "trace and couple":
        return once
    if what in OTHERS:
        return OTHERS[what](network, batches, coupling, name)
    criterion = CRITERIA[what](batches, 0)
    if hasattr(criterion, "loss"):
        criterion = type(criterion)(batches, LOSS)
    return timed(lambda: criterion(network, coupling))[1]


def plain(network: nn.Module, batches: list[Any]) -> None:
    """Forward and backward over all batches, in eval mode, with gradients of the parameters."""
    network.requires_grad_(True)
    for x, y in batches:
        network.zero_grad()
        LOSS(network(x), y).backward()


def _peer(network: nn.Module, batches: list[Any], what: str) -> Record:
    import torch_pruning as tp

    network.requires_grad_(True)
    heads = [m for m in network.modules() if isinstance(m, nn.Linear)]
    graph, once = timed(lambda: tp.DependencyGraph().build_dependency(network, batches[0][0][:1]))
    importance = PEERS[what]()

    def work() -> None:
        if GRADIENTS.get(what) == "gradients":
            for x, y in batches:
                LOSS(network(x), y).backward()
        elif GRADIENTS.get(what) == "squares":
            for x, y in batches:
                for one, label in zip(x.split(1), y.split(1), strict=True):
                    network.zero_grad()
                    LOSS(network(one), label).backward()
                    importance.accumulate_grad(network)
        for group in graph.get_all_groups(ignored_layers=heads):
            importance(group)

    return timed(work)[1] | {"graph_s": once["seconds"]}


def _fisher(network: nn.Module, batches: list[Any], coupling: gp.Coupling, name: str) -> Record:
    """Fisher and one plain forward and backward in turn."""
    times: dict[str, list[float]] = {"fisher": [], "plain": []}
    for _ in range(ROUNDS):
        fisher = gp.importance.Fisher(batches, LOSS, progress=False)
        times["fisher"].append(timed(lambda: fisher(network, coupling))[1]["seconds"])  # noqa: B023 - called at once
        times["plain"].append(timed(lambda: plain(network, batches))[1]["seconds"])
    found = {key: statistics.median(each) for key, each in times.items()}
    return {"all_seconds": times, "seconds": found["fisher"], "plain_s": found["plain"]} | {
        "times_plain": found["fisher"] / found["plain"]
    }


def _ranks(network: nn.Module, batches: list[Any], coupling: gp.Coupling, name: str) -> Record:
    """The same maps in one go and one by one, and whether the ranks are equal."""
    held: list[torch.Tensor] = []
    ranks = sums.ranks
    sums.ranks = lambda maps: (held.append(maps.clone()), ranks(maps))[1]  # type: ignore[assignment]
    few = [x[: FEW[name]] for x, _ in batches[:1]]
    gp.calibrate(network, coupling, few, statistics=["ranks"], progress=False)
    ours, loop, batched, different = 0.0, 0.0, 0.0, 0
    for maps in held:
        found, took = timed(lambda: ranks(maps))  # noqa: B023
        one_by_one, took_loop = timed(lambda: torch.stack([torch.linalg.matrix_rank(m) for m in maps]))  # noqa: B023
        ours, loop = ours + took["seconds"], loop + took_loop["seconds"]
        batched += timed(lambda: torch.linalg.matrix_rank(maps))[1]["seconds"]  # noqa: B023
        different += int((found != one_by_one).sum())
    return {
        "maps": sum(len(maps) for maps in held),
        "images": len(few[0]),
        "seconds": ours,
        "loop_s": loop,
        "batched_s": batched,
        "times_faster": loop / ours,
        "different": different,
    }


def _repair(network: nn.Module, batches: list[Any], coupling: gp.Coupling, name: str) -> Record:
    """Least squares after half of all channels went, with the comparison with the original before and after."""
    result = gp.prune(network, batches[0][0][:2], target=gp.Target(channels=0.5), verify=False)
    found, record = timed(
        lambda: gp.repair(
            network, result.model, result.coupling, result.plan, batches, batchnorm=False, loss=LOSS, progress=False
        )
    )
    about = {"fitted_on": found.samples, "images": sum(len(y) for _, y in batches), "left": len(found.left)}
    return record | about | {"error_before": found.pruned.error, "error_after": found.repaired.error}


OTHERS: Mapping[str, Callable[[nn.Module, list[Any], gp.Coupling, str], Record]] = {
    "Fisher beside plain": _fisher,
    "ranks beside a loop": _ranks,
    "least squares repair": _repair,
}


def selection(channels: int, taps: int, outputs: int, threads: int) -> Record:
    """Both searches for one layer, from moments that are there."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * channels, channels * taps, generator=generator, dtype=torch.float64)
    second = x.T @ (x @ torch.diag(torch.rand(channels * taps, generator=generator, dtype=torch.float64))) / len(x)
    second = (second + second.T) / 2 + torch.eye(channels * taps, dtype=torch.float64)
    weight = torch.randn(outputs, channels * taps, generator=generator, dtype=torch.float64)
    products = weight.T @ weight * second
    gram = products.reshape(channels, taps, channels, taps).sum((1, 3))
    return {
        "channels": channels,
        "taps": taps,
        "outputs": outputs,
        "removal_s": timed(lambda: greedy_removal(gram))[1]["seconds"],
        "selection_s": timed(lambda: forward_selection(second, weight, taps=taps))[1]["seconds"],
    }


def jobs() -> Iterator[tuple[str, str]]:
    """What is measured on each network, what is aimed at first."""
    yield from itertools.product(SIZES, ("plain", "trace and couple", *OTHERS, *CRITERIA, *PEERS))


LAYERS = ((512, 1, 512), (512, 9, 512))
"""Channels, taps and outputs of layers whose channels are selected."""
