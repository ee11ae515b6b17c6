"""One numerical check for every tool: the pruned model against the original with the removed channels set to zero.

What a tool removed is not asked of the tool: it is read off the values. Every parameter of the original holds values
that tell its channels apart, so the positions that a smaller parameter kept can be found by looking its values up.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

TOLERANCE: Mapping[str, float] = {"float64": 1e-9, "float64 with parts in float32": 1e-5, "float32": 1e-4}
"""Largest relative error that counts as exact, by the precision compared in."""
VOTES = 33
"""How many values of a slice are looked up to tell which slice of the original it was."""
SMALL = 2**20
"""Tensors of up to this many elements are given values of which no two are alike."""


@dataclass(frozen=True)
class Arguments:
    """What one forward call is given: positional arguments, or keyword arguments."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def map(self, change: Any) -> Arguments:
        """The same arguments with `change` applied to each tensor."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, change, (self.args, dict(self.kwargs or {})))
        return Arguments(args, kwargs)

    def call(self, model: nn.Module) -> Any:
        """What `model` returns; it is given copies, since some forwards write to their inputs."""
        torch.manual_seed(0)
        copied = self.map(torch.clone)
        return model(*copied.args, **(copied.kwargs or {}))

    def example(self) -> Any:
        """In the form that the libraries take: a dict of keyword arguments, or a tuple of positional ones."""
        return dict(self.kwargs) if self.kwargs else self.args


@dataclass(frozen=True)
class Checked:
    """What the check found.

    Attributes:
        runs: whether the pruned model's forward gives tensors at all.
        same_shape: whether its outputs have the shapes of the original's.
        removed: how many (tensor, position) slices are gone; -1 if a smaller parameter is no part of the original's.
        error: largest difference from the zeroed original, relative to each output's largest value.
        effect: how far zeroing moved the output, in the same measure; at 0 the comparison could not have failed.
        precision: what was compared in, a key of `TOLERANCE`.
        exact: the outputs agree within the tolerance, and the comparison could have failed.
        why: what went wrong; empty if nothing.
    """

    runs: bool = False
    same_shape: bool = False
    removed: int = 0
    error: float | None = None
    effect: float | None = None
    precision: str = ""
    exact: bool = False
    why: str = ""

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


# -- weights -----------------------------------------------------------------------------------------------------


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every scale, shift and statistic a value, and every channel one of its own, in place.

    Zero heads, layer scales of 1e-6 and fresh BatchNorm statistics would hide what was removed.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dim() < 2:
            _spread(parameter, 0.3, 1.0, generator)
        elif float(parameter.detach().std(correction=0)) < 1e-3:
            with torch.no_grad():
                parameter.normal_(0, 0.1, generator=generator)
        _separate(parameter, generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            _spread(buffer, -0.2, 0.2, generator)
        elif name.endswith((".weight", ".bias")):  # of a frozen BatchNorm
            _spread(buffer, 0.3, 1.0, generator)
        elif name.endswith("running_var"):
            _spread(buffer, 0.5, 1.5, generator)
    return model.eval()


@torch.no_grad()
def _spread(tensor: torch.Tensor, low: float, high: float, generator: torch.Generator) -> None:
    """Evenly spaced values in random order."""
    places = torch.randperm(tensor.numel(), generator=generator) + 0.5
    tensor.copy_((low + (high - low) * places / max(1, tensor.numel())).reshape(tensor.shape))


@torch.no_grad()
def _separate(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Draw anew what occurs twice; a large tensor is told apart by many values of each slice anyway."""
    if tensor.numel() > SMALL:
        return
    scale = max(float(tensor.std(correction=0)), 1e-3)
    flat = tensor.flatten()
    for _ in range(20):
        order = flat.argsort()
        twice = order[1:][flat[order][1:] == flat[order][:-1]]
        if not len(twice):
            break
        flat[twice] = torch.randn(len(twice), generator=generator).to(flat) * scale
    tensor.copy_(flat.reshape(tensor.shape))


# -- what was removed --------------------------------------------------------------------------------------------


