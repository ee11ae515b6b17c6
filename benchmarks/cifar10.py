"""Methods beside each other on CIFAR-10, each with the same data, seeds, epochs and multiply-adds.

    python benchmarks/cifar10.py --data DIR --weights resnet20-*.th resnet56-*.th --epochs 6 --sparse-epochs 2
    python benchmarks/cifar10.py --data DIR --weights resnet20-*.th --methods Fisher "torch-pruning group norm"
    python benchmarks/cifar10.py --data DIR --weights resnet56-*.th --curve 0.2 0.4 0.6 0.8
    python benchmarks/cifar10.py --table                        # write the table anew from the JSON

Results go to `results/cifar10.json` after every network and the table to `results/cifar10.md`. A run goes on from what
the results hold; cells with other settings are other cells. `--device cuda` trains on a GPU.

Every network loses channels inside its blocks until `--target` of its multiply-adds are left (the residual stream
stays, for all methods), and is fine-tuned by `gp.recover.finetune`; the epoch is chosen on a tenth of the training
images, and the test set gives the last figures alone. Methods that train sparsely do so for `--sparse-epochs` of the
epochs, so that all train equally long. Of every layer a tenth stays, whatever the method. "from scratch" trains the
network that magnitude leaves from random weights for as many epochs. `--curve` removes fractions of all channels by
their scales after slimming.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar10_peer
import cifar10_table
import results_file
import torch
from results_file import Record, Results
from torch import nn

import graphprune as gp

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from cifar10_resnet import STREAM, load_network
from cifar_training import Augmented, Data, Split, load
from zoo_cifar import macs, weights

RESULTS = Path(__file__).parent / "results"
Batches = list[tuple[torch.Tensor, torch.Tensor]]
SLIMMING = "Gamma after slimming"


@dataclass(frozen=True)
class Method:
    """How graphprune prunes.

    Attributes:
        importance: from calibration batches and a seed.
        allocation, repair: as for `gp.prune`.
        slims: whether the network is slimmed before.
        distils: whether the original teaches what is left of it.
    """

    importance: Callable[[Batches, int], Any]
    allocation: str = "uniform"
    repair: str = "none"
    slims: bool = False
    distils: bool = False


_LOSS = nn.functional.cross_entropy
_DATA: Record = {"progress": False}


def _fisher(batches: Batches, seed: int) -> gp.importance.Fisher:
    return gp.importance.Fisher(batches, _LOSS, **_DATA)


METHODS: Mapping[str, Method] = {
    "Random": Method(lambda batches, seed: gp.importance.Random(seed)),
    "Magnitude": Method(lambda batches, seed: gp.importance.Magnitude()),
    "Magnitude, repaired": Method(lambda batches, seed: gp.importance.Magnitude(), repair="least_squares"),
    "Magnitude, repaired, distilled": Method(
        lambda batches, seed: gp.importance.Magnitude(), repair="least_squares", distils=True
    ),
    SLIMMING: Method(lambda batches, seed: gp.importance.Gamma(), "global", slims=True),
    "Rank": Method(lambda batches, seed: gp.importance.Rank([x for x, _ in batches], **_DATA)),
    "Reconstruction": Method(
        lambda batches, seed: gp.importance.Reconstruction(batches, **_DATA), repair="least_squares"
    ),
    "Fisher": Method(_fisher, "greedy"),
    "Fisher, distilled": Method(_fisher, "greedy", distils=True),
    "Fisher, repaired": Method(_fisher, "greedy", "least_squares"),
    "Fisher, repaired, distilled": Method(_fisher, "greedy", "least_squares", distils=True),
    "Collaborative": Method(lambda batches, seed: gp.importance.Collaborative(batches, _LOSS, **_DATA), "greedy"),
}
SCRATCH = "from scratch"


class Subject:
    """A trained network, the images, and how long to train.

    Args:
        network: in eval mode.
        data: the images.
        options: of the command line.
        seed: of what training and criteria draw.
    """

    def __init__(self, network: nn.Module, data: Data, options: argparse.Namespace, seed: int) -> None:
        self.network, self.data, self.options, self.seed = network, data, options, seed
        self.example = data.train.images[:2]
        chosen = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(seed))
        images = chosen[: options.calibration]
        self.batches = Split(data.train.images[images], data.train.labels[images]).batches()

    def tuned(self, model: nn.Module, epochs: int, lr: float, **more: Any) -> gp.recover.Tuned | None:
        """Fine-tune in place, the same way for every method, but for `more`: a penalty or a teacher."""
        if not epochs:
            return None
        torch.manual_seed(self.seed)
        model.to(memory_format=torch.channels_last)
        loader, validation = Augmented(self.data.train), None if "penalty" in more else self.data.validation.batches()
        options = {"weight_decay": 5e-4, "progress": self.options.progress, "amp": self.options.amp} | more
        return gp.recover.finetune(model, loader, validation=validation, epochs=epochs, lr=lr, **options)

    def slimmed(self, penalty: Callable[[nn.Module], Any]) -> nn.Module:
        """A copy after sparse training: the last epoch counts, as penalised scales are not chosen by accuracy."""
        model = copy.deepcopy(self.network)
        self.tuned(model, self.options.sparse_epochs, self.options.lr, penalty=penalty(model))
        return model.eval()

    def by_slimming(self) -> nn.Module:
        """A copy whose scales were slimmed."""

        def penalty(model: nn.Module) -> gp.training.Slimming:
            coupling = gp.couple(gp.trace(model, self.example), keep_names=STREAM)
            return gp.training.Slimming(model, coupling, self.options.strength)

        return self.slimmed(penalty)

    def pruned(self, model: nn.Module, method: Method, target: gp.Target) -> gp.Result:
        """What graphprune leaves of a model, proved and, if the method says so, repaired."""
        importance = method.importance(self.batches, self.seed)
        given = {} if method.repair == "none" else {"batches": self.batches, "loss": _LOSS}
        return gp.prune(
            model,
            self.example,
            target=target,
            importance=importance,
            allocation=method.allocation,
            repair=method.repair,
            keep_names=STREAM,
            **given,
        )

    def small(self, name: str) -> tuple[nn.Module, int, float, Record]:
        """The pruned network of a method, how many epochs are left for it, at which rate, and what else is known."""
        rest = self.options.epochs - self.options.sparse_epochs
        if name in cifar10_peer.PEERS:
            peer = cifar10_peer.PEERS[name]
            strength = {"strength": self.options.strength, "group_strength": self.options.group_strength}
            sparse = self.network
            if peer.trains:
                sparse = self.slimmed(lambda model: cifar10_peer.penalty(peer, model, self.example, strength))
            limit = self.options.target * macs(self.network)
            small = cifar10_peer.within(peer, sparse, self.example, strength, lambda model: macs(model) <= limit)
            return small, rest if peer.trains else self.options.epochs, self.options.lr, {}
        method = METHODS["Magnitude" if name == SCRATCH else name]
        model = self.by_slimming() if method.slims else self.network
        result = self.pruned(model, method, gp.Target(macs=self.options.target, floor=cifar10_peer.FLOOR))
        known = {"error": result.report.verification.error, "effect": result.report.verification.effect}
        if name == SCRATCH:
            torch.manual_seed(self.seed)
            for module in result.model.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            return result.model, self.options.epochs, self.options.scratch_lr, known
        return result.model, rest if method.slims else self.options.epochs, self.options.lr, known

    def measured(self, cell: Record) -> Record:
        """The cell with its figures."""
        begun, more = time.perf_counter(), {}
        if "removed" in cell:
            target = gp.Target(channels=1 - cell["removed"], floor=cifar10_peer.FLOOR)
            found = self.pruned(self.by_slimming(), METHODS[SLIMMING], target)
            rest = self.options.epochs - self.options.sparse_epochs
            known = {"error": found.report.verification.error, "effect": found.report.verification.effect}
            small, epochs, lr = found.model, rest, self.options.lr
        else:
            small, epochs, lr, known = self.small(cell["method"])
            if cell["method"] in METHODS and METHODS[cell["method"]].distils:
                more = {"teacher": gp.recover.Distillation(self.network)}
        accuracy = {"pruned": self.data.test.accuracy(small)}
        pruning, begun = time.perf_counter() - begun, time.perf_counter()
        tuned = self.tuned(small, epochs, lr, **more)
        kept = {"macs": macs(small) / macs(self.network), "params": weights(small) / weights(self.network)}
        accuracy["tuned"] = self.data.test.accuracy(small)
        seconds = {"pruning": pruning, "tuning": time.perf_counter() - begun}
        history = [] if tuned is None else [epoch.plain() for epoch in tuned.epochs]
        return cell | known | {"accuracy": accuracy, "kept": kept, "seconds": seconds, "epochs": history}


def settings(options: argparse.Namespace) -> Record:
    """What makes cells comparable."""
    names = ("amp", "epochs", "sparse_epochs", "images", "calibration", "lr", "scratch_lr")
    return {name: getattr(options, name) for name in names}


def strength(options: argparse.Namespace, method: str) -> Record:
    """How strong a method's penalty is, if it has one."""
    if method in METHODS and METHODS[method].slims:
        return {"strength": options.strength}
    peer = cifar10_peer.PEERS.get(method)
    return {"strength": getattr(options, peer.trains)} if peer and peer.trains else {}


