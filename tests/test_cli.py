"""The command line, driven from end to end: what it prints, what it writes, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

import graphprune as gp
from graphprune import cli
from graphprune.cli import data, make, models, options
from graphprune.cli.root import ORDER

ROOT = Path(__file__).parent.parent
TINY = "timm:test_resnet"

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        return self.head(torch.relu(self.b(x)).mean((2, 3)))

def net(): return Net()
def pair(): return Net(), torch.rand(2, 3, 8, 8)
def inputs(): return torch.rand(2, 3, 9, 9)
def loader(): return [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])) for _ in range(5)]
def bare(): return [torch.rand(4, 3, 8, 8)]
def nothing(): return []
def tensor(): return torch.zeros(1)
def fails(): raise RuntimeError("no luck")
def loss(output, target): return nn.functional.cross_entropy(output, target)
instance = Net()
number = 3
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def good(*arguments: object) -> str:
    """What a command prints that must succeed, in 80 columns."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines()), default=0) <= 80
    assert "Traceback" not in result.output
    return result.stdout


def found(*arguments: object) -> Any:
    """What a command prints with --json."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def refused(*arguments: object, code: int = 2) -> str:
    """What a command says that must fail: on stderr, without a traceback, in one line."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.output
    return " ".join(result.stderr.translate(dict.fromkeys(map(ord, "╭╮╰╯─│"), " ")).split())


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return str(tmp_path / "net.py")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm model pruned to half its multiply-adds by the command."""
    out = tmp_path_factory.mktemp("cli")
    printed = good(
        "prune", TINY, "--macs", "0.5", "--out", out / "small", "--report", out / "r.html", "--report", out / "r.json"
    )
    assert "(0.500 kept)" in printed
    assert "verified" in printed
    return out / "small"


# -- from end to end --------------------------------------------------------------------------------------------------


def test_prune_writes_an_artefact_and_its_reports(small):
    report = gp.Report.from_json((small.parent / "r.json").read_text())
    assert report.requested.macs == 0.5
    assert report.costs["macs"].kept <= 0.5
    assert (small.parent / "r.html").read_text() == report.to_html()
    assert gp.Artefact.read(small).plan.removed > 0
    assert sorted(p.name for p in small.parent.iterdir()) == ["r.html", "r.json", "small"]


def test_the_artefact_is_verified_against_the_original(small):
    assert "equal to the zeroed original" in good("verify", TINY, small)
    answer = found("verify", TINY, small)
    assert answer["equal"]
    assert answer["error"] <= answer["tolerance"] < answer["effect"]


def test_verify_says_no_with_exit_code_1_where_weights_differ(small, tmp_path):
    model = models.load(TINY).model
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    save_file(model.state_dict(), tmp_path / "other.safetensors")
    said = refused("verify", TINY, small, "--weights", tmp_path / "other.safetensors", code=1)
    assert "differs from the zeroed original" in said
    assert "--plan checks the plan alone" in said
    answer = run("verify", TINY, small, "--weights", tmp_path / "other.safetensors", "--json")
    assert (answer.exit_code, json.loads(answer.stdout)["equal"]) == (1, False)
    good("verify", TINY, small, "--weights", tmp_path / "other.safetensors", "--plan")


def test_compare_sets_the_artefact_beside_the_original(small):
    printed = good("compare", TINY, small, "--repeats", 2)
    assert "MACs" in printed
    answer = found("compare", TINY, small, "--repeats", 2, "--threads", 1)
    report = gp.Report.from_json((small.parent / "r.json").read_text())
    for key in ("macs", "params"):
        assert answer["before"][key] == report.costs[key].before
        assert answer["after"][key] == report.costs[key].after
    assert answer["after"]["bytes"] < answer["before"]["bytes"]
    assert answer["after"]["seconds"] > 0
    assert answer["outputs"] is None


def test_compare_judges_models_by_data(small, tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (6, 160, 160, 3), dtype=np.uint8)
    np.savez(tmp_path / "val.npz", x=x, y=np.arange(6))
    model = models.load(TINY)
    batches = data.load(str(tmp_path / "val.npz"), model, data.Wanted(4, 6))
    assert [len(b[0]) for b in batches] == [4, 2]
    outputs = torch.cat([model.model(x) for x, _ in batches])
    loss = nn.functional.cross_entropy(outputs, torch.arange(6)).item()
    answer = found("compare", TINY, small, "--data", tmp_path / "val.npz", "--batch-size", 4, "--repeats", 1)
    assert answer["before"]["loss"] == pytest.approx(loss, rel=1e-4)
    assert answer["before"]["accuracy"] == pytest.approx((outputs.argmax(1) == torch.arange(6)).float().mean())
    assert answer["outputs"]["error"] > 0
    assert "accuracy" in good("compare", TINY, small, "--data", tmp_path / "val.npz", "--repeats", 1)


def test_export_writes_what_onnxruntime_runs(small, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    assert "off by" in good("export", small, tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"))
    x = torch.rand(3, 3, 160, 160)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), gp.load(small)(x), rtol=1e-3, atol=1e-4)


def test_export_takes_its_format_from_the_suffix(net, tmp_path):
    assert found("export", f"{net}:pair", tmp_path / "code")["format"] == "python"
    assert found("export", f"{net}:pair", tmp_path / "net.pt2")["format"] == "torch_export"
    again = found("export", f"{net}:pair", tmp_path / "folder.pt2", "--format", "python")
    assert (tmp_path / "folder.pt2" / "model.py").is_file()
    assert again["error"] <= 1e-4


def test_inspect_lists_groups_and_causes(net):
    printed = good("inspect", f"{net}:pair")
    assert "its positions matter to conv2d" in printed
    answer = found("inspect", f"{net}:pair")
    assert [(g["name"], g["size"]) for g in answer["groups"]] == [("a", 6), ("b", 5)]
    assert answer["costs"]["params"] == sum(p.numel() for p in models.load(f"{net}:pair").model.parameters())
    kept = found("inspect", f"{net}:pair", "--keep", "a")
    assert [g["name"] for g in kept["groups"]] == ["b"]


def test_long_tables_are_cut_unless_all_is_asked_for():
    rows = good("inspect", "torchvision:densenet121")
    assert "and 80 more; --all shows them" in rows
    assert "--all" not in good("inspect", "torchvision:densenet121", "--all")


def test_explain_says_why_two_are_tied_and_which_dims_shrink(net):
    assert "goes with" in good("explain", f"{net}:pair", "a.weight", "b.weight")
    lines = found("explain", f"{net}:pair", "a.weight")["lines"]
    assert len(lines) == 4
    assert "as group a" in lines[0]
    assert "nearest" in refused("explain", f"{net}:pair", "a.wait") or "did you mean" in refused(
        "explain", f"{net}:pair", "a.wait"
    )


def test_sensitivity_measures_and_keeps_what_it_measured(net, tmp_path):
    arguments = ["sensitivity", f"{net}:pair", "--data", f"{net}:loader", "--fraction", 0.5, "--by", "class"]
    assert "rise at each width" in good(*arguments, "--out", tmp_path / "scan.json", "--directory", tmp_path / "kept")
    scan = gp.Sensitivity.from_json((tmp_path / "scan.json").read_text())
    assert (set(scan.curves), scan.samples) == ({"a", "b"}, 20)
    assert found(*arguments, "--directory", tmp_path / "kept")["loss"] == scan.loss
    only = found(*arguments, "--group", "a", "--loss", f"{net}:loss", "--samples", 8)
    assert (list(only["curves"]), only["samples"]) == (["a"], 8)


def test_bench_times_models_in_turns_at_each_batch_size(net):
    answer = found("bench", f"{net}:pair", f"{net}:pair", "--batch", 1, "--batch", 4, "--repeats", 2, "--threads", 1)
    assert [(r["batch"], r["of_first"] > 0) for r in answer["runs"]] == [(1, True), (1, True), (4, True), (4, True)]
    assert "of the first" in good("bench", f"{net}:pair", "--repeats", 1)
    before = torch.get_num_threads()
    good("bench", f"{net}:pair", "--threads", 2, "--repeats", 1)
    assert torch.get_num_threads() == before


def test_prune_hands_on_what_it_is_told(net, tmp_path):
    target = ["--channels", 0.9, "--floor", 0.5, "--multiple-of", 2, "--protect", "b"]
    criterion = ["--importance", "gamma:reduction=max", "--otherwise", "magnitude:p=1", "--allocation", "global"]
    answer = found(
        "prune", f"{net}:pair", *target, *criterion, "--emit", "graph", "--no-verify", "--out", tmp_path / "o"
    )
    report = answer["report"]
    asked = {"channels": 0.9, "multiple_of": 2, "floor": 0.5, "protect": ["b"], "max_removed": 1.0}
    assert {name: value for name, value in report["requested"].items() if value} == asked
    assert (report["emitter"], report["verification"], report["allocation"]) == ("graph", None, "global")
    assert report["importance"] == "Gamma(reduction='max', otherwise=Magnitude(p=1))"
    assert {w["name"]: w["after"] for w in report["groups"]}["b"] == 5
    assert answer["written"] == [str(tmp_path / "o")]


def test_prune_meets_a_time_that_is_measured(net, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    answer = found("prune", f"{net}:pair", "--latency", 0.999, "--seconds", 1, "--max-removed", 0.5)["report"]
    assert (answer["requested"]["latency"], answer["requested"]["max_removed"]) == (0.999, 0.5)
    assert answer["costs"]["latency"]["after"] <= 0.999 * answer["costs"]["latency"]["before"]
    assert answer["measured"]["before"] > 0
    assert all(w["after"] >= w["before"] // 2 for w in answer["groups"])


def test_prune_reports_times_where_seconds_are_given_for_them(net, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    report = found("prune", f"{net}:pair", "--macs", 0.5, "--seconds", 1)["report"]
    assert report["costs"]["latency"]["before"] > report["timing"]["besides"] >= 0
    assert all(layer["costs"]["latency"]["before"] >= 0 for layer in report["layers"])
    assert found("prune", f"{net}:pair", "--macs", 0.5)["report"]["timing"] is None


def test_prune_repairs_with_data(net):
    how = ["--data", f"{net}:loader", "--repair", "least_squares", "--batchnorm", "--samples", 8]
    report = found("prune", f"{net}:pair", "--macs", 0.5, *how, "--importance", "taylor")["report"]
    assert report["repair"]["given"] == 8
    assert report["repair"]["original"]["loss"] is not None
    assert report["importance"] == "Taylor"
    printed = good("prune", f"{net}:pair", "--macs", 0.5, *how, "--all")
    assert "repaired" in printed
    assert "group  before  after  members  class" in printed


def test_an_artefact_without_a_graph_is_loaded_into_the_class_of_the_first(net, tmp_path):
    loaded = models.load(f"{net}:pair")
    result = gp.prune(loaded.model, loaded.example, target=gp.Target(macs=0.5))
    gp.save(result, tmp_path / "bare", graph=False)
    answer = found("compare", f"{net}:pair", tmp_path / "bare", "--repeats", 1)
    assert answer["after"]["params"] == result.report.costs["params"].after


def test_a_graph_module_is_verified_and_has_no_other_weights(net, tmp_path):
    good("prune", f"{net}:pair", "--macs", 0.5, "--emit", "graph", "--out", tmp_path / "o")
    good("verify", f"{net}:pair", tmp_path / "o")
    assert "has no other weights" in refused("verify", f"{net}:pair", tmp_path / "o", "--plan")


def test_widths_that_normalisations_read_are_verified(tmp_path):
    good("prune", "timm:test_vit", "--channels", 0.5, "--prune-norms", "--out", tmp_path / "o")
    good("verify", "timm:test_vit", tmp_path / "o")


def test_the_script_runs_in_a_process_of_its_own(net, tmp_path):
    command = [sys.executable, "-c", "from graphprune.cli import main; main()"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    options_ = ["prune", f"{net}:pair", "--macs", "0.5", "--out", str(tmp_path / "o"), "--json"]
    done = subprocess.run([*command, *options_], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"]["model_class"] == "Net"
    assert done.stderr == ""
    wrong = subprocess.run(
        [*command, "inspect", "nothing"], capture_output=True, text=True, env=environment, check=False
    )
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("graphprune: no model 'nothing'")


def test_interrupting_the_script_leaves_nothing_behind(net, tmp_path):
    slow = "\ndef slow():\n    import time\n    print('started', flush=True)\n    time.sleep(60)\n"
    Path(net).write_text(NET + slow)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a job in the background is deaf
    code = f"{heard}; from graphprune.cli import main; main()"
    command = [sys.executable, "-c", code, "prune", f"{net}:slow", "--macs", "0.5"]
    files = ["--out", str(tmp_path / "o"), "--report", str(tmp_path / "r.html")]
    process = subprocess.Popen([*command, *files], stdout=-1, stderr=-1, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.strip() == "graphprune: interrupted; what was not finished was not written"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["net.py"]


def test_interrupting_while_files_are_written_leaves_the_old_ones(net, tmp_path, monkeypatch):
    good("prune", f"{net}:pair", "--macs", 0.5, "--out", tmp_path / "o", "--report", tmp_path / "r.txt")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    again = ["prune", f"{net}:pair", "--macs", 0.9, "--report", tmp_path / "r.txt"]
    assert "interrupted" in refused(*again, "--out", tmp_path / "o", code=130)
    assert "interrupted" in refused(*again, code=130)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


# -- help -------------------------------------------------------------------------------------------------------------


def test_help_fits_80_columns_and_shows_examples():
    printed = good("--help")
    assert [line.split()[0] for line in printed.splitlines() if line.startswith("  ") and line.split()[0] in ORDER] == [
        *ORDER
    ]
    assert "..." not in printed.partition("Commands:")[2]
    for name in ORDER:
        text = good(name, "--help")
        assert "Raises" not in text
        assert name == "demo" or f"graphprune {name} " in text.split("Examples:")[1]


def test_every_example_names_options_that_are_there():
    printed = " ".join(good("--help").split("Examples:")[1].split())
    assert "graphprune prune timm:resnet18 --macs 0.5" in printed
    for name in ORDER:
        text = good(name, "--help")
        wanted = {word for word in text.partition("Examples:")[2].split() if word.startswith("--")}
        assert all(f" {word}" in text.partition("Examples:")[0] for word in wanted)


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pair", "net", "instance"])
def test_a_file_gives_a_module_a_function_or_a_pair(net, name):
    extra = [] if name == "pair" else ["--input", "1x3x8x8"]
    assert found("inspect", f"{net}:{name}", *extra)["model"] == "Net"


def test_random_weights_are_the_same_in_each_command_and_the_generator_is_left_alone(net):
    before = torch.get_rng_state()
    first, second = (models.load(f"{net}:pair").model.a.weight for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_a_torchvision_model_is_found_by_name():
    assert found("inspect", "torchvision:mobilenet_v3_small")["model"] == "MobileNetV3"


def test_a_hugging_face_folder_is_loaded_with_its_weights_or_without(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the zoo extra is not installed")
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20}
    config = transformers.BertConfig(vocab_size=50, **small, architectures=["BertForSequenceClassification"])
    config.save_pretrained(tmp_path / "bare")
    assert (
        found("inspect", f"hf:{tmp_path / 'bare'}", "--weights", "random")["model"] == "BertForSequenceClassification"
    )
    said = refused("inspect", f"hf:{tmp_path / 'bare'}")
    assert "with --weights random its config is enough" in said
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "full")
    loaded = models.load(f"hf:{tmp_path / 'full'}")
    torch.testing.assert_close(dict(loaded.model.state_dict()), dict(model.state_dict()))
    assert loaded.example.kwargs["input_ids"].shape == (1, 16)
    vit = transformers.ViTConfig(**small, image_size=32, patch_size=8)
    vit.save_pretrained(tmp_path / "vit")
    seen = models.load(f"hf:{tmp_path / 'vit'}", "random")
    assert seen.example.kwargs["pixel_values"].shape == (1, 3, 32, 32)


def test_inputs_are_given_as_shapes_or_by_a_function(net):
    assert [t.shape for t in models.example(["1x3x8x8", "int:2x5"]).tensors()] == [(1, 3, 8, 8), (2, 5)]
    assert models.example(["int:2x5"]).tensors()[0].dtype == torch.long
    assert models.load(f"{net}:pair", None, [f"{net}:inputs"]).example.tensors()[0].shape == (2, 3, 9, 9)


@pytest.mark.parametrize(
    ("spec", "advice"),
    [
        ("nothing", "no model 'nothing': it is timm:NAME, torchvision:NAME"),
        ("timm:", "no model 'timm:'"),
        ("timm:resnet81", "timm has no model 'resnet81'; did you mean"),
        ("torchvision:resnet81", "torchvision has no model 'resnet81'; did you mean"),
        ("hf:/nowhere", "with --weights random its config is enough"),
        ("nowhere.py:net", "there is no file nowhere.py"),
        ("{net}:nett", "has no 'nett'; did you mean 'net'"),
        ("{net}:fails", "fails: RuntimeError: no luck"),
        ("{net}:number", "gives int; it gives a module, or a module and example inputs"),
        ("{net}:net", "does not say what its inputs are; give an example: --input"),
        ("{folder}", "artefact"),
    ],
)
def test_what_is_no_model_is_refused(net, spec, advice):
    spec = spec.format(net=net, folder=Path(net).parent)
    assert advice in refused("inspect", spec)


def test_a_file_that_fails_is_refused_and_can_be_mended(tmp_path):
    file = tmp_path / "mended.py"
    file.write_text("import torch\nraise ValueError('not yet')")
    assert "cannot be imported: ValueError: not yet" in refused("inspect", f"{file}:net")
    file.write_text(NET)
    good("inspect", f"{file}:pair")


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path):
    for name, width in (("one", 6), ("two", 4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.py").write_text(
            NET.replace("(3, 6, 3)", f"(3, {width}, 3)").replace("d(6", f"d({width}")
        )
    sizes = [found("inspect", f"{tmp_path / name / 'same.py'}:pair")["groups"][0]["size"] for name in ("one", "two")]
    assert sizes == [6, 4]


@pytest.mark.parametrize("text", ["3x", "x", "-1x3", "int:", "half:1x3", "1x0"])
def test_what_is_no_shape_is_refused(net, text):
    assert "it is a shape such as 1x3x224x224 or int:1x16" in refused("inspect", f"{net}:net", "--input", text)


@pytest.mark.parametrize("form", ["plain.pt", "nested.pt", "parallel.pt", "plain.safetensors"])
def test_weights_are_read_from_files(net, tmp_path, form):
    state = {name: tensor + 1 for name, tensor in models.load(f"{net}:pair").model.state_dict().items()}
    file = tmp_path / form
    if form.endswith("safetensors"):
        save_file(state, file)
    elif form == "nested.pt":
        torch.save({"state_dict": state, "epoch": 3}, file)
    else:
        torch.save({f"module.{n}": t for n, t in state.items()} if form == "parallel.pt" else state, file)
    loaded = models.load(f"{net}:pair", str(file)).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_pretrained_weights_are_asked_of_the_source(monkeypatch):
    import timm

    asked = []
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: asked.append(pretrained) or real(name))
    for weights in (None, "random", "pretrained"):
        models.load(TINY, weights)
    assert asked == [False, False, True]


class Opens:
    def __reduce__(self):
        return print, ("code in a file of weights was run",)


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (None, "FileNotFoundError"),
        (b"nonsense", "--weights"),
        ([1, 2], "it holds no state dict"),
        ({"a.weight": torch.zeros(1)}, "do not fit Net"),
        (Opens(), "UnpicklingError"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(net, tmp_path, content, advice):
    file = tmp_path / "w.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    assert advice in refused("inspect", f"{net}:pair", "--weights", file)


def test_words_for_weights_are_for_sources_that_have_some(net, small):
    assert "name a file" in refused("inspect", f"{net}:pair", "--weights", "pretrained")
    assert "name a file" in refused("inspect", small, "--weights", "random")


# -- data -------------------------------------------------------------------------------------------------------------


def pictures(folder: Path, *names: str) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (30, 20), (40 * k, 0, 255)).save(folder / name)


def test_a_folder_of_images_is_read_class_by_class_in_turn(net, tmp_path):
    pictures(tmp_path / "d", "cat/1.png", "cat/2.jpg", "cat/sub/3.png", "dog/1.png", "dog/notes.png")
    (tmp_path / "d" / "dog" / "readme.txt").write_text("no image")
    loaded = models.load(f"{net}:pair")
    ((x, y),) = data.load(str(tmp_path / "d"), loaded, data.Wanted(8, 4))
    assert (x.shape, y.tolist()) == ((4, 3, 8, 8), [0, 1, 0, 1])
    mean, std = torch.tensor(loaded.mean), torch.tensor(loaded.std)
    torch.testing.assert_close(x[0, :, 4, 4], (torch.tensor([0.0, 0.0, 1.0]) - mean) / std)


def test_images_without_classes_have_no_targets(net, tmp_path):
    pictures(tmp_path / "d", "1.png", "2.png")
    (batch,) = data.load(str(tmp_path / "d"), models.load(f"{net}:pair"), data.Wanted())
    assert batch.shape == (2, 3, 8, 8)


def test_arrays_are_read_as_they_are_and_bytes_as_pixels(net, tmp_path):
    x = np.random.default_rng(0).random((3, 3, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "f.npz", x=x, y=[0, 1, 0])
    loaded = models.load(f"{net}:pair")
    ((read, targets),) = data.load(str(tmp_path / "f.npz"), loaded, data.Wanted())
    assert torch.equal(read, torch.from_numpy(x))
    assert targets.tolist() == [0, 1, 0]
    pixels = np.full((2, 4, 5, 3), 255, dtype=np.uint8)
    np.savez(tmp_path / "u.npz", x=pixels)
    (read,) = data.load(str(tmp_path / "u.npz"), loaded, data.Wanted())
    assert read.shape == (2, 3, 4, 5)
    torch.testing.assert_close(read[0, :, 0, 0], (1 - torch.tensor(loaded.mean)) / torch.tensor(loaded.std))


def test_a_loader_is_read_as_far_as_samples_are_wanted(net):
    loaded = models.load(f"{net}:pair")
    assert len(data.load(f"{net}:loader", loaded, data.Wanted(2, 9))) == 3
    assert len(data.load(f"{net}:bare", loaded, data.Wanted())) == 1


class Rows:
    def __init__(self, root: str, train: bool = True) -> None:
        from PIL import Image

        if root == "absent":
            raise RuntimeError("Dataset not found")
        self.rows = [(Image.new("L", (9, 9), 255), k) for k in range(3)]
        assert not train

    def __iter__(self):
        return iter(self.rows)


class Split(Rows):
    def __init__(self, root: str, split: str) -> None:
        super().__init__(root, split != "test")


@pytest.mark.parametrize("kind", [Rows, Split])
def test_datasets_of_torchvision_are_read_from_disk(net, monkeypatch, kind):
    datasets = pytest.importorskip("torchvision.datasets", reason="the zoo extra is not installed")
    monkeypatch.setattr(datasets, "Rows", kind, raising=False)
    loaded = models.load(f"{net}:pair")
    ((x, y),) = data.load("torchvision:Rows:somewhere", loaded, data.Wanted())
    assert (x.shape, y.tolist()) == ((3, 3, 8, 8), [0, 1, 2])
    arguments = ["sensitivity", f"{net}:pair", "--data"]
    assert "Dataset not found" in refused(*arguments, "torchvision:Rows:absent")
    assert "it is torchvision:NAME:DIR" in refused(*arguments, "torchvision:Rows")
    assert "it is torchvision:NAME:DIR" in refused(*arguments, "torchvision:Nothing:x")


def test_mnist_of_torchvision_is_read_from_its_files(net, tmp_path):
    pytest.importorskip("torchvision.datasets", reason="the zoo extra is not installed")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        images, labels = np.full((3, 28, 28), 255, np.uint8), np.array([7, 2, 1], np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
            (raw / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())
    ((x, y),) = data.load(f"torchvision:MNIST:{tmp_path}", models.load(f"{net}:pair"), data.Wanted())
    assert (x.shape, y.tolist()) == ((3, 3, 8, 8), [7, 2, 1])
    assert torch.equal(x[0], x[2])


@pytest.mark.filterwarnings("ignore")
def test_a_folder_is_read_by_the_datasets_library(net, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="the datasets library is not installed")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for kind in ("cat", "dog"):
        folder = tmp_path / "pets" / "test" / kind
        folder.mkdir(parents=True)
        image.new("RGB", (9, 9), "white").save(folder / "1.png")
    ((x, y),) = data.load(f"hf:{tmp_path / 'pets'}", models.load(f"{net}:pair"), data.Wanted())
    assert (x.shape, y.tolist()) == ((2, 3, 8, 8), [0, 1])


def test_datasets_of_hugging_face_are_read(net, monkeypatch):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    rows = {"good": [{"img": image.new("RGB", (9, 9)), "label": 4}], "text": [{"text": "a"}]}
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return rows[name]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    loaded = models.load(f"{net}:pair")
    ((x, y),) = data.load("hf:good:train", loaded, data.Wanted())
    assert (x.shape, y.tolist(), asked) == ((1, 3, 8, 8), [4], [("good", "train")])
    arguments = ["sensitivity", f"{net}:pair", "--data"]
    assert "has ['text'], no images" in refused(*arguments, "hf:text")
    assert "KeyError" in refused(*arguments, "hf:other")
    assert asked[-1] == ("other", "test")


def written(folder: Path, name: str, **arrays: object) -> str:
    np.savez(folder / name, **arrays)  # type: ignore[arg-type]
    return str(folder / name)


@pytest.mark.parametrize(
    ("spec", "advice"),
    [
        ("nothing", "no data 'nothing': it is a folder of images"),
        ("{tmp}/empty", "holds no images"),
        ("{tmp}/broken", "is no image"),
        ("{tmp}/none.npz", "No such file"),
        ("{tmp}/text.npz", "pickle"),
        ("{tmp}/noname.npz", "it has an array x of samples"),
        ("{tmp}/uneven.npz", "it has an array x of samples, and y of as many"),
        ("{tmp}/zero.npz", "holds no samples"),
        ("{net}:tensor", "gives Tensor; it gives a DataLoader"),
        ("{net}:number", "gives int; it gives a DataLoader"),
        ("{net}:nothing", "gives no batches"),
        ("{net}:fails", "no luck"),
    ],
)
def test_data_that_cannot_be_used_is_refused(net, tmp_path, spec, advice):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.png").write_text("no image")
    (tmp_path / "text.npz").write_text("x")
    written(tmp_path, "noname.npz", a=np.zeros(3))
    written(tmp_path, "uneven.npz", x=np.zeros((3, 3, 8, 8)), y=np.zeros(2))
    written(tmp_path, "zero.npz", x=np.zeros((0, 3, 8, 8)))
    said = refused("sensitivity", f"{net}:pair", "--data", spec.format(tmp=tmp_path, net=net))
    assert advice in said


def test_images_are_for_models_that_take_some(tmp_path):
    pictures(tmp_path / "d", "a/1.png")
    (tmp_path / "flat.py").write_text("import torch\ndef net(): return torch.nn.Linear(3, 5), torch.rand(2, 3)\n")
    said = refused("sensitivity", f"{tmp_path / 'flat.py'}:net", "--data", tmp_path / "d")
    assert "takes [[2, 3]], no images" in said


# -- other arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ([], "Target needs at least one of"),
        (["--macs", 1.5], "the fraction kept lies in (0, 1]"),
        (["--macs", 0.0001], "cannot be reached"),
        (["--macs", 0.5, "--floor", "x"], "'x' is neither a number of channels"),
        (["--macs", 0.5, "--floor", "2.5"], "a number of channels, such as 4, or a fraction"),
        (["--macs", 0.5, "--multiple-of", 0], "multiple_of=0"),
        (["--macs", 0.5, "--protect", "zzz"], "no group 'zzz'"),
        (["--macs", 0.5, "--keep", "zzz"], "zzz"),
        (["--macs", 0.5, "--importance", "magnitud"], "no criterion 'magnitud'; did you mean 'magnitude'"),
        (["--macs", 0.5, "--importance", "magnitude:q=1"], "'q=1' is no option of it, such as name=value; it has"),
        (["--macs", 0.5, "--importance", "magnitude:p"], "'p' is no option of it"),
        (["--macs", 0.5, "--importance", "magnitude:normalize=x"], "normalize='x'"),
        (["--macs", 0.5, "--importance", "taylor"], "Taylor reads data; pass --data"),
        (["--macs", 0.5, "--importance", "taylor:loss=1"], "is no option of it"),
        (["--macs", 0.5, "--importance", "gamma"], "no batch, instance, group, layer or rms norm"),
        (["--macs", 0.5, "--importance", "random", "--otherwise", "lamp"], "Random scores every group"),
        (["--macs", 0.5, "--allocation", "best"], "method='best'"),
        (["--macs", 0.5, "--emit", "code"], "emit='code'"),
        (["--macs", 0.5, "--repair", "bias"], "repair and batchnorm need batches"),
        (["--macs", 0.5, "--repair", "glue", "--data", "{net}:loader"], "repair='glue'"),
        (["--macs", 0.5, "--data", "{net}:loader", "--loss", "zz"], "--loss zz: it is cross_entropy"),
        (["--macs", 0.5, "--report", "r.pdf"], "r.pdf: a report ends in .html, .md, .json or .txt"),
        (["--macs", 0.5, "--report", "/nowhere/r.md"], "/nowhere is not a directory"),
        (["--macs", 0.5, "--out", "{net}"], "is a file"),
    ],
)
def test_arguments_of_prune_that_cannot_be_used_are_refused(net, arguments, advice, tmp_path):
    given = [str(a).format(net=net) for a in arguments]
    assert advice in refused("prune", f"{net}:pair", *given)


def test_a_directory_that_cannot_be_written_to_is_said_so(net, tmp_path, monkeypatch):
    def full(result, out):
        raise gp.ArtefactError("cannot be written: no space left")

    monkeypatch.setattr(make, "save", full)
    assert "no space left" in refused("prune", f"{net}:pair", "--macs", 0.5, "--out", tmp_path / "o")

    def no_room(file):
        raise OSError("no space left on the disk")

    monkeypatch.setattr(os, "fsync", no_room)
    said = refused("prune", f"{net}:pair", "--macs", 0.5, "--report", tmp_path / "r.md", code=1)
    assert "no space left" in said
    assert not list(tmp_path.glob("r.md*"))


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["verify", "{net}:pair", "nowhere"], "nowhere"),
        (["verify", "torchvision:resnet18", "{small}"], "group"),
        (["compare", "{net}:pair", "nowhere"], "no model 'nowhere'"),
        (["compare", "{net}:pair", "{net}:pair", "--input", "1x4x8x8"], "does not run on these inputs"),
        (["bench", "{net}:pair", "--input", "1x4x8x8"], "does not run on these inputs: RuntimeError"),
        (["export", "{net}:pair", "{tmp}/x", "--input", "1x4x8x8"], "fails on these example inputs"),
        (["sensitivity", "{net}:pair", "--data", "{net}:loader", "--by", "x"], "by='x'"),
        (["sensitivity", "{net}:pair", "--data", "{net}:loader", "--group", "x"], "no group fits 'x'"),
        (["sensitivity", "{net}:pair", "--data", "{net}:loader", "--fraction", "2"], "between 0 and 1"),
    ],
)
def test_other_arguments_that_cannot_be_used_are_refused(net, small, tmp_path, arguments, advice):
    assert advice in refused(*(str(a).format(net=net, small=small, tmp=tmp_path) for a in arguments))


@pytest.mark.parametrize(
    ("package", "advice"),
    [
        ("timm", 'pip install "graphprune[zoo]"'),
        ("PIL", "pip install Pillow"),
        ("datasets", "pip install datasets"),
    ],
)
def test_a_missing_package_is_named_with_what_brings_it(net, tmp_path, monkeypatch, package, advice):
    pictures(tmp_path / "d", "a/1.png")
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")] + [package]:
        monkeypatch.setitem(sys.modules, name, None)
    arguments = {
        "timm": ["inspect", TINY],
        "PIL": ["sensitivity", f"{net}:pair", "--data", tmp_path / "d"],
        "datasets": ["sensitivity", f"{net}:pair", "--data", "hf:x"],
    }[package]
    said = refused(*arguments, code=1)
    assert f"needs {package}" in said
    assert advice in said


def test_a_module_that_is_missing_elsewhere_is_no_matter_of_ours(net, monkeypatch):
    def missing(*arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'zebra'", name="zebra")

    monkeypatch.setattr(models, "load", missing)
    assert isinstance(run("inspect", f"{net}:pair").exception, ModuleNotFoundError)


def test_criteria_are_those_of_the_library():
    assert set(options.CRITERIA) == {
        *("activation", "apoz", "collaborative", "fisher", "fpgm", "gamma", "lamp", "magnitude", "random", "rank"),
        *("reconstruction", "taylor"),
    }
    batches = [torch.rand(2, 3)]
    for name in options.CRITERIA:
        assert type(options.criterion(name, batches, "mse")).__name__.lower() == name
