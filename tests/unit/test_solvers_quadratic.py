"""The relaxed programme, and the search that follows it, against exhaustive search."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import CalibrationError, InputError
from graphprune.solvers import exchange
from graphprune.solvers.exchange import value
from graphprune.solvers.quadratic import _project, _relax, select, selections
from graphprune.solvers.subset import greedy_removal


def problem(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """u and a positive semidefinite S: of low rank or full, with and without a common direction, u absent to dominant."""
    g = torch.Generator().manual_seed(seed)
    rank = [3, size, 3 * size][seed % 3]
    q = torch.randn(rank, size, generator=g, dtype=torch.float64)
    if seed % 2:
        q = q.abs() * torch.rand(size, generator=g, dtype=torch.float64).exp()
    linear = torch.randn(size, generator=g, dtype=torch.float64) * [0, 0.3, 1, 3][seed // 6 % 4]
    return linear, q.T @ q / rank


def exhaustive(linear: torch.Tensor, matrix: torch.Tensor, count: int) -> float:
    masks = torch.zeros(math.comb(len(linear), count), len(linear), dtype=torch.bool)
    for mask, chosen in zip(masks, itertools.combinations(range(len(linear)), count), strict=True):
        mask[list(chosen)] = True
    return float(value(masks, matrix, linear).min())


def reached(found: torch.Tensor, linear: torch.Tensor, matrix: torch.Tensor) -> float:
    return float(linear[found].sum() + matrix[found][:, found].sum())


@pytest.mark.parametrize("size", [1, 2, 5, 8, 11])
@pytest.mark.parametrize("indefinite", [False, True])
def test_within_one_percent_of_exhaustive_search_for_every_count(size, indefinite):
    for seed in range(24):
        linear, matrix = problem(size, seed)
        if indefinite:
            noise = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            matrix = matrix + 0.02 * (noise + noise.T)
        for count, found in enumerate(selections(linear, matrix, range(size + 1))):
            best = exhaustive(linear, matrix, count)
            assert len(found) == count
            assert reached(found, linear, matrix) <= best + 0.01 * abs(best) + 1e-12, (seed, count)


@pytest.mark.parametrize("seed", range(6))
def test_sixteen_channels(seed):
    linear, matrix = problem(16, seed)
    for count in (2, 8, 13):
        best = exhaustive(linear, matrix, count)
        assert reached(select(linear, matrix, count), linear, matrix) <= best + 0.01 * abs(best) + 1e-12


@pytest.mark.parametrize("size", [40, 150])
def test_never_worse_than_greedy(size):
    better = 0
    for seed in range(4):
        linear, matrix = problem(size, seed)
        order, costs = greedy_removal(matrix, linear)
        for count in (size // 5, size // 2):
            mine, greedy = reached(select(linear, matrix, count), linear, matrix), float(costs[:count].sum())
            assert mine <= greedy + 1e-9 * abs(greedy)
            better += mine < greedy - 1e-6 * abs(greedy)
        assert len(order) == size
    assert better > 0


def test_counts_in_any_order_with_repeats_and_the_same_answer_each_time():
    linear, matrix = problem(12, 5)
    several = selections(linear, matrix, [7, 0, 12, 7, 3])
    assert [len(found) for found in several] == [7, 0, 12, 7, 3]
    assert all(torch.equal(found, found.sort().values) for found in several)
    again = selections(linear, matrix, [7, 0, 12, 7, 3])
    assert all(torch.equal(a, b) for a, b in zip(several, again, strict=True))
    assert selections(linear, matrix, []) == []


def test_the_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    select(*problem(9, 2), 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_large_groups_are_not_kicked(monkeypatch):
    monkeypatch.setattr(exchange, "_ELEMENTS", 20)
    linear, matrix = problem(6, 1)
    monkeypatch.setattr(exchange, "_descend_all", None)
    assert len(select(linear, matrix, 3)) == 3


def test_nothing_to_choose_between():
    assert select(torch.zeros(4), torch.zeros(4, 4), 2).tolist() == [0, 1]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=12), st.data())
def test_projection_is_the_nearest_point(values, draw):
    point = torch.tensor(values, dtype=torch.float64)
    count = draw.draw(st.integers(0, len(values)))
    found = _project(point, count)
    assert found.min() >= 0
    assert found.max() <= 1
    assert float(found.sum()) == pytest.approx(count, abs=1e-9)
    # Nearest: the move is the same for all that are inside, at least as far up at 0, and down at 1.
    move = point - found
    inside = (found > 1e-9) & (found < 1 - 1e-9)
    level = move[inside].mean() if inside.any() else None
    if level is not None:
        assert (move[inside] - level).abs().max() < 1e-9
        assert (move[found <= 1e-9] <= level + 1e-8).all()
        assert (move[found >= 1 - 1e-9] >= level - 1e-8).all()
    else:
        low, high = move[found <= 1e-9], move[found >= 1 - 1e-9]
        assert not len(low) or not len(high) or low.max() <= high.min() + 1e-8


def test_the_relaxation_reaches_its_optimum():
    """No feasible direction from i to j lowers the objective: the slopes obey the conditions of Karush, Kuhn and Tucker."""
    linear, matrix = problem(15, 8)
    bound = 2 * float(torch.linalg.eigvalsh(matrix)[-1])
    found = _relax(torch.full((15,), 0.5, dtype=torch.float64), matrix, linear, 6, bound)
    slope = linear + 2 * matrix @ found
    assert slope[found > 1e-6].max() <= slope[found < 1 - 1e-6].min() + 0.02 * slope.abs().max()


@pytest.mark.parametrize("count", [-1, 5])
def test_counts_out_of_range(count):
    with pytest.raises(InputError, match=rf"counts: cannot remove \[{count}\] of 4 channels; pass numbers from 0 to 4"):
        select(torch.zeros(4), torch.eye(4), count)


def test_shapes_and_numbers_that_do_not_go_together():
    with pytest.raises(InputError, match=r"linear: shape \(3,\) .* pass one of shape \(4,\)"):
        select(torch.zeros(3), torch.eye(4), 1)
    with pytest.raises(InputError, match=r"matrix: .* pass a square matrix"):
        select(torch.zeros(3), torch.zeros(3, 4), 1)
    with pytest.raises(CalibrationError, match="linear: NaN or infinities"):
        select(torch.tensor([0.0, float("inf")]), torch.eye(2), 1)