def cells(options: argparse.Namespace, network: str) -> list[Record]:
    """What is to be measured, seed after seed."""
    of_all = {"network": network, "settings": settings(options)}
    found: list[Record] = []
    for seed in options.seeds:
        each = of_all | {"seed": seed}
        found += [each | {"method": m, **strength(options, m), "target": options.target} for m in options.methods]
        slimmed = each | {"method": SLIMMING, **strength(options, SLIMMING)}
        found += [slimmed | {"removed": removed} for removed in options.curve]
    return found


def is_done(cell: Record, done: Sequence[Record]) -> bool:
    """Whether the results hold this cell."""
    return any(all(other.get(name) == value for name, value in cell.items()) for other in done)


def environment(options: argparse.Namespace) -> Record:
    """What the numbers depend on, without naming the machine."""
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    return results_file.environment(options, ("torch", "torch-pruning", "numpy")) | {"device": device}


def moved(data: Data, device: str) -> Data:
    """The images on a device."""
    return Data(*(Split(s.images.to(device), s.labels.to(device)) for s in (data.train, data.validation, data.test)))


def run(options: argparse.Namespace, results: Results) -> None:
    """Measure what is missing; the file is written after every cell."""
    done: list[Record] = results.data.setdefault("cells", [])
    originals: Record = results.data.setdefault("original", {})
    results.data["environment"] = environment(options)
    data = moved(load(options.data, options.images), options.device)
    for path in options.weights:
        network = load_network(path).to(options.device)
        name = f"resnet{6 * len(network.layer1) + 2}"
        if name not in originals:
            originals[name] = {"accuracy": data.test.accuracy(network), "macs": macs(network)}
        for cell in cells(options, name):
            if not is_done(cell, done):
                done.append(Subject(network, data, options, cell["seed"]).measured(cell))
                results.write()
                print(cifar10_table.line(done[-1]), flush=True)
    results.write()


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*METHODS, SCRATCH, *cifar10_peer.PEERS]
    parser.add_argument("--data", type=Path, help="directory of CIFAR-10; made-up images without it")
    parser.add_argument("--weights", type=Path, nargs="+", default=[], help="trained ResNets")
    parser.add_argument("--methods", nargs="*", choices=every, default=every, metavar="METHOD", help=", ".join(every))
    parser.add_argument("--curve", type=float, nargs="*", default=[], help="fractions of all channels to remove")
    parser.add_argument("--target", type=float, default=0.5, help="fraction of the multiply-adds that stays")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6, help="in all, sparse training included")
    parser.add_argument("--sparse-epochs", type=int, default=2)
    parser.add_argument("--images", type=int, help="use only the first training images")
    parser.add_argument("--calibration", type=int, default=1000, help="training images that criteria look at")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--scratch-lr", type=float, default=0.1)
    parser.add_argument("--strength", type=float, default=1e-4, help="of penalties on scales")
    parser.add_argument("--group-strength", type=float, default=1e-4, help="of torch-pruning's group norm")
    parser.add_argument("--amp", action="store_true", help="train in bfloat16 where autocast does")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--progress", action="store_true", help="show a bar while training")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of results")
    parser.add_argument("--table", action="store_true", help="write the table anew and measure nothing")
    found = parser.parse_args(given)
    if not 0 <= found.sparse_epochs < max(1, found.epochs):
        parser.error("--sparse-epochs are part of --epochs, and fewer")
    return found


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    torch.set_num_threads(options.threads)
    results = Results(options.out / "cifar10.json", fresh=False)
    if not options.table:
        run(options, results)
    results.file.with_suffix(".md").write_text(cifar10_table.table(results.data))


if __name__ == "__main__":
    main()
