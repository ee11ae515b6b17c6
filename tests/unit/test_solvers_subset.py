"""Greedy removal, forward selection and swaps against their definitions, step by step."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import CalibrationError, InputError
from graphprune.solvers.exchange import swap, value
from graphprune.solvers.subset import forward_selection, greedy_removal


def gram(size: int, seed: int, samples: int | None = None) -> torch.Tensor:
    """E[x x'] of correlated activations."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples or 3 * size, size, generator=g, dtype=torch.float64)
    x = x @ torch.randn(size, size, generator=g, dtype=torch.float64) + 0.3
    return x.T @ x / len(x)


def form(positions: list[int], matrix: torch.Tensor, linear: torch.Tensor) -> float:
    z = torch.zeros(len(matrix), dtype=torch.float64)
    z[positions] = 1
    return float(linear @ z + z @ matrix @ z)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(0, 1000), st.booleans())
def test_every_removal_is_the_cheapest_next_one(size, seed, slanted):
    matrix = gram(size, seed)
    linear = torch.linspace(-1, 1, size, dtype=torch.float64) if slanted else torch.zeros(size, dtype=torch.float64)
    order, costs = greedy_removal(matrix, linear if slanted else None)
    assert sorted(order.tolist()) == list(range(size))
    for step in range(size):
        before = order[:step].tolist()
        added = {j: form([*before, j], matrix, linear) - form(before, matrix, linear) for j in order[step:].tolist()}
        assert costs[step].item() == pytest.approx(min(added.values()), rel=1e-9, abs=1e-9)
        assert added[int(order[step])] == pytest.approx(min(added.values()), rel=1e-9, abs=1e-9)
    assert costs.sum().item() == pytest.approx(form(list(range(size)), matrix, linear), rel=1e-9, abs=1e-9)


def test_channels_that_cancel_go_together():
    """The pair whose contributions cancel costs nothing, though each alone costs most."""
    x = torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0.1 * x[:, 3]
    x[:, 1] = -x[:, 2]
    order, costs = greedy_removal(x.T @ x / 50)
    assert set(order[:2].tolist()) == {1, 2}
    assert abs(float(costs[:2].sum())) < 1e-12


def test_ties_go_to_the_lower_index():
    assert greedy_removal(torch.eye(5))[0].tolist() == [0, 1, 2, 3, 4]
    assert greedy_removal(torch.zeros(3, 3))[1].tolist() == [0, 0, 0]


def test_only_the_symmetric_part_counts():
    matrix = gram(6, 1)
    skew = torch.arange(36.0, dtype=torch.float64).view(6, 6)
    order, costs = greedy_removal(matrix + skew - skew.T)
    assert torch.equal(order, greedy_removal(matrix)[0])
    torch.testing.assert_close(costs, greedy_removal(matrix)[1])


def residual(x: torch.Tensor, y: torch.Tensor, kept: list[int]) -> float:
    """E|y - B x_K|^2 at the best B."""
    if not kept:
        return float(y.square().sum())
    return float((y - x[:, kept] @ torch.linalg.lstsq(x[:, kept], y).solution).square().sum())


@pytest.mark.parametrize(("channels", "taps", "outputs"), [(7, 1, 3), (7, 1, 11), (5, 3, 2), (3, 4, 17)])
def test_forward_selection_is_orthogonal_matching_pursuit(channels, taps, outputs):
    g = torch.Generator().manual_seed(channels)
    columns = channels * taps
    x = torch.randn(200, columns, generator=g, dtype=torch.float64)
    x = (x @ torch.randn(columns, columns, generator=g, dtype=torch.float64) + 0.3).relu()
    weight = torch.randn(outputs, columns, generator=g, dtype=torch.float64)
    y = x @ weight.T
    found = forward_selection(x.T @ x / 200, weight, taps=taps, ridge=1e-10)
    own = lambda chosen: [c * taps + k for c in chosen for k in range(taps)]  # noqa: E731
    selected = found.order.flip(0).tolist()
    assert sorted(selected) == list(range(channels))
    total = residual(x, y, [])
    assert found.lost[0] == 1
    for width in range(1, channels + 1):
        left = {c: residual(x, y, own([*selected[: width - 1], c])) / total for c in selected[width - 1 :]}
        assert left[selected[width - 1]] == pytest.approx(min(left.values()), rel=1e-5, abs=1e-8)
        assert float(found.lost[width]) == pytest.approx(min(left.values()), rel=1e-5, abs=1e-8)


