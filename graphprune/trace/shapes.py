"""Results of frequent ops without running them: their kernels for the meta device are slow Python.

Only for plain cases: contiguous floats whose operands fit. Anything else runs the kernel, which says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

aten = torch.ops.aten


def quick(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """What `target` returns for operands on the meta device; None where its kernel has to say."""
    shape = _SHAPES.get(target)
    if shape is None or kwargs or not args or not isinstance(args[0], torch.Tensor):
        return None
    if not args[0].is_contiguous() or not args[0].is_floating_point():
        return None
    found = shape(*args)
    if found is None:
        return None
    if target._schema.is_mutable:
        return args[0] if found == args[0].shape else None
    return torch.empty(found, dtype=args[0].dtype, device="meta")


Shape = Sequence[int]


def _same(x: torch.Tensor, *_: Any) -> Shape:
    return x.shape


def _fit(shape: Shape, *operands: torch.Tensor | None) -> bool:
    return all(t is None or t.shape == shape for t in operands)


def _batch_norm(x: torch.Tensor, *more: Any) -> Shape | None:
    return x.shape if x.dim() > 1 and _fit(x.shape[1:2], *more[:4]) else None


def _layer_norm(x: torch.Tensor, normalized_shape: Shape, *more: Any) -> Shape | None:
    normalized = x.shape[x.dim() - len(normalized_shape) :]
    return x.shape if list(normalized) == list(normalized_shape) and _fit(normalized, *more[:2]) else None


def _group_norm(x: torch.Tensor, groups: int, *more: Any) -> Shape | None:
    return x.shape if x.dim() > 1 and x.shape[1] % groups == 0 and _fit(x.shape[1:2], *more[:2]) else None


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Shape | None:
    fits = weight.dim() == 2 and x.dim() > 1 and x.shape[-1] == weight.shape[1] and x.dtype == weight.dtype
    return (*x.shape[:-1], weight.shape[0]) if fits and _fit(weight.shape[:1], bias) else None


def _broadcast(x: torch.Tensor, other: Any) -> Shape | None:
    if isinstance(other, (int, float)):
        return x.shape
    if not isinstance(other, torch.Tensor) or other.dtype != x.dtype or not other.is_contiguous():
        return None
    return x.shape if x.shape == other.shape else _common(x.shape, other.shape)


def _common(a: Shape, b: Shape) -> Shape | None:
    """The shape that two shapes broadcast to."""
    rank = max(len(a), len(b))
    a, b = ((1,) * (rank - len(shape)) + tuple(shape) for shape in (a, b))
    fits = all(m == n or 1 in (m, n) for m, n in zip(a, b, strict=True))
    return torch.Size(n if m == 1 else m for m, n in zip(a, b, strict=True)) if fits else None


def _mean(x: torch.Tensor, dims: Any, keep: bool = False) -> Shape | None:
    if not isinstance(dims, (list, tuple)) or not dims:
        return None
    gone = {d % x.dim() for d in dims}
    kept = (1 if d in gone else n for d, n in enumerate(x.shape) if keep or d not in gone)
    return torch.Size(kept)


_SHAPES: Mapping[Any, Callable[..., Shape | None]] = {
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.group_norm.default: _group_norm,
    aten.linear.default: _linear,
    aten.gelu.default: _same,
    aten.hardswish.default: _same,
    aten.hardswish_.default: _same,
    aten.hardsigmoid.default: _same,
    aten.hardsigmoid_.default: _same,
    aten.hardtanh.default: _same,
    aten.hardtanh_.default: _same,
    aten.relu6.default: _same,
    **{getattr(aten, name).Tensor: _broadcast for name in ("add", "sub", "mul", "div", "add_", "mul_")},
    aten.mean.dim: _mean,
}
