"""Copies in float64 of what the emitters make, so that a comparison is not blurred by rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graphprune.errors import RewriteError
from graphprune.rewrite.graft import retold, source_of
from graphprune.rewrite.state import deepcopied, results
from graphprune.trace import Inputs, held, modules, run


def copied(module: nn.Module) -> nn.Module:
    """A copy to compare with, in eval mode: casting may compute weights anew, which in training moves buffers."""
    made = deepcopied(module, dict(results(module)))
    for _, part in modules(made):
        if not isinstance(part, torch.jit.ScriptModule):
            vars(part)["training"] = False
    return made


def _wider(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def raised(module: nn.Module) -> nn.Module:
    """A copy in float64, with the dtypes that its graphs and grafts state."""
    made: nn.Module = copied(module)._apply(_wider)  # type: ignore[no-untyped-call]

    def wider(argument: Any) -> Any:
        return torch.float64 if argument is torch.float32 else argument

    for _, part in modules(made):
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.args = fx.node.map_aggregate(node.args, wider)
                node.kwargs = fx.node.map_aggregate(node.kwargs, wider)
            part.recompile()
        elif source_of(part):
            retold(part, source_of(part).replace("torch.float32", "torch.float64"))
    return made


def is_traced(module: nn.Module) -> bool:
    """Whether some of its code comes from a trace, which states dtypes that the user's code may only have inherited."""
    return any(isinstance(part, fx.GraphModule) or source_of(part) for _, part in modules(module))


_HALF = (torch.bfloat16, torch.float16)


def to_compare(model: nn.Module, inputs: Inputs, limit: int) -> tuple[bool, nn.Module, Inputs]:
    """Model and inputs to compare with, and whether they were raised to float64.

    A copy counts only if it runs, and without its original: that would not be zeroed along with it.
    """
    if not is_double(model) and sum(p.numel() for p in model.parameters()) <= limit:
        try:
            wider, doubled = raised(model), inputs.map(_wider)
            with apart(model):
                run(wider, doubled)
            return True, wider, doubled
        except Exception:  # some models fix float32 in their code; they are compared as they are
            pass
    return False, in_full_precision(model), inputs.map(lambda t: t.float() if t.dtype in _HALF else t)


def is_double(model: nn.Module) -> bool:
    """Whether all weights are in float64 as they are."""
    return {t.dtype for _, t in held(model) if t.is_floating_point()} == {torch.float64}


def in_full_precision(model: nn.Module) -> nn.Module:
    """`model` itself, or a float32 copy of a half-precision one, so that rounding cannot hide an error."""
    if not any(t.dtype in _HALF for _, t in held(model)):
        return model
    return copied(model).float()


@contextmanager
def apart(original: nn.Module) -> Iterator[None]:
    """Fail where a copy runs a module or reads a weight of the original, through what was copied as it was.

    Closures, weak references and hooks are.

    Raises:
        RewriteError: it does; the message names the module or the weight.
    """
    names = {id(module): name for name, module in modules(original)}

    def check(module: nn.Module, _: Any) -> None:
        if id(module) in names:
            raise RewriteError(f"the copy still runs {names[id(module)] or 'the module itself'} of the original")

    handle = nn.modules.module.register_module_forward_pre_hook(check)
    try:
        with _Unread({id(tensor): name for name, tensor in held(original)}):
            yield
    finally:
        handle.remove()


class _Unread(TorchFunctionMode):
    """Fails where an op is given one of these tensors."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Look at the operands, and run the op.

        Raises:
            RewriteError: one of them is of the original.
        """
        for operand in pytree.tree_leaves((args, kwargs)):
            if id(operand) in self.names:
                raise RewriteError(f"the copy still reads {self.names[id(operand)]} of the original")
        return func(*args, **(kwargs or {}))
