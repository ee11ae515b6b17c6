"""Where channels end: the operands that a node has channels of while its outputs have none.

There each channel of a group is multiplied by weights and summed, so zeroing it there, at all of its ends at once, is
removing it. Everything that data can tell about a group is read at its ends. A recurrent layer is one node: what its
cells hand on to themselves is not seen, only what the layer gives to others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from graphprune.axes import Atom, Axes, Axis
from graphprune.coupling import Coupling
from graphprune.errors import CalibrationError
from graphprune.program import Node, Program, Value

ACTIVATIONS = ("node", "input")


@dataclass(frozen=True)
class End:
    """One operand of one node in which channels end.

    Attributes:
        node: the node.
        argument: name of the operand; with `index`, which of a list.
        index: position in a list of tensors; None for a single tensor.
        value: the operand.
        readers: per group that ends here, how to read it.
    """

    node: Node
    argument: str
    index: int | None
    value: Value
    readers: Mapping[str, Reader]

    def __str__(self) -> str:
        return str(self.node)


@dataclass(frozen=True)
class Reader:
    """How to sum a tensor over everything but samples and the channels of one group.

    Attributes:
        shape: (samples, channels) of the result.
        summed: dims that are summed first.
        dims: dims that remain, in order.
        take, put: positions in the flattened remainder, and in the flattened result, where they are added.
        spread: whether the tensor is the same for all samples, so that each gets its share.
        channels: per dim, whether channels of the group occur in it.
        samples: per dim, whether samples occur in it.
        matrix: the dim in which the channels are, the positions of each channel in it, and the sizes they are a product
            of beside the channels; None where there is more than one such dim.
    """

    shape: tuple[int, int]
    summed: tuple[int, ...]
    dims: tuple[int, ...]
    take: torch.Tensor
    put: torch.Tensor
    spread: bool
    channels: tuple[bool, ...]
    samples: tuple[bool, ...]
    matrix: tuple[int, torch.Tensor, tuple[int, ...]] | None

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """(samples, channels), in at least float32."""
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        rest = wide.sum(self.summed) if self.summed else wide
        out = rest.new_zeros(self.shape)
        taken = rest.reshape(-1)[self.take.to(rest.device)]
        out.view(-1).index_add_(0, self.put.to(rest.device), taken)
        return out / self.shape[0] if self.spread else out

    def maps(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The map of every sample and channel: what a tensor holds beside them, as a matrix; None for less than that.

        Returns:
            (maps, channels, height, width): of more than two dims the last two make a map, the others further maps.
        """
        if self.matrix is None or self.spread or sum(self.samples) > 1:
            return None
        d, order, inner = self.matrix
        x = tensor.index_select(d, order.to(tensor.device)).unflatten(d, (self.shape[1], *inner))  # type: ignore[no-untyped-call]
        x = x.movedim(d, 0)
        if any(self.samples):
            row = self.samples.index(True)
            x = x.movedim(row + 1 if row < d else row + len(inner), 0)
        else:
            x = x[None]
        space = [size for size in x.shape[2:] if size > 1]
        if len(space) < 2:
            return None
        maps: torch.Tensor = x.reshape(*x.shape[:2], -1, *space[-2:]).transpose(1, 2).flatten(0, 1)
        return maps

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        """How many elements of the tensor each channel has, shape (channels,)."""
        return self._places * math.prod(tensor.shape[d] for d in self.summed)

    @functools.cached_property
    def _places(self) -> torch.Tensor:
        """As `count`, of the dims that are not summed."""
        each = torch.zeros(self.shape).view(-1).index_add_(0, self.put, torch.ones(len(self.put)))
        return each.view(self.shape).sum(0) / (self.shape[0] if self.spread else 1)


@dataclass(frozen=True)
class Consumer:
    """A linear layer or convolution whose input has channels that may be removed.

    Attributes:
        node: the call.
        value: its input.
        weight, bias: fully qualified names; an empty bias for none.
        transposed: whether the weight is stored (inputs, outputs), as in `addmm`.
        groups: of a convolution.
    """

    node: Node
    value: Value
    weight: str
    bias: str
    transposed: bool
    groups: int

    @property
    def argument(self) -> str:
        """Name of the operand that is the input."""
        return CONSUMERS[self.node.op][0]


