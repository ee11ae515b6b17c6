"""Which sizes modules of torch.nn keep as attributes, and what their weights say these are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def by_weights(module: nn.Module) -> dict[str, Any]:
    """The size attributes of a module, as its weights have them; empty for a module of any other kind."""
    found: dict[str, Any] = {}
    kind: Any = type(module)
    for attributes in _readers(kind):
        found.update(attributes(module))
    return found


def _linear(m: nn.Linear) -> dict[str, Any]:
    return {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]}


def _bilinear(m: nn.Bilinear) -> dict[str, Any]:
    out, first, second = m.weight.shape
    return {"out_features": out, "in1_features": first, "in2_features": second}


def _conv(m: nn.modules.conv._ConvNd) -> dict[str, Any]:
    first, second = m.weight.shape[:2]
    if m.transposed:
        return {"in_channels": first, "out_channels": second * m.groups}
    return {"out_channels": first, "in_channels": second * m.groups}


def _norm(m: nn.modules.batchnorm._NormBase) -> dict[str, Any]:
    held = m.weight if m.weight is not None else m.running_mean
    return {} if held is None else {"num_features": held.shape[0]}


def _layer_norm(m: nn.LayerNorm | nn.RMSNorm) -> dict[str, Any]:
    return {} if m.weight is None else {"normalized_shape": tuple(m.weight.shape)}


def _group_norm(m: nn.GroupNorm) -> dict[str, Any]:
    return {} if m.weight is None else {"num_channels": m.weight.shape[0]}


def _embedding(m: nn.Embedding | nn.EmbeddingBag) -> dict[str, Any]:
    return {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]}


def _prelu(m: nn.PReLU) -> dict[str, Any]:
    return {"num_parameters": m.weight.shape[0]}


def _encoder_layer(m: nn.TransformerEncoderLayer) -> dict[str, Any]:
    """The fused kernel of eval mode is for heads that are as wide as the layer; this switches it off."""
    held, width = m.self_attn.in_proj_weight, m.self_attn.embed_dim
    return {} if held is None or held.shape == (3 * width, width) else {"activation_relu_or_gelu": 0}


def _rnn(m: nn.RNNBase) -> dict[str, Any]:
    entering: torch.Tensor = getattr(m, "weight_ih_l0")  # noqa: B009 - made by name in its constructor
    rows, width = entering.shape
    sizes = {"input_size": width, "hidden_size": rows // {"LSTM": 4, "GRU": 3}.get(m.mode, 1)}
    return {**sizes, "proj_size": getattr(m, "weight_hr_l0").shape[0]} if m.proj_size else sizes  # noqa: B009


def _rnn_cell(m: nn.RNNCellBase) -> dict[str, Any]:
    return {"input_size": m.weight_ih.shape[1], "hidden_size": m.weight_hh.shape[1]}


_TORCH: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], Callable[[Any], dict[str, Any]]], ...] = (
    (nn.Linear, _linear),
    (nn.Bilinear, _bilinear),
    (nn.modules.conv._ConvNd, _conv),
    (nn.modules.batchnorm._NormBase, _norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    (nn.GroupNorm, _group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _embedding),
    (nn.PReLU, _prelu),
    (nn.TransformerEncoderLayer, _encoder_layer),
    (nn.RNNBase, _rnn),
    (nn.RNNCellBase, _rnn_cell),
)


@functools.cache
def _readers(kind: type[nn.Module]) -> tuple[Callable[[Any], dict[str, Any]], ...]:
    return tuple(attributes for base, attributes in _TORCH if issubclass(kind, base))
