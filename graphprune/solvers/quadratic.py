"""The 0/1 quadratic programme of collaborative channel pruning (CCP, Peng et al., ICML 2019).

    minimise u'b + b'Sb  over  b in {0, 1}^n, sum b = p        b = 1: removed

Relaxed to [0, 1] it is solved by accelerated projected gradients. The p largest b and greedy solutions from either end
are improved by pairwise swaps on the exact objective; the best of them is kicked and improved again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphprune.errors import InputError
from graphprune.solvers.arrays import shaped, symmetric
from graphprune.solvers.exchange import descend, kick, value
from graphprune.solvers.subset import greedy_removal

_STEPS = 60  # of the gradient method at most; it stops as soon as it stands still
_STILL = 1e-4  # largest move of any b that counts as standing still


def select(linear: torch.Tensor, matrix: torch.Tensor, removed: int) -> torch.Tensor:
    """The channels to remove, ascending, (removed,) int64; see `selections`.

    Raises:
        InputError: the shapes do not go together, or `removed` is not in 0..n.
        CalibrationError: the statistics hold NaN.

    Example:
        >>> select(torch.zeros(3), torch.tensor([[2.0, 0, -1.9], [0, 1.0, 0], [-1.9, 0, 2.0]]), 2).tolist()
        [0, 2]
    """
    return selections(linear, matrix, [removed])[0]


def selections(linear: torch.Tensor, matrix: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """For each count p, the p channels whose removal costs u'z + z'Sz least, as far as local search can tell.

    Args:
        linear: u, (n,).
        matrix: S, (n, n); positive semidefinite, or nearly so.
        counts: how many to remove, each in 0..n, in any order; the relaxed solution of one is where the next starts.

    Returns:
        Per count, the positions removed, ascending, int64. Sets of different counts need not be nested.

    Raises:
        InputError: the shapes do not go together, or a count is not in 0..n.
        CalibrationError: the statistics hold NaN.
    """
    matrix = symmetric(matrix, "matrix")
    size = len(matrix)
    linear = shaped(linear, (size,), "linear")
    if wrong := [p for p in counts if not 0 <= p <= size]:
        raise InputError(f"counts: cannot remove {wrong} of {size} channels; pass numbers from 0 to {size}")
    forward = greedy_removal(matrix, linear)[0].to(matrix.device)
    # Taking channels back from the end where all are removed, cheapest first, is greedy removal in 1 - z.
    backward = greedy_removal(matrix, -linear - 2 * matrix.sum(1))[0].flip(0).to(matrix.device)
    bound = 2 * _largest(matrix)
    relaxed = linear.new_full((size,), 0.5)
    found: dict[int, torch.Tensor] = {}
    for count in sorted(set(counts)):
        relaxed = _relax(relaxed, matrix, linear, count, bound)
        starts = [relaxed.argsort(descending=True, stable=True)[:count], forward[:count], backward[:count]]
        found[count] = _best(starts, matrix, linear)
    return [found[count] for count in counts]


def _best(starts: Sequence[torch.Tensor], matrix: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """The best of the sets that swaps lead to from each of the starts; of equal ones the first."""
    masks = torch.zeros(len(starts), len(linear), dtype=torch.bool, device=linear.device)
    for mask, start in zip(masks, starts, strict=True):
        mask[start] = True
    ends = torch.stack([descend(mask, matrix, linear) for mask in masks])
    best = ends[int(value(ends, matrix, linear).argmin())]
    return kick(best, matrix, linear).nonzero().flatten()


def _relax(start: torch.Tensor, matrix: torch.Tensor, linear: torch.Tensor, count: int, bound: float) -> torch.Tensor:
    """A minimiser of u'b + b'Sb over 0 <= b <= 1, sum b = count, by Nesterov's method with restarts.

    `bound` is at least the largest curvature, that is twice the largest eigenvalue of S.
    """
    point = ahead = _project(start, count)
    momentum = 1.0
    for _ in range(_STEPS):
        slope = linear + 2 * (matrix @ ahead)
        new = _project(ahead - slope / bound, count)
        if float((ahead - new) @ (new - point)) > 0:
            momentum = 1.0
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        move = new - point
        ahead, point, momentum = new + (momentum - 1) / grown * move, new, grown
        if float(move.abs().max()) < _STILL:
            break
    return point


def _project(point: torch.Tensor, count: int) -> torch.Tensor:
    """The nearest b with 0 <= b <= 1 and sum b = count: point - t clamped, where t is exact between two breakpoints.

    The sum falls linearly in t between the sorted values of point - 1 and point, so that one pass finds the piece.
    """
    ends = torch.cat([point - 1, point]).sort()
    slopes = torch.where(ends.indices < len(point), 1.0, -1.0).cumsum(0)  # how many coordinates are between their ends
    fallen = torch.cat([slopes.new_zeros(1), (slopes[:-1] * ends.values.diff()).cumsum(0)])
    target = len(point) - count  # the sum is n at the first breakpoint and 0 at the last
    piece = int(torch.searchsorted(fallen, torch.tensor(float(target), dtype=fallen.dtype, device=fallen.device)))
    piece = min(max(piece - 1, 0), len(fallen) - 1)
    over = (target - float(fallen[piece])) / max(float(slopes[piece]), 1.0)
    return (point - (ends.values[piece] + over)).clamp(0, 1)


def _largest(matrix: torch.Tensor) -> float:
    """A bound on the magnitude of the eigenvalues: the smaller of the Frobenius norm and the largest row sum."""
    return max(min(float(torch.linalg.vector_norm(matrix)), float(matrix.abs().sum(1).max())), 1e-300)