CONSUMERS: Mapping[str, tuple[str, str, str]] = {
    "linear": ("input", "weight", "bias"),
    "conv1d": ("input", "weight", "bias"),
    "conv2d": ("input", "weight", "bias"),
    "conv3d": ("input", "weight", "bias"),
    "addmm": ("mat1", "mat2", "self"),
    "mm": ("self", "mat2", ""),
    "matmul": ("self", "other", ""),
}
"""Per op: its input, its weight, its bias."""
SUMMED: Mapping[str, tuple[str, str, int]] = {
    "linear": ("input", "weight", 1),
    "conv1d": ("input", "weight", 1),
    "conv2d": ("input", "weight", 1),
    "conv3d": ("input", "weight", 1),
    "addmm": ("mat1", "mat2", 0),
    "mm": ("self", "self", -1),
    "matmul": ("self", "self", -1),
    "bmm": ("self", "self", -1),
    "scaled_dot_product_attention": ("query", "query", -1),
}
"""Per op: an operand, and the tensor and its dim over which it is summed."""


def consumers(coupling: Coupling) -> Iterator[Consumer]:
    """Every consumer of every group, in order of execution; of a weight that is used both ways round, one way."""
    atoms, dims = set(coupling.atoms.values()), {v.target: coupling.dims[v] for v in coupling.program.parameters}
    ways: dict[str, bool] = {}
    for layer in layers(coupling.program):
        axis = dims[layer.weight][0 if layer.transposed else 1]
        ends = not atoms.isdisjoint(coupling.axes.leaves(axis))
        if ends and ways.setdefault(layer.weight, layer.transposed) == layer.transposed:
            yield layer


def shared(program: Program) -> set[str]:
    """Weights of layers that something else reads, too: an embedding, say, or a layer that has them transposed."""
    ways: dict[str, set[bool]] = {}
    for layer in layers(program):
        ways.setdefault(layer.weight, set()).add(layer.transposed)
    known = {layer.node for layer in layers(program)}
    others = {value.target for node in program.nodes if node not in known for value in node.values()}
    return {weight for weight, found in ways.items() if weight in others or len(found) > 1}


def layers(program: Program) -> Iterator[Consumer]:
    """Every linear layer and convolution with a weight of its own, in order of execution."""
    for node in program.nodes:
        if node.op not in CONSUMERS:
            continue
        given, weight, bias = map(node.arguments.get, CONSUMERS[node.op])
        plain = isinstance(weight, Value) and weight.kind == "parameter" and len(weight.shape) > 1
        plain &= all(node.arguments.get(factor, 1) == 1 for factor in ("alpha", "beta"))
        if not plain or not isinstance(given, Value) or given.kind not in ACTIVATIONS:
            continue
        assert isinstance(weight, Value)
        transposed = node.op in ("addmm", "mm", "matmul")
        own = isinstance(bias, Value) and bias.kind == "parameter" and len(bias.shape) == 1
        shift = bias.target if own and isinstance(bias, Value) else ""
        yield Consumer(node, given, weight.target, shift, transposed, node.arguments.get("groups") or 1)


def ends(coupling: Coupling, sample_dim: int) -> tuple[End, ...]:
    """Every end of every group, in order of execution.

    Args:
        coupling: of a program recorded at the batch size in question.
        sample_dim: which dim of the first input tells the samples apart.
    Raises:
        CalibrationError: the samples cannot be told apart.
    """
    finder = _Finder(coupling, sample_dim)
    found = [finder.end(*operand) for node in coupling.program.nodes for operand in _operands(node)]
    return tuple(end for end in found if end is not None and end.readers)


def maps(coupling: Coupling, sample_dim: int) -> tuple[End, ...]:
    """Where the channels of a group are last seen as maps: operands that hold them, of nodes whose outputs do not.

    That is where layers read the maps, and where pooling does away with them. See `ends`.
    """
    finder = _Finder(coupling, sample_dim)
    found = (finder.last_maps(*operand) for node in coupling.program.nodes for operand in _operands(node))
    return tuple(end for end in found if end.readers)


