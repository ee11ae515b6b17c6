"""Exports compute what the model computes; what cannot be exported is an error that writes nothing."""

from __future__ import annotations

import ast
import errno
import importlib
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.export import onnx as onnx_format
from graphprune.export import python as python_format
from graphprune.trace import run
from tests.artefact.test_save_load import NETS, pruned

exporting = importlib.import_module("graphprune.export")  # its name in the package is the function
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript or onnxruntime is missing")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, onnxscript and onnxruntime
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def path_for(format, tmp_path):
    return tmp_path / {"onnx": "net.onnx", "torch_export": "net.pt2", "python": "net"}[format]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("format", [pytest.param("onnx", marks=needs_onnx), "torch_export", "python"])
def test_what_is_exported_gives_the_same_at_two_batch_sizes(format, name, tmp_path):
    _, inputs, result = pruned(name)
    path = path_for(format, tmp_path)
    done = gp.export(result.model, path, inputs, format=format)
    batch = inputs.shape[0]
    assert done.batch_sizes == (batch, batch + 1)
    assert done.limits == ""
    assert done.error < (1e-4 if format == "onnx" else 1e-6)
    assert done.path == path
    assert sum(p.stat().st_size for p in done.files) == done.bytes > 100
    assert list(tmp_path.iterdir()) == [path]
    again = gp.export(result.model, path, inputs, format=format)  # in its place
    assert again.files == done.files


@needs_onnx
def test_an_onnx_file_runs_on_its_own(tmp_path):
    import onnxruntime

    _, inputs, result = pruned("convolutions")
    gp.export(result.model, tmp_path / "net.onnx", inputs)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    x = torch.rand(5, 3, 16, 16)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(got, run(result.model, gp.Inputs.of(x))[0].numpy(), rtol=1e-4, atol=1e-5)


@needs_onnx
def test_weights_too_large_for_one_file_get_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_format, "EMBEDDED", 100)
    _, inputs, result = pruned("convolutions")
    done = gp.export(result.model, tmp_path / "net.onnx", inputs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert {p.name for p in done.files} == {"net.onnx", "net.onnx.data"}
    assert gp.export(result.model, tmp_path / "net.onnx", inputs).error < 1e-4


def test_a_pt2_file_is_one_that_torch_loads(tmp_path):
    _, inputs, result = pruned("graft")
    gp.export(result.model, tmp_path / "net.pt2", inputs, format="torch_export")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.equal(loaded(inputs), result.model(inputs))


def test_the_python_folder_imports_nothing_but_torch(tmp_path):
    _, inputs, result = pruned("tied")
    gp.export(result.model, tmp_path / "net", inputs, format="python")
    source = (tmp_path / "net" / "model.py").read_text()
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert imported == {"json", "math", "struct", "pathlib", "torch"}
    assert "self.up.weight" in source
    assert "# up" in source  # where the calls come from
    torch.save({"x": inputs, "want": result.model(inputs)["logits"]}, tmp_path / "case.pt")
    code = """
import sys, torch
torch.set_num_threads(1)
from model import load
net, case = load(), torch.load("../case.pt")
assert torch.equal(net(case["x"])["logits"], case["want"])
assert net.head.weight is net.embed.weight
assert not net.training
assert not any(name.startswith(("graphprune", "safetensors")) for name in sys.modules)
"""
    subprocess.run([sys.executable, "-I", "-c", "import sys; sys.path.insert(0, '.')\n" + code], check=True, timeout=120,
                   cwd=tmp_path / "net")  # fmt: skip


def test_a_model_that_fixes_its_batch_size_says_so(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, x):
            return self.a(x).reshape(2, 4)

    done = gp.export(Fixed().eval(), tmp_path / "net", torch.rand(2, 3), format="python")
    assert "the batch size stays 2" in done.limits
    assert done.batch_sizes == (2,)


def test_the_model_is_left_as_it_was(tmp_path):
    _, inputs, result = pruned("convolutions")
    result.model.train()
    before = {k: v.clone() for k, v in result.model.state_dict().items()}
    gp.export(result.model, tmp_path / "net", inputs, format="python")
    assert result.model.training
    assert all(torch.equal(v, before[k]) for k, v in result.model.state_dict().items())


# -- what deployment does with a pruned model ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convolutions", "graft", "vit"])
def test_a_pruned_model_compiles(name):
    _, inputs, result = pruned(name)
    compiled = torch.compile(result.model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs), result.model(inputs))


@pytest.mark.parametrize("name", ["vit", "tied", "lstm"])
def test_a_pruned_model_is_quantised_by_torch(name):
    _, inputs, result = pruned(name)
    small = torch.ao.quantization.quantize_dynamic(result.model, {nn.Linear, nn.LSTM}, dtype=torch.qint8)
    assert any("quantized" in type(m).__module__ for m in small.modules())
    want, got = run(result.model, gp.Inputs.of(inputs))[0], small(inputs)
    got = got["logits"] if isinstance(got, dict) else got
    assert float((want - got).abs().max() / want.abs().max()) < 0.1


