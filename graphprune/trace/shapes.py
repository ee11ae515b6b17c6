"""Results of frequent ops without running them: their kernels for the meta device are slow Python.

Only for plain cases: floats whose operands fit, in the usual layouts. Anything else runs the kernel, which says what is
wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

aten = torch.ops.aten


def quick(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """What `target` returns for operands on the meta device; None where its kernel has to say."""
    shape = _SHAPES.get(target)
    if shape is None or not args or not _HARMLESS.issuperset(kwargs):
        return None
    x = args[0][0] if isinstance(args[0], list) and args[0] else args[0]
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return None
    layout = torch.contiguous_format
    if shape not in _MAKE_CONTIGUOUS and not x.is_contiguous():
        if shape not in _KEEP_LAYOUT or not _is_channels_last(x):
            return None
        layout = torch.channels_last
    found = shape(*args)
    if found is None:
        return None
    if target._schema.is_mutable:
        return x if found == x.shape else None
    return torch.empty(found, dtype=x.dtype, device="meta", memory_format=layout)


_HARMLESS = frozenset({"alpha", "approximate", "scale"})
"""Keyword arguments that change neither shape nor type."""


def _is_channels_last(x: torch.Tensor) -> bool:
    """Whether it is so without a doubt: a dim of size 1 can be anywhere."""
    return x.dim() == 4 and 1 not in x.shape[1:] and x.is_contiguous(memory_format=torch.channels_last)


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
    if not isinstance(other, torch.Tensor) or other.dtype != x.dtype:
        return None
    if not x.is_contiguous():  # beside it only what is laid out alike, or one number per channel
        per_channel = other.is_contiguous() and other.shape[-3:] == (x.shape[1], 1, 1) and other.numel() == x.shape[1]
        return x.shape if per_channel or (other.shape == x.shape and other.stride() == x.stride()) else None
    if not other.is_contiguous():
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


def _convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = None,
    padding: Any = None,
    dilation: Any = None,
    groups: int = 1,
) -> Shape | None:
    rank = x.dim() - 2
    steps, pads, gaps = stride or [1] * rank, padding or [0] * rank, dilation or [1] * rank
    if not weight.dim() - 2 == len(steps) == len(pads) == len(gaps) == rank or isinstance(pads, str):
        return None
    fits = x.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0 and x.dtype == weight.dtype
    if not fits or not x.numel() or not _fit(weight.shape[:1], bias) or min(steps) < 1 or min(pads) < 0:
        return None
    sizes = [
        (n + 2 * pad - gap * (k - 1) - 1) // step + 1
        for n, k, step, pad, gap in zip(x.shape[2:], weight.shape[2:], steps, pads, gaps, strict=True)
    ]
    return (x.shape[0], weight.shape[0], *sizes) if min(sizes) > 0 else None


def _adaptive_pool(x: torch.Tensor, size: Shape) -> Shape | None:
    return (*x.shape[:2], *size) if x.dim() == 4 and x.numel() and min(size) > 0 else None


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> Shape | None:
    first = tensors[0]
    rank, dtype = first.dim(), first.dtype
    if not -rank <= dim < rank or any(
        t.dim() != rank or t.dtype != dtype or not t.is_contiguous() or not t.numel() for t in tensors
    ):
        return None
    dim %= rank
    if len({(t.shape[:dim], t.shape[dim + 1 :]) for t in tensors}) > 1:
        return None
    return (*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :])


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None, *_: Any
) -> Shape | None:
    if mask is not None or not query.dim() == key.dim() == value.dim() == 4:
        return None
    alike = query.dtype == key.dtype == value.dtype and query.shape[:2] == key.shape[:2] == value.shape[:2]
    fits = alike and query.shape[3] == key.shape[3] and key.shape[2] == value.shape[2]
    return (*query.shape[:3], value.shape[3]) if fits else None


_POINTWISE = ("gelu", "hardsigmoid", "hardswish", "hardtanh", "relu", "relu6", "sigmoid", "silu", "tanh")
_KEEP_LAYOUT = {_same, _broadcast}
_MAKE_CONTIGUOUS = {_layer_norm, _convolution, _attention}
_SHAPES: Mapping[Any, Callable[..., Shape | None]] = {
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.group_norm.default: _group_norm,
    aten.linear.default: _linear,
    **{getattr(aten, name).default: _convolution for name in ("conv1d", "conv2d", "conv3d")},
    aten.adaptive_avg_pool2d.default: _adaptive_pool,
    aten.cat.default: _cat,
    aten.scaled_dot_product_attention.default: _attention,
    **{getattr(aten, name).default: _same for name in _POINTWISE},
    **{getattr(aten, f"{name}_").default: _same for name in _POINTWISE},
    **{getattr(aten, name).Tensor: _broadcast for name in ("add", "sub", "mul", "div", "add_", "mul_")},
    aten.mean.dim: _mean,
}
