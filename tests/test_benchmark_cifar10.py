"""The benchmark on CIFAR-10 trains every method equally long, meets the target, and goes on from what is done."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch_pruning") is None, reason="torch-pruning is missing")
if importlib.util.find_spec("torch_pruning"):
    import cifar10
    import cifar10_peer
    import cifar10_table
    from cifar10_resnet import ResNet
    from zoo_cifar import macs

EVERY = [*cifar10.METHODS, cifar10.SCRATCH, *cifar10_peer.PEERS] if "cifar10" in globals() else []
SMALL = ["--images", "144", "--calibration", "32", "--epochs", "2", "--sparse-epochs", "1", "--seeds", "0"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(9)
    network = ResNet(1)
    network(torch.randn(32, 3, 32, 32))  # batch norms get statistics
    path = tmp_path_factory.mktemp("weights") / "resnet8.th"
    torch.save({"state_dict": {f"module.{n}": t for n, t in network.state_dict().items()}}, path)
    return path


@pytest.fixture(scope="module")
def subject(weights):
    data = cifar10.load(None, 144)
    network = cifar10.load_network(weights)
    options = cifar10.arguments(SMALL)
    data = cifar10.Data(data.train, data.validation, cifar10.Split(data.test.images[:40], data.test.labels[:40]))
    return cifar10.Subject(network, data, options, 0)


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.filterwarnings("ignore")
def test_every_method_meets_the_target_and_trains_as_long(subject, method, monkeypatch):
    trained = []
    whole = subject.tuned

    def tuned(model, epochs, *rest, **more):
        trained.append(epochs)
        return whole(model, epochs, *rest, **more)

    monkeypatch.setattr(subject, "tuned", tuned)
    before = {name: tensor.clone() for name, tensor in subject.network.state_dict().items()}
    cell = {"network": "resnet8", "method": method, "seed": 0, "target": 0.5}
    found = subject.measured(cell)
    assert 0.35 < found["kept"]["macs"] <= 0.5
    assert sum(trained) == 2
    assert len(trained) == (2 if method == cifar10.SLIMMING or "scale" in method or "norm" in method else 1)
    assert set(found["accuracy"]) == {"pruned", "tuned"}
    if "torch-pruning" not in method:
        assert found["error"] < 1e-9 < found["effect"]
    assert all(torch.equal(before[name], tensor) for name, tensor in subject.network.state_dict().items())
    assert cifar10_table.line(found).startswith(f"resnet8 {method}, target 0.50, seed 0: ")


def test_from_scratch_forgets_the_weights(subject):
    small, epochs, lr, _ = subject.small(cifar10.SCRATCH)
    same, _, _, _ = subject.small("Magnitude")
    assert epochs == 2
    assert lr == 0.1
    assert macs(small) == macs(same)
    assert not torch.equal(small.conv1.weight, same.conv1.weight)


def test_a_run_goes_on_and_the_table_says_what_was_found(weights, tmp_path, monkeypatch, capsys):
    given = [*SMALL, "--weights", str(weights), "--out", str(tmp_path), "--curve", "0.5", "--methods"]
    cifar10.main([*given, "Magnitude"])
    cifar10.main([*given, "Magnitude", "Random"])
    assert len(capsys.readouterr().out.splitlines()) == 3
    results = json.loads((tmp_path / "cifar10.json").read_text())
    assert [(c["method"], c.get("removed")) for c in results["cells"]] == [
        ("Magnitude", None),
        (cifar10.SLIMMING, 0.5),
        ("Random", None),
    ]
    assert str(tmp_path) not in json.dumps(results)
    text = (tmp_path / "cifar10.md").read_text()
    assert "## resnet8: " in text
    assert "| Magnitude | 0." in text
    assert "| 0.50 | 0." in text
    monkeypatch.setattr(cifar10.Subject, "measured", None)
    cifar10.main([*given, "Random", "Magnitude"])
    (tmp_path / "cifar10.md").unlink()
    cifar10.main(["--table", "--out", str(tmp_path)])
    assert (tmp_path / "cifar10.md").read_text() == text
    with pytest.raises(SystemExit):
        cifar10.main(["--epochs", "2", "--sparse-epochs", "2"])


def test_the_mean_is_of_the_seeds():
    assert cifar10_table.spread([90.0, 92.0]) == "91.00 ± 1.41"
    assert cifar10_table.spread([90.0]) == "90.00"
