"""The C++ ops of torchvision, in plain torch, defined only where the installed build lacks them, so that it imports."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch.nn import functional as F

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align": "(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    "deform_conv2d": "(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask) -> Tensor",
}
_library: list[torch.library.Library] = []


def install() -> None:
    """Define what is missing; nothing where the real ops are there."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name, schema in _SCHEMAS.items():
            if not hasattr(torch.ops.torchvision, name):
                library.define(name + schema)
                if name in _STAND_INS:
                    library.impl(name, _STAND_INS[name], "CompositeExplicitAutograd")
        _library.append(library)
        importlib.import_module("torchvision.models.detection")
        for name, module in sys.modules.items():
            if name.startswith("torchvision.") and hasattr(module, "_has_ops"):
                module._has_ops = lambda: True  # or it refuses to run, or compiles an implementation of its own


def _nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    kept: list[int] = []
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for k in scores.argsort(descending=True).tolist():
        low, high = torch.maximum(boxes[k, :2], boxes[kept, :2]), torch.minimum(boxes[k, 2:], boxes[kept, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        if not (shared > threshold * (areas[k] + areas[kept] - shared)).any():
            kept.append(k)
    return torch.tensor(kept, dtype=torch.long)


def _roi_align(image, boxes, scale: float, rows: int, columns: int, samples: int, aligned: bool) -> torch.Tensor:
    """The mean of samples x samples points in each cell of each box; `samples` is positive here."""
    size, out = image.shape[2:], []
    for box in boxes:
        corners, axes = box[1:] * scale - 0.5 * aligned, []
        for d, cells in enumerate((rows, columns)):
            low, high = corners[1 - d], corners[3 - d]
            steps = (torch.arange(cells * samples, dtype=image.dtype) + 0.5) / (cells * samples)
            axes.append(2 * (low + steps * (high - low)) / (size[d] - 1) - 1)
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)[None]
        found = F.grid_sample(image[int(box[0])][None], grid, padding_mode="border", align_corners=True)
        out.append(F.avg_pool2d(found, samples)[0])
    return torch.stack(out) if out else image.new_zeros(0, image.shape[1], rows, columns)


def _deform_conv2d(image, weight, offset, mask, bias, *options: Any) -> torch.Tensor:
    """Each tap of each run of channels reads the image at a place of its own."""
    stride, padding, dilation, (groups, runs, use_mask) = options[0:2], options[2:4], options[4:6], options[6:]
    n, c, *size = image.shape
    rows, columns = weight.shape[2:]
    out = offset.shape[-2:]
    offset = offset.view(n, runs, rows * columns, 2, *out)
    taps = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    read = []
    for k, tap in enumerate(taps):
        axes = []
        for d in range(2):
            start = torch.arange(out[d]) * stride[d] - padding[d] + tap[d] * dilation[d]
            place = start.view(-1, 1) if d == 0 else start.view(1, -1)
            axes.append(2 * (place + offset[:, :, k, d]) / (size[d] - 1) - 1)
        grid = torch.stack(axes[::-1], dim=-1).flatten(0, 1)
        found = F.grid_sample(image.view(n * runs, c // runs, *size), grid, align_corners=True)
        found = found.view(n, runs, c // runs, *out)
        read.append(found * mask.view(n, runs, -1, *out)[:, :, k, None] if use_mask else found)
    columns_ = torch.stack(read, dim=3).view(n, groups, -1, out[0] * out[1])
    made = weight.view(groups, weight.shape[0] // groups, -1) @ columns_
    return made.view(n, -1, *out) + bias.view(-1, 1, 1)


_STAND_INS = {"nms": _nms, "roi_align": _roi_align, "deform_conv2d": _deform_conv2d}
