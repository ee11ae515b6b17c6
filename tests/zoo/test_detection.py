"""Detectors and segmentation networks: pruned through their tensor part, they detect what the zeroed original detects."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import nn

import graphprune as gp
from examples.detector import TensorPart, main, prune_detector
from tests.nets import randomised
from tests.zoo.test_zoo import zeroed_by_hand

models = pytest.importorskip("torchvision.models")

SMALL = {"min_size": 64, "max_size": 96}
STAGES = {"rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 20, "box_score_thresh": 0.0}
FEW = STAGES | {"box_detections_per_img": 4}
DENSE = {"score_thresh": 0.0, "topk_candidates": 40}


def ssd(**options):
    """SSD of 300 pixels with torchvision's own extractor; only the first four of its five stages are narrow."""
    made = pytest.importorskip("torchvision.models.detection.ssd")
    widths, layers = [3, 8, 16, 24, 512, 512], []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2)]
    boxes = made.DefaultBoxGenerator([[2], [2, 3], [2, 3], [2, 3], [2], [2]])
    backbone = made.SSDFeatureExtractorVGG(nn.Sequential(*layers), highres=False)
    return made.SSD(backbone, boxes, (300, 300), num_classes=7, **options)


def frozen():
    """Faster R-CNN over a backbone with frozen batch norms: its scales and shifts are buffers."""
    backbone = models.detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    made = models.detection.FasterRCNN(backbone, num_classes=7, **SMALL, **STAGES)
    for name, buffer in backbone.named_buffers():
        if name.endswith(("weight", "bias")):
            buffer.uniform_(0.3, 1.0)
    return made


def detector(name, **options):
    return functools.partial(models.get_model, name, weights=None, weights_backbone=None, num_classes=7, **options)


DETECTORS = {
    "fasterrcnn_frozen": (frozen, 64),
    "fasterrcnn_resnet50_fpn_v2": (detector("fasterrcnn_resnet50_fpn_v2", **SMALL, **STAGES), 64),
    "fasterrcnn_mobilenet": (detector("fasterrcnn_mobilenet_v3_large_fpn", **SMALL, **STAGES), 64),
    "maskrcnn_resnet50_fpn": (detector("maskrcnn_resnet50_fpn", **SMALL, **FEW), 64),
    "keypointrcnn_resnet50_fpn": (detector("keypointrcnn_resnet50_fpn", **SMALL, **FEW), 64),
    "retinanet_resnet50_fpn": (detector("retinanet_resnet50_fpn", **SMALL, **DENSE), 64),
    "fcos_resnet50_fpn": (detector("fcos_resnet50_fpn", **SMALL, **DENSE), 64),
    "ssd": (functools.partial(ssd, **DENSE), 300),
    "ssdlite320": (detector("ssdlite320_mobilenet_v3_large", **DENSE), 320),
}
FIELDS = {"maskrcnn_resnet50_fpn": {"masks"}, "keypointrcnn_resnet50_fpn": {"keypoints", "keypoints_scores"}}


