"""The parameters, buffers and constants of a model as values, each tensor once."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from graphprune.program import Kind, Node, Program, Value
from graphprune.trace.schema import value
from graphprune.trace.walk import parameters_and_buffers


class State:
    """Collects the state tensors that a front end meets.

    Args:
        model: whose state it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        of_training, others = parameters_and_buffers(model)
        self.named: list[tuple[str, torch.Tensor, Kind]] = [
            *((name, tensor, "parameter") for name, tensor in of_training),
            *((name, tensor, "buffer") for name, tensor in others),
        ]
        self._tensors: dict[str, torch.Tensor | None] = {name: tensor for name, tensor, _ in self.named}
        self.values: dict[Any, Value] = {}
        self.aliases: dict[str, str] = {}

    def add(self, target: str, like: torch.Tensor, kind: Kind, name: str = "") -> Value:
        """The value of the tensor that the model holds as `target`; a tensor it holds twice is one value."""
        tensor = self.tensor(target)
        key = target if tensor is None else id(tensor)
        if key in self.values:
            self.aliases[target] = self.values[key].target
            return self.values[key]
        return self.values.setdefault(key, value(name or target, like, kind, target))

    def tensor(self, target: str) -> torch.Tensor | None:
        """What the model holds under a dotted name."""
        if target not in self._tensors:
            try:
                found = functools.reduce(getattr, target.split("."), self.model)
            except AttributeError:
                found = None
            self._tensors[target] = found if isinstance(found, torch.Tensor) else None
        return self._tensors[target]

    def program(
        self,
        inputs: Iterable[Value],
        outputs: Iterable[Any],
        nodes: Iterable[Node],
        *,
        carried: Iterable[bool],
        dynamic_batch: bool = False,
        source: Any = None,
    ) -> Program:
        """The program, once everything was met; `carried` says of each output whether the model takes it back."""
        marked = [(v, mark) for v, mark in zip(outputs, carried, strict=True) if isinstance(v, Value)]
        outputs, nodes = tuple(v for v, _ in marked), tuple(nodes)
        read = {id(v) for node in nodes for v in node.values()} | {id(v) for v in outputs}
        self._alias_ties()
        return Program(
            model_class=type(self.model).__name__,
            state=tuple(self.values.values()),
            aliases=self.aliases,
            inputs=tuple(inputs),
            outputs=outputs,
            carried=frozenset(k for k, (_, mark) in enumerate(marked) if mark),
            nodes=nodes,
            unused=tuple(v.target for v in self.values.values() if id(v) not in read),
            overlapping=self._overlapping(),
            dynamic_batch=dynamic_batch,
            source=source,
        )

    def _alias_ties(self) -> None:
        """Names under which the model holds a tensor that the front end listed once."""
        for name, tensor, _ in self.named:
            known = self.values.get(id(tensor))
            if known is not None and known.target != name:
                self.aliases.setdefault(name, known.target)

    def _overlapping(self) -> tuple[tuple[str, ...], ...]:
        """Names of different tensors of the state that share storage."""
        by_storage: dict[int, list[str]] = {}
        for known in self.values.values():
            tensor = self.tensor(known.target) if known.target else None
            if tensor is not None and not tensor.is_meta and tensor.numel():
                by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(known.target)
        return tuple(tuple(names) for names in by_storage.values() if len(names) > 1)
