"""Ops that work along given dims: sums are exact, means and variances are statistics, orderings pin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphprune.axes import Atom, Axis
from graphprune.rules.call import Call, Dims
from graphprune.rules.registry import function, op, table
from graphprune.rules.text import rule


def _dims(call: Call, rank: int) -> list[int]:
    """The dims an op works along; all of them where it names none."""
    given = call["dim"] if call.has("dim") else None
    if given is None or given == [] or given == ():
        return list(range(rank))
    return sorted({d % max(rank, 1) for d in (given if isinstance(given, (list, tuple)) else [given])})


Along = Callable[[Call, Axis, bool], None]


def _sum(call: Call, axis: Axis, zero: bool) -> None:
    if not zero:
        call.pin(axis, f"{call.node.op} sums over it, and its removed channels are not zero there")


def _statistic(call: Call, axis: Axis, zero: bool) -> None:
    if axis.size > 1:
        call.renormalised.append(axis)


def _whole(call: Call, axis: Axis, zero: bool) -> None:
    call.pin(axis, f"{call.node.op} compares or orders its positions")


def _reduce(along: Along, zeros_stay: Sequence[bool] = (True,)) -> Callable[[Call], Sequence[Dims]]:
    """A rule for ops that reduce dims away (or to one position, with keepdim).

    Args:
        along: what to state about each reduced axis.
        zeros_stay: per output, whether zeros along a dim that stays give zeros.
    """

    def apply(call: Call) -> Sequence[Dims]:
        dims, zeros = call.dims(call.first), call.zeros(call.first)
        gone = _dims(call, len(dims))
        for d in gone:
            along(call, dims[d], zeros[d])
        keepdim = len(call.shape) == len(dims) and bool(gone)
        kept = [d for d in range(len(dims)) if d not in gone or keepdim]
        out = tuple(Atom(1) if d in gone else dims[d] for d in kept)
        for j, d in enumerate(kept):
            if d not in gone:
                call.tie((0, d), (1, j))
        outputs = [out for _ in call.node.outputs]
        stay = [*zeros_stay, *[False] * len(outputs)]
        call.zero = [tuple(s and d not in gone and zeros[d] for d in kept) for _, s in zip(outputs, stay, strict=False)]
        return outputs

    return apply


def _scan(zeros_stay: bool) -> Callable[[Call], Sequence[Dims]]:
    """A rule for ops that need every position along one dim and keep the shape (or shorten that dim, as topk)."""

    def apply(call: Call) -> Sequence[Dims]:
        dims, zeros = call.dims(call.first), call.zeros(call.first)
        along = call.dim() if call.has("dim") and dims else len(dims) - 1
        outputs = []
        for value in call.node.outputs:
            out = list(dims)
            if dims:
                call.pin(dims[along], f"{call.node.op} compares or orders its positions")
                if value.shape[along] != dims[along].size:
                    out[along] = call.pinned(value.shape[along], f"{call.node.op} makes it")
            outputs.append(tuple(out))
        for d in range(len(dims)):
            if d != along:
                call.tie((0, d), *((1 + i, d) for i in range(len(outputs))))
        call.zero = [tuple(zeros_stay and i == 0 and z for z in zeros) for i in range(len(outputs))]
        return outputs

    return apply


_OF_TWO = rule("*s, *s -> *s", zero="a + b")


@function("max min amax amin")
def extreme(call: Call) -> Sequence[Dims]:
    """Along dims, or of two tensors element by element."""
    if call.has("other"):
        return _OF_TWO(call)
    return _reduce(_whole, (True, False))(call)


@function("linalg_vector_norm norm")
def norm(call: Call) -> Sequence[Dims]:
    """A norm is a sum of powers: zeros do not change it, unless its order is not positive."""
    order = call["ord"] if call.has("ord") else call["p"]
    positive = order is None or (isinstance(order, (int, float)) and order > 0)
    return _reduce(_sum if positive else _whole)(call)


REDUCE = table(
    op("sum", _reduce(_sum)),
    op("mean", _reduce(_statistic)),
    op("var std", _reduce(_statistic)),
    op("var_mean std_mean", _reduce(_statistic, (True, True))),
    op("any", _reduce(_sum)),
    op("count_nonzero", _reduce(_sum)),
    op("all prod argmax argmin logsumexp median nanmedian mode", _reduce(_whole, (False,))),
    op("softmax log_softmax _softmax _log_softmax cumprod argsort logcumsumexp", _scan(zeros_stay=False)),
    op("cumsum cummax cummin sort topk", _scan(zeros_stay=True)),
    module=globals(),
)
