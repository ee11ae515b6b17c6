"""One call or more for every op that has a rule: element by element, contractions, normalisation, reductions."""

from __future__ import annotations

from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401 - defines an op

from graphprune.rules.pointwise import NOT_ZERO, SINGULAR, ZERO_TO_ZERO
from tests.rules.case import Case, c, ints, signed, t
from tests.rules.cases_shape import INDEX, SHAPE, SPACE
from tests.rules.cases_whole import PAIR, VISION, WHOLE

aten = torch.ops.aten


def _unary(name: str) -> Case:
    overloads = getattr(aten, name)
    op = overloads.default if "default" in overloads.overloads() else getattr(overloads, overloads.overloads()[0])
    if name in ("bitwise_not", "logical_not"):
        return c(op, t(2, 3, 5) > 0.5, free=3)
    x = t(2, 3, 5) + (1 if name in ("acosh", "arccosh") else 0)
    extra = _EXTRA.get(name, ())
    if name == "polygamma":
        return c(op, 1, x, free=0)
    x = torch.complex(x, x) if name == "imag" else x
    return Case(op, (x, *extra), free=0 if name in SINGULAR.split() else 3)


_EXTRA: dict[str, tuple[Any, ...]] = {
    "dropout": (0.5, False),
    "feature_dropout": (0.5, False),
    "alpha_dropout": (0.5, False),
    "feature_alpha_dropout": (0.5, False),
    "to": (torch.device("cpu"), torch.float32),
    "type_as": (torch.zeros(1),),
    "full_like": (3.0,),
}
# what draws random or uninitialised values cannot be compared by value; the rule is held by shape in test_rules.py
VALUELESS = {"rand_like", "randn_like", "empty_like", "empty", "new_empty", "empty_strided", "new_empty_strided"} | {
    "rand",
    "randn",
    "randint",
    "randperm",
    "randint_like",
    "bernoulli",
    "multinomial",
    "normal",
    "exponential",
    "uniform",
    "poisson",
}

DROPOUTS = "dropout feature_dropout alpha_dropout feature_alpha_dropout"
UNARY = [_unary(n) for n in f"{ZERO_TO_ZERO} {NOT_ZERO} {SINGULAR} {DROPOUTS}".split() if n not in VALUELESS]

_FLOAT_PAIRS = "arctan2 logaddexp logaddexp2 heaviside ldexp isclose complex polar add sub rsub subtract mul multiply maximum minimum fmax fmin copysign hypot atan2 eq ne lt gt le ge"
_QUOTIENTS = "xlogy special_xlogy div divide true_divide floor_divide fmod remainder"
_BOOL_PAIRS = "logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__"


def _pair(name: str, a: torch.Tensor, b: torch.Tensor, free: int, note: str) -> Case:
    overloads = getattr(aten, name)
    op = overloads.Tensor if "Tensor" in overloads.overloads() else overloads.default
    return c(op, a, b, free=free, note=note)


