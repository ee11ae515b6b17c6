"""Models from an artefact: the user's class with new sizes and weights, or a graph module that needs no class."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphprune import code
from graphprune.artefact.structure import Graft, Structure, Tensor
from graphprune.errors import ArtefactError, RewriteError
from graphprune.rewrite.changes import carry_over, unmet
from graphprune.rewrite.forward import Forward
from graphprune.rewrite.graft import graft, own_class
from graphprune.rewrite.module import refresh
from graphprune.rewrite.state import deepcopied, lookup, replacements, results
from graphprune.trace import held, modules

# -- the user's class --------------------------------------------------------------------------------------------


def own_tensors(structure: Structure) -> tuple[list[str], list[str]]:
    """Names of the tensors that a fresh instance must have, and of those that grafts bring along."""
    brought = {f"{path}.{c}" if path else c for path, g in structure.grafts.items() for c in g.constants}
    return [n for n in structure.tensors if n not in brought], [n for n in structure.tensors if n in brought]


def into_class(
    instance: nn.Module,
    structure: Structure,
    tensors: Mapping[str, torch.Tensor] | None,
    constants: Mapping[str, torch.Tensor],
    ops: Collection[str],
) -> nn.Module:
    """A copy of a fresh instance of the original's class with the structure's sizes.

    Args:
        instance: of the original's sizes; not modified. Its tensors may be on the meta device.
        structure: of the artefact.
        tensors: the weights by name; with None those of the instance, without the positions that the plan removes.
        constants: the tensors that grafts bring along.
        ops: further ops that grafts may call.
    Raises:
        ArtefactError: the instance is of another architecture, or stored code does what it may not.
    """
    _check_alike(instance, structure)
    found = dict(held(instance))
    if tensors is None:
        new = replacements(instance, structure.plan)
    else:
        new = {id(found[name] if name in found else lookup(instance, name)): tensor for name, tensor in tensors.items()}
    forwards = {path: _forward(path, g, structure, constants, ops) for path, g in structure.grafts.items()}
    try:
        small = deepcopied(instance, {**new, **results(instance)})
        for path, forward in forwards.items():
            graft(lookup(small, path), forward)
    except RewriteError as error:
        raise ArtefactError(str(error)) from error
    carry_over(small, structure.changes)
    refresh(small)
    _set_modes(small, structure)
    if left := [name for name, tensor in held(small) if tensor.is_meta]:
        raise ArtefactError(
            f"{left[0]} stays on the meta device: it is not among the weights; build the model on the CPU"
        )
    return small


def _forward(
    path: str, stored: Graft, structure: Structure, constants: Mapping[str, torch.Tensor], ops: Collection[str]
) -> Forward:
    """A graft's forward, written anew from its data."""
    prefix = f"{path}." if path else ""
    names = {n.removeprefix(prefix) for n in (*structure.tensors, *structure.aliases) if n.startswith(prefix)}
    functions = code.checked({"": stored.function}, names, ops=ops, where=path or "the model")
    return Forward(code.to_source(functions[""]), {c: constants[prefix + c] for c in stored.constants})


def _check_alike(instance: nn.Module, structure: Structure) -> None:
    """Refuse an instance that is not like the original.

    Raises:
        ArtefactError: it is not; the message lists the first differences.
    """
    wrong = list(_differences(instance, structure))
    if wrong:
        more = f"\n  and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ArtefactError(
            f"the artefact was made from a {structure.model} of another architecture than this "
            f"{type(instance).__name__}:\n  " + "\n  ".join(wrong[:4]) + more + "\npass the model as it was before "
            "pruning, with any weights; or load the artefact without a model, as a graph module"
        )


