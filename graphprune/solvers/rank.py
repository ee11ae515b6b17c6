"""The rank of many small matrices at once, the very numbers `torch.linalg.matrix_rank` gives them one by one.

By Sylvester's law of inertia as many singular values of M exceed t as M M' - t^2 I has positive pivots. Two such
counts, a little above and a little below the tolerance, settle almost every map; else `matrix_rank` decides.
"""

from __future__ import annotations

import numpy as np
import torch

from graphprune.errors import CalibrationError, InputError

_DIRECT = 4  # up to this many rows or columns, batched singular values are as quick as counting
_CHUNK = 200_000  # elements of the Gram matrices worked on at once, so that they stay in the cache
_SINGLE = 200_000  # multiplications of a product below which numpy's BLAS starts no threads of its own
_RANGE = {torch.float32: (1e-25, 1e40), torch.float64: (1e-70, 1e70)}  # norms of the maps that may be counted


def ranks(maps: torch.Tensor, tolerance: float | None = None) -> torch.Tensor:
    """Count the singular values of each map that exceed `tolerance` times its largest one.

    Args:
        maps: (N, H, W), real floating point; half precision is widened to float32 first.
        tolerance: relative, as `rtol` of `torch.linalg.matrix_rank`; None: its default, the machine epsilon of the
            dtype times max(H, W).

    Returns:
        (N,) int64, equal to `torch.linalg.matrix_rank(maps[i], rtol=tolerance)` for every i. (Where a singular value
        is within its rounding error of the threshold, `matrix_rank` itself varies with the map's alignment in memory.)

    Raises:
        InputError: `maps` is not (N, H, W) floating point, or `tolerance` is not in [0, 1).
        CalibrationError: a map holds NaN or an infinity.

    Example:
        >>> ranks(torch.stack([torch.eye(6), torch.ones(6, 6), torch.zeros(6, 6)])).tolist()
        [6, 1, 0]
    """
    if maps.ndim != 3 or not maps.is_floating_point() or 0 in maps.shape[1:]:
        raise InputError(
            f"ranks: {maps.dtype} of shape {tuple(maps.shape)}: pass real maps (N, H, W) with H and W >= 1"
        )
    if tolerance is not None and not 0 <= tolerance < 1:
        raise InputError(f"ranks: tolerance={tolerance}: it is relative to the largest singular value, 0 <= it < 1")
    maps = maps.detach()
    maps = maps if maps.dtype == torch.float64 else maps.float()
    short, long = sorted(maps.shape[1:])
    tolerance = long * torch.finfo(maps.dtype).eps if tolerance is None else tolerance
    size = max(1, _CHUNK // short**2)
    counts = [_ranks(maps[i : i + size], tolerance, i) for i in range(0, len(maps), size)]
    return torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64, device=maps.device)


def _ranks(maps: torch.Tensor, tolerance: float, first: int) -> torch.Tensor:
    """The ranks of one chunk of maps (N, H, W), whose first one is number `first`.

    Raises:
        CalibrationError: a map holds NaN or an infinity.
    """
    norms = torch.linalg.vector_norm(maps, dim=(1, 2), dtype=torch.float64)
    if not norms.isfinite().all() and len(bad := (~maps.isfinite().flatten(1).all(1)).nonzero()):
        name = f"map {first + int(bad[0])}" + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
        raise CalibrationError(f"ranks: NaN or infinities in {name}; look for the layer or the input that makes them")
    if min(maps.shape[1:]) <= _DIRECT:
        return _matrix_rank(maps, tolerance)
    # The fourth powers of these norms stay in range; subnormal numbers are rounded more coarsely than allowed for.
    low, high = _RANGE[maps.dtype]
    certain = norms == 0 if maps.dtype == torch.float32 else (maps == 0).all(2).all(1)
    found = torch.zeros_like(certain, dtype=torch.int64)
    if len(counted := ((norms > low) & (norms < high)).nonzero().flatten()):
        found[counted], certain[counted] = _count(maps[counted], tolerance)
    if len(left := (~certain).nonzero().flatten()):
        found[left] = _matrix_rank(maps[left], tolerance)
    return found


