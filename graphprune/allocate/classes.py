"""Which groups are of one structure (Fang et al., Isomorphic Pruning for Vision Models, ECCV 2024)."""

from __future__ import annotations

from collections import Counter, defaultdict

from graphprune.axes import Atom
from graphprune.coupling import Coupling


def structures(coupling: Coupling) -> list[int]:
    """Per group, the number of its class, counted in order of the groups.

    Groups are of one class when the same ops, equally often, have them in the same dims of the same operands and
    outputs. How many channels there are, how large kernels are and in which order the ops run does not count; so the
    hidden channels of all blocks of one kind are a class, and streams through different numbers of blocks are not.
    """
    meant = set(coupling.atoms.values())
    found = defaultdict[Atom, Counter[tuple[str, int, int]]](Counter)
    for applied in coupling.applied.values():
        for slot, dims in enumerate((*applied.operands, *applied.outputs)):
            for d, axis in enumerate(dims or ()):
                for atom in meant.intersection(coupling.axes.leaves(axis)):
                    found[atom][applied.node.op, slot, d] += 1
    numbers: dict[frozenset[tuple[tuple[str, int, int], int]], int] = {}
    return [numbers.setdefault(frozenset(found[a].items()), len(numbers)) for a in coupling.atoms.values()]