def batched(coupling: Coupling, sample_dim: int) -> list[Value]:
    """The inputs of the program that hold the samples of a batch along `sample_dim`: those as long there as the first.

    An input whose dim is one of the other dims of an input is none of them, however long: a mask over tokens, say.
    """
    found: list[Value] = []
    others: set[Atom] = set()
    for value in coupling.program.inputs:
        if len(value.shape) > sample_dim:
            leaves = [set(coupling.axes.leaves(axis)) for axis in coupling.dims[value]]
            own = leaves.pop(sample_dim)
            others.update(*leaves)
            if own.isdisjoint(others) and value.shape[sample_dim] == (found or [value])[0].shape[sample_dim]:
                found.append(value)
    return found


def _operands(node: Node) -> Iterator[tuple[Node, str, int | None, Value]]:
    """The activations among the arguments of a node."""
    for name, argument in node.arguments.items():
        if isinstance(argument, Value) and argument.kind in ACTIVATIONS:
            yield node, name, None, argument
        elif isinstance(argument, (tuple, list)):
            for i, item in enumerate(argument):
                if isinstance(item, Value) and item.kind in ACTIVATIONS:
                    yield node, name, i, item


class _Finder:
    """Reads the axes of operands; each node's operands are asked for in order."""

    def __init__(self, coupling: Coupling, sample_dim: int) -> None:
        self.coupling, self.axes = coupling, coupling.axes
        self.names = {atom: name for name, atom in coupling.atoms.items()}
        self.met: tuple[Node, set[Atom]] | None = None
        self._known_maps: dict[Value, set[str]] = {}
        self._known_samples: dict[Axis, Any] = {}
        given = batched(coupling, sample_dim)
        self.samples = given[0].shape[sample_dim] if given else 1
        self.strides: dict[Atom, int] = {}
        for value in given:
            self.strides |= _strides(coupling.dims[value][sample_dim], self.axes)

    def end(self, node: Node, argument: str, index: int | None, value: Value) -> End | None:
        """What ends at an operand and did not at an earlier operand of its node."""
        if self.met is None or self.met[0] is not node:
            self.met = node, self._atoms(node.outputs)
        atoms = self._atoms((value,))
        ended = atoms - self.met[1] | atoms & self._summed(node, argument)
        if not ended:
            return None
        self.met[1].update(ended)
        ordered = [(atom, name) for atom, name in self.names.items() if atom in ended]
        return End(node, argument, index, value, {name: self._reader(value, atom) for atom, name in ordered})

    def _summed(self, node: Node, argument: str) -> set[Atom]:
        """What a node sums an operand over, though its outputs may have the same channels, those of a stream, say."""
        operand, holder, dim = SUMMED.get(node.op, ("", "", 0))
        held = node.arguments.get(holder)
        if argument != operand or not isinstance(held, Value):
            return set()
        return set(self.axes.leaves(self.coupling.dims[held][dim]))

    def last_maps(self, node: Node, argument: str, index: int | None, value: Value) -> End:
        """The groups that an operand holds as maps, and the outputs of its node do not."""
        held = self._maps(value) - {name for output in node.outputs for name in self._maps(output)}
        atoms = {name: self.coupling.atoms[name] for name in self.coupling.atoms if name in held}
        return End(node, argument, index, value, {name: self._reader(value, atom) for name, atom in atoms.items()})

    def _maps(self, value: Value) -> set[str]:
        """The groups that a value holds as maps: beside samples and channels it has two dims or more."""
        if value not in self._known_maps:
            dims = self.coupling.dims[value]
            self._known_maps[value] = {self.names[a] for a in self._atoms((value,)) if self._is_map(dims, a)}
        return self._known_maps[value]

    def _is_map(self, dims: Sequence[Axis], atom: Atom) -> bool:
        sample = [self._sample(axis) for axis in dims]
        channel = [self.axes.places(axis, {atom: 0}) for axis in dims]
        laid_out = self._matrix(dims, channel, sample, atom)
        if laid_out is None or (self.samples > 1 and all(s is None for s in sample)):
            return False
        beside = [axis.size for d, axis in enumerate(dims) if d != laid_out[0] and sample[d] is None]
        return bool(sum(size > 1 for size in (*beside, *laid_out[2])) > 1)

    def _atoms(self, values: Sequence[Value]) -> set[Atom]:
        leaves = {atom for v in values for axis in self.coupling.dims[v] for atom in self.axes.leaves(axis)}
        return leaves & self.names.keys()

    def _reader(self, value: Value, atom: Atom) -> Reader:
        """How to read the channels of one group off a value."""
        dims = self.coupling.dims[value]
        sample = [self._sample(axis) for axis in dims]
        channel = [self.axes.places(axis, {atom: 0}) for axis in dims]
        left = [d for d in range(len(dims)) if sample[d] is not None or len(channel[d][0])]
        shape = [dims[d].size for d in left]
        flat, number = np.arange(math.prod(shape)).reshape(shape), np.zeros(shape, dtype=np.intp)
        for k, d in enumerate(left):
            if (found := sample[d]) is not None:
                number = number + found.reshape([-1 if j == k else 1 for j in range(len(left))])
        takes, puts = [], []
        spread = self.samples > 1 and all(s is None for s in sample)
        for k, d in enumerate(left):
            at, which = channel[d]
            row = number.take(at, axis=k) * atom.size + which.reshape([-1 if j == k else 1 for j in range(len(left))])
            takes.append(flat.take(at, axis=k).reshape(-1))
            puts.append(row.reshape(-1))
        take, put = np.concatenate(takes), np.concatenate(puts)
        if spread:  # the same for all samples
            rows = np.arange(self.samples) * atom.size
            take, put = np.tile(take, self.samples), (rows[:, None] + put[None]).reshape(-1)
        return Reader(
            shape=(self.samples, atom.size),
            summed=tuple(d for d in range(len(dims)) if d not in left),
            dims=tuple(left),
            take=torch.from_numpy(take),
            put=torch.from_numpy(put),
            spread=spread,
            channels=tuple(bool(len(at)) for at, _ in channel),
            samples=tuple(s is not None for s in sample),
            matrix=self._matrix(dims, channel, sample, atom),
        )

    def _matrix(self, dims: Sequence[Axis], channel: Any, sample: Any, atom: Atom) -> Any:
        """Where the channels are and what each is laid out over, if that is a single part of a single dim."""
        held = [d for d in range(len(dims)) if len(channel[d][0])]
        terms = [term for term in self.axes.terms(dims[held[0]]) if atom in self.axes.leaves(term)]
        if len(held) > 1 or len(terms) > 1 or sample[held[0]] is not None:
            return None
        factors = self.axes.factors(terms[0])
        if sum(f is atom for f in factors) != 1:
            return None
        at, which = channel[held[0]]
        order = torch.from_numpy(at[np.lexsort((at, which))])
        return held[0], order, tuple(f.size for f in factors if f is not atom)

    def _sample(self, axis: Axis) -> Any:
        """Per position of an axis, what it adds to the number of its sample; None if samples do not occur in it."""
        if axis not in self._known_samples:
            total, found = np.zeros(axis.size, dtype=np.intp), False
            for atom, stride in self.strides.items():
                at, which = self.axes.places(axis, {atom: 0})
                total[at] += which * stride
                found |= len(at) > 0
            self._known_samples[axis] = total if found else None
        return self._known_samples[axis]


def _strides(axis: Axis, axes: Axes) -> dict[Atom, int]:
    """Per atom of the axis of samples, by how much its position moves the number of the sample.

    Raises:
        CalibrationError: the model cuts the batch into pieces and treats them differently.
    """
    factors = axes.factors(axes.find(axis))
    if not all(isinstance(f, Atom) for f in factors):
        raise CalibrationError(
            f"the samples of a batch cannot be told apart: the model cuts the batch into {axes.describe(axis)}; "
            "pass batches of one sample"
        )
    found, stride = {}, 1
    for factor in reversed(factors):
        assert isinstance(factor, Atom)
        found[factor], stride = stride, stride * factor.size
    return found
