"""Round trips of saved models through a fresh process, exports to ONNX, and sizes and times beside a pickle.

    python benchmarks/artefact.py                              # results/artefact.{json,md}; goes on where it stopped
    python benchmarks/artefact.py --only timm:resnet18 transformers:BERT
    python benchmarks/artefact.py --table                      # write the table anew from the JSON

Each network has random weights and is pruned to half of the channels of every group, saved, and loaded in a process of
its own, which runs it on stored inputs: (a) into an instance of its class whose own weights are zero, (b) without the
class, as a graph module, (c) for transformers, into what `AutoModel...from_config` gives. `same` means that every
output has the same bits as before saving. (b) is compared with the model, whose class may run other kernels than its
trace says; none of these does.

ONNX files come from `graphprune.export`, which runs them with onnxruntime at two batch sizes; `error` is the largest
difference relative to the output's largest value.

The pickle is what whole-module libraries tell their users to write, `torch.save(model, path)`, here of the same smaller
model, and for networks that torch-pruning gets through also of its own, halved by its own means. Bytes are of all
files; seconds are of loading from a warm file cache in a fresh process with the packages imported, without making the
instance for (a), and of one forward at batch size 1: medians of `--repeats`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import shim
import torch
import zoo_models
from torch import nn

import graphprune as gp
from graphprune.trace import Inputs, run

shim.install()

Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
NETWORKS = (
    *("timm:resnet18", "timm:mobilenetv3_small_050", "timm:efficientnet_b0", "timm:deit_tiny_patch16_224"),
    *("timm:convnext_atto", "timm:edgenext_xx_small", "timm:crossvit_tiny_240", "timm:coat_tiny"),
    *("timm:mixer_s32_224", "timm:regnetx_002", "timm:swin_tiny_patch4_window7_224", "timm:xcit_nano_12_p16_224"),
    *("torchvision:resnet50", "torchvision:vgg11_bn", "torchvision:googlenet", "torchvision:mobilenet_v2"),
    *("torchvision:shufflenet_v2_x0_5", "torchvision:squeezenet1_1", "torchvision:densenet121"),
    *("torchvision:fcn_resnet50", "torchvision:vit_b_32"),
    *("transformers:BERT", "transformers:DistilBERT", "transformers:DeBERTa", "transformers:GPT-2"),
    *("transformers:Llama", "transformers:Mixtral", "transformers:T5", "transformers:ViT", "transformers:Swin"),
    *("transformers:SegFormer", "transformers:Whisper"),
)
PEERS = (
    "timm:resnet18",
    "timm:regnetx_002",
    "torchvision:resnet50",
    "torchvision:vgg11_bn",
    "torchvision:mobilenet_v2",
)
"""Networks that torch-pruning gets through in `zoo.py`, for sizes and times."""


def built(network: str) -> tuple[nn.Module, Inputs]:
    """A network of the zoo in eval mode, and what it is called with."""
    model, given = zoo_models.build(*network.split(":"))
    return model, Inputs(given.args, given.kwargs or {})


# -- the saving process ------------------------------------------------------------------------------------------


def measure(network: str, repeats: int) -> Record:
    """Save one network, load it elsewhere, and export it."""
    model, inputs = built(network)
    result = gp.prune(model, inputs, target=gp.Target(channels=0.5))
    row: Record = {"emitter": result.report.emitter, "kept": result.report.costs["params"].kept}
    row["load_average"] = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = time.perf_counter()
        gp.save(result, folder / "artefact")
        row["save_s"] = time.perf_counter() - start
        torch.save(result.model, folder / "pickle.pt")
        torch.save({"inputs": (inputs.args, inputs.kwargs), "want": run(result.model, inputs)}, folder / "case.pt")
        row["bytes"] = {"artefact": _length(folder / "artefact"), "pickle": _length(folder / "pickle.pt")}
        ways = ["class", "graph", "pickle"] + ["auto"] * network.startswith("transformers:")
        if network in PEERS:
            row["bytes"]["peer"] = _save_peer(network, folder / "peer.pt")
            ways.append("peer")
        row["loaded"] = {way: _in_fresh_process(network, way, folder, repeats) for way in ways}
        try:
            done = gp.export(result.model, folder / "model.onnx", inputs)
            row["onnx"] = {"error": done.error, "batch_sizes": done.batch_sizes, "bytes": done.bytes}
        except gp.GraphpruneError as error:
            row["onnx"] = {"failed": str(error).splitlines()[0][:300]}
    return row


def _length(path: Path) -> int:
    return sum(p.stat().st_size for p in (path.iterdir() if path.is_dir() else [path]))


def _save_peer(network: str, path: Path) -> int:
    """Halve the network with torch-pruning, and pickle it as its documentation says."""
    import torch_pruning as tp

    model, inputs = built(network)
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    importance = tp.importance.MagnitudeImportance(p=2)
    pruner = tp.pruner.MagnitudePruner(
        model, inputs.args, importance=importance, pruning_ratio=0.5, ignored_layers=heads
    )
    pruner.step()
    model.zero_grad()
    torch.save(model, path)
    return _length(path)


def _in_fresh_process(network: str, way: str, folder: Path, repeats: int) -> Record:
    command = [sys.executable, __file__, "--load", network, way, str(folder), str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        return {"failed": next((s for s in reversed(done.stderr.splitlines()) if "Error: " in s), "no message")[:300]}
    found: Record = json.loads(done.stdout.strip().splitlines()[-1])
    return found


# -- the loading process -----------------------------------------------------------------------------------------


def load_elsewhere(network: str, way: str, folder: Path, repeats: int) -> Record:
    """Load in one of the ways, compare, and time it; runs in a process of its own."""
    case = torch.load(folder / "case.pt", weights_only=False)
    inputs = Inputs(*case["inputs"])
    loads = _loads(network, way, folder)
    model = loads()
    got = run(model, inputs)
    same = len(got) == len(case["want"]) and all(map(torch.equal, got, case["want"]))
    seconds = [_seconds(loads) for _ in range(repeats)]
    with torch.no_grad():
        forwards = [_seconds(lambda: inputs.call(model)) for _ in range(repeats)]
    return {"same": same, "load_s": statistics.median(seconds), "forward_s": statistics.median(forwards)}


def _loads(network: str, way: str, folder: Path) -> Callable[[], nn.Module]:
    if way == "graph":
        if network == "transformers:Mixtral":  # registers an op that its experts call
            importlib.import_module("transformers.integrations.moe")
        return lambda: gp.load(folder / "artefact")
    if way in ("pickle", "peer"):
        return lambda: torch.load(folder / f"{way}.pt", weights_only=False)
    model, _ = built(network)
    if way == "auto":
        model = _auto(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    return lambda: gp.load(folder / "artefact", model)


def _auto(model: Any) -> nn.Module:
    """What `AutoModel...from_config` makes of the model's config."""
    import transformers

    tasks = {"ConditionalGeneration": ("Seq2SeqLM", "SpeechSeq2Seq")}
    kind = type(model).__name__
    said = "CausalLM" if kind.endswith("LMHeadModel") else kind.partition("For")[2]
    for task in tasks.get(said, (said,)):
        auto = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel")
        if type(model.config) in auto._model_mapping:
            made: nn.Module = auto.from_config(model.config)
            return made.eval()
    raise LookupError(f"no auto class makes a {kind}")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# -- results -----------------------------------------------------------------------------------------------------


