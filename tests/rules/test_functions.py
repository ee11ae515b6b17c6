"""Functions of torch between two linear layers: what they trace to has rules, and half of each group goes, exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp


@dataclass(frozen=True)
class Use:
    """A function of what a linear layer gives: [4, 5, 8]; features last in what it returns.

    Attributes:
        f: the function.
        free: sizes of the groups found.
        head: whether a linear layer follows.
    """

    f: Callable[[torch.Tensor], torch.Tensor]
    free: tuple[int, ...] = (8,)
    head: bool = True


def _written(y, key, value):
    y = y.clone()
    y[key] = value
    return y


def _index(y, *shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 4


def _spread(y):
    return torch.zeros_like(y), torch.tensor([0, 2, 1, 0])


USES: dict[str, Use] = {
    "cosine": Use(lambda y: F.cosine_similarity(y, y.relu(), dim=-1)),
    "cosine of rows": Use(lambda y: y * F.cosine_similarity(y, y.relu(), dim=1)[:, None]),
    "vecdot": Use(lambda y: torch.linalg.vecdot(y, y.relu())),
    "tensordot": Use(lambda y: torch.tensordot(y, y.relu(), dims=([2], [2])).flatten(1)),
    "inner": Use(lambda y: torch.inner(y, y.relu()[0])),
    "cdist": Use(lambda y: torch.cdist(y, y.relu())),
    "multi_dot": Use(lambda y: torch.linalg.multi_dot([y[0], y[1].T, y[2]])),
    "kron": Use(lambda y: torch.kron(y[0], y[1]), (8,)),
    "gram diagonal": Use(lambda y: torch.diagonal(y.mT @ y, dim1=1, dim2=2)),
    "diag_embed": Use(lambda y: torch.diag_embed(y).sum(-2)),
    "block_diag": Use(lambda y: torch.block_diag(y[0], y[1].relu())),
    "hstack": Use(lambda y: torch.hstack([y[:, 0], y[:, 1].relu()])),
    "vstack": Use(lambda y: torch.vstack([y[0], y[1].relu(), y[2, 0]])),
    "dstack": Use(lambda y: torch.dstack([y, y.relu()])),
    "column_stack": Use(lambda y: torch.column_stack([y[:, 0], y[:, 1].relu()])),
    "hsplit": Use(lambda y: torch.cat(torch.hsplit(y[:, 0], 2)), (4,)),
    "dsplit": Use(lambda y: torch.dsplit(y, [3])[1], (3, 5)),
    "broadcast": Use(lambda y: torch.broadcast_tensors(y, y[:, :1])[1]),
    "sum_to_size": Use(lambda y: y.sum_to_size(1, 5, y.shape[2])),
    "fft of steps": Use(lambda y: torch.fft.ifft(torch.fft.fft(y, dim=1), dim=1).real),
    "real fft of steps": Use(lambda y: torch.view_as_real(torch.fft.rfft(y, dim=1)).flatten(1, 1).mT),
    "fft of features": Use(lambda y: torch.fft.fft2(y).real, ()),
    "polar": Use(lambda y: torch.polar(y, y).imag),
    "complex": Use(lambda y: torch.view_as_real(torch.complex(y, y.relu())).flatten(2)),
    "diff of steps": Use(lambda y: torch.diff(y, dim=1)),
    "rot90 of steps": Use(lambda y: torch.rot90(y, 1, [0, 1])),
    "flip": Use(lambda y: torch.flipud(torch.fliplr(y))),
    "quantile of steps": Use(lambda y: torch.quantile(y, 0.3, dim=1)),
    "sort of steps": Use(lambda y: torch.msort(y)),
    "renorm": Use(lambda y: torch.renorm(y, 2, 0, 0.3)),
    "norm": Use(lambda y: torch.linalg.norm(y, dim=-1)),
    "frobenius": Use(lambda y: torch.linalg.matrix_norm(y)),
    "normalize": Use(lambda y: F.normalize(y, dim=-1)),
    "gather of steps": Use(lambda y: y.gather(1, _index(y, 4, 3, 1).expand(-1, -1, y.shape[2]))),
    "gather of features": Use(lambda y: y.gather(2, _index(y, 4, 5, 3)), ()),
    "take_along_dim": Use(lambda y: torch.take_along_dim(y, _index(y, 4, 3, 1), dim=1)),
    "index_add": Use(lambda y: torch.index_add(_spread(y)[0], 0, _spread(y)[1], y)),
    "scatter_add": Use(lambda y: torch.zeros_like(y).scatter_add(0, _spread(y)[1][:, None, None].expand_as(y), y)),
    "scatter_reduce": Use(
        lambda y: torch.zeros_like(y).scatter_reduce(0, _spread(y)[1][:, None, None].expand_as(y), y, "amax")
    ),
    "index_fill": Use(lambda y: y.index_fill(1, torch.tensor([0, 3]), 1.5)),
    "index_copy": Use(lambda y: y.index_copy(1, torch.tensor([0, 3]), y[:, :2].relu())),
    "a mask of features": Use(lambda y: _written(y, y > 0.2, 0.0)),
    "a mask of steps": Use(lambda y: _written(y, y[:, :, 0] > 0.2, 0.0), ()),
    "rows of a mask": Use(lambda y: y[torch.ones(4, 5, dtype=torch.bool)]),
    "written steps": Use(lambda y: _written(y, (slice(None), 0), 2.0)),
    "repeated": Use(lambda y: y.repeat_interleave(2, dim=-1), (8, 2)),
    "repeated flat": Use(lambda y: y[0, 0].repeat_interleave(2), (8, 2)),
    "repeated by counts": Use(lambda y: y.repeat_interleave(torch.tensor([1, 2, 0, 1]), dim=0)),
    "searched": Use(lambda y: torch.searchsorted(torch.tensor([-0.5, 0.0, 0.5], dtype=y.dtype), y) * y),
    "bucketized": Use(lambda y: torch.bucketize(y, torch.tensor([-0.5, 0.0, 0.5], dtype=y.dtype)) * y),
    "tril": Use(lambda y: torch.tril(y @ y.mT) @ y),
    "embedded bags": Use(lambda y: F.embedding_bag(_index(y, 2, 3), y[0]), (8,)),
    "cross": Use(lambda y: torch.linalg.cross(y[:, :3], y[:, 1:4].relu(), dim=1)),
    "logaddexp": Use(lambda y: torch.logaddexp(y, y.relu())),
    "float_power": Use(lambda y: torch.float_power(y, 2)),
    "special": Use(lambda y: torch.special.erf(torch.special.expm1(torch.special.log1p(y.relu())))),
    "random numbers": Use(lambda y: y + torch.bernoulli(y.sigmoid()), ()),
    "inverse": Use(lambda y: torch.linalg.inv(y.mT @ y + torch.eye(8, dtype=y.dtype)), ()),
    "summed loss": Use(lambda y: F.mse_loss(y, y.relu(), reduction="sum"), head=False),
    "loss of each": Use(lambda y: F.smooth_l1_loss(y, y.relu(), reduction="none")),
    "distance": Use(lambda y: torch.dist(y, y.relu()), head=False),
    "histogram": Use(lambda y: y * torch.histc(y, 8), ()),
}


class Between(nn.Module):
    def __init__(self, use: Use) -> None:
        super().__init__()
        self.f, self.first = use.f, nn.Linear(3, 8)
        self.last = nn.LazyLinear(7) if use.head else nn.Identity()

    def forward(self, x):
        return self.last(self.f(self.first(x)).to(x.dtype))


@pytest.mark.parametrize("name", USES)
def test_half_of_each_group_goes(name):
    torch.manual_seed(0)
    use, x = USES[name], torch.randn(4, 5, 3)
    model = Between(use)
    model(x)
    coupling = gp.couple(gp.trace(model, x))
    assert coupling.unknown == ()
    assert tuple(g.size for g in coupling.groups) == use.free
    if not use.free:
        return
    for emit in ("auto", "graph"):
        check = gp.prune(model, x, target=gp.Target(channels=0.5), emit=emit).report.verification
        assert check.precision == "float64"
        assert check.error < 1e-9
        assert check.effect > 1e-6