def test_forward_selection_finds_the_channels_that_span_the_others():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, 8, generator=g, dtype=torch.float64)
    x[:, [1, 4, 6]] = x[:, [0, 2, 3]] @ torch.randn(3, 3, generator=g, dtype=torch.float64)
    x[:, [5, 7]] = 0
    found = forward_selection(x.T @ x / 100, torch.randn(5, 8, generator=g, dtype=torch.float64))
    assert found.lost[3] < 1e-6 < 1e-3 < found.lost[2]
    assert found.order[:2].tolist() == [7, 5]  # dead channels go first, the higher index before the lower
    assert (found.lost.diff() <= 0).all()


def test_forward_selection_with_fewer_samples_than_channels_tells_its_ridge():
    x = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = forward_selection(x.T @ x / 4, torch.eye(9, dtype=torch.float64), ridge=0.0)
    assert found.ridge == 1e-10
    assert found.lost[4] < 1e-6
    coarse = forward_selection((x.T @ x / 4).float(), torch.eye(9), ridge=0.0)
    assert coarse.ridge >= 1e-6


def test_a_layer_without_input_loses_nothing_to_speak_of():
    found = forward_selection(torch.zeros(3, 3), torch.ones(2, 3))
    assert found.order.tolist() == [2, 1, 0]
    assert found.lost.isfinite().all()


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 11), st.integers(0, 1000), st.data())
def test_no_swap_helps_after_swapping(size, seed, draw):
    matrix = gram(size, seed, samples=3)
    linear = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = sorted(draw.draw(st.sets(st.integers(0, size - 1))))
    found = swap(torch.tensor(start, dtype=torch.int64), matrix, linear).tolist()
    best = form(found, matrix, linear)
    assert found == sorted(set(found))
    assert len(found) == len(start)
    assert best <= form(start, matrix, linear) + 1e-12
    for i, j in itertools.product(found, set(range(size)) - set(found)):
        assert best <= form([k for k in found if k != i] + [j], matrix, linear) + 1e-9 * float(matrix.abs().max())


def test_the_value_of_masks_is_the_form():
    matrix, linear = gram(5, 0), torch.arange(5.0, dtype=torch.float64)
    masks = torch.tensor([[True, False, True, False, False], [False] * 5])
    torch.testing.assert_close(value(masks, matrix, linear).tolist(), [form([0, 2], matrix, linear), 0.0])


EYE = torch.eye(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: greedy_removal(torch.zeros(3, 4)), r"matrix: torch.float32 of shape \(3, 4\): pass a square matrix"),
        (lambda: greedy_removal(torch.eye(3, dtype=torch.int64)), "matrix: torch.int64 .* of real numbers"),
        (lambda: greedy_removal(EYE, torch.zeros(3)), r"linear: shape \(3,\) .* pass one of shape \(4,\)"),
        (lambda: forward_selection(EYE, torch.zeros(2, 3)), r"weight: shape \(2, 3\): pass \(outputs, 4\)"),
        (
            lambda: forward_selection(EYE, torch.zeros(2, 4), taps=3),
            "taps=3: 4 columns are not 3 for every channel; pass",
        ),
        (lambda: forward_selection(EYE, torch.zeros(2, 4), ridge=-1.0), "ridge=-1.0: pass a number >= 0"),
        (lambda: swap(torch.tensor([4]), EYE), r"removed: positions \[4\] are not all in range\(4\)"),
        (lambda: swap(torch.tensor([1, 1]), EYE), r"removed: a position occurs twice in \[1, 1\]"),
        (lambda: swap(torch.tensor([1]), EYE, torch.zeros(2)), r"linear: shape \(2,\)"),
    ],
)
def test_arguments_that_do_not_go_together(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_statistics_of_no_data_are_refused():
    bad = torch.eye(3)
    bad[1, 1] = float("nan")
    with pytest.raises(CalibrationError, match="matrix: NaN or infinities among the statistics"):
        greedy_removal(bad)
    with pytest.raises(CalibrationError, match="weight: NaN or infinities"):
        forward_selection(torch.eye(3), bad)
    with pytest.raises(CalibrationError, match="not positive semidefinite"):
        forward_selection(torch.tensor([[1.0, 5.0], [5.0, 1.0]]), torch.ones(1, 2))
