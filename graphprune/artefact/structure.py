"""What an artefact says of a model beside its weights, as data: read off a result, and read back and checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from graphprune import code
from graphprune.artefact.tensorfile import DTYPES, Sizes, sizes_of
from graphprune.errors import ArtefactError, PlanError
from graphprune.plan import Plan
from graphprune.pruning import Result
from graphprune.rewrite.changes import Change
from graphprune.rewrite.graft import own_class, source_of
from graphprune.rewrite.module import Slot
from graphprune.rewrite.state import lookup
from graphprune.trace import held, modules

Kind = Literal["parameter", "frozen", "buffer", "transient", "attribute"]
KINDS = ("parameter", "frozen", "buffer", "transient", "attribute")


@dataclass(frozen=True)
class Tensor:
    """One tensor of the smaller model.

    Attributes:
        dtype, shape: as safetensors names them.
        kind: "parameter", a "frozen" one that gets no gradients, "buffer", a "transient" one that is not in a state
            dict, or "attribute".
    """

    dtype: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def sizes(self) -> Sizes:
        """Element type and shape."""
        return self.dtype, self.shape

    @property
    def data(self) -> list[Any]:
        """As plain data."""
        return [self.kind, self.dtype, list(self.shape)]


@dataclass(frozen=True)
class Graft:
    """A forward as data, and the names of the tensors that it brings along."""

    function: Mapping[str, Any]
    constants: tuple[str, ...]


@dataclass(frozen=True)
class Structure:
    """A smaller model without its weights.

    Attributes:
        model: class of the original.
        emitter: how it was made, "module", "graft" or "graph".
        modules: class name of every module by path; none of a graph module.
        training: whether the model is in training mode, and the paths of the modules that are not as the model is.
        tensors: by fully qualified name.
        aliases: further names of tied tensors.
        plan: which channels of the original are left, and so which positions of every tensor.
        changes: ints that modules keep.
        grafts: by path.
        inputs: name, shape and element type of the example inputs.
        report: the report, as data.
        no_graph: why the artefact has no graph module; empty if it has one.
    """

    model: str
    emitter: str
    modules: Mapping[str, str]
    training: tuple[bool, frozenset[str]]
    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    plan: Plan
    changes: tuple[Change, ...]
    grafts: Mapping[str, Graft]
    inputs: tuple[Mapping[str, Any], ...]
    report: Mapping[str, Any]
    no_graph: str


# -- result to structure -----------------------------------------------------------------------------------------


def describe(result: Result, no_graph: str) -> tuple[Structure, dict[str, torch.Tensor]]:
    """The structure of a result, and its tensors.

    Raises:
        ArtefactError: a tensor cannot be stored, or the model was changed since it was pruned.
    """
    model = result.model
    tensors, aliases = _tensors(model, result.plan)
    _check_unchanged(tensors, result)
    root = model.training
    report = result.report
    structure = Structure(
        model=report.model_class,
        emitter=report.emitter,
        modules={} if report.emitter == "graph" else {p: own_class(m).__name__ for p, m in modules(model)},
        training=(root, frozenset(p for p, m in modules(model) if m.training != root)),
        tensors={name: tensor_of(model, name, tensor) for name, tensor in tensors.items()},
        aliases=aliases,
        plan=result.plan,
        changes=result.changes,
        grafts={path: _graft(m, path, result) for path, m in modules(model) if source_of(m)},
        inputs=tuple(
            {"name": v.target, "shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch.")}
            for v in result.coupling.program.inputs
        ),
        report=json.loads(report.to_json()),
        no_graph=no_graph,
    )
    return structure, tensors


def _tensors(model: nn.Module, plan: Plan) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every tensor under its first name, and the further names of those that have some."""
    named = held(model)
    names = dict(named)
    named += [
        (name, found)
        for name in plan.shapes
        if name not in names and isinstance(found := lookup(model, name), torch.Tensor)
    ]
    first: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in named:
        known = first.setdefault(id(tensor), name)
        if known == name:
            tensors[name] = tensor
        else:
            aliases[name] = known
    return tensors, aliases


def tensor_of(model: nn.Module, name: str, tensor: torch.Tensor) -> Tensor:
    """What is stored of a tensor of a model beside its values.

    Raises:
        ArtefactError: it cannot be stored.
    """
    dtype, shape = sizes_of(tensor, name)
    path, _, leaf = name.rpartition(".")
    owner = lookup(model, path)
    kind: Kind = "attribute"
    if isinstance(tensor, nn.Parameter):
        kind = "parameter" if tensor.requires_grad else "frozen"
    elif isinstance(owner, nn.Module) and leaf in owner._buffers:
        kind = "transient" if leaf in owner._non_persistent_buffers_set else "buffer"
    return Tensor(dtype, shape, kind)


def _check_unchanged(tensors: Mapping[str, torch.Tensor], result: Result) -> None:
    """Refuse a model whose tensors are not those of the plan any more.

    Raises:
        ArtefactError: they are not.
    """
    plan = result.plan
    for name, tensor in tensors.items():
        if name in plan.shapes:
            kept = plan.kept.get(name, {})
            shape = tuple(len(kept[d]) if d in kept else size for d, size in enumerate(plan.shapes[name]))
            if tuple(tensor.shape) != shape:
                raise ArtefactError(
                    f"{name} is {list(tensor.shape)} and was {list(shape)} when the model was pruned; "
                    "save the model before changing its layers"
                )


