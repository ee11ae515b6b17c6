"""The training examples run from their command lines, on made-up images, and their steps do what they say."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import graphprune as gp

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import ccp_auxiliary
import cifar_training
import hrank
import thinet
from cifar10_resnet import ResNet
from zoo_cifar import macs

SMALL = ["--images", "160", "--calibration", "40", "--train-epochs", "2"]


def lines(capsys):
    """What was printed: (what it is of, accuracy, fraction of the MACs)."""
    found = []
    for line in capsys.readouterr().out.splitlines():
        what, _, figures = line.partition(": accuracy ")
        accuracy, *kept = figures.split(", ")
        found.append((what, float(accuracy), float(kept[0].split()[0]) if kept else 1.0))
    return found


def test_thinet_goes_layer_by_layer(capsys):
    model = thinet.main([*SMALL, "--images", "320", "--train-epochs", "4", "--keep", "0.5", "--last-epochs", "1"])
    found = lines(capsys)
    layers = ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"]
    steps = [f"{layer} {what}" for layer in layers for what in ("pruned and repaired", "tuned")]
    assert [what for what, _, _ in found] == ["original", *steps, "after the last fine-tuning"]
    kept = [k for _, _, k in found]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == pytest.approx(macs(model) / macs(ResNet(1)), abs=1e-3)
    assert type(model) is ResNet
    assert [model.get_submodule(layer).out_channels for layer in layers] == [8, 16, 32]
    assert found[-1][1] > 0.6  # ten classes


def test_hrank_prunes_by_the_ranks_of_the_original(capsys):
    model = hrank.main([*SMALL, "--keep", "0.25", "--epochs", "1"])
    found = lines(capsys)
    assert [what.split()[-1] for what, _, _ in found] == ["original", *["pruned", "tuned"] * 3]
    assert [model.get_submodule(f"layer{k}.0.conv1").out_channels for k in (1, 2, 3)] == [4, 8, 16]
    options = cifar_training.parser("").parse_args(SMALL)
    network, data = cifar_training.begin(options)
    batches = [x for x, _ in data.train.batches(40)]
    example = data.test.images[:2]
    scores = gp.importance.Rank(batches)(network, coupling := gp.couple(gp.trace(network, example)))
    left = gp.importance.ordered(scores["layer1.0.conv1"]).keep(4)
    fixed = hrank.Fixed("layer1.0.conv1", scores["layer1.0.conv1"])
    plan = gp.allocate(fixed(network, coupling), gp.Target(channels={"layer1.0.conv1": 0.25}), coupling)
    assert list(plan.groups["layer1.0.conv1"]) == left
    assert plan.removed == 12


def test_auxiliary_classifiers_shrink_along_and_are_dropped(capsys):
    model = ccp_auxiliary.main([*SMALL, "--macs", "0.5"])
    (first, _, _), (pruned, _, kept), (tuned, _, _) = lines(capsys)
    assert (first, pruned, tuned) == ("original", "pruned", "fine-tuned")
    assert kept == pytest.approx(0.5, abs=0.03)
    assert type(model) is ResNet
    assert not any(module._forward_hooks for module in model.modules())
    torch.manual_seed(0)
    both = ccp_auxiliary.WithClassifiers(ResNet(1), {"layer1": 16, "layer2": 32}).eval()
    result = gp.prune(both, torch.randn(2, 3, 32, 32), target=gp.Target(channels=0.5))
    assert [c.in_features for c in result.model.classifiers] == [8, 16]
    assert [tuple(each.shape) for each in result.model(torch.randn(2, 3, 32, 32))] == [(2, 10)] * 3


def test_batches_are_shifted_and_mirrored_whole_images():
    torch.manual_seed(0)
    images = torch.rand(70, 3, 32, 32) + 1
    split = cifar_training.Split(images, torch.arange(70))
    batches = cifar_training.Augmented(split)
    assert len(batches) == 1
    ((x, y),) = batches
    assert x.shape == (64, 3, 32, 32)
    assert len(set(y.tolist())) == 64
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    ways = set()
    for image, label in zip(x, y, strict=True):
        found = [
            (row, column, mirrored)
            for row in range(9)
            for column in range(9)
            for mirrored in (False, True)
            if torch.equal(
                image,
                padded[label, :, row : row + 32, column : column + 32].flip(-1)
                if mirrored
                else padded[label, :, row : row + 32, column : column + 32],
            )
        ]
        assert len(found) == 1
        ways.update(found)
    assert len(ways) > 40
    assert {mirrored for *_, mirrored in ways} == {False, True}


def test_both_layouts_of_cifar_give_the_same_images(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 50)
    plain, official = tmp_path / "plain", tmp_path / "official" / "cifar-10-batches-py"
    plain.mkdir()
    official.mkdir(parents=True)
    np.savez(plain / "train.npz", x=x, y=y)
    np.savez(plain / "test.npz", x=x[:10], y=y[:10])
    flat = x.transpose(0, 3, 1, 2).reshape(50, -1)
    for k in range(5):
        part = slice(10 * k, 10 * k + 10)
        (official / f"data_batch_{k + 1}").write_bytes(pickle.dumps({b"data": flat[part], b"labels": y[part].tolist()}))
    (official / "test_batch").write_bytes(pickle.dumps({b"data": flat[:10], b"labels": y[:10].tolist()}))
    first, second = (cifar_training.load(d, 40) for d in (plain, tmp_path / "official"))
    for name in ("train", "validation", "test"):
        a, b = getattr(first, name), getattr(second, name)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert len(first.train.labels) == 36
    assert len(first.validation.labels) == 4
    with pytest.raises(SystemExit, match=r"holds neither train.npz, train20k.npz nor"):
        cifar_training.load(tmp_path / "plain" / "..", 40)
