"""Write the golden files anew: `python -m tests.write_golden`; read the diff before committing it."""

from __future__ import annotations

import torch

import graphprune as gp
from tests import shim
from tests.nets import Attention, CifarResNet, DenseBlock, UNet, Yolo
from tests.unit.test_coupling import GOLDEN, coupled, lines
from tests.zoo.test_transformers import KINDS, built, kinds
from tests.zoo.tiny import TINY

NETS = {
    "cifar_resnet20": lambda: (CifarResNet(3), torch.rand(1, 3, 32, 32)),
    "unet": lambda: (UNet(), torch.rand(1, 3, 16, 16)),
    "dense_block": lambda: (DenseBlock(3), torch.rand(1, 3, 8, 8)),
    "yolo": lambda: (Yolo(), torch.rand(1, 3, 64, 64)),
    "attention": lambda: (Attention(), torch.rand(2, 7, 30)),
}

if __name__ == "__main__":
    shim.install()
    for name, build in NETS.items():
        model, example = build()
        (GOLDEN / f"{name}.txt").write_text("\n".join(lines(coupled(model, example))) + "\n")
    text = []
    for name in TINY:
        model, inputs = built(name)
        text += [name, *(f"  {kind}" for kind in kinds(gp.couple(gp.trace(model, inputs))))]
    KINDS.write_text("\n".join(text) + "\n")
