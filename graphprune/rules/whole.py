"""Ops that need every position along some dims: transforms, differences, losses, solvers; other dims are free."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphprune.axes import Axis
from graphprune.rules.call import Call, Dims
from graphprune.rules.registry import function, op, table
from graphprune.rules.shape import straight
from graphprune.rules.text import rule

_FFT = "fft ifft rfft irfft hfft ihfft fft2 ifft2 rfft2 irfft2 hfft2 ihfft2 fftn ifftn rfftn irfftn fftshift ifftshift"
_ALGEBRA = """
    linalg_inv linalg_pinv linalg_svd linalg_svdvals linalg_qr linalg_eigh linalg_eigvalsh linalg_cholesky linalg_solve
    linalg_solve_triangular linalg_det linalg_slogdet linalg_matrix_exp matrix_exp linalg_matrix_power matrix_power
    linalg_householder_product linalg_lu_factor inverse det logdet slogdet svd
"""
_LOSSES = """
    cross_entropy_loss nll_loss nll_loss_nd kl_div binary_cross_entropy binary_cross_entropy_with_logits ctc_loss
    cosine_embedding_loss margin_ranking_loss hinge_embedding_loss triplet_margin_loss soft_margin_loss
    multi_margin_loss multilabel_margin_loss poisson_nll_loss
"""
_COUNTED = "histc bincount nonzero argwhere masked_select _unique2 unique_consecutive"
_ORDERED = "take put as_strided resize_as cartesian_prod combinations vander cov corrcoef trace affine_grid_generator"


def whole(reason: str) -> Callable[[Call], Sequence[Dims]]:
    """A rule for ops of which every operand stays whole."""

    def apply(call: Call) -> Sequence[Dims]:
        stated = reason.format(op=call.node.op)
        for value in call.node.values():
            for axis in call.dims(value):
                call.pin(axis, stated)
        return [tuple(call.pinned(size, f"{call.node.op} makes it") for size in v.shape) for v in call.node.outputs]

    return apply


def along(call: Call, gone: Sequence[int], reason: str) -> Sequence[Dims]:
    """The dims `gone` of the first operand stay whole and may change their size; zeros along the others stay."""
    dims, zeros = call.dims(call.first), call.zeros(call.first)
    for d in gone:
        call.pin(dims[d], reason)
    straight(call, [(d, d) for d in range(len(dims)) if d not in gone])
    outputs, call.zero = [], []
    for value in call.node.outputs:
        kept = [d not in gone or size == dims[d].size for d, size in enumerate(value.shape)]
        outputs.append(
            tuple(a if k else call.pinned(n, reason) for a, k, n in zip(dims, kept, value.shape, strict=True))
        )
        call.zero.append(tuple(z and d not in gone for d, z in enumerate(zeros)))
    return outputs


def named(call: Call, default: Sequence[int]) -> list[int]:
    """The dims an op names, counted from the front; `default` where it names none."""
    rank, given = len(call.dims(call.first)), call["dim"]
    listed = given if isinstance(given, (list, tuple)) else default if given is None else [given]
    return sorted({d % max(rank, 1) for d in listed})


@function(" ".join(f"fft_{name}" for name in _FFT.split()))
def transform(call: Call) -> Sequence[Dims]:
    """A Fourier transform mixes the positions of its dims."""
    rank = len(call.dims(call.first))
    last = [-2, -1] if call.node.op.endswith("2") else range(rank)
    sizes = call["s"] if call.has("s") else None
    return along(call, named(call, range(-len(sizes), 0) if sizes else last), f"{call.node.op} mixes its positions")


@function("diff trapz trapezoid cumulative_trapezoid gradient")
def difference(call: Call) -> Sequence[Dims]:
    """Neighbours along a dim; what goes before and after it is concatenated, so only one tensor has a rule here."""
    others = call.node.values()[1:]
    if others or call.node.op == "gradient":
        return whole("{op} compares its neighbours")(call)
    gone = named(call, [-1])
    if len(call.shape) < len(call.dims(call.first)):
        return _reduced(call, gone[0])
    return along(call, gone, f"{call.node.op} compares its neighbours")


def _reduced(call: Call, gone: int) -> Sequence[Dims]:
    dims, zeros = call.dims(call.first), call.zeros(call.first)
    call.pin(dims[gone], f"{call.node.op} compares its neighbours")
    kept = [d for d in range(len(dims)) if d != gone]
    straight(call, [(d, j) for j, d in enumerate(kept)])
    call.zero = [tuple(zeros[d] for d in kept)]
    return [tuple(dims[d] for d in kept)]


@function("rot90")
def rotate(call: Call) -> Sequence[Dims]:
    """A quarter turn swaps two dims and reverses one; both stay whole."""
    dims, zeros = call.dims(call.first), call.zeros(call.first)
    first, second = (d % len(dims) for d in call["dims"])
    order = list(range(len(dims)))
    if call["k"] % 2:
        order[first], order[second] = second, first
    for d in (first, second):
        call.pin(dims[d], "rot90 reverses it")
    straight(call, [(d, j) for j, d in enumerate(order)])
    call.zero = [tuple(zeros[d] for d in order)]
    return [tuple(dims[d] for d in order)]


_PAIR = rule("*s, *s -> *s", zero="a + b")


@function("mse_loss l1_loss smooth_l1_loss huber_loss")
def distance(call: Call) -> Sequence[Dims]:
    """A distance per position, kept as it is, averaged or summed."""
    if call["reduction"] == 0:
        return _PAIR(call)
    pairs = [(call.dims(v), call.zeros(v)) for v in call.node.values()]
    for (a, zero), (b, other) in zip(*(zip(*pair, strict=True) for pair in pairs), strict=True):
        axis: Axis = call.unify(a, b)
        if call["reduction"] == 1:
            call.renormalised.append(axis)
        elif not (zero and other):
            call.pin(axis, f"{call.node.op} sums over it, and its removed channels are not zero there")
    return [()]


WHOLE = table(
    op(_ALGEBRA, whole("{op} solves for all of it")),
    op(_LOSSES, whole("{op} weighs every position")),
    op(_COUNTED, whole("{op} counts or picks by value")),
    op(_ORDERED, whole("{op} picks positions of it")),
    op("stft", "*b t!, w!? -> *b f! u!", zero="a"),
    op("istft", "*b f! u!, w!? -> *b t!", zero="a"),
    op("pdist", "n! k~ -> m!", summand="a"),
    module=globals(),
)
