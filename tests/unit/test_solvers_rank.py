"""Counting by inertia gives exactly what torch.linalg.matrix_rank gives one map at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphprune.errors import CalibrationError, InputError
from graphprune.solvers import rank
from graphprune.solvers.rank import ranks

SHAPES = [(1, 1), (1, 9), (2, 2), (2, 5), (4, 4), (5, 3), (5, 5), (7, 7), (8, 13), (14, 14), (17, 11), (28, 28)]


def one_by_one(maps: torch.Tensor, tolerance: float | None = None) -> torch.Tensor:
    return torch.stack([torch.linalg.matrix_rank(m, rtol=tolerance) for m in maps])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectrum(values: torch.Tensor, height: int, width: int, g: torch.Generator) -> torch.Tensor:
    """Maps with the given singular values (N, min(height, width)), in float64."""
    short = min(height, width)
    left, right = (torch.linalg.qr(torch.randn(len(values), n, short, generator=g).double()).Q for n in (height, width))
    return left * values[:, None] @ right.mT


@pytest.mark.parametrize("shape", SHAPES)
def test_random_low_rank_maps(shape):
    height, width = shape
    g = generator(height * 100 + width)
    parts = []
    for r in range(min(shape) + 1):
        parts.append(torch.randn(3, height, r, generator=g) @ torch.randn(3, r, width, generator=g))
    maps = torch.cat(parts)
    expected = one_by_one(maps)
    assert expected.unique().numel() == min(shape) + 1
    assert torch.equal(ranks(maps), expected)


@pytest.mark.parametrize("size", [6, 8, 14, 28, 56])
def test_feature_maps_after_relu(size):
    """Convolutions of smooth images, some channels nearly always off: full, structural and numerical deficiency."""
    torch.manual_seed(size)
    coarse = torch.randn(4, 3, max(2, size // 4), max(2, size // 4))
    images = nn.functional.interpolate(coarse, size=size, mode="bicubic")
    bias = torch.linspace(-2.5, 1, 24)
    maps = nn.functional.conv2d(images, torch.randn(24, 3, 3, 3) / 3, bias, padding=1).relu().flatten(0, 1)
    expected = one_by_one(maps)
    assert expected.unique().numel() > 4
    assert torch.equal(ranks(maps), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 3), (5, 5), (6, 9), (8, 8), (15, 12), (28, 28), (56, 56)])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_singular_values_near_the_tolerance(shape, dtype, scale):
    g = generator(7)
    short, unit = min(shape), torch.finfo(dtype).eps * max(shape)
    values = torch.ones(60, short, dtype=torch.float64)
    for i, factor in enumerate([0.1, 0.25, 0.4, 0.5, 0.6, 1.6, 2, 3, 4, 10]):
        values[i::10, 1 + i % (short - 1) :] = factor * unit
    maps = (scale * spectrum(values, *shape, g)).to(dtype)
    expected = one_by_one(maps)
    assert (expected == short).any()
    assert (expected < short).any()
    assert torch.equal(ranks(maps), expected)


@pytest.mark.parametrize("tolerance", [0.0, 1e-9, 1e-4, 0.02, 0.3, 0.9])
def test_a_tolerance_of_ones_own(tolerance):
    g = generator(11)
    maps = spectrum(torch.logspace(0, -8, 9).double().expand(20, 9), 9, 12, g).float()
    assert torch.equal(ranks(maps, tolerance), one_by_one(maps, tolerance))
    assert torch.equal(ranks(maps.double(), tolerance), one_by_one(maps.double(), tolerance))


def test_zeros_constants_duplicates_lines_and_triangles():
    g = generator(3)
    base = torch.rand(12, 12, generator=g)
    rows, columns, both = base.clone(), base.clone(), base.clone()
    rows[3:9] = 0
    columns[:, 5:] = 0
    both[2:5], both[:, 4:6] = 0, 0
    twice = base.clone()
    twice[1], twice[7] = twice[0], 2 * twice[6]
    maps = torch.stack(
        [torch.zeros(12, 12), torch.full((12, 12), 3.0), rows, columns, both, twice, base.tril(-4), base.triu(1)]
    )
    assert ranks(maps).tolist() == [0, 1, 6, 5, 9, 10, 8, 11]
    assert torch.equal(ranks(maps), one_by_one(maps))


def test_few_maps_are_left_to_singular_values(monkeypatch):
    """Most of the maps are settled by counting, or all of it would be in vain."""
    seen = []
    plain = torch.linalg.matrix_rank
    monkeypatch.setattr(rank.torch.linalg, "matrix_rank", lambda a, **k: seen.append(len(a)) or plain(a, **k))
    g = generator(5)
    full = torch.randn(1000, 14, 14, generator=g).relu()
    low = torch.randn(1000, 14, 5, generator=g) @ torch.randn(1000, 5, 14, generator=g)
    assert ranks(torch.cat([full, low])).bincount()[[5, 14]].sum() > 1990
    assert sum(seen) < 20


def test_chunks_make_no_difference(monkeypatch):
    maps = torch.randn(53, 7, 7, generator=generator(2)).relu()
    whole = ranks(maps)
    monkeypatch.setattr(rank, "_CHUNK", 10 * 49)
    assert torch.equal(ranks(maps), whole)


@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e-80, 1e80, 1e160, 1e200])
def test_float64_maps_whose_squares_leave_the_range(scale):
    maps = torch.randn(30, 6, 6, generator=generator(9), dtype=torch.float64).relu() * scale
    maps[::5, 2] = maps[::5, 1]
    maps[3] = 0
    assert torch.equal(ranks(maps), one_by_one(maps))


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e30, 1e37])
def test_float32_maps_of_any_magnitude(scale):
    maps = torch.randn(30, 6, 6, generator=generator(9)).relu() * scale
    assert torch.equal(ranks(maps), one_by_one(maps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype):
    maps = torch.randn(40, 7, 7, generator=generator(1)).relu().to(dtype)
    maps[::4, 3] = maps[::4, 2]
    assert torch.equal(ranks(maps), one_by_one(maps.float()))


def test_views_gradients_and_emptiness():
    maps = torch.randn(30, 9, 11, generator=generator(4), requires_grad=True)
    strided = maps.mT[::2, 1:8, :]
    found = ranks(strided)
    assert not found.requires_grad
    assert found.dtype == torch.int64
    assert torch.equal(found, one_by_one(strided))
    assert ranks(torch.zeros(0, 5, 5)).shape == (0,)


@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_map_that_is_not_finite_is_named(size, value, monkeypatch):
    monkeypatch.setattr(rank, "_CHUNK", 4 * size**2)
    maps = torch.ones(9, size, size)
    maps[6, 1, 1] = maps[7, 0, 0] = value
    with pytest.raises(CalibrationError, match="NaN or infinities in map 6 and 1 more; look for the layer"):
        ranks(maps)


@pytest.mark.parametrize("maps", [torch.zeros(3, 3), torch.zeros(2, 3, 3, dtype=torch.int64), torch.zeros(2, 0, 3)])
def test_what_is_no_stack_of_maps(maps):
    with pytest.raises(InputError, match=r"pass real maps \(N, H, W\) with H and W >= 1"):
        ranks(maps)


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan")])
def test_a_tolerance_out_of_range(tolerance):
    with pytest.raises(InputError, match="relative to the largest singular value, 0 <= it < 1"):
        ranks(torch.ones(1, 2, 2), tolerance)
