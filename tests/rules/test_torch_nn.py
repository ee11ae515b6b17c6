"""Every layer of torch.nn, between two others: no op of it is unknown, and half of each group goes, exactly."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from tests.nets import randomised

NAMES = sorted(n for n, c in vars(nn).items() if inspect.isclass(c) and issubclass(c, nn.Module))
LAYERS: dict[str, tuple[Callable[[int, int], nn.Module], tuple[int, ...]]] = {
    "rows": (nn.Linear, (4, 3)),
    "steps": (nn.Linear, (5, 2, 3)),
    "1d": (lambda i, o: nn.Conv1d(i, o, 1), (2, 3, 12)),
    "2d": (lambda i, o: nn.Conv2d(i, o, 1), (2, 3, 8, 8)),
    "3d": (lambda i, o: nn.Conv3d(i, o, 1), (2, 3, 6, 6, 6)),
}


@dataclass(frozen=True)
class Row:
    """How to make and use a layer.

    Attributes:
        kind: what stands before it, a key of `LAYERS`, and after it unless `after` says otherwise.
        args, kwargs: of its constructor.
        free: sizes of the groups found.
        out: channels it gives to what stands after it; 0 for nothing there.
        call: how it is called.
        width: channels it gets.
        after: another key of `LAYERS`.
        whole: for a layer whose channels stay whole, the reason that must be given.
        norms: option of `couple`.
    """

    kind: str
    args: tuple[Any, ...] = ()
    free: tuple[int, ...] = (8,)
    out: int = 8
    call: Callable[[Any, torch.Tensor], torch.Tensor] = lambda layer, y: layer(y)
    width: int = 8
    after: str = ""
    whole: str = ""
    norms: str = "pin"
    kwargs: dict[str, Any] = field(default_factory=dict)


def row(kind: str, *args: Any, **options: Any) -> Row:
    """A `Row`; what is no field of it is an argument of the layer."""
    fields = {k: options.pop(k) for k in list(options) if k in Row.__dataclass_fields__}
    return Row(kind, **{"args": args, "kwargs": options, **fields})


def each(names: str, *args: Any, dims: str = "123", kind: str = "", **options: Any) -> dict[str, Row]:
    """Rows of layers that differ in the number of spatial dims alone."""
    return {n.format(d=d): row(kind or f"{d}d", *args, **options) for n in names.split() for d in dims}


def loss(target: Callable[[torch.Tensor], Any], whole: str = "", **options: Any) -> Row:
    """A loss of what stands before it."""
    options = {"free": (), "out": 0, **options}
    return row("rows", call=lambda layer, y: layer(y, target(y)), whole=whole, **options)


def with_indices(pool: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    return lambda layer, y: layer(*pool(y, 2, return_indices=True))


def _first(layer, y):
    return layer(y)[0]


def _classes(y):
    return torch.arange(y.shape[0], device=y.device) % 3


_ELEMENT_WISE = """
    CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish RReLU ReLU ReLU6 SELU SiLU
    Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Dropout AlphaDropout