def settled(model: nn.Module, size: int) -> nn.Module:
    """With statistics of the batch norms that fit the weights: where signals die out, boxes tie in their scores."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        TensorPart(model).train()(torch.rand(2, 3, size, size))
    return model.eval()


@pytest.mark.parametrize("name", DETECTORS)
def test_a_pruned_detector_finds_what_the_zeroed_original_finds(name):
    torch.manual_seed(0)
    build, size = DETECTORS[name]
    model = settled(randomised(build()), size)
    small, result = prune_detector(
        model,
        torch.rand(1, 3, size, size),
        target=gp.Target(channels=0.5),
        importance=gp.importance.Random(seed=1),
        on_unknown="error",
    )
    check, report = result.report.verification, result.report
    assert report.emitter == "module"
    assert type(small) is type(model)
    assert all(w.after == max(1, int(w.before / 2 + 0.5)) for w in report.groups)
    assert check.precision == "float64"
    assert check.error < 1e-9
    assert check.effect > 1e-3
    zeroed = zeroed_by_hand(TensorPart(model), result.plan).detector
    images = [torch.rand(3, 60, 80, dtype=torch.float64), torch.rand(3, 90, 70, dtype=torch.float64)]
    with torch.no_grad():
        wanted, found, dense = (m.double()(images) for m in (zeroed, small, model))
    for want, got, whole in zip(wanted, found, dense, strict=True):
        assert set(got) == {"boxes", "labels", "scores"} | FIELDS.get(name, set())
        assert len(want["boxes"]) >= 4
        assert torch.equal(got["labels"], want["labels"])
        for field in set(want) - {"labels"}:
            torch.testing.assert_close(got[field], want[field], rtol=1e-9, atol=1e-9)
        assert whole["boxes"].shape != want["boxes"].shape or not torch.allclose(whole["boxes"], want["boxes"])


def test_the_width_of_the_pyramid_is_one_group_over_all_levels_and_heads():
    part = TensorPart(DETECTORS["maskrcnn_resnet50_fpn"][0]()).eval()
    coupling = gp.couple(gp.trace(part, torch.rand(1, 3, 64, 64)))
    pyramid = {str(m) for m in coupling.group("detector.backbone.fpn.inner_blocks.0.0").members}
    read = {str(m) for m in coupling.group("detector.backbone.fpn.layer_blocks.0.0").members}
    assert pyramid == {
        *(f"detector.backbone.fpn.inner_blocks.{k}.0.{p}[0]" for k in range(4) for p in ("weight", "bias")),
        *(f"detector.backbone.fpn.layer_blocks.{k}.0.weight[1]" for k in range(4)),
    }
    heads = {"rpn.head.conv.0.0", "roi_heads.box_head.fc6", "roi_heads.mask_head.0.0"}
    assert read == {
        *(f"detector.backbone.fpn.layer_blocks.{k}.0.{p}[0]" for k in range(4) for p in ("weight", "bias")),
        *(f"detector.{head}.weight[1]" for head in heads),
    }


def test_a_pruned_detector_trains():
    torch.manual_seed(0)
    model = randomised(DETECTORS["fcos_resnet50_fpn"][0]())
    small, result = prune_detector(model, torch.rand(1, 3, 64, 64), target=gp.Target(macs=0.5))
    assert result.report.costs["macs"].kept <= 0.5
    truth = {"boxes": torch.tensor([[5.0, 7.0, 40.0, 50.0]]), "labels": torch.tensor([3])}
    losses = small.train()([torch.rand(3, 60, 80)] * 2, [truth] * 2)
    assert set(losses) == {"classification", "bbox_regression", "bbox_ctrness"}
    sum(losses.values()).backward()
    assert small.backbone.fpn.layer_blocks[0][0].weight.grad.any()


def test_what_the_tensor_part_leaves_out_is_reported():
    """A wrapper without the second stage: its box head keeps its shape, and the report says so."""

    class Proposals(TensorPart):
        def forward(self, images):
            return self.detector.rpn.head(list(self.detector.backbone(images).values()))

    model = randomised(DETECTORS["fasterrcnn_mobilenet"][0]())
    result = gp.prune(Proposals(model), torch.rand(1, 3, 64, 64), target=gp.Target(channels=0.5))
    left_out = {f"detector.roi_heads.{n}" for n, _ in model.roi_heads.named_parameters()}
    assert left_out
    assert left_out <= set(result.report.unused)
    assert "detector.roi_heads.box_head.fc6.weight" in str(result.report)


def test_the_example_prints_a_report_and_what_the_pruned_detector_finds(capsys):
    main(["fasterrcnn_mobilenet_v3_large_320_fpn", "--macs", "0.5", "--size", "64"])
    printed = capsys.readouterr().out
    assert "TensorPart, requested macs 0.5" in printed
    assert "FasterRCNN gives {'boxes': (" in printed