def _graft(module: nn.Module, path: str, result: Result) -> Graft:
    known = {*result.plan.shapes, *result.coupling.program.aliases}
    prefix = f"{path}." if path else ""
    constants = tuple(name for name in module._buffers if prefix + name not in known)
    return Graft(code.from_source(source_of(module)), constants)


# -- structure to data and back ----------------------------------------------------------------------------------


def to_data(structure: Structure) -> dict[str, Any]:
    """The structure as plain data; lists of positions that tensors share are written once."""
    plan = structure.plan.to_data()
    positions: dict[tuple[int, ...], int] = {}
    for dims in plan["kept"].values():
        for dim, kept in dims.items():
            dims[dim] = positions.setdefault(tuple(kept), len(positions))
    root, others = structure.training
    return {
        "model": structure.model,
        "emitter": structure.emitter,
        "modules": dict(structure.modules),
        "training": [root, sorted(others)],
        "tensors": {name: t.data for name, t in structure.tensors.items()},
        "aliases": dict(structure.aliases),
        "plan": plan,
        "positions": [list(p) for p in positions],
        "changes": [[*dataclasses.astuple(c.slot), c.old, c.new] for c in structure.changes],
        "grafts": {path: [g.function, list(g.constants)] for path, g in structure.grafts.items()},
        "inputs": list(structure.inputs),
        "report": structure.report,
        "no_graph": structure.no_graph,
    }


def from_data(data: Any) -> Structure:
    """The structure that `to_data` gave; of the grafts only that they are tables is checked here.

    Raises:
        ArtefactError: it is not such a structure; the message says which part.
    """
    if not isinstance(data, dict):
        raise ArtefactError("the structure is no table")
    found: dict[str, Any] = {}
    for name, reader in _READERS.items():
        try:
            found[name] = reader(data)
        except ArtefactError:
            raise
        except (PlanError, LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            said = str(error).splitlines()[0] if str(error) else ""
            raise ArtefactError(
                f"the structure's {name} cannot be read: {type(error).__name__}: {said:.200}"
            ) from error
    structure = Structure(**found)
    if wrong := next(
        (a for a, n in structure.aliases.items() if n not in structure.tensors or a in structure.tensors), ""
    ):
        raise ArtefactError(f"the structure's aliases cannot be read: {wrong!r:.80} stands for no tensor")
    return structure


def _plan(data: Mapping[str, Any]) -> Plan:
    positions, plan = data["positions"], data["plan"]
    if any(type(i) is not int or i < 0 for dims in plan["kept"].values() for i in dims.values()):
        raise ValueError("positions are given by number")
    kept = {name: {d: positions[i] for d, i in dims.items()} for name, dims in plan["kept"].items()}
    return Plan.from_data({**plan, "kept": kept})


def tensors_from(table: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by name, as `to_data` writes them.

    Raises:
        ValueError: one is something else.
    """
    found = {}
    for name, (kind, dtype, shape) in table.items():
        if kind not in KINDS or dtype not in DTYPES or not all(type(s) is int and 0 <= s < 1 << 63 for s in shape):
            raise ValueError(f"{name!r:.80} is {kind!r:.20} {dtype!r:.20} {shape!r:.40}")
        found[name] = Tensor(dtype, tuple(shape), kind)
    return found


def _texts(table: Any) -> dict[str, str]:
    """A table of texts.

    Raises:
        TypeError: it is something else.
    """
    if not all(isinstance(v, str) for v in table.values()):
        raise TypeError("a table of texts is expected")
    return dict(table)


def _text(value: Any) -> str:
    """A text.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value


def _change(row: Sequence[Any]) -> Change:
    module, attribute, index, config, old, new = row
    texts = isinstance(module, str) and isinstance(attribute, str) and isinstance(config, (str, type(None)))
    if not texts or type(index) not in (int, type(None)) or type(old) is not int or type(new) is not int:
        raise TypeError(f"{row!r:.80} is no change of an int")
    return Change(Slot(module, attribute, index, config), old, new)


def _training(data: Mapping[str, Any]) -> tuple[bool, frozenset[str]]:
    root, others = data["training"]
    if not isinstance(root, bool):
        raise TypeError(f"{root!r:.40} is no mode")
    return root, frozenset(map(_text, others))


def _table(value: Any) -> Mapping[str, Any]:
    """A table.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, dict):
        raise TypeError("a table is expected")
    return value


def _one_of(value: Any, *known: str) -> str:
    """One of these texts.

    Raises:
        ValueError: it is another one.
    """
    if value not in known:
        raise ValueError(f"{value!r:.40} is none of {', '.join(known)}")
    return cast(str, value)


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "model": lambda data: _text(data["model"]),
    "emitter": lambda data: _one_of(data["emitter"], "module", "graft", "graph"),
    "modules": lambda data: _texts(data["modules"]),
    "training": _training,
    "tensors": lambda data: tensors_from(data["tensors"]),
    "aliases": lambda data: _texts(data["aliases"]),
    "plan": _plan,
    "changes": lambda data: tuple(map(_change, data["changes"])),
    "grafts": lambda data: {p: Graft(_table(f), tuple(map(_text, c))) for p, (f, c) in data["grafts"].items()},
    "inputs": lambda data: tuple(map(_table, data["inputs"])),
    "report": lambda data: _table(data["report"]),
    "no_graph": lambda data: _text(data["no_graph"]),
}
