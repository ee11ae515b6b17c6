"""Runs a model as it was recorded: the same op calls in the same order, now with values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._dispatch.python import no_python_dispatcher
from torch.utils import _pytree as pytree

from graphprune.errors import TraceError
from graphprune.program import Node, Program
from graphprune.trace.inputs import Inputs
from graphprune.trace.predispatch import PreDispatch
from graphprune.trace.schema import signature, writes

StandIn = Callable[[Node, Any, tuple[Any, ...], Mapping[str, Any]], Any]
"""Called with a node, the op it calls and the values of its arguments; returns the result, or None to run the op."""

SILENT = ("contiguous", "lift_fresh")
"""Calls that change no values, and that a run makes or not as layout and device have it: both differ on meta."""


def play(program: Program, model: Callable[..., Any], inputs: Inputs, stand_in: StandIn) -> Any:
    """What `model` returns, with every op call of `program` shown to `stand_in` on the way.

    Autograd and autocast act as around any call of the model.

    Args:
        program: recorded from this model with inputs of these shapes.
        model: in eval mode, or what calls it.
        inputs: arguments of its forward.
        stand_in: may replace the result of a node.
    Raises:
        TraceError: the model makes other calls than when it was recorded, so its code branches on values.
    """
    player = _Player(program, stand_in)
    with player.seeing():
        output = model(*inputs.args, **inputs.kwargs)
    player.check_ended()
    return output


class _Player(PreDispatch):  # type: ignore[no-untyped-call]
    """Sees the calls that the recorder saw."""

    def __init__(self, program: Program, stand_in: StandIn) -> None:
        super().__init__()
        self.program, self.stand_in = program, stand_in
        self.at = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one call, or what stands in for it.

        Raises:
            TraceError: another call was recorded here.
        """
        kwargs = dict(kwargs or {})
        op = signature(func)[0]
        self._skip(op)
        node = self.program.nodes[self.at] if self.at < len(self.program.nodes) else None
        met = node is not None and node.op == op
        result = self.stand_in(node, func, args, kwargs) if met and node is not None else None
        if result is None:
            with no_python_dispatcher():
                result = func(*args, **kwargs)
        if met:
            self.at += 1
        elif op not in SILENT and (
            writes(func) or any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(result))
        ):
            raise TraceError(f"{self._name()} calls {func} where {node or 'nothing more'} was recorded")
        return result

    def check_ended(self) -> None:
        """Refuse a run that stopped early.

        Raises:
            TraceError: it did.
        """
        self._skip()
        if self.at < len(self.program.nodes):
            raise TraceError(f"{self._name()} ends before {self.program.nodes[self.at]}, which was recorded")

    def _skip(self, op: str = "") -> None:
        """Pass over recorded calls that a run with values need not make, unless it makes this one now."""
        left = self.program.nodes
        while self.at < len(left) and left[self.at].op in SILENT and left[self.at].op != op:
            self.at += 1

    def _name(self) -> str:
        return self.program.model_class