BINARY = [
    *(_pair(n, signed(2, 3, 5), signed(2, 3, 5) + 0.01, 3, "same") for n in _FLOAT_PAIRS.split()),
    *(_pair(n, signed(2, 3, 5), signed(3, 1), 3, "broadcast") for n in _FLOAT_PAIRS.split()),
    *(_pair(n, t(2, 3, 5), t(2, 3, 5, seed=1), 0, "same") for n in _QUOTIENTS.split()),
    *(_pair(n, t(2, 3, 5), t(3, 1), 2, "broadcast") for n in _QUOTIENTS.split()),
    *(_pair(n, t(2, 3) > 0.5, t(3, seed=1) > 0.5, 2, "bool") for n in _BOOL_PAIRS.split()),
    c(aten.add.Scalar, signed(2, 3), 1.5, free=2),
    c(aten.add.Scalar, signed(2, 3), 0, free=2, note="zero"),
    c(aten.mul.Scalar, signed(2, 3), 1.5, free=2),
    c(aten.div.Scalar, signed(2, 3), 1.5, free=2),
    c(aten.rsub.Scalar, signed(2, 3), 1.5, free=2),
    c(aten.sub.Scalar, signed(2, 3), 1.5, free=2),
    c(aten.gt.Scalar, signed(2, 3), -1.0, free=2),
    c(aten.ne.Scalar, signed(2, 3), 0, free=2),
    c(aten.add_.Tensor, signed(2, 3, 5), signed(3, 1), free=3, note="in place"),
    c(aten.copy.default, t(2, 3, 5), t(3, 1), free=3),
    c(aten.pow.Tensor_Scalar, t(2, 3), 2, free=2),
    c(aten.pow.Tensor_Scalar, t(2, 3), 0, free=2, note="to nothing"),
    c(aten.pow.Tensor_Scalar, t(2, 3), -1, free=0, note="negative"),
    c(aten.float_power.Tensor_Scalar, t(2, 3), 2, free=2),
    c(aten.xlogy.Scalar_Other, t(2, 3), 2, free=2),
    c(aten.prelu.default, signed(5), t(1), free=1, note="vector"),
    c(aten.pow.Scalar, 2.0, t(2, 3), free=2),
    c(aten.pow.Tensor_Tensor, t(2, 3), t(3), free=2),
    c(aten.clamp.default, signed(2, 3), -0.2, 0.2, free=2),
    c(aten.clamp.default, signed(2, 3), 0.1, 0.2, free=2, note="above zero"),
    c(aten.clamp.Tensor, signed(2, 3), t(3), None, free=2),
    c(aten.clip.default, signed(2, 3), -0.2, None, free=2),
    c(aten.clamp_min.default, signed(2, 3), 0.1, free=2),
    c(aten.clamp_max.default, signed(2, 3), -0.1, free=2),
    c(aten.hardtanh.default, signed(2, 3), -0.2, 0.2, free=2),
    c(aten.hardtanh.default, signed(2, 3), 0.2, 0.3, free=2, note="above zero"),
    c(aten.threshold.default, signed(2, 3), 0.1, 0.0, free=2),
    c(aten.threshold.default, signed(2, 3), 0.1, 5.0, free=2, note="to five"),
    c(aten.masked_fill.Scalar, t(2, 3, 5), t(3, 5) > 0.5, 0, free=3),
    c(aten.masked_fill.Scalar, t(2, 3, 5), t(3, 5) > 0.5, -1.0, free=3, note="not zero"),
    c(aten.masked_fill.Tensor, t(2, 3, 5), t(3, 5) > 0.5, torch.tensor(2.0, dtype=torch.float64), free=3),
    c(aten.where.self, t(3, 1) > 0.5, t(2, 3, 5), t(5), free=3),
    c(aten.where.ScalarOther, t(3, 1) > 0.5, t(2, 3, 5), 2.0, free=3),
    c(aten.where.ScalarSelf, t(3, 1) > 0.5, 0.0, t(2, 3, 5), free=3),
    c(aten.addcmul.default, signed(2, 3), signed(3), signed(2, 1), free=2),
    c(aten.addcdiv.default, signed(2, 3), signed(3), t(2, 1), free=1),
    c(aten.lerp.Tensor, signed(2, 3), signed(3), t(2, 1), free=2),
    c(aten.lerp.Scalar, signed(2, 3), signed(3), 0.3, free=2),
    c(aten.prelu.default, signed(2, 3, 5), t(3), free=3),
    c(aten.prelu.default, signed(2, 3, 5), t(1), free=3, note="shared"),
    c(aten.fill.Scalar, t(2, 3), 0, free=2),
    c(aten.fill.Scalar, t(2, 3), 7, free=2, note="seven"),
    c(aten.native_dropout.default, t(2, 3), 0.5, False, free=2),
    *(c(getattr(aten, n).default, t(2, 3, 5), 0.5, True, free=0, note="on") for n in DROPOUTS.split()),
    c(aten.zero.default, t(2, 3), free=2),
    c(aten.zeros_like.default, t(2, 3), free=2),
]

