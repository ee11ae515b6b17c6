"""Saving and loading: weights as safetensors, all else as JSON, nothing that is run.

`save` writes what a pruned model is; `load` gives it back in the user's class, or as a graph module where the class is
not at hand. Reading an artefact runs no code from it: grafts and graph modules are stored as tables of calls, in which
only ops that graphprune has a rule for, and the model's own tensors, are accepted (see `graphprune.code`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn

from graphprune import code
from graphprune.artefact import store, tensorfile
from graphprune.artefact.build import Graph, into_class, into_graph, is_plain_name, made, own_tensors, wrapped
from graphprune.artefact.structure import Structure, Tensor, describe, from_data, tensor_of, tensors_from, to_data
from graphprune.couple import couple
from graphprune.errors import ArtefactError, GraphpruneError
from graphprune.plan import Plan
from graphprune.pruning import Result
from graphprune.rewrite.graph import emit_graph
from graphprune.trace import Inputs, held, trace
from graphprune.version import __version__

__all__ = ["Artefact", "load", "save", "whole_graph"]


# -- saving ------------------------------------------------------------------------------------------------------


def save(result: Result, directory: str | os.PathLike[str], *, graph: bool = True) -> None:
    """Write a pruned model, and all that is known of it, to a directory.

    The files take the place of an older artefact at once, when all of them are written; one save at a time. The weights
    are those that the model has now, so that it can be trained in between.

    Args:
        result: from `prune` or `prune_iteratively`.
        directory: made if it is not there; files of other names stay.
        graph: also trace the smaller model, so that it can be loaded without its class.
    Raises:
        ArtefactError: a tensor cannot be stored, the model was changed since it was pruned, or the directory cannot be
            written to; nothing is written then, and an older artefact is still there.

    Example:
        >>> import tempfile, torch, graphprune as gp
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
        >>> result = gp.prune(net, torch.randn(2, 3), target=gp.Target(channels=0.5))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     gp.save(result, directory)
        ...     small = gp.load(directory, net)
        >>> small[0].out_features
        4
    """
    if not isinstance(result, Result):
        raise ArtefactError(f"save takes what gp.prune returns, not a {type(result).__name__}")
    path = store.directory_of(directory)
    graph_module, limits, no_graph = _traced(result) if graph else (None, "", "it was saved with graph=False")
    structure, tensors = describe(result, no_graph)
    contents: dict[str, store.Write] = {}
    if graph_module is not None:
        stored, constants = _graph_data(graph_module, limits, structure)
        contents["graph"] = store.as_json(stored)
        tensors = {**tensors, **constants}
    contents["structure"] = store.as_json(to_data(structure))
    contents["weights"] = tensorfile.writer(tensors)
    store.write(path, contents, model=structure.model, version=__version__)


def _traced(result: Result) -> tuple[fx.GraphModule | None, str, str]:
    """The model as a graph module, what is limited about it, and why there is none."""
    try:
        found, limits = whole_graph(result.model, result.inputs)
        code.from_graph(found)
    except GraphpruneError as error:
        return None, "", f"the pruned model could not be traced when it was saved: {str(error).splitlines()[0]}"
    return found, limits, ""


def whole_graph(model: nn.Module, inputs: Inputs) -> tuple[fx.GraphModule, str]:
    """A model as one graph module, with an open batch size where that can be, and what is limited about it.

    Raises:
        ArtefactError: a tensor has a name that the code of graph modules, which torch writes, does not quote.
        GraphpruneError: it cannot be traced.
    """
    if odd := [name for name, _ in held(model) if not all(map(is_plain_name, name.split(".")))]:
        raise ArtefactError(f"the code of a graph module cannot name {odd[0]}")
    if isinstance(model, fx.GraphModule):
        return model, ""
    coupling = couple(trace(model, inputs))
    found, limits = emit_graph(model, inputs, coupling, Plan.of(coupling, {}))
    assert isinstance(found, fx.GraphModule)
    return found, limits


def _graph_data(
    module: fx.GraphModule, limits: str, structure: Structure
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A graph module as data, and the tensors that it has and the model has not."""
    functions, _ = code.from_graph(module)
    known = {*structure.tensors, *structure.aliases}
    own = {name: tensor for name, tensor in held(module) if name not in known}
    stored = {
        "functions": functions,
        "tensors": [name for name, _ in held(module) if name in known],
        "constants": {name: tensor_of(module, name, tensor).data for name, tensor in own.items()},
        "limits": limits,
    }
    return stored, own


