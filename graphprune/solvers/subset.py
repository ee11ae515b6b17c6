"""Which channels to remove one after the other: greedily, or by forward selection.

The quadratic form is u'z + z'Sz, z in {0, 1}^n, 1 = removed: ThiNet's with u = 0 and S the Gram matrix of the channels'
contributions to the next layer; Fisher's and CCP's with first-order terms in u.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from graphprune.errors import CalibrationError, InputError
from graphprune.solvers.arrays import finite, shaped, symmetric
from graphprune.solvers.least_squares import factorise, floor_of


def greedy_removal(matrix: torch.Tensor, linear: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove channels one by one, each time the one that adds least to u'z + z'Sz (ThiNet, Luo et al., ICCV 2017).

    Args:
        matrix: S, (n, n).
        linear: u, (n,); zero when left out, as in ThiNet.

    Returns:
        All n channels, (n,) int64, first removed first, of equal ones the lower index; and what each removal adds, (n,)
        float64: the first p sum up to the form's value with p removed.

    Raises:
        InputError: the shapes do not go together.
        CalibrationError: the statistics hold NaN.

    Example:
        >>> greedy_removal(torch.tensor([[4.0, 1.0, -1.0], [1.0, 2.0, 1.0], [-1.0, 1.0, 1.0]]))[0].tolist()
        [2, 0, 1]
    """
    rows = symmetric(matrix, "matrix").numpy(force=True)
    size = len(rows)
    cost = rows.diagonal().copy()
    if linear is not None:
        cost += shaped(linear, (size,), "linear").numpy(force=True)
    order, costs = np.empty(size, dtype=np.int64), np.empty(size)
    for step in range(size):
        order[step] = chosen = cost.argmin()
        costs[step] = cost[chosen]
        cost += 2 * rows[chosen]
        cost[chosen] = np.inf
    return torch.from_numpy(order), torch.from_numpy(costs)


@dataclass(frozen=True)
class Selection:
    """Channels in the order in which they are to be removed.

    Attributes:
        order: (n,) int64, first removed first.
        lost: (n + 1,) float64; lost[w] is the part of the output's power that least squares does not recover from the w
            channels kept, in [0, 1]; lost[0] = 1.
        ridge: added to the diagonal of the second moments, relative to its mean.
    """

    order: torch.Tensor
    lost: torch.Tensor
    ridge: float


def forward_selection(second: torch.Tensor, weight: torch.Tensor, *, taps: int = 1, ridge: float = 1e-8) -> Selection:
    """Select the channels from which least squares best reconstructs the output W x (orthogonal matching pursuit).

    The next channel is the one with the largest drop of E|W x - B x_K|^2 + ridge |B|^2, B refitted each time. The order
    of removal is the reverse. Of equal channels, such as dead ones, the lower index is selected first.

    Args:
        second: E[x x'], (n * taps, n * taps), channel by channel: position c * taps + k is tap k of channel c.
        weight: W, (m, n * taps).
        taps: columns a channel owns, such as k * k of a convolution.
        ridge: at least this is added to the diagonal, relative to its mean; more where that leaves it singular.

    Raises:
        InputError: the shapes do not go together, or `taps` is not a divisor.
        CalibrationError: the statistics hold NaN, or are those of no data.

    Example:
        >>> forward_selection(torch.diag(torch.tensor([1.0, 4.0, 2.0])), torch.ones(1, 3)).order.tolist()
        [0, 2, 1]
    """
    floor = floor_of(second)
    second = symmetric(second, "second moments")
    columns = len(second)
    if taps < 1 or columns % taps:
        raise InputError(f"taps={taps}: {columns} columns are not {taps} for every channel; pass kernel height * width")
    if weight.ndim != 2 or weight.shape[1] != columns:
        raise InputError(
            f"weight: shape {tuple(weight.shape)}: pass (outputs, {columns}), as many columns as the moments"
        )
    weight = finite(weight, "weight")
    ridge = factorise(second, ridge, floor)[1]
    cross = second @ weight.T
    power = float((weight.T * cross).sum())
    if power < 0:
        raise CalibrationError("second moments: the output has negative power, so they are those of no data")
    if cross.shape[1] > columns:  # only inner products of the rows matter
        cross = torch.linalg.qr(cross.T, mode="r").R.T
    shift = ridge * (second.diagonal().mean() if second.any() else 1.0)
    selected, gains = _pursue(
        second + shift * torch.eye(columns, dtype=second.dtype, device=second.device), cross, taps
    )
    lost = 1 - torch.cat([gains.new_zeros(1), gains.cumsum(0)]) / (power or 1.0)
    return Selection(selected.flip(0), lost.clamp(min=0), ridge)


def _pursue(second: torch.Tensor, cross: torch.Tensor, taps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of selection, (n,), and the drop of the squared residual at each step, (n,).

    `factor` holds the rows of the Cholesky factor L' of the channels selected, with all columns; `own` the diagonal
    blocks of the Schur complement; `rest` the cross moments with the residual. A step costs one product with `factor`.
    """
    size = len(second) // taps
    own = torch.stack([second[i : i + taps, i : i + taps] for i in range(0, len(second), taps)])
    rest = cross.reshape(size, taps, cross.shape[1]).clone()
    factor = torch.empty_like(second)
    free = torch.ones(size, dtype=torch.bool, device=second.device)
    order = torch.empty(size, dtype=torch.int64, device=second.device)
    drops = second.new_empty(size)
    for step in range(size):
        lower = torch.linalg.cholesky_ex(own).L
        fitted = torch.linalg.solve_triangular(lower, rest, upper=False)
        gains = torch.where(free, fitted.square().sum((1, 2)), -1.0)
        chosen = int((gains == gains.max()).nonzero()[0])
        order[step], drops[step], free[chosen] = chosen, gains[chosen], False
        begin, at = step * taps, slice(chosen * taps, (chosen + 1) * taps)
        row = second[at] - factor[:begin, at].T @ factor[:begin]
        row = torch.linalg.solve_triangular(lower[chosen], row, upper=False)
        factor[begin : begin + taps] = row
        rest -= (row.T @ fitted[chosen]).view_as(rest)
        blocks = row.view(taps, size, taps).transpose(0, 1)
        own -= blocks.mT @ blocks
        own[chosen], rest[chosen] = torch.eye(taps, dtype=own.dtype, device=own.device), 0
    return order, drops
