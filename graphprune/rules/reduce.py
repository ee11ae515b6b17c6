"""Ops that work along given dims: sums are exact, means and variances are statistics, orderings pin."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphprune.axes import Atom, Axis
from graphprune.program import Value
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


def _scan(zeros_stay: bool, otherwise: int = -1) -> Callable[[Call], Sequence[Dims]]:
    """A rule for ops that need every position along one dim and keep the shape (or shorten that dim, as topk)."""

    def apply(call: Call) -> Sequence[Dims]:
        dims, zeros = call.dims(call.first), call.zeros(call.first)
        along = call.dim() if call.has("dim") and dims else otherwise % max(1, len(dims))
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


@function("linalg_vector_norm norm linalg_norm linalg_matrix_norm frobenius_norm")
def norm(call: Call) -> Sequence[Dims]:
    """A norm is a sum of powers: zeros do not change it, unless its order is not positive; matrix norms solve."""
    order = call["ord"] if call.has("ord") else call["p"]
    positive = order in (None, "fro") or (isinstance(order, (int, float)) and order > 0)
    dims = _dims(call, len(call.dims(call.first)))
    of_matrix = call.node.op.startswith("linalg_") and call.node.op != "linalg_vector_norm" and len(dims) == 2
    return _reduce(_sum if positive and not (of_matrix and order not in (None, "fro")) else _whole)(call)


@function("renorm")
def renorm(call: Call) -> Sequence[Dims]:
    """Each slice along a dim is scaled down to a largest norm over all the others."""
    dims, zeros, dim = call.dims(call.first), call.zeros(call.first), call.dim()
    for d, axis in enumerate(dims):
        if d != dim:
            _sum(call, axis, zeros[d])
        call.tie((0, d), (1, d))
    call.zero = [zeros]
    return [dims]


@function("quantile nanquantile")
def quantile(call: Call) -> Sequence[Dims]:
    """Order statistics along a dim; several of them are listed in a new dim in front."""
    listed = isinstance(call["q"], Value) and len(call["q"].shape) == 1
    shape = call.shape[1:] if listed else call.shape
    dims = call.dims(call.first)
    gone = _dims(call, len(dims))
    for d in gone:
        _whole(call, dims[d], False)
    keepdim = len(shape) == len(dims)
    kept = [Atom(1) if d in gone else a for d, a in enumerate(dims) if keepdim or d not in gone]
    if listed:
        call.pin(call.dims(call["q"])[0], "quantile lists them")
        kept = [call.pinned(call.shape[0], "quantile lists them"), *kept]
    return [tuple(kept)]


@function("sum_to_size")
def sum_to_size(call: Call) -> Sequence[Dims]:
    """What an expansion repeated is added up again."""
    dims, zeros, shape = call.dims(call.first), call.zeros(call.first), call.shape
    extra, out, flags = len(dims) - len(shape), [], []
    for d, axis in enumerate(dims):
        gone = d < extra or shape[d - extra] != axis.size
        if gone:
            _sum(call, axis, zeros[d])
        if d >= extra:
            out.append(Atom(1) if gone else axis)
            flags.append(zeros[d] and not gone)
            call.literal(out[-1], "size", d - extra)
    call.zero = [tuple(flags)]
    return [tuple(out)]


REDUCE = table(
    op("sum nansum", _reduce(_sum)),
    op("mean nanmean", _reduce(_statistic)),
    op("var std", _reduce(_statistic)),
    op("var_mean std_mean", _reduce(_statistic, (True, True))),
    op("any", _reduce(_sum)),
    op("count_nonzero", _reduce(_sum)),
    op(
        "all prod argmax argmin logsumexp median nanmedian mode aminmax kthvalue nuclear_norm",
        _reduce(_whole, (False,)),
    ),
    op("softmax log_softmax _softmax _log_softmax cumprod argsort logcumsumexp", _scan(zeros_stay=False)),
    op("cumsum cummax cummin sort topk", _scan(zeros_stay=True)),
    op("msort", _scan(zeros_stay=True, otherwise=0)),
    module=globals(),
)