CONTRACT = [
    c(aten.linear.default, signed(2, 3, 5), signed(7, 5), signed(7), free=4),
    c(aten.linear.default, signed(5), signed(7, 5), free=2, note="vector"),
    c(aten.bilinear.default, signed(2, 3), signed(2, 5), signed(7, 3, 5), signed(7), free=4),
    c(aten.conv1d.default, signed(2, 3, 11), signed(5, 3, 4), signed(5), free=3),
    c(aten.conv2d.default, signed(2, 3, 7, 6), signed(5, 3, 4, 3), None, free=3),
    c(aten.conv2d.default, signed(3, 7, 6), signed(5, 3, 4, 3), signed(5), free=2, note="unbatched"),
    c(aten.conv2d.default, signed(2, 6, 7, 5), signed(15, 2, 4, 3), signed(15), groups=3, free=4, note="grouped"),
    c(aten.conv2d.default, signed(2, 6, 7, 5), signed(6, 1, 3, 3), signed(6), groups=6, free=2, note="depthwise"),
    c(aten.conv2d.default, signed(2, 6, 7, 5), signed(18, 1, 3, 3), None, groups=6, free=3, note="multiplier"),
    c(aten.conv2d.padding, signed(2, 3, 7, 6), signed(5, 3, 3, 3), None, [1, 1], "same", free=3),
    c(aten.conv3d.default, signed(2, 3, 4, 6, 5), signed(5, 3, 2, 3, 4), signed(5), free=3),
    c(aten.conv_transpose1d.default, signed(2, 3, 4), signed(3, 5, 2), signed(5), free=3),
    c(aten.conv_transpose2d.input, signed(2, 3, 4, 6), signed(3, 5, 2, 3), signed(5), free=3),
    c(
        aten.conv_transpose2d.input,
        signed(2, 6, 4, 5),
        signed(6, 5, 2, 3),
        signed(15),
        groups=3,
        free=4,
        note="grouped",
    ),
    c(aten.conv_transpose3d.input, signed(2, 3, 4, 2, 5), signed(3, 7, 2, 3, 1), None, free=3),
    c(
        aten.convolution.default,
        *(signed(2, 6, 7, 5), signed(15, 2, 4, 3), signed(15), [1, 1], [0, 0], [1, 1], False, [0, 0], 3),
        free=4,
    ),
    c(
        aten.convolution.default,
        *(signed(2, 6, 4, 5), signed(6, 5, 2, 3), signed(15), [1, 1], [0, 0], [1, 1], True, [0, 0], 3),
        free=4,
        note="transposed",
    ),
    c(aten.matmul.default, signed(3), signed(3), free=1, note="vectors"),
    c(aten.matmul.default, signed(3), signed(2, 3, 5), free=3, note="vector first"),
    c(aten.matmul.default, signed(2, 5, 3), signed(3), free=3, note="vector last"),
    c(aten.matmul.default, signed(2, 7, 5, 3), signed(7, 3, 11), free=5, note="broadcast"),
    c(aten.mm.default, signed(2, 3), signed(3, 5), free=3),
    c(aten.bmm.default, signed(7, 2, 3), signed(7, 3, 5), free=4),
    c(aten.mv.default, signed(2, 3), signed(3), free=2),
    c(aten.dot.default, signed(3), signed(3), free=1),
    c(aten.vdot.default, signed(3), signed(3), free=1),
    c(aten.outer.default, signed(3), signed(5), free=2),
    c(aten.ger.default, signed(3), signed(5), free=2),
    c(aten.addmm.default, signed(5), signed(2, 3), signed(3, 5), free=3, note="bias"),
    c(aten.addmm.default, signed(2, 5), signed(2, 3), signed(3, 5), free=3),
    c(aten.baddbmm.default, signed(7, 2, 5), signed(7, 2, 3), signed(7, 3, 5), free=4),
    c(aten.addbmm.default, signed(2, 5), signed(7, 2, 3), signed(7, 3, 5), free=4),
    c(aten.addmv.default, signed(2), signed(2, 3), signed(3), free=2),
    c(aten.addr.default, signed(2, 3), signed(2), signed(3), free=2),
    c(aten.addr.default, signed(3), signed(2), signed(3), free=2, note="broadcast"),
    c(aten.embedding_bag.default, signed(7, 5), ints(7, 11), torch.tensor([0, 2, 5]), free=1),
    c(aten.embedding_bag.default, signed(7, 5), ints(7, 11), torch.tensor([0, 2, 5]), False, 2, free=1, note="largest"),
    c(
        aten.embedding_bag.padding_idx,
        *(signed(7, 5), ints(7, 11), torch.tensor([0, 2, 5]), False, 1, False, None, False, 3),
        free=1,
    ),
    c(aten.einsum.default, "bhid,bhjd->bhij", [signed(2, 3, 5, 7), signed(2, 3, 11, 7)], free=5),
    c(aten.einsum.default, "...ij,jk->...ik", [signed(2, 3, 5), signed(5, 7)], free=4, note="dots"),
    c(aten.einsum.default, "ij,kj", [signed(2, 3), signed(5, 3)], free=3, note="implicit"),
    c(aten.einsum.default, "bcd->b", [signed(2, 3, 5)], free=3, note="sum"),
    c(aten.einsum.default, "ii->i", [signed(3, 3)], free=1, note="diagonal"),
    c(aten.scaled_dot_product_attention.default, signed(2, 3, 5, 7), signed(2, 3, 4, 7), signed(2, 3, 4, 11), free=4),
    c(
        aten.scaled_dot_product_attention.default,
        *(signed(2, 3, 5, 7), signed(2, 3, 4, 7), signed(2, 3, 4, 11), signed(3, 5, 4)),
        free=4,
        note="masked",
    ),
    c(
        aten.scaled_dot_product_attention.default,
        *(signed(2, 6, 5, 7), signed(2, 3, 4, 7), signed(2, 3, 4, 11)),
        enable_gqa=True,
        free=5,
        note="grouped query",
    ),
    c(aten.embedding.default, signed(11, 5), ints(11, 2, 3), free=3),
    c(
        torch.ops.transformers.grouped_mm_fallback.default,
        *(signed(7, 3), signed(2, 3, 5), torch.tensor([4, 7], dtype=torch.int32)),
        free=2,
    ),
]

