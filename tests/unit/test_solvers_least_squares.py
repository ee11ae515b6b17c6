"""Fits from moments equal fits to the data, also where the data leave the fit undetermined."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.errors import CalibrationError, InputError
from graphprune.solvers.least_squares import coefficients, factorise


def data(samples: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Correlated activations after a ReLU, float64."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=g, dtype=torch.float64)
    return (torch.randn(samples, channels, generator=g, dtype=torch.float64) @ mixing + 0.5).relu()


def positions(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), st.integers(0, 1000), st.data())
def test_uncentred_fit_is_lstsq_on_the_data(channels, seed, draw):
    x = data(5 * channels + 3, channels, seed)
    kept = positions(*sorted(draw.draw(st.sets(st.integers(0, channels - 1), min_size=1, max_size=channels - 1))))
    removed = positions(*(i for i in range(channels) if i not in kept.tolist()))
    fit = coefficients(x.T @ x / len(x), kept, removed)
    expected = torch.linalg.lstsq(x[:, kept], x[:, removed], driver="gelsd").solution.T
    residual = lambda b: (x[:, removed] - x[:, kept] @ b.T).square().sum()  # noqa: E731
    assert residual(fit.matrix) <= residual(expected) * (1 + 1e-6) + 1e-8 * x[:, removed].square().sum()
    assert fit.offset is None
    if fit.ridge == 0:
        torch.testing.assert_close(fit.matrix, expected, rtol=1e-5, atol=1e-6)


def test_centred_fit_is_lstsq_with_a_column_of_ones():
    x = data(200, 7)
    kept, removed = positions(0, 2, 5), positions(1, 3, 4, 6)
    fit = coefficients(x.T @ x / 200, kept, removed, mean=x.mean(0))
    ones = torch.cat([x[:, kept], torch.ones(200, 1, dtype=x.dtype)], 1)
    expected = torch.linalg.lstsq(ones, x[:, removed]).solution.T
    assert fit.ridge == 0
    torch.testing.assert_close(fit.matrix, expected[:, :-1])
    torch.testing.assert_close(fit.offset, expected[:, -1])


def test_a_layer_refitted_keeps_its_output_where_the_removed_are_combinations():
    x = data(300, 5)
    x[:, 3] = 2 * x[:, 0] - x[:, 1] + 0.7
    weight, bias = torch.randn(3, 5, dtype=x.dtype), torch.randn(3, dtype=x.dtype)
    kept, removed = positions(0, 1, 2, 4), positions(3)
    fit = coefficients(x.T @ x / 300, kept, removed, mean=x.mean(0))
    refitted = weight[:, kept] + weight[:, removed] @ fit.matrix
    shifted = bias + weight[:, removed] @ fit.offset
    torch.testing.assert_close(x[:, kept] @ refitted.T + shifted, x @ weight.T + bias)


def test_every_conv_group_is_fitted_by_itself():
    xs = [data(90, 5, seed) for seed in range(3)]
    second = torch.stack([x.T @ x / 90 for x in xs])
    mean = torch.stack([x.mean(0) for x in xs])
    same = coefficients(second, positions(0, 3), positions(1, 2, 4), mean=mean)
    kept = torch.stack([positions(0, 3), positions(1, 4), positions(2, 0)])
    removed = torch.stack([positions(1, 2), positions(0, 3), positions(4, 1)])
    own = coefficients(second, kept, removed, mean=mean)
    for i in range(3):
        alone = coefficients(second[i], positions(0, 3), positions(1, 2, 4), mean=mean[i])
        torch.testing.assert_close(same.matrix[i], alone.matrix)
        torch.testing.assert_close(same.offset[i], alone.offset)
        alone = coefficients(second[i], kept[i], removed[i], mean=mean[i])
        torch.testing.assert_close(own.matrix[i], alone.matrix)
        torch.testing.assert_close(own.offset[i], alone.offset)


@pytest.mark.parametrize("centred", [False, True])
def test_fewer_samples_than_channels_get_a_ridge_that_is_told(centred):
    x = data(6, 20)
    kept, removed = torch.arange(15), torch.arange(15, 20)
    mean = x.mean(0) if centred else None
    fit = coefficients(x.T @ x / 6, kept, removed, mean=mean)
    assert 0 < fit.ridge < 1e-6
    assert fit.matrix.abs().max() < 10
    # The kept channels span the samples, so that the removed ones follow from them but for the ridge.
    error = x[:, kept] @ fit.matrix.T + (fit.offset if centred else 0) - x[:, removed]
    assert error.norm() < 1e-5 * x[:, removed].norm()


def test_dead_channels_take_no_part():
    x = data(80, 6)
    x[:, 1] = x[:, 4] = 0
    kept, removed = positions(0, 1, 2), positions(3, 4, 5)
    fit = coefficients(x.T @ x / 80, kept, removed)
    without = coefficients(x.T @ x / 80, positions(0, 2), removed)
    assert fit.ridge > 0
    assert without.ridge == 0
    assert not fit.matrix[:, 1].any()
    assert not fit.matrix[1].any()
    torch.testing.assert_close(fit.matrix[:, [0, 2]], without.matrix, rtol=1e-6, atol=1e-8)


def test_all_dead_is_a_fit_of_zeros():
    fit = coefficients(torch.zeros(4, 4), positions(0, 1), positions(2, 3), mean=torch.zeros(4))
    assert fit.matrix.tolist() == [[0, 0], [0, 0]]
    assert fit.offset.tolist() == [0, 0]


def test_nothing_kept_leaves_the_mean():
    x = data(50, 3)
    fit = coefficients(x.T @ x / 50, positions(), positions(0, 1, 2), mean=x.mean(0))
    assert fit.matrix.shape == (3, 0)
    torch.testing.assert_close(fit.offset, x.mean(0))
    assert coefficients(x.T @ x / 50, positions(0, 2), positions()).matrix.shape == (0, 2)


def test_moments_in_float32_are_not_trusted_below_their_rounding():
    x = data(40, 30).float()
    x[:, 3] = x[:, 0] + x[:, 1]
    fit = coefficients(x.T @ x / 40, torch.arange(20), torch.arange(20, 30))
    exact = coefficients((x.double().T @ x.double() / 40), torch.arange(20), torch.arange(20, 30))
    assert fit.ridge >= 1e-6 > exact.ridge
    removed = x[:, 20:].double()
    errors = [(x[:, :20].double() @ f.matrix.T - removed).norm() / removed.norm() for f in (fit, exact)]
    assert errors[0] < errors[1] * 1.05 + 1e-3


def test_the_ridge_asked_for_is_the_one_added():
    x = data(100, 5)
    second, kept, removed = x.T @ x / 100, positions(0, 1, 2), positions(3, 4)
    fit = coefficients(second, kept, removed, ridge=0.1)
    gram = second[:3, :3] + 0.1 * second[:3, :3].diagonal().mean() * torch.eye(3, dtype=torch.float64)
    assert fit.ridge == 0.1
    torch.testing.assert_close(fit.matrix, second[3:, :3] @ torch.linalg.inv(gram))


def test_the_factor_is_that_of_the_matrix_and_the_ridge():
    matrix = torch.ones(3, 3, dtype=torch.float64)
    factor, ridge = factorise(matrix, 0.0, 1e-10)
    torch.testing.assert_close(factor @ factor.mT, matrix + ridge * torch.eye(3, dtype=torch.float64))
    assert ridge == 1e-10


EYE = torch.eye(4)


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((torch.zeros(3, 4), positions(0), positions(1)), {}, "second moments: .* pass a square matrix"),
        ((EYE, positions(0), positions(4)), {}, r"removed: positions \[4\] are not all in range\(4\)"),
        ((EYE, positions(-1), positions(1)), {}, r"kept: positions \[-1\] are not all in range"),
        ((EYE, positions(0, 1), positions(1)), {}, "a position occurs twice; each is kept once"),
        ((EYE, torch.tensor([0.0]), positions(1)), {}, "kept: torch.float32 .* pass one row of int64 positions"),
        ((EYE, positions(0), torch.tensor([[1], [2]])), {}, "removed: .* or one for each conv group"),
        (
            (EYE, positions(0), positions(1)),
            {"mean": torch.zeros(3)},
            r"mean: shape \(3,\) .* pass one of shape \(4,\)",
        ),
        ((EYE, positions(0), positions(1)), {"ridge": -1.0}, "ridge=-1.0: pass a number >= 0"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, keywords, message):
    with pytest.raises(InputError, match=message):
        coefficients(*arguments, **keywords)


def test_moments_of_no_data_are_refused():
    with pytest.raises(CalibrationError, match=r"not positive semidefinite, .* accumulate them in float64"):
        coefficients(torch.tensor([[1.0, 5.0, 0], [5.0, 1.0, 0], [0, 0, 1]]), positions(0, 1), positions(2))
    with pytest.raises(CalibrationError, match="NaN or infinities among the statistics; look for the batch"):
        coefficients(torch.full((3, 3), float("nan")), positions(0, 1), positions(2))
