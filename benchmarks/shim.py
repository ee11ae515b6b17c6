"""Lets torchvision be imported where its C++ ops do not load: beside a build of torch it was not made for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_OPS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
)
_held: list[torch.library.Library] = []  # a library that is collected takes its definitions with it


def install() -> None:
    """Declare the ops that `import torchvision` asks for, unless the real ones load; call it before that import."""
    spec = importlib.util.find_spec("torchvision")
    if _held or spec is None or spec.origin is None:
        return
    for path in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(path)
            return
        except OSError:  # built for another torch: what torchvision itself passes over in silence
            continue
    library = torch.library.Library("torchvision", "DEF")
    for schema in _OPS:
        library.define(schema)
    _held.append(library)