STAND_INS = {"_grouped_mm": "transformers.grouped_mm_fallback"}
"""Ops held through another one of the same rule: this one has no float64 kernel and wants sizes that divide by 4."""


def _recurrent(kind: str, layers: int, directions: int, biases: bool, project: int = 0, first: bool = False) -> Case:
    """A layer over 7 steps, a batch of 2, 3 inputs and 5 units."""
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)
    fed, x = project or 5, signed(2, 7, 3) if first else signed(7, 2, 3)
    weights = []
    for k in range(layers * directions):
        weights += [signed(gates * 5, 3 if k < directions else directions * fed), signed(gates * 5, fed)]
        weights += [signed(gates * 5), t(gates * 5)] if biases else []
        weights += [signed(project, 5)] if project else []
    h, cell = signed(layers * directions, 2, fed), signed(layers * directions, 2, 5)
    options = (weights, biases, layers, 0.0, False, directions == 2, first)
    note = f"{layers}x{directions}{'' if biases else ' no bias'}{' projected' if project else ''}"
    op = getattr(aten, kind).input
    return c(op, x, [h, cell] if kind == "lstm" else h, *options, free=4 if project else 3, note=note)


def _cell(kind: str, biases: bool) -> Case:
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)
    states = [signed(2, 5), t(2, 5)] if kind == "lstm" else signed(2, 5)
    bias = (signed(gates * 5), t(gates * 5)) if biases else ()
    op = getattr(aten, f"{kind}_cell").default
    weights = (signed(gates * 5, 3), signed(gates * 5, 5))
    return c(op, signed(2, 3), states, *weights, *bias, free=3, note="" if biases else "no bias")