def environment(repeats: int) -> Record:
    """What the numbers depend on, without naming the machine."""
    names = ("torch", "torchvision", "timm", "transformers", "safetensors", "onnx", "onnxscript", "onnxruntime")
    versions = {"python": platform.python_version(), "graphprune": gp.__version__}
    versions |= {name: importlib.metadata.version(name) for name in (*names, "torch-pruning")}
    date = datetime.date.today().isoformat()
    return {
        "versions": versions,
        "date": date,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "cpus": os.cpu_count(),
    }


def text(results: Record) -> str:
    """The results as a Markdown table."""
    rows = results["networks"]
    env = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    counted = {
        way: [r["loaded"][way] for r in rows.values() if way in r.get("loaded", {})]
        for way in ("class", "graph", "auto")
    }
    kept = {way: f"{sum(bool(f.get('same')) for f in found)} of {len(found)}" for way, found in counted.items()}
    onnx = [r["onnx"]["error"] for r in rows.values() if "error" in r.get("onnx", {})]
    loads = [row["load_average"] for row in rows.values() if "load_average" in row]
    lines = [
        "# Saved models",
        "",
        f"Written by `benchmarks/artefact.py` on {env['date']}: {versions}; {env['threads']} thread(s) of "
        f"{env['cpus']} CPUs; medians of {env['repeats']}, load average "
        f"{min(loads, default=0):.1f} to {max(loads, default=0):.1f} in the {len(loads)} rows that noted it.",
        "",
        f"Loaded in a fresh process with the same bits in every output: into the class {kept['class']}, as a graph "
        f"module {kept['graph']}, into what `AutoModel...from_config` gives {kept['auto']}. ONNX: {len(onnx)} of "
        f"{len(rows)} exported and run by onnxruntime, largest error {max(onnx, default=0):.1e}.",
        "",
        "| network | emitted | class | graph | auto | ONNX error (batch sizes) | MB: artefact, pickle, peer's pickle | "
        "load ms: class, graph, pickle, peer | forward ms: class, graph, pickle, peer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(name, row) for name, row in rows.items())]) + "\n"


def _row(name: str, row: Record) -> str:
    if "failed" in row:
        return f"| {name} | failed: {row['failed']} | | | | | | | |"
    loaded = row["loaded"]
    said = [_said(loaded.get(way)) for way in ("class", "graph", "auto")]
    onnx = row["onnx"]
    exported = f"{onnx['error']:.1e} ({', '.join(map(str, onnx['batch_sizes']))})" if "error" in onnx else "fails"
    sizes = ", ".join(f"{row['bytes'][k] / 1e6:.2f}" for k in ("artefact", "pickle", "peer") if k in row["bytes"])
    times = [
        ", ".join(
            f"{1000 * loaded[way][key]:.1f}"
            for way in ("class", "graph", "pickle", "peer")
            if key in loaded.get(way, {})
        )
        for key in ("load_s", "forward_s")
    ]
    return f"| {' | '.join([name, row['emitter'], *said, exported, sizes, *times])} |"


def _said(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return "fails" if "failed" in found else "same" if found["same"] else "differs"


def main() -> None:
    """Measure what is asked for and not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=NETWORKS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--load", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.load:
        network, way, folder, repeats = args.load
        print(json.dumps(load_elsewhere(network, way, Path(folder), int(repeats))))
        return
    path = args.out / "artefact.json"
    results: Record = json.loads(path.read_text()) if path.exists() else {"networks": {}}
    results["environment"] = results.get("environment") or environment(args.repeats)
    for network in [] if args.table else args.only:
        if network in results["networks"] and "failed" not in results["networks"][network]:
            continue
        try:
            results["networks"][network] = measure(network, args.repeats)
        except Exception as error:
            results["networks"][network] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        print(network, _row(network, results["networks"][network]), flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "artefact.md").write_text(text(results))


if __name__ == "__main__":
    main()
