"""Whole networks: a random half of every exact group goes, and every output equals the zeroed original's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import graphprune as gp
from tests.nets import CifarResNet, UNet, Yolo, randomised

images = functools.partial(torch.rand, generator=torch.Generator().manual_seed(0))


def torchvision(name: str, size: int = 64, **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        models = pytest.importorskip("torchvision.models")
        return models.get_model(name, weights=None, **options), images(2, 3, size, size)

    return build


def timm(name: str, **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        size = options.get("img_size", 64)
        return pytest.importorskip("timm").create_model(name, **options), images(2, 3, size, size)

    return build


def bert() -> tuple[nn.Module, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=80,
        vocab_size=101,
        max_position_embeddings=33,
    )
    inputs = {"input_ids": torch.arange(18).reshape(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    return transformers.BertModel(config), inputs


ZOO: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "resnet18": torchvision("resnet18"),
    "resnet50": torchvision("resnet50"),
    "vgg11_bn": torchvision("vgg11_bn"),
    "googlenet": torchvision("googlenet", init_weights=False),
    "inception_v3": torchvision("inception_v3", size=80, init_weights=False),
    "densenet121": torchvision("densenet121"),
    "mobilenet_v2": torchvision("mobilenet_v2"),
    "mobilenet_v3_small": torchvision("mobilenet_v3_small"),
    "efficientnet_b0": torchvision("efficientnet_b0"),
    "regnet_x_400mf": torchvision("regnet_x_400mf"),
    "resnext50_32x4d": torchvision("resnext50_32x4d"),
    "shufflenet_v2_x1_0": torchvision("shufflenet_v2_x1_0"),
    "convnext_tiny": torchvision("convnext_tiny"),
    "vit_b_16": torchvision("vit_b_16", size=32, image_size=32),
    "swin_t": torchvision("swin_t"),
    "deeplabv3_resnet50": torchvision("deeplabv3_resnet50", weights_backbone=None, num_classes=5),
    "fcn_resnet50": torchvision("fcn_resnet50", weights_backbone=None, num_classes=5, aux_loss=True),
    "deeplabv3_mobilenet": torchvision(
        "deeplabv3_mobilenet_v3_large", weights_backbone=None, num_classes=5, aux_loss=True
    ),
    "lraspp_mobilenet": torchvision("lraspp_mobilenet_v3_large", weights_backbone=None, num_classes=5),
    "unet": lambda: (UNet(), images(2, 3, 16, 16)),
    "yolo": lambda: (Yolo(), images(2, 3, 64, 64)),
    "cifar_resnet56": lambda: (CifarResNet(9), images(2, 3, 32, 32)),
    "deit_tiny": timm("deit_tiny_patch16_224", img_size=32, depth=3),
    "swin_tiny": timm("swin_tiny_patch4_window7_224", img_size=56, window_size=7),
    "bert": bert,
}

GRAFTED = {
    "shufflenet_v2_x1_0": "InvertedResidual",
    "vit_b_16": "MultiheadAttention",
    "swin_t": "ShiftedWindowAttention",
    "deit_tiny": "Attention",
}
"""Networks whose own Python fixes a size that a random half changes, and the class in which it does.

The report must say what stopped the class; the modules of that class, and no others, are grafted.
"""


@pytest.mark.parametrize("name", ZOO)
def test_half_of_every_group_goes_and_the_outputs_are_those_of_the_zeroed_original(name, capsys):
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    randomised(model)
    result = gp.prune(
        model, inputs, target=gp.Target(channels=0.5), importance=gp.importance.Random(seed=1), on_unknown="error"
    )
    check, report = result.report.verification, result.report
    with capsys.disabled():
        print(  # noqa: T201 - one line per network
            f"\n{name:<20} {len(report.groups):>3} groups, {report.costs['params'].kept:.3f} of the parameters, "
            f"{report.costs['macs'].kept:.3f} of the MACs, {report.emitter:<6} error {check.error:.1e}",
            end="",
        )
    assert report.groups
    assert all(w.after == max(1, int(w.before / 2 + 0.5)) for w in report.groups)
    assert {w.exactness for w in report.groups} == {"exact"}
    assert check.precision == "float64"
    assert check.error < 1e-9
    assert check.effect > 1e-3
    assert type(result.model) is type(model)
    assert report.emitter == ("graft" if name in GRAFTED else "module")
    assert bool(report.reason) == (name in GRAFTED)
    kinds = {type(m).__name__ for n, m in model.named_modules() if n in report.grafts}
    assert kinds == ({GRAFTED[name]} if name in GRAFTED else set())
    counted = sum(p.numel() for p in result.model.parameters())
    assert counted == report.costs["params"].after


def zeroed_by_hand(model: nn.Module, plan: gp.Plan) -> nn.Module:
    """The oracle, written again without the library: removed slices set to zero in a copy of the model."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in [*copied.named_parameters(), *copied.named_buffers()]:
            for dim, kept in plan.kept.get(name, {}).items():
                gone = sorted(set(range(tensor.shape[dim])) - set(kept.tolist()))
                tensor.index_fill_(dim, torch.tensor(gone), 0)
    return copied


@pytest.mark.parametrize("name", ["resnet18", "unet", "cifar_resnet56", "deit_tiny", "bert"])
def test_float32_outputs_equal_those_of_a_copy_zeroed_by_hand(name):
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    randomised(model)
    result = gp.prune(model, inputs, target=gp.Target(channels=0.5), importance=gp.importance.Random(seed=1))
    given = gp.Inputs.of(inputs)
    with torch.no_grad():
        zeroed = tree_leaves(zeroed_by_hand(model, result.plan)(*given.args, **given.kwargs))
        pruned = tree_leaves(result.model(*given.args, **given.kwargs))
        dense = tree_leaves(model(*given.args, **given.kwargs))
    assert len(zeroed) == len(pruned) >= 1
    for want, got, whole in zip(zeroed, pruned, dense, strict=True):
        assert (got - want).abs().max() < 1e-4 * want.abs().max()
        assert (whole - want).abs().max() > 1e-3 * want.abs().max()


@pytest.mark.parametrize("name", ["unet", "cifar_resnet56", "deit_tiny", "shufflenet_v2_x1_0", "swin_t"])
def test_a_graph_module_takes_other_batch_sizes(name):
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    randomised(model)
    result = gp.prune(model, inputs[:1], target=gp.Target(channels=0.5), emit="graph")
    other = images(5, *inputs.shape[1:])
    with torch.no_grad():
        want = zeroed_by_hand(model, result.plan)(other)
        assert torch.allclose(result.model(other), want, rtol=1e-3, atol=1e-4 * want.abs().max().item())
