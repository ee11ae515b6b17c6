"""What cannot be traced: refused before it is tried, or explained once it failed, with the advice that fits."""

from __future__ import annotations

import functools
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphprune.errors import InputError, TraceError
from graphprune.program import VIEWS, Program, Value
from graphprune.trace.inputs import Inputs
from graphprune.trace.walk import held, modules, parameters_and_buffers

LONGEST = 400
"""How many characters of what torch says about a failure are passed on."""


def check(model: object, inputs: Inputs) -> None:
    """Refuse what no front end can make sense of.

    Raises:
        InputError: the model or the inputs are not usable; the message says what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}, not a torch.nn.Module; pass the module itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("model is a ScriptModule, which has no Python to trace; pass the module it was scripted from")
    of_training, others = parameters_and_buffers(model)
    for problem in (*_parts(model), *_state([*of_training, *others]), *_given(inputs)):
        raise InputError(problem)
    _check_devices(of_training, others, inputs)


# -- parts of the model ------------------------------------------------------------------------------------------------

_REPLICATED = "torch.nn.parallel.distributed.DistributedDataParallel"
_SHARDED = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"
_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized")


def _parts(model: nn.Module) -> Iterator[str]:
    if isinstance(model, nn.DataParallel):
        yield "model is wrapped in DataParallel; prune model.module and wrap the result again"
    for path, part in modules(model):
        kinds = _kinds(type(part))  # type: ignore[arg-type]
        what, name = path or "model", type(part).__name__
        if _REPLICATED in kinds:
            inner = f"put {path}.module in its place, prune the model" if path else "prune model.module"
            yield f"{what} is wrapped in {name}; {inner} and wrap the result again"
        elif _SHARDED in kinds:
            yield f"{what} is sharded by {name}; prune the model before it is sharded, then shard the result"
        elif isinstance(part, torch.jit.ScriptModule) and held(part):
            yield f"{what} is a ScriptModule with weights; put the module it was made from in its place"
        elif type(part).__module__.startswith(_QUANTISED):
            yield f"{what} is a quantised {name}; prune the float model and quantise the result"


@functools.cache
def _kinds(part: Any) -> frozenset[str]:
    """The full names of a class and of those it derives from."""
    return frozenset(f"{kind.__module__}.{kind.__qualname__}" for kind in part.__mro__)


# -- tensors -----------------------------------------------------------------------------------------------------


Named = Iterable[tuple[str, torch.Tensor]]


def _state(named: Named) -> Iterator[str]:
    for name, tensor in named:
        if nn.parameter.is_lazy(tensor):
            yield f"{name} is not initialised yet; run the model once on real inputs, then prune it"
        elif type(tensor).__name__ == "DTensor":
            yield f"{name} is sharded over devices; prune the model before it is sharded, then shard the result"
        elif (kind := _odd_kind(tensor)) is not None:
            yield f"{name} is {kind[0]}; prune the model with {kind[1]} in its place"


def _given(inputs: Inputs) -> Iterator[str]:
    tensors = inputs.tensors()
    for k, tensor in enumerate(tensors):
        if (kind := _odd_kind(tensor)) is not None:
            yield f"tensor {k} of the example inputs is {kind[0]}; pass {kind[1]}"
    if tensors and not any(tensor.numel() for tensor in tensors):
        yield "all example inputs are empty; pass a batch of at least one, as there is nothing to compare otherwise"


_ODD: tuple[tuple[Callable[[torch.Tensor], bool], str, str], ...] = (
    (lambda t: t.is_quantized, "a quantised tensor", "the float one, .dequantize()"),
    (lambda t: t.is_nested, "a nested tensor", "a padded one, torch.nested.to_padded_tensor(t, 0.0)"),
    (lambda t: t.layout is not torch.strided, "a sparse tensor", "the dense one, .to_dense()"),
)


def _odd_kind(tensor: torch.Tensor) -> tuple[str, str] | None:
    """What a tensor is that no op can be followed through, and what to use instead."""
    if tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested:
        return None
    return next(((what, instead) for holds, what, instead in _ODD if holds(tensor)), None)


def _check_devices(of_training: Named, others: Named, inputs: Inputs) -> None:
    """Refuse inputs and parameters that are apart.

    Raises:
        InputError: they are on different devices, or a part of the parameters has no values.
    """
    unloaded = [(name, p) for name, p in of_training if p.is_meta]
    homes = {tensor.device for _, tensor in (*of_training, *others)}
    if unloaded and any(not p.is_meta for _, p in of_training):
        count = len({id(p) for _, p in unloaded})
        raise InputError(
            f"{count} parameters, such as {unloaded[0][0]}, are on the meta device and the others are not; "
            "load their values first"
        )
    given = {t.device for t in inputs.tensors()}
    if len(homes) == 1 and given and homes != given:
        home = homes.pop()
        away = ", ".join(sorted(str(d) for d in given))
        raise InputError(f"example inputs are on {away} but the model is on {home}; move them with .to({str(home)!r})")


# -- what the code does ------------------------------------------------------------------------------------------


def check_written(program: Program) -> None:
    """Refuse a model whose forward writes to its own parameters: it is another one after each call.

    Raises:
        Rewritten: it does; the message names the parameter and the line.
    """
    root: dict[Value, Value] = {}
    for node in program.nodes:
        if not node.values():
            continue
        first = root.get(node.values()[0], node.values()[0])
        if node.in_place and first.kind == "parameter":
            raise Rewritten(written(program.model_class, first.target, f", by {node}"))
        if node.in_place or node.op in VIEWS:
            root.update(dict.fromkeys(node.outputs, first))


class Rewritten(TraceError):
    """A forward writes to a parameter; no other front end need be asked."""


def written(model: str, name: str, by: str = "") -> str:
    """The message for a forward that writes to a parameter."""
    return (
        f"{model} writes to its parameter {name} in its forward{by}, so it is another model after each call; "
        "move that out of the forward (after the optimiser's step), or under `if self.training:`"
    )


# -- what went wrong -------------------------------------------------------------------------------------------------


def own_failure(model: nn.Module, inputs: Inputs, cause: Exception) -> str:
    """The message for a model that does not run on its example inputs."""
    shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in inputs.tensors())
    return (
        f"{type(model).__name__} itself fails on these example inputs ({shapes or 'no tensors'}): "
        f"{type(cause).__name__}: {_first_line(cause)}{_stopped_at(cause)}\n"
        "pass inputs that model(*args, **kwargs) accepts: a tensor, a tuple of arguments or a dict of keyword arguments"
    )


def export_failure(model: nn.Module, error: Exception) -> str:
    """The message for a model that runs, but cannot be exported."""
    return (
        f"{type(model).__name__} runs, but cannot be traced: {type(error).__name__}: {_first_line(error)}"
        f"{_stopped_at(error)}\n{_advice(model, str(error))}"
    )


def _advice(model: nn.Module, error: str) -> str:
    said = next((advice for text, advice in _SAID if text in error), None)
    suspects = (
        f"{path or 'it'} is a {type(part).__name__}, which no trace can look into; {advice}"
        for path, part in modules(model)
        for belongs, advice in _SUSPECTS
        if belongs(part)
    )
    return said or next(suspects, _GENERAL)


_SUSPECTS: tuple[tuple[Callable[[nn.Module], bool], str], ...] = (
    (lambda m: isinstance(m, torch.jit.ScriptModule), "put the module it was made from in its place"),
    (
        lambda m: type(m).__module__.startswith("torch.ao.quantization"),
        "prune the float model first and prepare the result for quantisation",
    ),
)
_SAID = (
    ("fake impl", "give the op a fake implementation that says the shape of its output: @torch.library.register_fake"),
    (
        "Unsupported input type",
        "pass tensors, numbers, strings and containers of them; another class is taken apart once it is "
        "registered with torch.export.register_dataclass or torch.utils._pytree.register_pytree_node",
    ),
    (
        "in output, which is not a known type",
        "return tensors in tuples, lists, dicts or dataclasses; another class is taken apart once it is "
        "registered with torch.utils._pytree.register_pytree_node",
    ),
    (
        "inference tensor",
        "its weights were made under torch.inference_mode(); build the model outside it and load them "
        "with load_state_dict",
    ),
)
_GENERAL = (
    "its path through the code must not depend on the values of tensors, and values must not leave torch (.numpy(), "
    "gradients taken inside); move such code out of the model, write a branch with torch.where, or prune the submodule "
    "that can be traced"
)


def _stopped_at(error: Exception) -> str:
    """The innermost frame of the user's own code in the traceback, as a clause."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_foreign(frame.filename)]
    if not frames:
        return ""
    last = frames[-1]
    return f"\n  stopped at {last.filename}:{last.lineno}, in {last.name}: {last.line}"


_FOREIGN = (f"{Path(torch.__file__).parent}/", f"{Path(__file__).parent.parent}/", "<")
_STANDARD = f"{sysconfig.get_paths()['stdlib']}/"


def _is_foreign(path: str) -> bool:
    """Whether a source file is torch's, this package's or the standard library's, which say little to the user."""
    standard = path.startswith(_STANDARD) and "site-packages" not in path
    return standard or path.startswith(_FOREIGN) or "/sympy/" in path


def _first_line(error: Any) -> str:
    """What an error says first; of a condition on symbolic sizes, which can fill pages, the beginning."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
