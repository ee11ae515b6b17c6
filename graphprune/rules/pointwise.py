"""Element-wise ops: dims align at the right, and a removed zero stays zero where f(0) = 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from graphprune.rules.call import Call, Dims, operand_values
from graphprune.rules.registry import function, op, table
from graphprune.rules.text import rule

ZERO_TO_ZERO = """
    relu relu6 leaky_relu gelu silu mish tanh hardswish elu selu celu rrelu softsign
    sin tan asin atan sinh asinh expm1 log1p erf neg negative abs absolute square sqrt
    sign sgn floor ceil round trunc frac
    dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout
    clone contiguous alias detach to _to_copy lift_fresh_copy lift_fresh type_as nan_to_num positive real imag conj
    resolve_conj resolve_neg deg2rad rad2deg hardshrink softshrink tanhshrink float double half bool int long
"""
NOT_ZERO = """
    sigmoid hardsigmoid log_sigmoid exp exp2 softplus log log2 log10 logit cos cosh acos acosh reciprocal rsqrt erfc
    erfinv digamma lgamma logical_not bitwise_not isnan isinf isfinite ones_like full_like rand_like randn_like
    empty_like bernoulli atanh special_expit native_sigmoid
"""

_ZERO = rule("*s -> *s", zero="a")
_NOT_ZERO = rule("*s -> *s", zero="1")

_BINARY = {
    "add": "a + b",
    "sub": "a + b",
    "rsub": "a + b",
    "subtract": "a + b",
    "mul": "a*b",
    "multiply": "a*b",
    "div": "a",
    "divide": "a",
    "true_divide": "a",
    "floor_divide": "a",
    "fmod": "a",
    "remainder": "a",
    "maximum": "a + b",
    "minimum": "a + b",
    "fmax": "a + b",
    "fmin": "a + b",
    "copysign": "a",
    "atan2": "a",
    "hypot": "a + b",
    "logical_and": "a*b",
    "logical_or": "a + b",
    "logical_xor": "a + b",
    "bitwise_and": "a*b",
    "bitwise_or": "a + b",
    "bitwise_xor": "a + b",
    "__and__": "a*b",
    "__or__": "a + b",
    "__xor__": "a + b",
    "eq": "1",
    "ne": "a + b",
    "lt": "a + b",
    "gt": "a + b",
    "le": "1",
    "ge": "1",
    "copy": "b",
}


def _if(holds: Callable[[Call], bool]) -> Callable[[Call], Sequence[Dims]]:
    """A unary op whose f(0) depends on its arguments."""
    return lambda call: (_ZERO if holds(call) else _NOT_ZERO)(call)


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, (int, float)) else otherwise


@function("pow")
def power(call: Call) -> Sequence[Dims]:
    """0 ** p is 0 for a positive number p."""
    tensors = [v for v in operand_values(call.node) if v is not None]
    if len(tensors) == 2:
        return rule("*s, *s -> *s")(call)
    return (_ZERO if _number(call["exponent"], -1.0) > 0 and len(tensors) == 1 else _NOT_ZERO)(call)


@function("clamp clip clamp_min clamp_max hardtanh")
def clamp(call: Call) -> Sequence[Dims]:
    """Zero stays zero if it is within the limits."""
    if len([v for v in operand_values(call.node) if v is not None]) > 1:
        return rule("*s, *s?, *s? -> *s")(call)
    low = next((call[n] for n in ("min", "min_val") if call[n] is not None), None)
    high = next((call[n] for n in ("max", "max_val") if call[n] is not None), None)
    return (_ZERO if _number(low, 0.0) <= 0 <= _number(high, 0.0) else _NOT_ZERO)(call)


@function("masked_fill")
def masked_fill(call: Call) -> Sequence[Dims]:
    """The mask lies over the tensor; filling with anything but 0 leaves no zeros behind."""
    return _FILLED[isinstance(call["value"], (int, float)) and call["value"] == 0](call)


_FILLED = {True: rule("*s, *s -> *s", zero="a"), False: rule("*s, *s, *v? -> *s", checked=False)}

POINTWISE = table(
    op(ZERO_TO_ZERO, _ZERO),
    op(NOT_ZERO, _NOT_ZERO),
    *(op(name, "*s, *s -> *s", zero=zero) for name, zero in _BINARY.items()),
    op("where", "*s, *s?, *s? -> *s", zero="b + c"),
    op("addcmul", "*s, *s, *s -> *s", zero="a + b*c"),
    op("addcdiv", "*s, *s, *s -> *s", zero="a + b"),
    op("lerp", "*s, *s, *s? -> *s", zero="a + b"),
    op("prelu", "b c *s, c -> b c *s", zero="a"),
    op("threshold", _if(lambda call: _number(call["threshold"], -1.0) >= 0 and call["value"] == 0)),
    op("fill", _if(lambda call: call["value"] == 0)),
    op("zero zeros_like", "*s -> *s", zero=""),
    module=globals(),
)