@needs_onnx
@pytest.mark.parametrize("name", ["vit", "graft"])
def test_a_pruned_model_is_quantised_by_onnxruntime(name, tmp_path):
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    _, inputs, result = pruned(name)
    gp.export(result.model, tmp_path / "net.onnx", inputs)
    quantize_dynamic(tmp_path / "net.onnx", tmp_path / "int8.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "int8.onnx"), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    want = run(result.model, gp.Inputs.of(inputs))[0].numpy()
    assert np.abs(got - want).max() / np.abs(want).max() < 0.1


# -- what cannot be exported ---------------------------------------------------------------------------------------


def net():
    return nn.Linear(3, 5)


X = torch.rand(2, 3)


def test_formats_are_named(tmp_path):
    with pytest.raises(gp.ArtefactError, match="it is 'onnx', 'torch_export', 'python'"):
        gp.export(net(), tmp_path / "net", X, format="tflite")


class Cache:
    def __init__(self, held):
        self.held = held


torch.utils._pytree.register_pytree_node(Cache, lambda cache: ([cache.held], None), lambda held, _: Cache(*held))


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, x, keep=True):
        y = self.layer(x)
        return (y, Cache(y)) if keep else y


def test_an_object_that_torch_cannot_store_is_an_error_and_leaving_it_out_helps(tmp_path):
    with pytest.raises(gp.ArtefactError, match=r"(?s)torch cannot store this program: .*Cache.*use_cache=False"):
        gp.export(Cached(), tmp_path / "net.pt2", X, format="torch_export")
    assert list(tmp_path.iterdir()) == []
    assert gp.export(Cached(), tmp_path / "net.pt2", (X, False), format="torch_export").error == 0


def test_python_has_such_an_object_as_plain_containers(tmp_path):
    done = gp.export(Cached(), tmp_path / "net", X, format="python")
    y, cache = python_format.imported(tmp_path / "net")(X)
    assert done.error == 0
    assert isinstance(cache, list)
    assert torch.equal(y, cache[0])


def test_places_that_hold_something_else_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(gp.ArtefactError, match="mine holds something else than an export"):
        gp.export(net(), tmp_path / "mine", X, format="python")
    with pytest.raises(gp.ArtefactError, match="mine is a folder; pass the path of a file"):
        gp.export(net(), tmp_path / "mine", X, format="torch_export")
    with pytest.raises(gp.ArtefactError, match=r"there is no folder .*; make it first"):
        gp.export(net(), tmp_path / "none" / "net", X, format="python")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_missing_package_is_named_with_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(gp.ArtefactError, match=r'ONNX needs onnxscript; type: pip install "graphprune\[export\]"'):
        gp.export(net(), tmp_path / "net.onnx", X)
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_an_op_that_onnx_has_not_is_an_error_of_ours(tmp_path):
    class Special(nn.Module):
        def forward(self, x):
            return torch.linalg.matrix_exp(x[:, :2, None] * x[:, None, :2])

    with pytest.raises(gp.ArtefactError, match="torch cannot export this model to ONNX"):
        gp.export(Special(), tmp_path / "net.onnx", X)
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_a_file_that_onnxruntime_does_not_take_is_an_error_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda program, args, path, **_: path.write_bytes(b"no"))
    with pytest.raises(gp.ArtefactError, match="onnxruntime does not take the file"):
        gp.export(net(), tmp_path / "net.onnx", X)


def test_regions_cannot_be_written_as_one_function(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.a(x)

    with pytest.raises(gp.ArtefactError, match="has regions, such as autocast"):
        gp.export(Mixed(), tmp_path / "net", X, format="python")
    assert gp.export(Mixed(), tmp_path / "net.pt2", X, format="torch_export").error == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda outs: [o + 1 for o in outs], r"is off by .* \(tolerance 1e-04\); nothing was written"),
        (lambda outs: outs[:0], r"gives outputs \[\], the model \[\[2, 5\]\]"),
        (lambda outs: [o[:1] for o in outs], r"gives outputs \[\[1, 5\]\]"),
        (lambda outs: [o * float("nan") for o in outs], "is off by nan"),
        (lambda outs: 1 / 0, "does not run: ZeroDivisionError"),
    ],
)
def test_an_export_that_gives_something_else_is_not_written(change, match, tmp_path, monkeypatch):
    def wrong(model, inputs, path):
        path.write_text("wrong")
        return lambda given: change(run(model, given)), ""

    monkeypatch.setattr(exporting, "_WRITERS", {**exporting._WRITERS, "onnx": wrong})
    with pytest.raises(gp.ArtefactError, match=match):
        gp.export(net(), tmp_path / "net.onnx", X)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    gp.export(net(), tmp_path / "net", X, format="python")
    before = {p.name: p.read_bytes() for p in (tmp_path / "net").iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(python_format.Path, "write_text", full)
    with pytest.raises(gp.ArtefactError, match="No space left on device; nothing there was changed"):
        gp.export(net(), tmp_path / "net", X, format="python")
    assert {p.name: p.read_bytes() for p in (tmp_path / "net").iterdir()} == before
    assert len(list(tmp_path.iterdir())) == 1


def test_weights_of_the_folder_are_safetensors(tmp_path):
    gp.export(net(), tmp_path / "net", X, format="python")
    content = (tmp_path / "net" / "weights.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert set(header) == {"__metadata__", "weight", "bias"}
