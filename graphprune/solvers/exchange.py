"""Local search for the channels to remove: exchange pairs, kick the best, exchange again.

The quadratic form is u'z + z'Sz, z in {0, 1}^n, 1 = removed. Taking i back and removing j instead adds
g_j - g_i + S_ii + S_jj - 2 S_ij to it, with g = u + 2 S z.
"""

from __future__ import annotations

import torch

from graphprune.errors import InputError
from graphprune.solvers.arrays import shaped, symmetric

_COPIES = 64  # kicked at once, fewer where they would be more than _ELEMENTS
_ELEMENTS = 400_000
_PAIRS = 4  # exchanged by a kick, at most
_ROUNDS = 3  # of kicks without success


def swap(removed: torch.Tensor, matrix: torch.Tensor, linear: torch.Tensor | None = None) -> torch.Tensor:
    """Exchange a removed channel for a kept one, the pair that lowers u'z + z'Sz most, until no pair lowers it.

    Args:
        removed: (p,) int64, positions among n.
        matrix: S, (n, n).
        linear: u, (n,); zero when left out.

    Returns:
        (p,) int64, ascending.

    Raises:
        InputError: the shapes do not go together, or a position occurs twice or is out of range.
        CalibrationError: the statistics hold NaN.

    Example:
        >>> swap(torch.tensor([0]), torch.diag(torch.tensor([3.0, 1.0, 2.0]))).tolist()
        [1]
    """
    matrix = symmetric(matrix, "matrix")
    size = len(matrix)
    linear = matrix.new_zeros(size) if linear is None else shaped(linear, (size,), "linear")
    if len(removed) and not 0 <= int(removed.min()) <= int(removed.max()) < size:
        raise InputError(f"removed: positions {removed.tolist()} are not all in range({size})")
    out = torch.zeros(size, dtype=torch.bool, device=matrix.device)
    out[removed] = True
    if int(out.sum()) != len(removed):
        raise InputError(f"removed: a position occurs twice in {removed.tolist()}")
    return descend(out, matrix, linear).nonzero().flatten()


def value(out: torch.Tensor, matrix: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """The form at masks (..., n)."""
    z = out.to(matrix.dtype)
    return ((z @ matrix + linear) * z).sum(-1)


def descend(out: torch.Tensor, matrix: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """`swap` of a mask (n,), True = removed; S symmetric, all in float64."""
    inside, outside = out.nonzero().flatten(), (~out).nonzero().flatten()
    if not len(inside) or not len(outside):
        return out
    diagonal = matrix.diagonal()
    slope = linear + 2 * matrix[inside].sum(0)
    twice = 2 * matrix[inside][:, outside]
    noise = _noise(matrix, linear)
    while True:
        change = (slope + diagonal)[outside] - twice + (diagonal - slope)[inside][:, None]
        row, column = divmod(int(change.argmin()), len(outside))
        if change[row, column] >= -noise:
            break
        back, gone = int(inside[row]), int(outside[column])
        inside[row], outside[column] = gone, back
        slope += 2 * (matrix[gone] - matrix[back])
        twice[row], twice[:, column] = 2 * matrix[gone, outside], 2 * matrix[inside, back]
    out = torch.zeros_like(out)
    out[inside] = True
    return out


def kick(out: torch.Tensor, matrix: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """Look beyond a local minimum: exchange a few random pairs in many copies, let all descend, go on from the best.

    The random numbers are the same in every call. Where the group is so large that not even one copy fits, the mask is
    returned as it is.
    """
    size, fewest = len(out), min(int(out.sum()), int((~out).sum()))
    copies = min(_COPIES, _ELEMENTS // max(size, 1) ** 2)
    if not copies or not fewest:
        return out
    generator = torch.Generator().manual_seed(0)
    best, noise, failures = value(out, matrix, linear), _noise(matrix, linear), 0
    pairs = (torch.arange(copies, device=out.device) % min(_PAIRS, fewest) + 1)[:, None]
    while failures < _ROUNDS:
        keys = torch.rand(copies, size, generator=generator, dtype=matrix.dtype).to(out.device)
        chosen = [torch.where(side, keys, -1.0).argsort(1).argsort(1) >= size - pairs for side in (out, ~out)]
        masks = _descend_all(out & ~chosen[0] | chosen[1], matrix, linear)
        values = value(masks, matrix, linear)
        failures += 1
        if values.min() < best - noise:
            best, out, failures = values.min(), masks[int(values.argmin())], 0
    return out


def _descend_all(out: torch.Tensor, matrix: torch.Tensor, linear: torch.Tensor) -> torch.Tensor:
    """`descend` of many masks (copies, n) at once."""
    out, diagonal, noise = out.clone(), matrix.diagonal(), _noise(matrix, linear)
    slope = linear + 2 * out.to(matrix.dtype) @ matrix
    while True:
        take = torch.where(out, torch.inf, diagonal + slope)
        give = torch.where(out, diagonal - slope, torch.inf)
        change, at = (give[:, :, None] + take[:, None, :] - 2 * matrix).flatten(1).min(1)
        moving = (change < -noise).nonzero().flatten()
        if not len(moving):
            return out
        back, gone = at[moving] // len(matrix), at[moving] % len(matrix)
        out[moving, back], out[moving, gone] = False, True
        slope[moving] += 2 * (matrix[gone] - matrix[back])


def _noise(matrix: torch.Tensor, linear: torch.Tensor) -> float:
    """A gain this small may be rounding, and exchanging for it go round in circles."""
    return 1e-14 * len(linear) * float((linear.abs() + matrix.diagonal().abs()).max())