def _differences(instance: nn.Module, structure: Structure) -> Iterable[str]:
    kinds = {path: own_class(m).__name__ for path, m in modules(instance)}
    for path in [*structure.modules, *(p for p in kinds if p not in structure.modules)]:
        kind, stored = kinds.get(path, "not there"), structure.modules.get(path, "not there")
        if kind != stored:
            yield f"{path or 'the model'} is {kind} here, and {stored} in the artefact"
    here = dict(held(instance))
    names = dict.fromkeys([*own_tensors(structure)[0], *structure.aliases])
    attributes = {n for n, t in structure.tensors.items() if t.kind == "attribute"}
    shapes = structure.plan.shapes
    for name in [*names, *(n for n in here if n not in names)]:
        tensor = lookup(instance, name) if name in attributes else here.get(name)
        if not isinstance(tensor, torch.Tensor) or name not in names:
            yield f"{name} is only in {'the artefact' if name in names else 'the model'}"
            continue
        known = name if name in shapes else structure.aliases.get(name, name)
        if known in shapes and tuple(tensor.shape) != shapes[known]:
            yield f"{name} is {list(tensor.shape)} here, and {list(shapes[known])} in the artefact"
    ties = {frozenset((a, n)) for a, n in structure.aliases.items()}
    first: dict[int, str] = {}
    own = {frozenset((n, k)) for n, t in here.items() if (k := first.setdefault(id(t), n)) != n}
    for pair in ties ^ own:
        if pair <= here.keys():
            where = "the model" if pair in own else "the artefact"
            yield f"{' and '.join(sorted(pair))} are one tensor only in {where}"
    change = unmet(instance, structure.changes)
    if change is not None:
        yield f"{change.slot} is not {change.old}"


def _set_modes(small: nn.Module, structure: Structure) -> None:
    root, others = structure.training
    for path, module in modules(small):
        if not isinstance(module, torch.jit.ScriptModule):
            vars(module)["training"] = root != (path in others)


def wrapped(tensor: torch.Tensor, described: Tensor) -> torch.Tensor:
    """A tensor, as a parameter if it is one."""
    if described.kind in ("parameter", "frozen"):
        return nn.Parameter(tensor, requires_grad=described.kind == "parameter")
    return tensor


def made(model: Any) -> nn.Module:
    """The instance to load into, made by a factory if it is one.

    Raises:
        ArtefactError: it is neither.
    """
    if not callable(model):
        raise ArtefactError(
            f"model={model!r:.80}: pass a module, or a function that makes one, such as lambda: Net(10)"
        )
    instance = model if isinstance(model, nn.Module) else model()
    if not isinstance(instance, nn.Module):
        raise ArtefactError(f"the factory gave a {type(instance).__name__}, and should give a module")
    return instance


# -- a graph module ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Graph:
    """A graph module as data.

    Attributes:
        functions: its forward and what that runs.
        tensors: names of the tensors of the model that it has.
        constants: further ones, that the code made.
        limits: what is limited about it, a sentence or nothing.
    """

    functions: Mapping[str, Any]
    tensors: tuple[str, ...]
    constants: Mapping[str, Tensor]
    limits: str


def into_graph(
    graph: Graph, structure: Structure, tensors: Mapping[str, torch.Tensor], ops: Collection[str]
) -> nn.Module:
    """The graph module of an artefact.

    Args:
        graph: read from the file.
        structure: of the artefact.
        tensors: by name, those of the model and the graph's own.
        ops: further ops that it may call.
    Raises:
        ArtefactError: stored code does what it may not.
    """
    first = {name: structure.aliases.get(name, name) for name in graph.tensors}
    every = {**{name: structure.tensors[known] for name, known in first.items()}, **graph.constants}
    functions = code.checked(graph.functions, every, ops=ops, where="the graph module")
    root = nn.Module()
    for name in every:
        _register(root, name, tensors[first.get(name, name)])
    name = structure.model if structure.model.isidentifier() and structure.model.isascii() else "Pruned"
    small = code.to_graph(functions, root, name)
    for _, module in modules(small):
        module.training = structure.training[0]
    for name, described in every.items():  # which is lost where graph modules take tensors over
        path, _, leaf = name.rpartition(".")
        owner = lookup(small, path)
        if described.kind == "transient" and leaf in getattr(owner, "_buffers", ()):
            owner._non_persistent_buffers_set.add(leaf)
    return small


def _register(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor where its name says, making the modules on the way.

    Raises:
        ArtefactError: another tensor or an attribute of modules has that name.
    """
    *path, leaf = name.split(".")
    owner = root
    for part in path:
        if part not in owner._modules:
            _check_free(owner, part, name)
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    _check_free(owner, leaf, name)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def _check_free(owner: nn.Module, part: str, name: str) -> None:
    """Refuse names that a module has another use for.

    Raises:
        ArtefactError: it has.
    """
    if not is_plain_name(part) or hasattr(owner, part):
        raise ArtefactError(f"{name!r:.80} is no name of a tensor of a graph module")


def is_plain_name(name: str) -> bool:
    """Whether the code of graph modules, which torch writes, can name a module or a tensor so."""
    return bool(name) and name.isprintable() and not set(name) & set("\"'\\")
