"""Runs programs and recorded models node by node, so that others can watch values or stand in for single ops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphprune.errors import CalibrationError, TraceError
from graphprune.program import Node, Program
from graphprune.trace import Inputs, StandIn, held, nested_graph, play, same_random_numbers, trace, untouched

Watch = Callable[[Node, Any], None]
"""Called with each node and its result."""


def interpret(
    program: Program,
    state: Mapping[str, torch.Tensor],
    inputs: Inputs,
    *,
    watch: Watch | None = None,
    stand_in: StandIn | None = None,
) -> list[torch.Tensor]:
    """Run `program` with this state, without gradients.

    Args:
        program: from `trace`.
        state: tensors by fully qualified name; constants that are not in it are taken from the trace.
        inputs: arguments like the example inputs of the trace.
        watch: called after each node.
        stand_in: may replace the result of a node.
    Returns:
        The output tensors, flattened in order.
    """
    with torch.no_grad(), same_random_numbers():
        outputs = evaluate(program, state, inputs, watch=watch, stand_in=stand_in)
    return [o for o in outputs if isinstance(o, torch.Tensor)]


def evaluate(
    program: Program,
    state: Mapping[str, torch.Tensor],
    inputs: Inputs,
    *,
    watch: Watch | None = None,
    stand_in: StandIn | None = None,
    in_place: bool = False,
) -> list[Any]:
    """As `interpret`, with gradients as set outside; returns every leaf of the output, tensor or not.

    With `in_place` the run may write to the buffers in `state`.
    """
    exported = program.source
    given = iter(inputs.map(torch.clone).tensors())
    operands: list[Any] = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind.name == "USER_INPUT":
            constant = not isinstance(spec.arg, torch.export.graph_signature.TensorArgument)
            operands.append(getattr(spec.arg, "value", None) if constant else next(given))
        else:
            held = state[spec.target] if spec.target in state else exported.constants[spec.target]
            operands.append(held if in_place or spec.kind.name == "PARAMETER" else _apart(held))
    nodes = {node.name: node for node in program.nodes}
    return list(_Runner(exported.graph_module, nodes, "", watch, stand_in).run(*operands))


def _apart(held: Any) -> Any:
    """What a graph may write to without changing the model."""
    return held.clone() if isinstance(held, torch.Tensor) else held


class Replay:
    """Runs a model on one batch after the other with stand-ins for its ops; each shape of a batch is traced once.

    The user's own module runs, as `play` says. One whose code branches on values runs as its exported program.

    Args:
        model: any module; it is left as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._programs: dict[Any, Program] = {}
        self._export = self._started = False

    def program(self, inputs: Inputs) -> Program:
        """The program of the model at the shapes of `inputs`.

        Raises:
            TraceError: the model cannot be traced with these inputs.
        """
        leaves, form = pytree.tree_flatten((inputs.args, dict(inputs.kwargs)))
        seen = [(leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves]
        key = (str(form), *seen)
        if key not in self._programs:
            with torch.autocast(_device(self.model), enabled=False):
                self._programs[key] = trace(self.model, inputs, front_end="export" if self._export else "auto")
        return self._programs[key]

    def run(
        self,
        inputs: Inputs,
        stand_in: StandIn,
        *,
        then: Callable[[Any], None] = lambda output: None,
        restart: Callable[[], None] = lambda: None,
        state: Mapping[str, torch.Tensor] | None = None,
    ) -> Any:
        """What the model returns.

        Args:
            inputs: arguments of its forward.
            stand_in: may replace the result of a node.
            then: called with the output before the model is put back as it was.
            restart: called where the first run has to be given up and is done in another way.
            state: parameters and buffers to use instead of the model's own, by fully qualified name.
        Raises:
            CalibrationError: the model's code takes another path than when it was traced.
            TraceError: the model cannot be traced with these inputs.
        """
        program = self.program(inputs)
        try:
            with untouched(self.model), torch.compiler.set_stance("force_eager"):
                output = self.output(program, inputs.map(torch.clone), stand_in, state)
                then(output)
        except TraceError as error:
            if self._export or self._started:
                raise CalibrationError(f"the model does not run as it was traced: {error}") from error
            self._export = True
            self._programs.clear()
            restart()
            return self.run(inputs, stand_in, then=then, state=state)
        self._started = True
        return output

    def output(
        self, program: Program, inputs: Inputs, stand_in: StandIn, state: Mapping[str, torch.Tensor] | None = None
    ) -> Any:
        """As `run`, without putting the model back as it was."""
        if program.source is None:
            call: Any = self.model if state is None else partial(_call, self.model, state)
            return play(program, call, inputs, stand_in)
        every = {**dict(held(self.model)), **(state or {})}
        leaves = evaluate(program, every, inputs, stand_in=stand_in, in_place=True)
        return pytree.tree_unflatten(leaves, program.source.call_spec.out_spec)


def _call(model: nn.Module, state: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    return torch.func.functional_call(model, dict(state), args, kwargs)


class _Runner(fx.Interpreter):
    """Runs one graph; a nested graph runs in a runner of its own, under the context its wrapper asks for."""

    def __init__(
        self,
        module: fx.GraphModule,
        nodes: Mapping[str, Node],
        prefix: str,
        watch: Watch | None,
        stand_in: StandIn | None,
    ) -> None:
        super().__init__(module)
        self.nodes, self.prefix, self.watch, self.stand_in = nodes, prefix, watch, stand_in
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, or what stands in for it."""
        node = self.nodes.get(self.prefix + n.name)
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if (inner := nested_graph(n.target, args)) is not None:
            body, operands = inner
            with _context(n.target, args):
                runner = _Runner(body, self.nodes, f"{self.prefix}{n.name}.", self.watch, self.stand_in)
                return runner.run(*operands)
        result = None
        if node is not None and self.stand_in is not None:
            result = self.stand_in(node, n.target, args, kwargs)
        if result is None:
            result = super().run_node(n)
        if node is not None and self.watch is not None:
            self.watch(node, result)
        return result


def _context(target: Any, args: tuple[Any, ...]) -> Any:
    """The context in which a wrapper runs its graph."""
    name = getattr(target, "__name__", str(target))
    if "autocast" in name:
        device, dtype, enabled, cache = args[:4]
        return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)
    return contextlib.nullcontext()


def _device(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")