def held(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every floating-point parameter and buffer under each of its names."""
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        if tensor.is_floating_point():
            yield name, tensor.detach()


def kept(whole: torch.Tensor, part: torch.Tensor) -> dict[int, torch.Tensor] | None:
    """Which positions of each dim of `whole` make up `part`; None if no choice does.

    Returns:
        Only the dims along which something is missing or in another order.
    """
    if whole.dim() != part.dim() or any(p > w for p, w in zip(part.shape, whole.shape, strict=True)):
        return None
    if torch.equal(whole, part) if whole.shape == part.shape else False:
        return {}
    ordered, order = whole.flatten().sort()
    positions = [_looked_up(whole, part, d, ordered, order) for d in range(whole.dim())]
    if any(len(found.unique()) < len(found) for found in positions):
        return None
    chosen = whole
    for d, found in enumerate(positions):
        chosen = chosen.index_select(d, found)
    if not torch.equal(chosen, part):
        return None
    return {d: p for d, p in enumerate(positions) if not torch.equal(p, torch.arange(whole.shape[d]))}


def _looked_up(
    whole: torch.Tensor, part: torch.Tensor, dim: int, ordered: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """For every slice of `part` along `dim`, the position in `whole` that most of its values are at."""
    slices = part.movedim(dim, 0).flatten(1) if part.dim() > 1 else part[:, None]
    columns = torch.linspace(0, slices.shape[1] - 1, min(VOTES, slices.shape[1])).long()
    values = slices[:, columns].contiguous()
    at = torch.searchsorted(ordered, values).clamp(max=len(ordered) - 1)
    stride = 1
    for size in whole.shape[dim + 1 :]:
        stride *= size
    return (order[at] // stride % whole.shape[dim]).mode(dim=1).values


def removal(model: nn.Module, pruned: nn.Module) -> dict[str, dict[int, torch.Tensor]]:
    """Per tensor that lost something, the positions gone, by dim.

    Buffers are looked up too; one that cannot be told apart (all zeros, say) is taken for whole.

    Raises:
        ValueError: a parameter of `pruned` is no part of the original's; the message names it.
    """
    small = dict(held(pruned))
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    gone: dict[str, dict[int, torch.Tensor]] = {}
    for name, whole in held(model):
        if name not in small:
            continue
        positions = kept(whole, small[name])
        if positions is None and name in parameters:
            sizes = f"{list(small[name].shape)} of {list(whole.shape)}"
            raise ValueError(f"{name} ({sizes}) does not hold values of the original's")
        missing = {d: _others(p, whole.shape[d]) for d, p in (positions or {}).items()}
        if missing := {d: m for d, m in missing.items() if len(m)}:
            gone[name] = missing
    return gone


def _others(positions: torch.Tensor, size: int) -> torch.Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[positions] = False
    return mask.nonzero().flatten()


def zeroed(model: nn.Module, gone: Mapping[str, Mapping[int, torch.Tensor]]) -> nn.Module:
    """A copy of `model` with these positions set to 0."""
    copied = copy.deepcopy(model)
    state = dict(held(copied))
    with torch.no_grad():
        for name, dims in gone.items():
            for dim, positions in dims.items():
                state[name].index_fill_(dim, positions, 0)
    return copied


# -- comparing ---------------------------------------------------------------------------------------------------


def check(model: nn.Module, pruned: nn.Module, inputs: Arguments) -> Checked:
    """Hold `pruned` against `model` with zeros where it lost something."""
    try:
        dense, got = outputs(model, inputs), outputs(pruned, inputs)
    except Exception as error:
        return Checked(why=f"its forward fails: {said(error)}")
    same_shape = [t.shape for t in got] == [t.shape for t in dense]
    try:
        gone = removal(model, pruned)
    except ValueError as error:
        return Checked(runs=True, same_shape=same_shape, removed=-1, why=str(error))
    removed = sum(len(positions) for dims in gone.values() for positions in dims.values())
    if not same_shape:
        return Checked(runs=True, removed=removed, why="its outputs have other shapes than the original's")
    error, effect, precision = compare(model, zeroed(model, gone), pruned, inputs)
    tolerance = TOLERANCE[precision]
    why = ""
    if not removed:
        why = "nothing was removed"
    elif not error <= tolerance:
        why = f"it differs from the zeroed original by {error:.1e}"
    elif not effect > tolerance:
        why = "zeroing had no effect, so nothing was proved"
    return Checked(True, True, removed, error, effect, precision, not why, why)


def compare(model: nn.Module, reference: nn.Module, pruned: nn.Module, inputs: Arguments) -> tuple[float, float, str]:
    """Error and effect, in float64 where all three models run in it."""
    models = (reference, pruned, model)
    try:
        wide = inputs.map(lambda t: t.double() if t.is_floating_point() else t)
        rounded = _Rounded()
        want, got, dense = (_raised_outputs(m, wide, rounded) for m in models)
        precision = "float64 with parts in float32" if rounded.seen else "float64"
    except Exception:  # code that states float32; all are compared as they are
        want, got, dense = (outputs(m, inputs) for m in models)
        precision = "float32"
    return difference(got, want, dense), difference(want, dense, want), precision


def _raised_outputs(model: nn.Module, inputs: Arguments, rounded: _Rounded) -> list[torch.Tensor]:
    """The outputs of a float64 copy, which is gone when the next one is made."""
    raised = copy.deepcopy(model).double()
    with rounded:
        return outputs(raised, inputs)


class _Rounded(TorchDispatchMode):
    """Whether any op gave a result in less than float64."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        narrow = (torch.float32, torch.float16, torch.bfloat16, torch.complex64)
        self.seen |= any(isinstance(t, torch.Tensor) and t.dtype in narrow for t in pytree.tree_leaves(result))
        return result


def outputs(model: nn.Module, inputs: Arguments) -> list[torch.Tensor]:
    """Every tensor that `model` returns, in flattening order."""
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(inputs.call(model)) if isinstance(t, torch.Tensor)]


def difference(got: list[torch.Tensor], want: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Largest difference of any output, relative to its largest value among those that differ from `other`."""
    worst = 0.0
    for a, b, c in zip(got, want, other, strict=True):
        if b.numel() == 0:
            continue
        wide = torch.complex128 if b.is_complex() else torch.float64
        a, b, c = a.to(wide), b.to(wide), c.to(wide)
        gap = float(torch.where(a == b, 0.0, (a - b).abs()).max())
        moved = b[(b != c) & b.isfinite()] if bool((b != c).any()) else b[b.isfinite()]
        scale = float(moved.abs().max()) if moved.numel() else 0.0
        worst = max(worst, float("inf") if gap != gap else gap / max(scale, 1e-6))
    return worst


def said(error: BaseException) -> str:
    """Type and first line of an error, without the paths of this machine."""
    line = next(iter(str(error).splitlines()), "")
    words = (word.rsplit("/", 1)[-1] if word.startswith(("/", '"/', "'/")) else word for word in line.split(" "))
    return f"{type(error).__name__}: {' '.join(words)}"[:240]
