"""What stored code may call: ops of torch that graphprune has a rule for, and a table of functions of numbers."""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from graphprune.errors import ArtefactError
from graphprune.rules import RULES, find

FUNCTIONS: Mapping[str, tuple[Callable[..., Any], str]] = {
    "add": (operator.add, "{} + {}"),
    "sub": (operator.sub, "{} - {}"),
    "mul": (operator.mul, "{} * {}"),
    "floordiv": (operator.floordiv, "{} // {}"),
    "truediv": (operator.truediv, "{} / {}"),
    "mod": (operator.mod, "{} % {}"),
    "pow": (operator.pow, "{} ** {}"),
    "neg": (operator.neg, "-{}"),
    "eq": (operator.eq, "{} == {}"),
    "ne": (operator.ne, "{} != {}"),
    "lt": (operator.lt, "{} < {}"),
    "le": (operator.le, "{} <= {}"),
    "gt": (operator.gt, "{} > {}"),
    "ge": (operator.ge, "{} >= {}"),
    "is": (operator.is_, "{} is {}"),
    "and": (operator.and_, "{} & {}"),
    "or": (operator.or_, "{} | {}"),
    "not": (operator.not_, "not {}"),
    "both": (lambda first, second: first and second, "{} and {}"),
    "either": (lambda first, second: first or second, "{} or {}"),
    "item": (operator.getitem, "{}[{}]"),
    "shape": (lambda tensor: tensor.shape, "{}.shape"),
    "device": (lambda tensor: tensor.device, "{}.device"),
    "assert": (torch._assert, "torch._assert({}, {})"),
    "trunc": (math.trunc, "math.trunc({})"),
    "floor": (math.floor, "math.floor({})"),
    "ceil": (math.ceil, "math.ceil({})"),
    "sym_max": (torch.sym_max, "torch.sym_max({}, {})"),
    "sym_min": (torch.sym_min, "torch.sym_min({}, {})"),
    "sym_float": (torch.sym_float, "torch.sym_float({})"),
    "sym_int": (torch.sym_int, "torch.sym_int({})"),
    "sym_not": (torch.sym_not, "torch.sym_not({})"),
}
"""Per name, what is called and how it is written."""
BY_FUNCTION: Mapping[Any, str] = {function: name for name, (function, _) in FUNCTIONS.items()}
HIGHER = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
"""Ops that run one other function, once."""
WITHOUT_RULE = frozenset({"sym_size", "_assert_async", "_assert_scalar", "_assert_tensor_metadata", "item"})
"""Ops of aten that traces hold beside those with a rule."""
_OP = re.compile(r"[A-Za-z_]\w{0,99}\.\w{1,99}\.\w{1,99}", re.ASCII)
_PLAIN = frozenset(
    {
        "Tensor",
        "int",
        "SymInt",
        "float",
        "number",
        "Scalar",
        "bool",
        "ScalarType",
        "Layout",
        "MemoryFormat",
        "Device",
        "str",
    }
)


def name_of(op: torch._ops.OpOverload) -> str:
    """How stored code names an op."""
    return str(op)


@functools.lru_cache(maxsize=4096)
def _resolved(name: str) -> torch._ops.OpOverload:
    """The op of this name.

    Raises:
        ArtefactError: there is none.
    """
    namespace, op, overload = name.split(".")
    try:
        found = getattr(getattr(getattr(torch.ops, namespace), op), overload)
    except (AttributeError, RuntimeError) as error:
        raise ArtefactError(
            f"there is no op {name} in this process; import the package that registers it, or update torch"
        ) from error
    if not isinstance(found, torch._ops.OpOverload):
        raise ArtefactError(f"{name} is no op")
    return found


def allowed(name: str, also: Collection[str] = ()) -> torch._ops.OpOverload:
    """The op of this name, if stored code may call it.

    It may where graphprune has a rule for it, as then it is known to compute tensors and no more, and where the caller
    of `load` allows it. The name is looked up among registered ops, and only if it may be called.

    Args:
        name: "namespace.op.overload".
        also: further ops that the caller trusts, as "namespace.op".
    Raises:
        ArtefactError: it may not, or there is none.
    """
    if not _OP.fullmatch(name):
        raise ArtefactError(f"{name[:80]!r} is no name of an op")
    namespace, op, _ = name.split(".")
    short = f"{namespace}.{op}"
    known = namespace == "aten" and (op in WITHOUT_RULE or find(RULES, op) is not None)
    if not known and find(RULES, short) is None and short not in also:
        raise ArtefactError(
            f"stored code calls {short}, which is not among the ops it may; if you trust it: ops=[{short!r}]"
        )
    found = _resolved(name)
    strange = [a.name for a in found._schema.arguments if not _is_plain(str(a.type)) and short not in also]
    if strange:
        raise ArtefactError(f"stored code calls {name}, which takes more than data as {strange[0]}")
    return found


def _is_plain(kind: str) -> bool:
    """Whether a type of an argument, such as Optional[List[int]], is of plain data; no data stands for a generator."""
    return set(re.findall(r"[A-Za-z]+", kind)) - {"Optional", "List"} <= _PLAIN | {"Generator"}