def _count(maps: torch.Tensor, tolerance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The ranks of maps (N, H, W), and which of them are certain.

    Elimination without pivoting first, over the rows that are not zero: it succeeds where they are independent.
    """
    maps = maps if maps.shape[1] <= maps.shape[2] else maps.mT
    gram = _gram(maps.double())
    diagonal = gram.diagonal(dim1=1, dim2=2)
    squares = diagonal.clone()
    above, below = _brackets(gram, tolerance, maps.shape[2], torch.finfo(maps.dtype).eps)
    filled = squares > 0
    found = filled.sum(1)
    diagonal.copy_(torch.where(filled, squares - above[:, None], 1.0))  # a zero row has a pivot that stops nothing
    certain = torch.linalg.cholesky_ex(gram.mT, upper=True).info == 0  # symmetric; LAPACK stores columns
    if len(left := (~certain).nonzero().flatten()):
        diagonal.copy_(squares)
        columns = (maps[left].abs().sum(1) > 0).sum(1)
        found[left], certain[left] = _inertia(gram[left], above[left], below[left], columns)
    return found, certain


def _brackets(gram: torch.Tensor, tolerance: float, long: int, unit: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Squares of thresholds just above and just below the one of `matrix_rank`, each (N,); not positive: there is none.

    Uncertain are the largest eigenvalue of G, between the Rayleigh quotient of sqrt(G) 1 or |G|^2 / tr G and |G|; the
    singular values in the dtype of the maps, by a few sqrt(n) of its machine epsilon `unit`; and G itself, formed and
    eliminated in float64, by at most (n + 1) eps tr G.
    """
    trace = gram.diagonal(dim1=1, dim2=2).sum(1).clamp(min=torch.finfo(gram.dtype).tiny)
    largest = torch.linalg.vector_norm(gram, dim=(1, 2))
    sums = gram.sum(2)
    quotient = sums.square().sum(1) / sums.sum(1).clamp(min=torch.finfo(gram.dtype).tiny)
    smallest = torch.maximum(quotient, largest.square() / trace)
    error = (long + 1) * torch.finfo(gram.dtype).eps * trace
    slack = min(long / 2, 2 * long**0.5) * unit
    return (tolerance + slack) ** 2 * largest + error, max(tolerance - slack, 0) ** 2 * smallest - error


def _inertia(
    gram: torch.Tensor, above: torch.Tensor, below: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many eigenvalues exceed `above`, and whether none is between `below` and it; `columns` bounds the rank."""
    found = _positive(gram, above)
    certain = found == columns
    check = (~certain & (below > 0)).nonzero().flatten()
    certain[check] = _positive(gram[check], below[check]) == found[check]
    return found, certain


def _gram(maps: torch.Tensor) -> torch.Tensor:
    """M M' of every map; numpy sees that it is symmetric and computes half of it."""
    if maps.device.type != "cpu" or maps.shape[1] * (maps.shape[1] + 1) * maps.shape[2] > _SINGLE:
        return maps @ maps.mT
    array = maps.numpy()
    return torch.from_numpy(np.matmul(array, array.swapaxes(1, 2)))


def _positive(gram: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """How many eigenvalues of each Gram matrix exceed its shift: the positive pivots of L D L'.

    A 2 x 2 pivot of the Bunch-Kaufman method (both its pivot indices are negative) has one eigenvalue of each sign.
    """
    shifted = gram - torch.diag_embed(shift[:, None].expand(gram.shape[:2]))
    factors, pivots, _ = torch.linalg.ldl_factor_ex(shifted)
    single = (factors.diagonal(dim1=1, dim2=2) > 0) & (pivots > 0)
    count: torch.Tensor = single.sum(1) + (pivots < 0).sum(1) // 2
    return count


def _matrix_rank(maps: torch.Tensor, tolerance: float) -> torch.Tensor:
    """The ranks by singular values."""
    found: torch.Tensor = torch.linalg.matrix_rank(maps, rtol=tolerance)
    return found