def _packed(kind: str) -> Case:
    whole = _recurrent(kind, 2, 2, biases=True)
    _, states, weights, *options, _ = whole.args
    sizes = torch.tensor([2, 2, 1])
    return c(getattr(aten, kind).data, signed(5, 3), sizes, states, weights, *options, free=2, note="packed")


RECURRENT = [
    *(_recurrent(k, 1, 1, biases=True) for k in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
    *(_recurrent(k, 2, 2, biases=False, first=True) for k in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
    _recurrent("lstm", 2, 2, biases=True, project=3),
    _recurrent("lstm", 1, 1, biases=False, project=3, first=True),
    *(_packed(k) for k in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
    *(_cell(k, biases) for k in ("lstm", "gru", "rnn_tanh", "rnn_relu") for biases in (True, False)),
]

NORM = [
    c(aten.layer_norm.default, signed(2, 3, 5), [5], t(5), signed(5), free=2),
    c(aten.layer_norm.default, signed(2, 3, 5), [3, 5], None, None, free=1, note="two dims"),
    c(aten.rms_norm.default, signed(2, 3, 5), [5], t(5), free=2),
    c(aten.group_norm.default, signed(2, 15, 7), 3, t(15), signed(15), free=2),
    c(aten.group_norm.default, signed(2, 6, 7), 6, t(6), signed(6), free=2, note="per channel"),
    c(
        aten.batch_norm.default,
        *(signed(2, 3, 5), t(3), signed(3), signed(3), t(3), False, 0.1, 1e-5, False),
        free=3,
    ),
    c(
        aten.batch_norm.default,
        *(signed(2, 3, 5), None, None, signed(3), t(3), False, 0.1, 1e-5, False),
        free=3,
        note="plain",
    ),
    c(
        aten.batch_norm.default,
        *(signed(2, 3, 5), t(3), None, None, None, True, 0.1, 1e-5, False),
        free=1,
        note="of the batch",
    ),
    c(
        aten.instance_norm.default,
        *(signed(2, 3, 5), t(3), signed(3), None, None, True, 0.1, 1e-5, False),
        free=2,
    ),
]

# the direction of a weight norm is left as it is where its scale is zeroed: here it is zeroed too, so that dim is pinned
NORM += [
    c(aten._weight_norm.default, signed(5, 3, 7), t(5, 1, 1), free=2),
    c(aten._weight_norm.default, signed(5, 3, 7), t(1, 1, 7), 2, free=2, note="last"),
    c(aten._weight_norm.default, signed(5, 3, 7), torch.tensor(2.0, dtype=torch.float64), -1, free=3, note="whole"),
]

REDUCE = [
    c(aten.sum.dim_IntList, signed(2, 3, 5), [1], free=3),
    c(aten.sum.dim_IntList, signed(2, 3, 5), [-1, 0], True, free=3, note="keepdim"),
    c(aten.sum.default, signed(2, 3), free=2),
    c(aten.mean.dim, signed(2, 3, 5), [1], free=2),
    c(aten.mean.default, signed(2, 3), free=0),
    c(aten.var.correction, signed(2, 3, 5), [1], correction=0, free=2),
    c(aten.std.dim, signed(2, 3, 5), [1], free=2),
    c(aten.var_mean.correction, signed(2, 3, 5), [1], free=2),
    c(aten.std_mean.correction, signed(2, 3, 5), [1], free=2),
    c(aten.any.dim, signed(2, 3, 5) > 0, 1, free=2),
    c(aten.count_nonzero.dim_IntList, t(2, 3, 5), [1], free=3),
    c(aten.all.dim, t(2, 3, 5) > 0.2, 1, free=2),
    c(aten.prod.dim_int, t(2, 3, 5), 1, free=2),
    c(aten.argmax.default, t(2, 3, 5), 1, free=2),
    c(aten.argmin.default, t(2, 3, 5), 1, True, free=2),
    c(aten.logsumexp.default, signed(2, 3, 5), [1], free=2),
    c(aten.median.dim, t(2, 3, 5), 1, free=2),
    c(aten.nanmedian.dim, t(2, 3, 5), 1, free=2),
    c(aten.mode.default, t(2, 3, 5), 1, free=2),
    c(aten.amax.default, signed(2, 3, 5), [1], free=2),
    c(aten.amin.default, signed(2, 3, 5), [1], free=2),
    c(aten.max.dim, signed(2, 3, 5), 1, free=2),
    c(aten.max.default, signed(2, 3), free=0),
    c(aten.max.other, signed(2, 3), signed(3), free=2),
    c(aten.min.dim, signed(2, 3, 5), 1, free=2),
    c(aten.softmax.int, signed(2, 3, 5), 1, free=2),
    c(aten.log_softmax.int, signed(2, 3, 5), 1, free=2),
    c(aten._softmax.default, signed(2, 3, 5), 1, False, free=2),
    c(aten._log_softmax.default, signed(2, 3, 5), 1, False, free=2),
    c(aten.cumsum.default, signed(2, 3, 5), 1, free=2),
    c(aten.cumprod.default, signed(2, 3, 5), 1, free=2),
    c(aten.logcumsumexp.default, signed(2, 3, 5), 1, free=2),
    c(aten.cummax.default, signed(2, 3, 5), 1, free=2),
    c(aten.cummin.default, signed(2, 3, 5), 1, free=2),
    c(aten.sort.default, signed(2, 3, 5), 1, free=2),
    c(aten.argsort.default, signed(2, 3, 5), 1, free=2),
    c(aten.topk.default, signed(2, 3, 7), 4, -1, free=2),
    c(aten.linalg_vector_norm.default, signed(2, 3, 5), 2, [1], free=3),
    c(aten.linalg_vector_norm.default, signed(2, 3, 5), 0, [1], free=2, note="count"),
    c(aten.linalg_vector_norm.default, signed(2, 3, 5), float("inf"), [1], True, free=3, note="largest"),
    c(aten.norm.ScalarOpt_dim, signed(2, 3, 5), 2, [1], free=3),
    c(aten.norm.Scalar, signed(2, 3), 2, free=2),
    c(aten.linalg_norm.default, signed(2, 3, 5), None, [1], free=3),
    c(aten.linalg_norm.default, signed(2, 3, 5), 2, [1, 2], free=1, note="of matrices"),
    c(aten.linalg_matrix_norm.str_ord, signed(2, 3, 5), free=3),
    c(aten.linalg_matrix_norm.str_ord, signed(2, 3, 5), "nuc", free=1, note="nuclear"),
    c(aten.linalg_matrix_norm.default, signed(2, 3, 5), 1, free=1),
    c(aten.frobenius_norm.dim, signed(2, 3, 5), [1], free=3),
    c(aten.nuclear_norm.dim, signed(2, 3, 5), [1, 2], free=1),
    c(aten.nansum.default, signed(2, 3, 5), [1], free=3),
    c(aten.nanmean.default, signed(2, 3, 5), [1], free=2),
    c(aten.aminmax.default, signed(2, 3, 5), dim=1, free=2),
    c(aten.kthvalue.default, signed(2, 3, 5), 2, 1, free=2),
    c(aten.msort.default, signed(2, 3, 5), free=2),
    c(aten.quantile.scalar, t(2, 3, 5), 0.5, 1, free=2),
    c(aten.quantile.default, t(2, 3, 5), torch.tensor([0.2, 0.7], dtype=torch.float64), 1, True, free=2),
    c(aten.nanquantile.scalar, t(2, 3, 5), 0.5, free=0),
    c(aten.renorm.default, signed(2, 3, 5), 2, 1, 0.5, free=3),
    c(aten.sum_to_size.default, signed(2, 3, 5), [3, 1], free=3),
]

CASES = [*UNARY, *BINARY, *CONTRACT, *RECURRENT, *NORM, *REDUCE, *SHAPE, *SPACE, *INDEX, *PAIR, *WHOLE, *VISION]