"""


def _bits(y):
    return (y > 0).to(y.dtype)


def _signs(y):
    return 2 * _bits(y) - 1


def _labels(y):
    return torch.arange(8, device=y.device).expand(y.shape)


def _of_two(layer, y):
    return layer(y, y.relu(), torch.ones(y.shape[0], dtype=y.dtype, device=y.device))


def _of_three(layer, y):
    return layer(y, y.relu(), y.tanh())


_encoder_layer = nn.TransformerEncoderLayer(8, 2, 16)
_RANDOM = torch.rand(2, 8, 3, generator=torch.Generator().manual_seed(0))

TABLE: dict[str, Row] = {
    **{name: row("rows") for name in _ELEMENT_WISE.split()},
    **each("Dropout{d}d"),
    "FeatureAlphaDropout": row("2d"),
    "Threshold": row("rows", 0.1, 0.0),
    "PReLU": row("rows", 8),
    "GLU": row("rows", 1, free=(4,), out=4),
    # contractions
    "Linear": row("rows", 8, 5, out=5, free=(8, 5)),
    "Bilinear": row("rows", 8, 8, 5, out=5, free=(8, 5), call=lambda layer, y: layer(y, y.relu())),
    **each("Conv{d}d ConvTranspose{d}d", 8, 6, 2, out=6, free=(8, 6)),
    "Embedding": row("rows", 7, 8, call=lambda layer, y: layer(torch.arange(4, device=y.device)) + y),
    "EmbeddingBag": row("rows", 7, 8, call=lambda layer, y: layer(torch.arange(4, device=y.device)[:, None]) + y),
    # lazy layers, after the call that makes them what they are
    "LazyLinear": row("rows", 5, out=5, free=(8, 5)),
    **each("LazyConv{d}d LazyConvTranspose{d}d", 6, 2, out=6, free=(8, 6)),
    **each("LazyBatchNorm{d}d"),
    **each("LazyInstanceNorm{d}d", affine=True, track_running_stats=True),
    # normalisation
    **each("BatchNorm{d}d", 8),
    **each("InstanceNorm{d}d", 8, affine=True),
    "SyncBatchNorm": row("2d", 8),
    "GroupNorm": row("2d", 2, 8, free=(2,)),
    "LayerNorm": row("rows", 8, norms="prune"),
    "RMSNorm": row("rows", 8, norms="prune"),
    "LocalResponseNorm": row("2d", 3, free=(), whole="its positions matter to avg_pool3d"),
    "CrossMapLRN2d": row("2d", 3, free=(), whole="of it"),
    # space
    **each("AvgPool{d}d MaxPool{d}d AdaptiveAvgPool{d}d AdaptiveMaxPool{d}d", 2),
    **each("LPPool{d}d", 2, 2),
    **each("ReflectionPad{d}d ReplicationPad{d}d ZeroPad{d}d CircularPad{d}d", 1),
    **each("ConstantPad{d}d", 1, 0.5),
    "MaxUnpool1d": row("1d", 2, call=with_indices(F.max_pool1d)),
    "MaxUnpool2d": row("2d", 2, call=with_indices(F.max_pool2d)),
    "MaxUnpool3d": row("3d", 2, call=with_indices(F.max_pool3d)),
    "FractionalMaxPool2d": row("2d", 2, output_size=4, _random_samples=_RANDOM[..., :2]),
    "FractionalMaxPool3d": row("3d", 2, output_size=3, _random_samples=_RANDOM),
    "Upsample": row("2d", scale_factor=2),
    "UpsamplingBilinear2d": row("2d", scale_factor=2),
    "UpsamplingNearest2d": row("2d", scale_factor=2),
    "Fold": row("1d", (4, 5), (2, 2), width=32, free=(8,), after="2d"),
    "Unfold": row("2d", (2, 2), out=32, free=(8,), after="1d"),
    "PixelShuffle": row("2d", 2, out=2, free=(2,)),
    "PixelUnshuffle": row("2d", 2, out=32),
    "ChannelShuffle": row("2d", 2, free=(2, 4)),
    # shape
    "Flatten": row("2d", out=8 * 64, after="rows"),
    "Unflatten": row("rows", 1, (2, 4), out=4, free=(4,)),
    # recurrent
    "RNN": row("steps", 8, 6, out=6, free=(8, 6), call=_first),
    "GRU": row("steps", 8, 6, out=6, free=(8, 6), call=_first),
    "LSTM": row("steps", 8, 6, out=6, free=(8, 6), call=_first),
    "RNNCell": row("rows", 8, 6, out=6, free=(8, 6)),
    "GRUCell": row("rows", 8, 6, out=6, free=(8, 6)),
    "LSTMCell": row("rows", 8, 6, out=6, free=(8, 6), call=_first),
    # attention
    "MultiheadAttention": row("steps", 8, 2, free=(8, 2, 4, 8), call=lambda layer, y: layer(y, y, y)[0]),
    "TransformerEncoderLayer": row("steps", 8, 2, 16, free=(2, 4, 16)),
    "TransformerDecoderLayer": row("steps", 8, 2, 16, free=(2, 4, 2, 4, 16), call=lambda layer, y: layer(y, y)),
    "TransformerEncoder": row("steps", _encoder_layer, 2, free=(2, 4, 16) * 2, enable_nested_tensor=False),
    "TransformerDecoder": row(
        "steps", nn.TransformerDecoderLayer(8, 2, 16), 2, free=(2, 4, 2, 4, 16) * 2, call=lambda layer, y: layer(y, y)
    ),
    "Transformer": row(
        "steps", 8, 2, 1, 1, 16, batch_first=True, free=(2, 4, 16, 2, 4, 2, 4, 16), call=lambda layer, y: layer(y, y)
    ),
    # what compares the positions of a dim
    "Softmax": row("1d", -1),
    "LogSoftmax": row("1d", -1),
    "Softmin": row("1d", -1),
    "Softmax2d": row("2d", free=(), whole="softmax compares or orders its positions"),
    "CosineSimilarity": row("2d", 1, out=0, call=lambda layer, y: layer(y, y.relu())),
    "PairwiseDistance": row(
        "rows",
        out=0,
        free=(),
        call=lambda layer, y: layer(y, y.relu()),
        whole="adds a constant to each of its positions",
    ),
    # losses
    "MSELoss": loss(torch.relu, reduction="sum", free=(8,)),
    "L1Loss": loss(torch.relu, reduction="sum", free=(8,)),
    "SmoothL1Loss": loss(torch.relu, norms="prune", free=(8,)),
    "HuberLoss": loss(torch.relu, norms="prune", free=(8,)),
    "CrossEntropyLoss": loss(_classes, "cross_entropy_loss weighs every position"),
    "LinearCrossEntropyLoss": loss(_classes, args=(8, 5), free=(8,)),
    "NLLLoss": loss(_classes, "nll_loss_nd weighs every position"),
    "NLLLoss2d": row(
        "2d",
        out=0,
        free=(),
        call=lambda s, y: s(y, _classes(y)[:, None, None].expand(-1, 8, 8)),
        whole="nll_loss_nd weighs every position",
    ),
    "MultiMarginLoss": loss(_classes, "multi_margin_loss weighs every position"),
    "MultiLabelMarginLoss": loss(_labels, "multilabel_margin_loss weighs every position"),
    "MultiLabelSoftMarginLoss": loss(_bits, "sum sums over it"),
    "SoftMarginLoss": loss(_signs, "soft_margin_loss weighs every position"),
    "HingeEmbeddingLoss": loss(_signs, "hinge_embedding_loss weighs every position"),
    "KLDivLoss": loss(_bits, "kl_div weighs every position", reduction="batchmean"),
    "PoissonNLLLoss": loss(_bits, "poisson_nll_loss weighs every position"),
    "BCELoss": row("rows", out=0, free=(), call=lambda s, y: s(y.sigmoid(), _bits(y)), whole="weighs every position"),
    "BCEWithLogitsLoss": loss(_bits, "binary_cross_entropy_with_logits weighs every position"),
    "CosineEmbeddingLoss": row(
        "rows", out=0, free=(), call=_of_two, whole="cosine_embedding_loss weighs every position"
    ),
    "MarginRankingLoss": row(
        "rows", out=0, free=(), call=lambda s, y: s(y, y.relu(), _signs(y)), whole="margin_ranking_loss weighs every"
    ),
    "TripletMarginLoss": row("rows", out=0, free=(), call=_of_three, whole="triplet_margin_loss weighs every position"),
    "TripletMarginWithDistanceLoss": row("rows", out=0, free=(), call=_of_three, whole="adds a constant to each"),
}

EXCUSED = {
    **dict.fromkeys(["Module", "Container"], "has no forward"),
    **dict.fromkeys(["ModuleDict", "ModuleList", "ParameterDict", "ParameterList"], "a container without a forward"),
    "Sequential": "what half of the suite is made of",
    "RNNBase": "the base of RNN, GRU and LSTM",
    "RNNCellBase": "the base of the cells",
    "AdaptiveLogSoftmaxWithLoss": "which rows it computes depends on the values of the target, so it cannot be traced",
    "GaussianNLLLoss": "it looks at the values of the variances, so it cannot be traced",
    "CTCLoss": "how much of its inputs it reads depends on the values of the lengths, so it cannot be traced",
    "DataParallel": "refused, see test_odd_models",
}


class Sandwich(nn.Module):
    def __init__(self, name: str, row: Row) -> None:
        super().__init__()
        self.before = LAYERS[row.kind][0](3, row.width)
        self.layer = getattr(nn, name)(*row.args, **row.kwargs)
        self.after = LAYERS[row.after or row.kind][0](row.out, 5) if row.out else nn.Identity()
        self.call = row.call

    def forward(self, x):
        return self.after(self.call(self.layer, self.before(x)))


def test_every_layer_has_a_row_or_an_excuse():
    assert sorted([*TABLE, *EXCUSED]) == NAMES


@pytest.mark.filterwarnings("ignore:.*NLLLoss2d.*:FutureWarning")
@pytest.mark.parametrize("name", TABLE)
def test_half_of_each_group_goes(name):
    torch.manual_seed(0)
    row = TABLE[name]
    model, x = Sandwich(name, row), torch.randn(LAYERS[row.kind][1])
    model(x)
    model = randomised(model)
    coupling = gp.couple(gp.trace(model, x), norms=row.norms)
    assert coupling.unknown == ()
    assert tuple(g.size for g in coupling.groups) == row.free
    if row.whole:
        assert row.whole in coupling.why_not("before.weight", 0)
        return
    result = gp.prune(model, x, target=gp.Target(channels=0.5), importance=gp.importance.Random(3), norms=row.norms)
    assert all(w.after < w.before for w in result.report.groups)
    check = result.report.verification
    assert check.error < 1e-9
    assert check.effect > 1e-6
