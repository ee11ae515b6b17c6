"""One call or more for every op that has a rule, and how many axes the rule must leave free.

Sizes are pairwise different, so that a swapped letter cannot hide.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from graphprune.rules.pointwise import NOT_ZERO, SINGULAR, ZERO_TO_ZERO

aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    op: Any
    args: tuple[Any, ...]
    free: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def name(self) -> str:
        return str(self.op._schema.name).partition("::")[2]

    @property
    def label(self) -> str:
        return (
            f"{self.op._schema.name.partition('::')[2]}.{self.op._overloadname}{'-' + self.note if self.note else ''}"
        )


def t(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random float64 values in (0.1, 0.9), where every function is defined."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1


def signed(*shape: int) -> torch.Tensor:
    return t(*shape) - 0.5


def ints(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0))


def c(op: Any, *args: Any, free: int, note: str = "", **kwargs: Any) -> Case:
    return Case(op, args, free, kwargs, note)


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

UNARY = [_unary(n) for n in f"{ZERO_TO_ZERO} {NOT_ZERO} {SINGULAR}".split() if n not in VALUELESS]

_FLOAT_PAIRS = "arctan2 logaddexp logaddexp2 heaviside ldexp isclose complex polar add sub rsub subtract mul multiply maximum minimum fmax fmin copysign hypot atan2 eq ne lt gt le ge"
_QUOTIENTS = "xlogy special_xlogy div divide true_divide floor_divide fmod remainder"
_DISTANCES = "mse_loss l1_loss smooth_l1_loss huber_loss"
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
]


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

PAIR = [
    c(aten.cosine_similarity.default, signed(2, 3, 5), signed(2, 3, 1), 1, free=3),
    c(aten.cosine_similarity.default, signed(2, 3, 5), signed(3, 5), -1, free=3, note="fewer dims"),
    c(aten.linalg_vecdot.default, signed(2, 3, 5), signed(2, 3, 5), dim=1, free=3),
    c(aten.pairwise_distance.default, signed(2, 3, 5), signed(3, 5), free=2),
    c(aten.pairwise_distance.default, signed(2, 3), signed(2, 3), 2.0, 1e-6, True, free=1, note="kept"),
    c(aten.dist.default, signed(2, 3), t(2, 3), free=2),
    c(aten.dist.default, signed(2, 3), signed(3), free=1, note="broadcast"),
    c(aten.cdist.default, signed(2, 3, 7), signed(2, 5, 7), free=4),
    c(aten.pdist.default, signed(3, 5), free=1),
    c(aten.tensordot.default, signed(2, 3, 5), signed(5, 7, 3), [1, 2], [2, 0], free=4),
    c(aten.inner.default, signed(2, 3, 5), signed(7, 5), free=4),
    c(aten.inner.default, signed(2, 3), torch.tensor(2.0, dtype=torch.float64), free=2, note="number"),
    c(aten.chain_matmul.default, [signed(2, 3), signed(3, 5), signed(5, 7)], free=4),
    c(aten.linalg_multi_dot.default, [signed(3), signed(3, 5), signed(5)], free=2),
    c(aten.kron.default, signed(2, 3), signed(5, 7), free=4),
    c(aten.kron.default, signed(3), signed(5, 7), free=3, note="fewer dims"),
    c(aten.block_diag.default, [signed(2, 3), signed(5), signed(7, 2)], free=5),
]

_SQUARE = torch.eye(5, dtype=torch.float64) + 0.1 * signed(5, 5) @ signed(5, 5).mT
_PROBABLE = torch.full((2, 5), 0.2, dtype=torch.float64)
_ALGEBRA = "inv svd svdvals qr eigh eigvalsh cholesky det slogdet matrix_exp lu_factor"

WHOLE = [
    *(c(getattr(aten, f"linalg_{n}").default, _SQUARE, free=0) for n in _ALGEBRA.split()),
    *(
        c(getattr(aten, n).default, _SQUARE, free=0)
        for n in ["matrix_exp", "inverse", "det", "logdet", "slogdet", "svd", "trace"]
    ),
    c(aten.linalg_pinv.default, _SQUARE, 1e-10, free=0),
    c(aten.linalg_matrix_power.default, _SQUARE, 3, free=0),
    c(aten.matrix_power.default, _SQUARE, 3, free=0),
    c(aten.linalg_householder_product.default, signed(5, 3), signed(3), free=0),
    c(aten.linalg_solve.default, _SQUARE, signed(5, 3), free=0),
    c(aten.linalg_solve_triangular.default, _SQUARE.triu(), signed(5, 3), upper=True, free=0),
    *(
        c(getattr(aten, f"fft_{n}").default, signed(2, 3, 4), free=2)
        for n in ["fft", "ifft", "rfft", "irfft", "hfft", "ihfft"]
    ),
    *(c(getattr(aten, f"fft_{n}").default, signed(2, 4, 6), free=1) for n in ["fft2", "ifft2", "rfft2", "irfft2"]),
    *(c(getattr(aten, f"fft_{n}").default, signed(2, 4, 6), free=1) for n in ["hfft2", "ihfft2"]),
    *(
        c(getattr(aten, f"fft_{n}").default, signed(2, 4, 6), dim=[1], free=2)
        for n in ["fftn", "ifftn", "rfftn", "irfftn"]
    ),
    *(c(getattr(aten, f"fft_{n}").default, signed(2, 4, 6), [1], free=2) for n in ["fftshift", "ifftshift"]),
    c(aten.fft_rfftn.default, signed(2, 4, 6), [4, 6], free=1, note="sizes"),
    c(aten.fft_fftn.default, signed(2, 3), free=0, note="all"),
    c(aten.stft.default, signed(2, 16), 5, 3, None, torch.ones(5, dtype=torch.float64), return_complex=True, free=1),
    c(aten.istft.default, torch.complex(t(2, 3, 7), signed(2, 3, 7)), 4, free=1),
    c(aten.diff.default, signed(2, 3, 5), 1, 1, free=2),
    c(aten.diff.default, signed(2, 3), 1, 1, signed(2, 1), free=0, note="prepended"),
    c(aten.trapz.dx, signed(2, 3, 5), dim=1, free=2),
    c(aten.trapezoid.dx, signed(2, 3, 5), dim=1, free=2),
    c(aten.cumulative_trapezoid.dx, signed(2, 3, 5), dim=1, free=2),
    c(aten.gradient.scalarint, signed(2, 3), dim=1, free=0),
    c(aten.rot90.default, signed(2, 3, 5), 1, [0, 2], free=1),
    c(aten.rot90.default, signed(2, 3, 5), 2, [0, -1], free=1, note="half"),
    c(aten.cross.default, signed(2, 3, 5), signed(2, 3, 5), free=2),
    c(aten.linalg_cross.default, signed(2, 5, 3), signed(1, 5, 3), free=2),
    *(c(getattr(aten, n).default, signed(2, 3), signed(2, 3), 0, free=2, note="each") for n in _DISTANCES.split()),
    *(c(getattr(aten, n).default, signed(2, 3), signed(2, 3), 1, free=0, note="mean") for n in _DISTANCES.split()),
    *(c(getattr(aten, n).default, signed(2, 3), signed(2, 3), 2, free=2, note="sum") for n in _DISTANCES.split()),
    c(aten.cross_entropy_loss.default, signed(2, 5), ints(5, 2), free=0),
    c(aten.nll_loss.default, signed(2, 5), ints(5, 2), free=0),
    c(aten.nll_loss_nd.default, signed(2, 5, 3), ints(5, 2, 3), free=0),
    *(c(getattr(aten, n).default, t(2, 5), _PROBABLE, free=0) for n in ["kl_div", "binary_cross_entropy"]),
    c(aten.binary_cross_entropy_with_logits.default, t(2, 5), _PROBABLE, free=0),
    c(aten.ctc_loss.IntList, signed(7, 2, 5), ints(4, 2, 3) + 1, [7, 7], [3, 2], free=0),
    c(aten.cosine_embedding_loss.default, signed(2, 5), t(2, 5), torch.ones(2), free=0),
    c(aten.margin_ranking_loss.default, signed(5), t(5), torch.ones(5), free=0),
    *(
        c(getattr(aten, n).default, t(2, 5), torch.ones(2, 5), free=0)
        for n in ["hinge_embedding_loss", "soft_margin_loss"]
    ),
    c(aten.triplet_margin_loss.default, signed(2, 5), t(2, 5), t(2, 5, seed=3), free=0),
    c(aten.multi_margin_loss.default, signed(2, 5), ints(5, 2), free=0),
    c(aten.multilabel_margin_loss.default, signed(2, 5), ints(5, 2, 5), free=0),
    c(aten.poisson_nll_loss.default, t(2, 5), t(2, 5, seed=3), True, False, 1e-8, 1, free=0),
    c(aten.histc.default, t(2, 3), 5, free=0),
    c(aten.bincount.default, ints(5, 7), free=0),
    *(c(getattr(aten, n).default, t(2, 3) - 0.5, free=0) for n in ["nonzero", "argwhere"]),
    c(aten.masked_select.default, t(2, 3), t(2, 3) > 0.5, free=0),
    c(aten._unique2.default, ints(5, 7), free=0),
    c(aten.unique_consecutive.default, ints(5, 7), free=0),
    c(aten.take.default, t(2, 3), ints(6, 5), free=0),
    c(aten.put.default, t(2, 3), torch.tensor([1, 4]), t(2), free=0),
    c(aten.resize_as.default, t(2, 3), t(3, 5), free=0),
    c(aten.as_strided.default, t(2, 3), [2, 2], [1, 1], free=0),
    c(aten.cartesian_prod.default, [t(2), t(3)], free=0),
    c(aten.combinations.default, t(3), free=0),
    *(c(getattr(aten, n).default, t(3, 5), free=0) for n in ["cov", "corrcoef"]),
    c(aten.vander.default, t(3), free=0),
    c(aten.affine_grid_generator.default, t(2, 2, 3), [2, 3, 4, 5], False, free=0),
]

SHAPE = [
    c(aten.view.default, t(2, 12, 5), [2, 3, 4, 5], free=4, note="split"),
    c(aten.view.default, t(2, 3, 5), [2, -1], free=3, note="join"),
    c(aten.view.default, t(6, 5), [2, 15], free=3, note="both"),
    c(aten.view.default, t(4, 9), [12, 3], free=3, note="refined"),
    c(aten.view.default, t(6, 4), [3, 8], free=3, note="refined again"),
    c(aten.view.default, t(3, 4), [4, 3], free=0, note="misaligned"),
    c(aten.reshape.default, t(2, 12), [2, 1, 3, 4], free=3),
    c(aten._unsafe_view.default, t(2, 12), [2, 3, 4], free=3),
    c(aten.flatten.using_ints, t(2, 3, 5, 7), 1, 2, free=4),
    c(aten.ravel.default, t(2, 3), free=2),
    c(aten.unflatten.int, t(2, 12), 1, [3, 4], free=3),
    c(aten.squeeze.dim, t(2, 1, 3), 1, free=2),
    c(aten.squeeze.default, t(2, 1, 3), free=2),
    c(aten.unsqueeze.default, t(2, 3), 1, free=2),
    c(aten.view_as.default, t(2, 12), t(2, 3, 4), free=3),
    c(aten.reshape_as.default, t(2, 12), t(2, 3, 4), free=3),
    c(aten.atleast_1d.default, t(3), free=1),
    c(aten.atleast_2d.default, t(3), free=1),
    c(aten.atleast_3d.default, t(3), free=1),
    c(aten.permute.default, t(2, 3, 5), [2, 0, -2], free=3),
    c(aten.transpose.int, t(2, 3, 5), 0, -1, free=3),
    c(aten.swapaxes.default, t(2, 3, 5), 0, 2, free=3),
    c(aten.swapdims.default, t(2, 3, 5), 0, 2, free=3),
    c(aten.t.default, t(2, 3), free=2),
    c(aten.numpy_T.default, t(2, 3), free=2),
    c(aten.mT.default, t(2, 3, 5), free=3),
    c(aten.mH.default, t(2, 3, 5), free=3),
    c(aten.adjoint.default, t(2, 3, 5), free=3),
    c(aten.movedim.int, t(2, 3, 5, 7), 0, 2, free=4),
    c(aten.movedim.intlist, t(2, 3, 5, 7), [0, 3], [2, 0], free=4),
    c(aten.moveaxis.int, t(2, 3, 5), -1, 0, free=3),
    c(aten.expand.default, t(3, 1), [2, -1, 5], free=3),
    c(aten.expand_as.default, t(3, 1), t(2, 3, 5), free=3),
    c(aten.broadcast_to.default, t(3, 1), [2, 3, 5], free=3),
    c(aten.repeat.default, t(3, 5), [2, 4, 1], free=4),
    c(aten.tile.default, t(3, 5), [4, 1], free=3),
    c(aten.repeat_interleave.self_int, t(3, 5), 4, 1, free=3),
    c(aten.cat.default, [t(2, 3, 5), t(2, 7, 5)], 1, free=4),
    c(aten.cat.default, [t(2, 3), t(2, 5), t(2, 7)], -1, free=4, note="three"),
    c(aten.concat.default, [t(2, 3), t(2, 5)], 1, free=3),
    c(aten.concatenate.default, [t(2, 3), t(2, 5)], 1, free=3),
    c(aten.stack.default, [t(2, 3), t(2, 3), t(2, 3)], -1, free=2),
    c(aten.chunk.default, t(2, 14, 5), 2, 1, free=4),
    c(aten.chunk.default, t(7, 2), 3, free=3, note="uneven"),
    c(aten.split.Tensor, t(2, 14), 6, 1, free=4),
    c(aten.split_with_sizes.default, t(2, 14), [3, 4, 7], -1, free=4),
    c(aten.tensor_split.sections, t(2, 14), 3, 1, free=4),
    c(aten.tensor_split.indices, t(2, 14), [3, 8], 1, free=4),
    c(aten.unsafe_chunk.default, t(2, 14), 2, 1, free=3),
    c(aten.unsafe_split.Tensor, t(2, 14), 7, 1, free=3),
    c(aten.unsafe_split_with_sizes.default, t(2, 14), [3, 11], 1, free=3),
    c(aten.glu.default, signed(2, 6, 5), 1, free=3),
    c(aten.unbind.int, t(2, 3, 5), 1, free=2),
    c(aten.select.int, t(2, 3, 5), 1, -1, free=2),
    c(aten.slice.Tensor, t(2, 14), 1, 3, 10, free=4),
    c(aten.slice.Tensor, t(2, 14), 1, -5, free=3, note="from the end"),
    c(aten.slice.Tensor, t(2, 14), 1, 0, -5, free=3, note="up to the end"),
    c(aten.slice.Tensor, t(2, 14), 0, 0, 9223372036854775807, free=2, note="all"),
    c(aten.slice.Tensor, t(2, 14), 1, 1, None, 2, free=1, note="every second"),
    c(aten.narrow.default, t(2, 14), 1, 3, 7, free=4),
    c(aten.hsplit.int, t(2, 14), 2, free=3),
    c(aten.hsplit.array, t(14), [3, 8], free=3, note="vector"),
    c(aten.vsplit.int, t(14, 2), 2, free=3),
    c(aten.dsplit.array, t(2, 3, 14), [3], free=4),
    c(aten.hstack.default, [t(2, 3), t(2, 5)], free=3),
    c(aten.hstack.default, [t(3), t(5)], free=2, note="vectors"),
    c(aten.vstack.default, [t(3, 2), t(5, 2)], free=3),
    c(aten.vstack.default, [t(3), t(5, 3)], free=2, note="vector first"),
    c(aten.row_stack.default, [t(3, 2), t(5, 2)], free=3),
    c(aten.dstack.default, [t(2, 3, 5), t(2, 3, 7)], free=4),
    c(aten.dstack.default, [t(3), t(1, 3, 5)], free=2, note="vector first"),
    c(aten.column_stack.default, [t(3), t(3, 5)], free=2),
    c(aten.fliplr.default, t(2, 3, 5), free=2),
    c(aten.flipud.default, t(2, 3, 5), free=2),
    c(aten.repeat_interleave.self_int, t(3, 5), 4, free=3, note="all dims"),
    c(aten.repeat_interleave.self_Tensor, t(3, 5), torch.tensor([2, 1, 3]), 0, free=1),
    c(aten.repeat_interleave.self_Tensor, t(3), torch.tensor([2, 1, 3]), free=0, note="all dims"),
    c(aten.repeat_interleave.Tensor, torch.tensor([2, 1, 3]), free=0),
    c(aten.broadcast_tensors.default, [t(2, 1, 5), t(3, 1), t(5)], free=3),
    c(aten.diagonal.default, t(2, 5, 3, 5), 0, 1, -1, free=3),
    c(aten.diagonal.default, t(2, 5, 7), 1, 1, 2, free=1, note="shifted"),
    c(aten.diag_embed.default, t(2, 5), 0, 0, 2, free=2),
    c(aten.diag_embed.default, t(2, 5), 1, free=1, note="shifted"),
    c(aten.diag.default, t(5), free=1),
    c(aten.diag.default, t(5, 5), free=1, note="of a matrix"),
    c(aten.matrix_H.default, t(2, 3), free=2),
    c(aten.pad.default, t(2, 5, 7), [0, 0, 3, 4], free=5),
    c(aten.pad.default, t(2, 5, 7), [0, 0, 3, 0], "constant", 2.5, free=4, note="not zero"),
    c(aten.pad.default, t(2, 5, 7), [2, 1], "reflect", free=2, note="reflect"),
    c(aten.pad.default, t(2, 5, 7), [-2, 0], free=2, note="crop"),
    c(aten.constant_pad_nd.default, t(2, 5, 7), [2, 3], free=5),
    c(aten.flip.default, t(2, 3, 5), [1], free=2),
    c(aten.roll.default, t(2, 3, 5), [2], [1], free=2),
    c(aten.roll.default, t(2, 3), [2], free=0, note="flat"),
    c(aten.unfold.default, t(2, 7, 5), 1, 3, 2, free=2),
    c(aten.meshgrid.indexing, [t(2), t(3)], indexing="ij", free=2),
    c(aten.meshgrid.indexing, [t(2), t(3)], indexing="xy", free=2, note="xy"),
    c(aten.zeros.default, [2, 3], free=2),
    c(aten.new_zeros.default, t(7), [2, 3], free=3),
    c(aten.ones.default, [2, 3], free=2),
    c(aten.new_ones.default, t(7), [2, 3], free=3),
    c(aten.full.default, [2, 3], 0.5, free=2),
    c(aten.new_full.default, t(7), [2, 3], 0.5, free=3),
    c(aten.arange.default, 5, free=0),
    c(aten.linspace.default, 0, 1, 5, free=0),
    c(aten.logspace.default, 0, 1, 5, free=0),
    c(aten.eye.default, 3, free=0),
    c(aten.bartlett_window.default, 5, free=0),
    c(aten.hann_window.default, 5, free=0),
    c(aten.scalar_tensor.default, 5, free=0),
    *(c(getattr(aten, f"{n}_window").default, 5, free=0) for n in ["hamming", "blackman", "kaiser"]),
    *(c(getattr(aten, f"{n}_indices").default, 3, 5, free=0) for n in ["tril", "triu"]),
    c(aten.one_hot.default, ints(7, 3), 7, free=1),
    c(aten.tril.default, t(2, 3, 5), free=1),
    c(aten.triu.default, t(2, 3, 5), free=1),
]


def _spatial(template: str, n: int, *args: Any, free: int = 2, **kwargs: Any) -> Case:
    overloads = getattr(aten, template.format(n=n))
    op = overloads.vec if "vec" in overloads.overloads() else overloads.default
    return c(op, signed(2, 3, *(4, 6, 5)[:n]), *args, free=free, **kwargs)


SPACE = [
    *(_spatial("max_pool{n}d", n, [2] * n, free=2) for n in (1, 2, 3)),
    *(_spatial("avg_pool{n}d", n, [2] * n) for n in (1, 2, 3)),
    *(_spatial("adaptive_avg_pool{n}d", n, [3] * n) for n in (1, 2, 3)),
    *(_spatial("adaptive_max_pool{n}d", n, [3] * n) for n in (1, 2, 3)),
    *(_spatial("max_pool{n}d_with_indices", n, [2] * n) for n in (1, 2, 3)),
    *(_spatial("reflection_pad{n}d", n, [1] * 2 * n) for n in (1, 2, 3)),
    *(_spatial("replication_pad{n}d", n, [1] * 2 * n) for n in (1, 2, 3)),
    *(_spatial("upsample_nearest{n}d", n, [7] * n, None) for n in (1, 2, 3)),
    *(_spatial("_upsample_nearest_exact{n}d", n, [7] * n, None) for n in (1, 2, 3)),
    _spatial("upsample_linear{n}d", 1, [7], False, None),
    _spatial("upsample_bilinear{n}d", 2, [7, 8], False, None),
    _spatial("upsample_bicubic{n}d", 2, [7, 8], False, None),
    _spatial("upsample_trilinear{n}d", 3, [7, 8, 9], False, None),
    _spatial("_upsample_bilinear{n}d_aa", 2, [7, 8], False, None),
    _spatial("_upsample_bicubic{n}d_aa", 2, [7, 8], False, None),
    c(aten.grid_sampler.default, signed(2, 3, 4, 5), signed(2, 7, 6, 2), 0, 0, False, free=2),
    c(aten.pixel_shuffle.default, signed(2, 12, 3, 5), 2, free=2),
    c(aten.pixel_unshuffle.default, signed(2, 5, 4, 6), 2, free=2),
    c(aten.channel_shuffle.default, signed(2, 15, 4, 7), 3, free=5),
    c(aten.native_channel_shuffle.default, signed(2, 15, 4, 7), 3, free=5),
    c(
        aten.max_unpool2d.default,
        signed(2, 3, 2, 2),
        (ints(1, 2, 3, 2, 2) + torch.tensor([[0, 2], [8, 10]])),
        [4, 4],
        free=2,
    ),
    c(
        aten.max_unpool3d.default,
        *(signed(2, 3, 1, 2, 2), (ints(1, 2, 3, 1, 2, 2) + torch.tensor([[0, 2], [8, 10]]))),
        *([2, 4, 4], [2, 2, 2], [0, 0, 0]),
        free=2,
    ),
    c(aten.fractional_max_pool2d.default, signed(2, 3, 5, 7), [2, 2], [2, 3], t(2, 3, 2), free=2),
    c(aten.fractional_max_pool3d.default, signed(2, 3, 5, 7, 4), [2, 2, 2], [2, 3, 2], t(2, 3, 3), free=2),
    c(aten.view_as_complex.default, signed(3, 5, 2), free=2),
    c(aten.view_as_real.default, torch.complex(t(3, 5), signed(3, 5)), free=2),
    c(aten.im2col.default, signed(2, 3, 5, 6), [2, 3], [1, 1], [0, 0], [1, 1], free=2),
    c(aten.col2im.default, signed(2, 18, 16), [5, 6], [2, 3], [1, 1], [0, 0], [1, 1], free=2),
]

INDEX = [
    c(aten.index.Tensor, t(5, 3, 7), [ints(5, 2, 4)], free=4),
    c(aten.index.Tensor, t(2, 5, 3), [None, ints(5, 4)], free=3, note="second"),
    c(aten.index.Tensor, t(5, 3, 7), [ints(5, 4), None, ints(7, 4)], free=2, note="apart"),
    c(aten.index.Tensor, t(5, 3, 7), [ints(5, 4, 1), ints(3, 2)], free=3, note="broadcast"),
    c(aten.index_put.default, t(5, 3), [ints(5, 4).unique()], t(1, 3), free=1),
    c(aten.index_select.default, t(2, 5, 3), 1, ints(5, 4), free=3),
    c(aten.index.Tensor, t(5, 3, 7), [t(5, 3) > 0.5], free=1, note="mask"),
    c(aten.index.Tensor, t(5, 3, 7), [None, t(3) > 0.3], free=2, note="mask of the second"),
    c(aten.index_put.default, t(5, 3, 7), [t(5, 3) > 0.5], t(1), free=3, note="filled by mask"),
    c(aten.index_put.default, t(5, 3), [torch.arange(5) > 2], t(2, 3), free=1, note="by mask"),
    c(aten.gather.default, t(5, 3, 7), 0, ints(5, 4, 3, 7), free=2),
    c(aten.gather.default, t(5, 3, 7), 0, ints(5, 4, 2, 7), free=1, note="part"),
    c(aten.take_along_dim.default, t(5, 3), ints(5, 4, 3), 0, free=1),
    c(aten.take_along_dim.default, t(5, 3), ints(5, 4, 1), 0, free=1, note="broadcast"),
    c(aten.take_along_dim.default, t(5, 3), ints(5, 4), free=0, note="flat"),
    c(aten.scatter.src, t(5, 3), 0, ints(1, 2, 3) + torch.tensor([[1], [4]]), t(2, 3), free=1),
    c(aten.scatter.src, t(5, 3), 0, ints(1, 2, 2) + torch.tensor([[1], [4]]), t(2, 3), free=0, note="part"),
    c(aten.scatter.value, t(5, 3), 0, ints(5, 2, 3), 0.0, free=1),
    c(aten.scatter.value, t(5, 3), 0, ints(5, 2, 3), 2.0, free=1, note="two"),
    c(aten.scatter_add.default, t(5, 3), 0, ints(5, 2, 3), t(2, 3), free=1),
    c(aten.scatter_reduce.two, t(5, 3), 0, ints(5, 2, 3), t(2, 3), "amax", free=1),
    c(aten.index_add.default, t(5, 3), 0, ints(5, 2), t(2, 3), free=1),
    c(aten.index_copy.default, t(5, 3), 0, torch.tensor([3, 1]), t(2, 3), free=1),
    c(aten.index_reduce.default, t(5, 3), 0, torch.tensor([3, 1]), t(2, 3), "prod", free=1),
    c(aten.index_fill.int_Scalar, t(5, 3), 0, ints(5, 2), 1.0, free=1),
    c(aten.index_fill.int_Scalar, t(5, 3), 0, ints(5, 2), 0.0, free=1, note="zero"),
    c(aten.slice_scatter.default, t(7, 3), t(2, 3), 0, 1, 3, free=1),
    c(aten.select_scatter.default, t(7, 3), t(3), 0, 1, free=1),
    c(aten.masked_scatter.default, t(2, 3), t(2, 3) > 0.5, t(2, 3), free=0),
    c(aten.isin.Tensor_Tensor, t(2, 3), t(5), free=2),
    c(aten.bucketize.Tensor, t(2, 3), t(5).sort()[0], free=2),
    c(aten.searchsorted.Tensor, t(5).sort()[0], t(2, 3), free=2),
    c(aten.searchsorted.Tensor, t(2, 5).sort()[0], t(2, 3), free=2, note="rows"),
    c(aten.searchsorted.Scalar, t(5).sort()[0], 0.5, free=0),
    c(aten.searchsorted.Tensor, t(5), t(2, 3), sorter=t(5).argsort(), free=2, note="sorter"),
]

CASES = [*UNARY, *BINARY, *CONTRACT, *RECURRENT, *NORM, *REDUCE, *SHAPE, *SPACE, *INDEX, *PAIR, *WHOLE]