# -- loading -----------------------------------------------------------------------------------------------------


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    weights: Literal["saved", "model"] = "saved",
    device: str = "cpu",
    ops: Collection[str] = (),
) -> nn.Module:
    """The pruned model that `save` wrote, in the modes it had.

    Args:
        directory: what was passed to `save`.
        model: the original model with any weights, or a function that makes it: what comes back is a copy of it with
            the smaller sizes. Its tensors may be on the meta device. Without one, a graph module comes back, in which
            objects among the outputs, such as caches, are dicts of what holds tensors in them, nested as they were.
        weights: "saved", or those of "model", of which what the plan keeps is taken: another checkpoint, or one that
            was trained further.
        device: where the weights are put.
        ops: ops that stored code may call beside those that graphprune has rules for, such as "my_namespace.my_op".
    Raises:
        ArtefactError: the files are no artefact, were changed, or are of a newer format; the model is of another
            architecture; or stored code calls an op that it may not.

    Example:
        See `save`.
    """
    return Artefact.read(directory).load(model, weights=weights, device=device, ops=ops)


@dataclass(frozen=True, eq=False)
class Artefact:
    """What a directory holds, without its weights.

    Attributes:
        directory: where it is.
        manifest: the data files, and the versions they were written with.
        structure: what is known of the model.
    """

    directory: Path
    manifest: store.Manifest
    structure: Structure = field(repr=False)

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> Artefact:
        """Read all but the weights and the graph.

        Raises:
            ArtefactError: there is no artefact, or it cannot be used.
        """
        path = store.directory_of(directory)
        found = store.manifest(path)
        return cls(path, found, from_data(store.read_json(path, found.entries["structure"])))

    @property
    def plan(self) -> Plan:
        """Which channels of the original are left; `plan.kept` has, per tensor, the old positions of the new ones."""
        return self.structure.plan

    @property
    def report(self) -> Mapping[str, Any]:
        """The report of the pruning, as plain data."""
        return self.structure.report

    @cached_property
    def graph(self) -> Graph:
        """The graph module as data.

        Raises:
            ArtefactError: there is none, or it cannot be used.
        """
        if "graph" not in self.manifest.entries:
            why = self.structure.no_graph or "it was left out"
            raise ArtefactError(
                f"{self.directory} holds no graph module, as {why}; pass the original: load(.., model=..)"
            )
        return _graph_from(store.read_json(self.directory, self.manifest.entries["graph"]), self.structure)

    def load(
        self,
        model: nn.Module | Callable[[], nn.Module] | None = None,
        *,
        weights: Literal["saved", "model"] = "saved",
        device: str = "cpu",
        ops: Collection[str] = (),
    ) -> nn.Module:
        """The model; see `graphprune.load`.

        Raises:
            ArtefactError: as there.
        """
        if weights not in ("saved", "model"):
            raise ArtefactError(f"weights={weights!r:.40}; it is 'saved' or 'model'")
        structure = self.structure
        if model is None:
            if weights == "model":
                raise ArtefactError("weights='model' takes those of a model; pass it")
            names = [structure.aliases.get(n, n) for n in self.graph.tensors]
            tensors = self._tensors({*names, *self.graph.constants}, device)
            return into_graph(self.graph, structure, tensors, ops)
        if structure.emitter == "graph":
            raise ArtefactError(
                "this pruned model is a graph module and fits no instance of a class; load it without a model"
            )
        instance = made(model)
        own, brought = own_tensors(structure)
        saved = weights == "saved"
        found = self._tensors([*own, *brought] if saved else brought, device)
        constants = {name: found[name] for name in brought}
        return into_class(instance, structure, {n: found[n] for n in own} if saved else None, constants, ops)

    def _tensors(self, names: Iterable[str], device: str) -> dict[str, torch.Tensor]:
        """Tensors from the file, once it is known to be what was written."""
        entry = self.manifest.entries["weights"]
        every = {**self.structure.tensors, **self._constants}
        sizes = {name: tensor.sizes for name, tensor in every.items()}
        found = tensorfile.load(self.directory / entry.name, entry, sizes, frozenset(names), device)
        return {name: wrapped(tensor, every[name]) for name, tensor in found.items()}

    @cached_property
    def _constants(self) -> Mapping[str, Tensor]:
        return self.graph.constants if "graph" in self.manifest.entries else {}


def _graph_from(data: Any, structure: Structure) -> Graph:
    """The graph module as data; its functions are checked when it is made.

    Raises:
        ArtefactError: it is not one.
    """
    try:
        constants = tensors_from(data["constants"])
        tensors = tuple(data["tensors"])
        known = {*structure.tensors, *structure.aliases}
        if len(set(tensors)) != len(tensors) or not known.issuperset(tensors) or known & constants.keys():
            raise ArtefactError("the graph cannot be read: its tensors are not those of the model")
        if not isinstance(data["limits"], str):
            raise ArtefactError("the graph cannot be read: its limits are no text")
        return Graph(data["functions"], tensors, constants, data["limits"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(f"the graph cannot be read: {type(error).__name__}: {error!s:.200}") from error
