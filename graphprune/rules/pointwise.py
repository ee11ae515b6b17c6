"""Element-wise ops: dims align at the right, and a removed zero stays zero where f(0) = 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from graphprune.program import Value
from graphprune.rules.call import Call, Dims, operand_values
from graphprune.rules.registry import function, op, table
from graphprune.rules.text import rule

ZERO_TO_ZERO = """
    relu relu6 leaky_relu gelu silu mish tanh hardswish elu selu celu rrelu
    sin tan asin atan sinh asinh atanh expm1 log1p erf erfinv neg negative abs absolute square sqrt
    sign sgn floor ceil round trunc frac
    clone contiguous alias detach to _to_copy lift_fresh_copy lift_fresh type_as nan_to_num positive real conj
    resolve_conj resolve_neg deg2rad rad2deg hardshrink softshrink isnan isinf
    arcsin arctan arcsinh arctanh fix signbit angle imag special_erf special_expm1 special_log1p special_entr
"""
NOT_ZERO = """
    sigmoid hardsigmoid log_sigmoid exp exp2 softplus cos cosh acos erfc logical_not bitwise_not isfinite
    ones_like full_like empty_like special_expit arccos i0 sinc special_i0 special_sinc special_erfc
"""
SINGULAR = "log log2 log10 logit reciprocal rsqrt digamma lgamma acosh arccosh polygamma"

_ZERO = rule("*s -> *s", zero="a")
_NOT_ZERO = rule("*s -> *s", zero="1")

_BINARY = {
    "add": "a + b",
    "sub": "a + b",
    "rsub": "a + b",
    "subtract": "a + b",
    "mul": "a*b",
    "multiply": "a*b",
    "maximum": "a + b",
    "minimum": "a + b",
    "fmax": "a + b",
    "fmin": "a + b",
    "copysign": "a",
    "hypot": "a + b",
    "atan2": "1",
    "arctan2": "1",
    "logaddexp": "1",
    "logaddexp2": "1",
    "heaviside": "a + b",
    "ldexp": "a",
    "isclose": "1",
    "complex": "a + b",
    "polar": "a",
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


def _not_finite(call: Call) -> None:
    """Pin the dims along which the last operand holds zeros: the op is not finite there, and 0 times that is not 0."""
    value = [v for v in operand_values(call.node) if v is not None][-1]
    for axis, zero in zip(call.dims(value), call.zeros(value), strict=True):
        if zero:
            call.pin(axis, f"{call.node.op} is not finite at the zeros of its removed channels")


@function(SINGULAR)
def singular(call: Call) -> Sequence[Dims]:
    """Not finite at 0."""
    _not_finite(call)
    return _NOT_ZERO(call)


_QUOTIENT = rule("*s, *s -> *s", zero="a")
_PLUS_QUOTIENT = rule("*s, *s, *s -> *s", zero="a + b")


@function("div divide true_divide floor_divide fmod remainder")
def quotient(call: Call) -> Sequence[Dims]:
    """0 divided by anything but 0."""
    if sum(v is not None for v in operand_values(call.node)) == 2:
        _not_finite(call)
    return _QUOTIENT(call)


@function("xlogy special_xlogy")
def times_logarithm(call: Call) -> Sequence[Dims]:
    """A * log(b)."""
    if isinstance(call["other"], Value):
        _not_finite(call)
    return _QUOTIENT(call)


@function("addcdiv")
def plus_quotient(call: Call) -> Sequence[Dims]:
    """A + b / c."""
    _not_finite(call)
    return _PLUS_QUOTIENT(call)


@function("pow float_power")
def power(call: Call) -> Sequence[Dims]:
    """0 ** p is 0 for a positive number p, and not finite for a negative one."""
    if isinstance(call["exponent"], Value):
        return _OF_TWO(call)
    exponent = call["exponent"]
    if isinstance(exponent, (int, float)) and not exponent >= 0:  # a NaN is a number that is not known yet
        return singular(call)
    return (_ZERO if _number(exponent, -1.0) > 0 else _NOT_ZERO)(call)


_OF_TWO = rule("*s?, *s -> *s")


@function("clamp clip clamp_min clamp_max hardtanh")
def clamp(call: Call) -> Sequence[Dims]:
    """Zero stays zero if it is within the limits."""
    if len([v for v in operand_values(call.node) if v is not None]) > 1:
        return rule("*s, *s?, *s? -> *s")(call)
    low = next((call[n] for n in ("min", "min_val") if call[n] is not None), None)
    high = next((call[n] for n in ("max", "max_val") if call[n] is not None), None)
    return (_ZERO if _number(low, 0.0) <= 0 <= _number(high, 0.0) else _NOT_ZERO)(call)


@function("prelu")
def prelu(call: Call) -> Sequence[Dims]:
    """One slope per channel; without a channel dim there is one slope."""
    return (_SLOPES if len(call.shape) > 1 else _SLOPE)(call)


_SLOPES, _SLOPE = rule("b c *s, c -> b c *s", zero="a"), rule("*s, w! -> *s", zero="a")


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
    op("lerp", "*s, *s, *s? -> *s", zero="a + b"),
    op("threshold", _if(lambda call: _number(call["threshold"], -1.0) >= 0 and call["value"] == 0)),
    op("fill", _if(lambda call: call["value"] == 0)),
    op("zero zeros_like", "*s -> *s", zero=""),
    module=globals(),
)
