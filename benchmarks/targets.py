"""Are targets met, how much importance do the methods of allocation lose at equal cost, and how long do they take?

    python benchmarks/targets.py                                   # everything; about half an hour
    python benchmarks/targets.py --networks ResNet-50 BERT-base    # some networks
    python benchmarks/targets.py --table                           # write the tables anew from the JSON

Results go to `results/targets.json` as they come and the tables to `results/targets.md`. A run goes on from what the
results hold; with `--fresh` it starts anew.

networks    ten networks with random weights, the filters of each layer scaled by random factors; scores are squared
            magnitudes of mean 1 in each group, or as they are; every method at every target. For each target the plan
            of one method is carried out, and what comes out is run under torch's FlopCounterMode and its parameters
            are counted.
small       chains with a shortcut of four groups of 3 to 7 channels, at which every choice is tried.
wide        seconds to allocate 100 000 channels.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import targets_nets
import targets_table
import torch
from results_file import Results, environment, parser, started
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import graphprune as gp
from graphprune.allocate import METHODS
from graphprune.allocate.problem import pose
from graphprune.cost import COSTS, Cost, widths
from graphprune.importance import Removal
from graphprune.pruning import emit_verified
from graphprune.trace import Inputs

Record = dict[str, Any]
FLOOR = 0.1
TARGETS: Mapping[str, Record] = {
    "MACs 0.7": {"macs": 0.7},
    "MACs 0.5": {"macs": 0.5},
    "MACs 0.3": {"macs": 0.3},
    "parameters 0.5": {"params": 0.5},
    "memory 0.7": {"memory": 0.7},
    "MACs 0.5, parameters 0.6": {"macs": 0.5, "params": 0.6},
    "MACs 0.5, multiples of 8": {"macs": 0.5, "multiple_of": 8},
}
ALLOCATIONS = (*METHODS, "global per cost")
"""The last gives the global method the scores divided by what a channel costs before pruning."""
SMALL = (("macs", 0.3), ("macs", 0.5), ("macs", 0.7), ("params", 0.5), ("macs and params", 0.5))


def network(name: str) -> Record:
    """All targets of one network, with all methods; and what is left of it when plans are carried out."""
    model, inputs = targets_nets.build(name)
    start = time.perf_counter()
    coupling = gp.couple(gp.trace(model, inputs))
    found: Record = {"trace_and_couple_s": round(time.perf_counter() - start, 2), "groups": len(coupling.groups)}
    costs = {what: COSTS[what](coupling) for what in ("macs", "params", "memory")}
    found |= {"channels": sum(g.size for g in coupling.groups)}
    found |= {"whole": {what: cost.at({}) for what, cost in costs.items()}, "counted": counted(model, inputs)}
    found |= {"rows": [], "emitted": []}
    emitting = itertools.cycle(METHODS)
    scored = {kind: targets_nets.scored(model, coupling, kind) for kind in targets_nets.SCORES}
    for (kind, orders), (label, wanted) in itertools.product(scored.items(), TARGETS.items()):
        target, plans = gp.Target(**wanted, floor=FLOOR), {}
        for method in ALLOCATIONS:
            row = {"scores": kind, "target": label, "method": method}
            start = time.perf_counter()
            try:
                plan = plans[method] = allocated(method, orders, target, coupling)
            except gp.TargetError as error:
                found["rows"].append(row | {"infeasible": str(error).splitlines()[0]})
                continue
            row["seconds"] = round(time.perf_counter() - start, 3)
            found["rows"].append(row | achieved(plan, target, costs, coupling, orders))
        if kind == targets_nets.SCORES[0] and plans:
            method = next(emitting)
            carried = emitted(model, inputs, coupling, plans[method], costs)
            found["emitted"].append({"target": label, "method": method} | carried)
    return found


def allocated(method: str, orders: Mapping[str, Removal], target: gp.Target, coupling: gp.Coupling) -> gp.Plan:
    """The plan of a method."""
    if method != "global per cost":
        return gp.allocate(orders, target, coupling, method=method)
    names = [g.name for g in coupling.groups]
    prices = np.zeros(len(names))
    for what in target.budgets:
        cost = COSTS[what](coupling)
        prices += cost.gradient(cost.vector({})) / cost.at({})
    priced = {}
    for name, price in zip(names, prices, strict=True):
        priced[name] = Removal(orders[name].order, orders[name].costs / max(price, 1e-12))
    return gp.allocate(priced, target, coupling, method="global")


def achieved(
    plan: gp.Plan, target: gp.Target, costs: Mapping[str, Cost], coupling: gp.Coupling, orders: Mapping[str, Removal]
) -> Record:
    """What a plan keeps, what it loses, by how much it misses, and whether any step would still have fitted."""
    kept, budgets = widths(plan), target.budgets
    shares = {what: cost.at(kept) / cost.at({}) for what, cost in costs.items()}
    lost = sum(float(order.lost[kept[name]]) for name, order in orders.items())
    whole = sum(float(order.lost[0]) for order in orders.values())
    room = False
    for group in coupling.groups:
        width = min(group.size, (kept[group.name] // target.multiple_of + 1) * target.multiple_of)
        if width > kept[group.name]:
            more = kept | {group.name: width}
            room |= all(costs[b].at(more) <= share * costs[b].at({}) for b, share in budgets.items())
    return {
        "kept": {what: round(share, 6) for what, share in shares.items()},
        "lost": lost / whole,
        "over": max(shares[b] / share for b, share in budgets.items()) > 1 + 1e-9,
        "miss": 1 - max(shares[b] / share for b, share in budgets.items()),
        "a_step_would_fit": room,
        "multiples": all(w % target.multiple_of == 0 or w == coupling.group(n).size for n, w in kept.items()),
    }


def counted(model: nn.Module, inputs: Any) -> Record:
    """Multiply-adds as torch counts them, and parameters one by one.

    Torch counts matrix products; of fused kernels for attention on a CPU it knows nothing, so they are switched off.
    """
    given, fast = Inputs.of(inputs), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*given.args, **given.kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return {"macs": counter.get_total_flops() / 2, "params": sum(p.numel() for p in model.parameters())}


def emitted(model: nn.Module, inputs: Any, coupling: gp.Coupling, plan: gp.Plan, costs: Mapping[str, Cost]) -> Record:
    """What the smaller module does and holds, beside what its costs were said to be."""
    start = time.perf_counter()
    rewritten, _ = emit_verified(model, Inputs.of(inputs), coupling, plan, verify=False)
    seconds = round(time.perf_counter() - start, 1)
    said = {what: costs[what].at(widths(plan)) for what in ("macs", "params")}
    small = rewritten.model.eval()
    return {"emitter": rewritten.emitter, "seconds": seconds, "said": said, "counted": counted(small, inputs)}


def small(nets: int) -> Record:
    """How much more than the least each method loses, where every choice can be tried."""
    gaps: dict[str, list[float]] = {method: [] for method in METHODS}
    for seed in range(nets):
        coupling, orders = targets_nets.small(seed)
        for what, share in SMALL:
            target = gp.Target(**dict.fromkeys(what.split(" and "), share))
            problem = pose(orders, target, coupling, each=False)
            choices = np.array(list(itertools.product(*(range(len(u.widths)) for u in problem.units))))
            lost = sum(unit.lost[choices[:, i]] for i, unit in enumerate(problem.units))
            least = next(lost[i] for i in np.argsort(lost, kind="stable") if problem.fits(choices[i]))
            for method, choose in METHODS.items():
                gaps[method].append(float(problem.lost(choose(problem)) / least - 1))
    return {"nets": nets, "problems": len(gaps["uniform"]), "gaps": gaps}


def wide() -> Record:
    """Seconds of each method for 100 000 channels."""
    coupling, orders = targets_nets.wide()
    found: Record = {"groups": len(coupling.groups), "channels": sum(g.size for g in coupling.groups), "seconds": {}}
    for method in METHODS:
        start = time.perf_counter()
        gp.allocate(orders, gp.Target(macs=0.5), coupling, method=method)
        found["seconds"][method] = round(time.perf_counter() - start, 2)
    return found


def run(args: argparse.Namespace, results: Results) -> None:
    """Everything asked for that the results lack."""
    results.data["environment"] = environment(args, ("torch", "torchvision", "transformers", "numpy"))
    results.data |= {"floor": FLOOR, "spread": targets_nets.SPREAD}
    networks: Record = results.data.setdefault("networks", {})
    for name in args.networks:
        if name not in networks:
            load = os.getloadavg()[0]
            networks[name] = network(name) | {"load_average_before": load}
            results.write()
            print(name, f"{networks[name]['groups']} groups", flush=True)
    for name, measure in (("small", lambda: small(args.nets)), ("wide", wide)):
        if name not in results.data:
            results.data[name] = measure()
            results.write()
            print(name, flush=True)


def main() -> None:
    """Run what is missing and write the tables."""
    options = parser(__doc__)
    options.add_argument("--networks", nargs="*", default=list(targets_nets.NETWORKS), help="some of them")
    options.add_argument("--nets", type=int, default=100, help="how many small networks")
    args = started(options)
    results = Results(args.out / "targets.json", fresh=args.fresh)
    if not args.table:
        run(args, results)
    (args.out / "targets.md").write_text(targets_table.text(results.data))


if __name__ == "__main__":
    main()
