"""What every solver asks of its arguments."""

from __future__ import annotations

import torch

from graphprune.errors import CalibrationError, InputError


def symmetric(matrix: torch.Tensor, name: str) -> torch.Tensor:
    """A square matrix, or a stack of them, in float64; only its symmetric part matters to a quadratic form.

    Raises:
        InputError: `matrix` is not square, or not real floating point.
        CalibrationError: it holds NaN or an infinity.
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or not matrix.is_floating_point():
        raise InputError(f"{name}: {matrix.dtype} of shape {tuple(matrix.shape)}: pass a square matrix of real numbers")
    matrix = finite(matrix, name)
    return matrix if torch.equal(matrix, matrix.mT) else (matrix + matrix.mT) / 2


def finite(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """`tensor` in float64, without its gradient.

    Raises:
        CalibrationError: it holds NaN or an infinity.
    """
    tensor = tensor.detach().double()
    if not tensor.isfinite().all():
        raise CalibrationError(f"{name}: NaN or infinities among the statistics; look for the batch that makes them")
    return tensor


def shaped(tensor: torch.Tensor, shape: tuple[int, ...], name: str) -> torch.Tensor:
    """`tensor` in float64, if it has the shape that goes with the other arguments.

    Raises:
        InputError: it has another shape.
    """
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name}: shape {tuple(tensor.shape)} does not go with the matrix: pass one of shape {shape}")
    return finite(tensor, name)
