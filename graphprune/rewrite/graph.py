"""Whole-graph emission: a `GraphModule` of the exported program with every size in it rewritten.

Works for every plan and needs no source. The module takes and returns what the original does, for any batch size the
original allows, keeps parameter names, and follows `.train()` in its dropouts and batch norms.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from graphprune.couple import exported
from graphprune.coupling import Coupling
from graphprune.errors import GraphpruneError
from graphprune.plan import Plan
from graphprune.rewrite.state import lookup, replacements, smaller
from graphprune.rewrite.writer import Writer
from graphprune.trace import Inputs, held, modules, trace


def emit_graph(model: nn.Module, inputs: Inputs, coupling: Coupling, plan: Plan) -> tuple[nn.Module, str]:
    """A graph module that carries out the plan.

    Args:
        model: the original; not modified, no tensor is shared with it.
        inputs: example inputs.
        coupling, plan: what to remove.
    Returns:
        The module, and what is limited about it ("" or a sentence about a fixed batch size).
    Raises:
        RewriteError: the exported program cannot be turned into a module.
    """
    open_batch, limits = _with_open_batch(model, inputs, coupling)
    graph_module = open_batch.program.source.module(check_guards=False)
    plan = Plan.of(open_batch, plan.groups)
    writer = Writer(open_batch, plan, model)
    writer.rewrite(graph_module, "")
    writer.guard(graph_module.graph)
    graph_module.graph._tracer_cls = None  # the exporter's cannot be pickled
    graph_module.graph._tracer_extras = None
    small = fx.GraphModule(graph_module, graph_module.graph, class_name=type(model).__name__)
    _take_state(small, model, plan)
    for _, module in modules(small):
        module.training = model.training
    return small, limits


def _with_open_batch(model: nn.Module, inputs: Inputs, coupling: Coupling) -> tuple[Coupling, str]:
    """The coupling of a trace that leaves the batch size open, or, where that fails, the one at hand."""
    if coupling.program.dynamic_batch:
        return coupling, ""
    sizes = {t.shape[0] for t in inputs.tensors() if t.dim()}
    wider = inputs.map(lambda t: torch.cat([t, t]) if t.dim() else t) if sizes == {1} else inputs
    for attempt in (wider, inputs):
        try:
            again = coupling.again(trace(model, attempt, dynamic_batch=True))
        except GraphpruneError:
            continue
        if again.alike(coupling) and again.program.dynamic_batch:
            return again, ""
    return exported(
        coupling, model, inputs
    ), f"the batch size stays {min(sizes, default=1)}, the model cannot be traced with an open one"


def _take_state(small: nn.Module, model: nn.Module, plan: Plan) -> None:
    """Give the graph module its own tensors: sliced where the plan says so, tied where they were tied."""
    originals = dict(held(model))
    new = replacements(model, plan)
    for name, tensor in list(held(small)):
        path, _, leaf = name.rpartition(".")
        owner = lookup(small, path)
        original = originals.get(name, tensor)
        if id(original) not in new:
            new[id(original)] = smaller(tensor, name, plan)
        table = owner._parameters if leaf in owner._parameters else owner._buffers
        table[leaf] = new[id(original)]
        if leaf in getattr(lookup(model, path), "_non_persistent_buffers_set", ()):
            owner._non_persistent_buffers_set.add(leaf)
