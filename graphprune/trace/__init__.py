"""Front ends: a model and example inputs in, a `Program` out.

`record` notes the ATen calls of one run on the meta device: quick, but its program cannot be run. `export` asks
`torch.export` for a graph that can be run and rewritten, with the batch size left open if wanted. Both see the same
ops, before autograd or decompositions: a convolution or an attention product is one node. The model is left as it was.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from graphprune.collector import paused
from graphprune.errors import InputError, TraceError
from graphprune.program import Program
from graphprune.trace.export import export, nested_graph
from graphprune.trace.inputs import PLAIN, Inputs, forget, is_plain, output_tensors, run, same_random_numbers, untouched
from graphprune.trace.play import StandIn, play
from graphprune.trace.record import record
from graphprune.trace.refuse import Rewritten, check, check_written, own_failure
from graphprune.trace.schema import signature
from graphprune.trace.tree import register
from graphprune.trace.walk import held, modules, parameters

__all__ = [
    "PLAIN",
    "Inputs",
    "StandIn",
    "forget",
    "held",
    "is_plain",
    "modules",
    "nested_graph",
    "output_tensors",
    "own_failure",
    "parameters",
    "play",
    "register",
    "run",
    "same_random_numbers",
    "signature",
    "trace",
    "untouched",
]

FrontEnd = Literal["auto", "record", "export"]


def trace(
    model: nn.Module, example_inputs: Any, *, dynamic_batch: bool = False, front_end: FrontEnd = "auto"
) -> Program:
    """Trace `model` into a `Program`.

    Args:
        model: any module; it is not modified, and its weights are not copied (they may be on the meta device).
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or an `Inputs`.
        dynamic_batch: leave the size of dim 0 of every input open, where the model allows it; needs "export".
        front_end: "record" notes the calls of one run on the meta device, "export" uses `torch.export`; "auto" records
            what can be recorded and exports the rest.
    Raises:
        InputError: the arguments are not usable: not a module, wrong device, or the model itself fails on them.
        TraceError: the model runs but cannot be traced; the message names the line of the user's code.

    Example:
        >>> program = trace(nn.Linear(3, 5), torch.zeros(2, 3))
        >>> [node.op for node in program.nodes]
        ['linear']
    """
    if front_end not in ("auto", "record", "export") or (dynamic_batch and front_end == "record"):
        raise InputError(f"front_end={front_end!r}; it is 'auto', 'record' or, with an open batch size, 'export'")
    inputs = Inputs.of(example_inputs)
    check(model, inputs)
    register((inputs.args, dict(inputs.kwargs)))
    unrecorded = ""
    if front_end == "record" or (front_end == "auto" and not dynamic_batch):
        try:
            with paused(), untouched(model, computing=False), torch.no_grad():
                program = record(model, inputs)
            check_written(program)
            return program
        except Rewritten as error:
            raise TraceError(str(error)) from error
        except Exception as error:
            unrecorded = f"{type(error).__name__}: {error}"
            if front_end == "record":
                message = f"{type(model).__name__} cannot be recorded: {unrecorded}\nuse front_end='auto'"
                raise TraceError(message) from error
    with untouched(model), torch.no_grad():
        inputs = inputs.map(torch.clone)  # one tensor passed twice stands for two; and code may write to its inputs
        batch_dims = [(0,) if t.dim() else () for t in inputs.tensors()] if dynamic_batch else []
        program = replace(export(model, inputs, batch_dims), unrecorded=unrecorded)
    check_written(program)
    return program
