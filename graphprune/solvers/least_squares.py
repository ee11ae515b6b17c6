"""Least squares from second moments: removed channels as linear combinations of the kept ones.

Channel pruning (He et al., ICCV 2017) and ThiNet (Luo et al., ICCV 2017) scale the kept channels; refitting the whole
consumer is as cheap and stronger: B = C_PK (C_KK + ridge)^-1, then W_K += W_P B and b += W_P (mu_P - B mu_K).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphprune.errors import CalibrationError, InputError
from graphprune.solvers.arrays import shaped, symmetric

_FINE, _COARSE = 1e-10, 1e-6  # smallest pivots that are no rounding, relative to the mean diagonal: float64, float32
_GROWTH = 10.0


def floor_of(second: torch.Tensor) -> float:
    """The smallest pivot worth trusting in moments of this dtype, relative to the mean of their diagonal."""
    return _FINE if second.dtype == torch.float64 else _COARSE


@dataclass(frozen=True)
class Fit:
    """Removed channels from kept ones: x_P is close to `matrix` x_K + `offset`.

    Attributes:
        matrix: B, (..., P, K) float64.
        offset: (..., P) float64; None where no means were given, and the fit goes through the origin.
        ridge: what was added to the diagonal, relative to its mean over K; the same for all conv groups.
    """

    matrix: torch.Tensor
    offset: torch.Tensor | None
    ridge: float


def coefficients(
    second: torch.Tensor,
    kept: torch.Tensor,
    removed: torch.Tensor,
    *,
    mean: torch.Tensor | None = None,
    ridge: float = 0.0,
) -> Fit:
    """Fit the removed channels by the kept ones in the least-squares sense.

    Args:
        second: E[x x'], (I, I), or (G, I, I) with one matrix per conv group; unfolded, I = channels * taps.
        kept: positions K among I, (K,), or (G, K) where the groups differ.
        removed: positions P among I, likewise.
        mean: E[x], (I,) or (G, I); given, the fit has an offset and works on the covariance.
        ridge: at least this times the mean of the diagonal is added to it; more where the kept channels are linearly
            dependent, as dead channels are, or any with fewer samples than channels.

    Raises:
        InputError: shapes do not go together, positions are out of range or on both sides, or `ridge` is negative.
        CalibrationError: the moments hold NaN, or are those of no data at all (not positive semidefinite).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]], dtype=torch.float64) @ torch.eye(2, 3).double()
        >>> x[:, 2] = x[:, 0] - 2 * x[:, 1]
        >>> coefficients(x.T @ x / 3, torch.tensor([0, 1]), torch.tensor([2])).matrix.round(decimals=6).tolist()
        [[1.0, -2.0]]
    """
    floor = floor_of(second)
    second = symmetric(second, "second moments")
    if mean is not None:
        mean = shaped(mean, tuple(second.shape[:-1]), "mean")
        second = second - mean[..., :, None] * mean[..., None, :]
    _check(kept, removed, second)
    to_kept, to_removed = (p.expand(*second.shape[:-2], p.shape[-1]) for p in (kept, removed))
    rows = _take(second, to_kept, -2)
    gram, cross = _take(rows, to_kept, -1), _take(rows, to_removed, -1)
    factor, ridge = factorise(gram, ridge, floor)
    fitted = torch.cholesky_solve(cross, factor).mT
    if mean is None:
        return Fit(fitted, None, ridge)
    shift = (fitted @ mean.gather(-1, to_kept)[..., None])[..., 0]
    return Fit(fitted, mean.gather(-1, to_removed) - shift, ridge)


def factorise(matrix: torch.Tensor, ridge: float, floor: float) -> tuple[torch.Tensor, float]:
    """The Cholesky factors of positive semidefinite matrices, with the ridge that makes them definite.

    Args:
        matrix: (..., n, n) float64, symmetric.
        ridge: to begin with, relative to the mean of the diagonal.
        floor: the smallest pivot accepted, relative likewise; `ridge` grows tenfold from here until all are that large.

    Returns:
        The lower factor and the ridge used.

    Raises:
        InputError: `ridge` is negative or not finite.
        CalibrationError: even a ridge as large as the diagonal does not help.
    """
    if not 0 <= ridge < float("inf"):
        raise InputError(f"ridge={ridge}: pass a number >= 0, relative to the mean of the diagonal")
    scale = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
    scale = torch.where(scale > 0, scale, 1.0)  # channels without any activation: the fit is zero with any ridge
    while True:
        shifted = matrix + torch.diag_embed((ridge * scale)[..., None].expand(matrix.shape[:-1]))
        factor, info = torch.linalg.cholesky_ex(shifted)
        smallest = factor.diagonal(dim1=-2, dim2=-1).square() / scale[..., None]
        if not info.any() and (smallest > floor / 2).all():
            return factor, ridge
        if ridge > 0.5:
            raise CalibrationError(
                "second moments: not positive semidefinite, so they are those of no data; accumulate them in float64,"
                " and divide sums by the count that belongs to them"
            )
        ridge = max(floor, _GROWTH * ridge)


def _take(matrix: torch.Tensor, positions: torch.Tensor, dim: int) -> torch.Tensor:
    """The rows (-2) or columns (-1) of each matrix at its own positions (..., k)."""
    shape = list(matrix.shape)
    shape[dim] = positions.shape[-1]
    return matrix.gather(
        dim, positions[..., None, :].expand(shape) if dim == -1 else positions[..., None].expand(shape)
    )


def _check(kept: torch.Tensor, removed: torch.Tensor, second: torch.Tensor) -> None:
    """Positions are in range, and none occurs twice.

    Raises:
        InputError: otherwise.
    """
    size = second.shape[-1]
    for name, positions in (("kept", kept), ("removed", removed)):
        if positions.dtype != torch.int64 or tuple(positions.shape[:-1]) not in {(), tuple(second.shape[:-2])}:
            raise InputError(
                f"{name}: {positions.dtype} of shape {tuple(positions.shape)}: pass one row of int64 positions, or one"
                " for each conv group"
            )
        if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < size:
            raise InputError(f"{name}: positions {positions.tolist()} are not all in range({size})")
    both = torch.cat([p.expand(*second.shape[:-2], p.shape[-1]) for p in (kept, removed)], -1).sort(-1).values
    if (both.diff(dim=-1) == 0).any():
        raise InputError("kept, removed: a position occurs twice; each is kept once, removed once, or left out")
