"""Files that are not what was saved, and places that cannot be written to: a clear error, and nothing done."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import resource
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune import files
from graphprune.artefact import store
from tests.nets import CifarResNet

ROOT = Path(__file__).parents[2]
specification = importlib.util.spec_from_file_location("artefact_fuzz", ROOT / "benchmarks" / "artefact_fuzz.py")
fuzz = importlib.util.module_from_spec(specification)
specification.loader.exec_module(fuzz)

X = torch.rand(2, 3, 9, 9)


@pytest.fixture(scope="module")
def starts():
    return {name: fuzz.saved(name) for name in fuzz.STARTS}


@pytest.fixture(scope="module")
def watch():
    return fuzz.Watch()


@pytest.fixture
def result():
    return gp.prune(fuzz.convolutional(), X, target=gp.Target(channels=0.5))


def place(content, directory, **changed):
    fuzz.write({**content, **changed}, directory, reseal=True)
    return directory


def edited(content, kind, edit):
    """The content with one file changed by a function, hashes made to fit."""
    data = json.loads(content[kind])
    edit(data)
    return {kind: json.dumps(data).encode()}


def loads(directory, name="convolutional"):
    return [gp.load(directory, fuzz.STARTS[name][0]()), gp.load(directory)]


def unchanged(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


# -- files that were changed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["manifest", "structure", "graph", "weights"])
def test_a_bit_flipped_anywhere_is_noticed(kind, starts, tmp_path):
    content = starts["convolutional"]
    length = len(content[kind])
    for number in range(40):
        data = bytearray(content[kind])
        data[number * length // 40] ^= 1 << number % 8
        directory = tmp_path / str(number)
        directory.mkdir()
        fuzz.write(content | {kind: bytes(data)}, directory, reseal=False)
        with pytest.raises(gp.ArtefactError):
            loads(directory)


@pytest.mark.parametrize("kind", ["manifest", "structure", "graph", "weights"])
def test_a_file_that_ends_early_is_noticed(kind, starts, tmp_path):
    content = starts["convolutional"]
    for number in range(20):
        directory = tmp_path / str(number)
        directory.mkdir()
        short = content[kind][: number * len(content[kind]) // 20]
        fuzz.write(content | {kind: short}, directory, reseal=False)
        with pytest.raises(gp.ArtefactError):
            loads(directory)


def test_messages_say_which_file_and_what(result, tmp_path):
    gp.save(result, tmp_path)
    (weights,) = tmp_path.glob("weights*")
    content = weights.read_bytes()
    weights.write_bytes(content[:-5])
    with pytest.raises(gp.ArtefactError, match=rf"weights-.* has {len(content) - 5} bytes and was written with"):
        gp.load(tmp_path)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(gp.ArtefactError, match=r"weights-.* was changed after it was written"):
        gp.load(tmp_path)
    weights.unlink()
    with pytest.raises(gp.ArtefactError, match=r"weights-.*safetensors is missing"):
        gp.load(tmp_path)
    weights.mkdir()
    with pytest.raises(gp.ArtefactError, match=r"weights-.*safetensors is no file"):
        gp.load(tmp_path)
    (tmp_path / "artefact.json").unlink()
    with pytest.raises(gp.ArtefactError, match=r"holds no artefact.json; pass a directory that gp.save wrote"):
        gp.load(tmp_path)
    with pytest.raises(gp.ArtefactError, match=r"holds no artefact.json"):
        gp.load(tmp_path / "nowhere")


@pytest.mark.parametrize("number", range(300))
def test_broken_artefacts_load_or_are_refused_and_do_nothing(number, starts, watch, tmp_path):
    name = list(starts)[number % len(starts)]
    _, content, reseal = fuzz.broken(starts[name], 5000 + number, seed=1)
    fuzz.write(content, tmp_path, reseal=reseal)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fuzz.outcome(name, tmp_path, watch) in ("loaded", "refused")


def test_the_fuzzer_notices_what_it_is_for(starts, watch, tmp_path, monkeypatch):
    place(starts["convolutional"], tmp_path)
    assert fuzz.outcome("convolutional", tmp_path, watch) == "loaded"

    def bad(action):
        monkeypatch.setattr(gp, "load", lambda *args, **kwargs: action())
        return fuzz.outcome("convolutional", tmp_path, watch)

    assert bad(lambda: 1 / 0).startswith("ZeroDivisionError")
    assert bad(lambda: os.system("true")) == "did os.system"
    assert bad(lambda: (tmp_path / "new").write_text("x")).startswith("did open")
    assert bad(lambda: exec(compile("1", "<attack>", "exec"))) == "did exec <attack>"


# -- files that were made by hand ----------------------------------------------------------------------------------


def reheaded(content, edit):
    """The weights with their header changed by a function."""
    (length,) = struct.unpack("<Q", content["weights"][:8])
    header = json.loads(content["weights"][8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content["weights"][8 + length :]


def test_weights_of_another_shape_are_refused(starts, tmp_path):
    content = starts["convolutional"]
    place(content, tmp_path, weights=reheaded(content, lambda h: h["3.weight"]["shape"].reverse()))
    with pytest.raises(
        gp.ArtefactError, match=r"3.weight is 'F32' \[3, 3, 3, 4\] .* the files are of different artefacts"
    ):
        loads(tmp_path)


def test_a_huge_tensor_is_refused_before_it_is_made(starts, tmp_path):
    def edit(data):
        data["tensors"]["0.weight"][2] = [2**40, 2**20]

    place(starts["convolutional"], tmp_path, **edited(starts["convolutional"], "structure", edit))
    with pytest.raises(gp.ArtefactError, match="the files are of different artefacts"):
        gp.load(tmp_path)


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"[]", "its header is no table"),
        (b"{", "is no JSON that can be read"),
        (b'{"a": {}}', "is missing in|is not expected in"),
        (None, "its header is longer than the file"),
    ],
)
def test_weights_with_another_header_are_refused(header, match, starts, tmp_path):
    body = starts["convolutional"]["weights"]
    weights = struct.pack("<Q", 2**63) + body[8:] if header is None else struct.pack("<Q", len(header)) + header
    place(starts["convolutional"], tmp_path, weights=weights)
    with pytest.raises(gp.ArtefactError, match=match):
        gp.load(tmp_path)


@pytest.mark.parametrize("change", [lambda o: [0, 12], lambda o: [p + 4 for p in o], lambda o: "no"])
def test_tensors_that_overlap_or_leave_gaps_are_refused(change, starts, tmp_path):
    content = starts["convolutional"]
    place(
        content,
        tmp_path,
        weights=reheaded(content, lambda h: h["7.bias"].update(data_offsets=change(h["7.bias"]["data_offsets"]))),
    )
    with pytest.raises(gp.ArtefactError, match="has no place for"):
        gp.load(tmp_path)


def test_bytes_that_no_tensor_has_are_refused(starts, tmp_path):
    place(starts["convolutional"], tmp_path, weights=starts["convolutional"]["weights"] + b"more")
    with pytest.raises(gp.ArtefactError, match="bytes of tensors and should have"):
        gp.load(tmp_path)


def structure_edits():
    def of(path, value):
        def edit(data):
            *inner, last = path
            for key in inner:
                data = data[key]
            data[last] = value

        return edit

    return {
        "no model": (lambda d: d.pop("model"), "structure's model cannot be read"),
        "emitter": (of(["emitter"], "pickle"), "none of module, graft, graph"),
        "modes": (of(["training"], [1, []]), "is no mode"),
        "a mode": (of(["training"], [True, [3]]), "is no text"),
        "kind": (of(["tensors", "0.weight", 0], "code"), "structure's tensors cannot be read"),
        "negative": (of(["tensors", "0.weight", 2], [-1, 3]), "structure's tensors cannot be read"),
        "alias": (of(["aliases", "0.weight"], "0.bias"), "stands for no tensor"),
        "modules": (of(["modules"], {"": 3}), "a table of texts is expected"),
        "plan": (of(["plan", "groups", "0"], [99]), "structure's plan cannot be read"),
        "plan size": (of(["plan", "shapes", "0.weight"], [2.5]), "is no size"),
        "positions": (of(["positions", 0], [5, 1]), "ascending"),
        "position": (of(["plan", "kept", "0.weight", "0"], -1), "positions are given by number"),
        "change": (of(["changes", 0], ["0", "out_channels", None, None, "6", 3]), "is no change of an int"),
        "grafts": (of(["grafts"], {"0": [3, []]}), "a table is expected"),
        "report": (of(["report"], []), "a table is expected"),
    }


@pytest.mark.parametrize("case", structure_edits())
def test_a_structure_edited_by_hand_is_refused(case, starts, tmp_path):
    edit, match = structure_edits()[case]
    place(starts["convolutional"], tmp_path, **edited(starts["convolutional"], "structure", edit))
    with pytest.raises(gp.ArtefactError, match=match):
        loads(tmp_path)


def test_an_edit_by_hand_without_new_hashes_is_refused(result, tmp_path):
    gp.save(result, tmp_path)
    manifest = tmp_path / "artefact.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"Sequential"', '"Sequentiel"'))
    with pytest.raises(gp.ArtefactError, match=r"artefact.json was changed after it was written"):
        gp.load(tmp_path)
    manifest.write_text(text)
    (structure,) = tmp_path.glob("structure*")
    structure.write_text(structure.read_text().replace('"Sequential"', '"Sequentiel"'))
    with pytest.raises(gp.ArtefactError, match=r"structure-.*.json was changed after it was written"):
        gp.load(tmp_path)


def manifest_edits():
    def files(kind, **said):
        return lambda data: data["files"][kind].update(said)

    return {
        "traversal": (files("weights", sha256="../../../../etc/passwd"), "does not say what its weights is"),
        "absolute": (files("structure", sha256="/" * 64), "does not say what its structure is"),
        "length": (files("graph", bytes=-1), "does not say what its graph is"),
        "no weights": (lambda data: data["files"].pop("weights"), "names no weights"),
        "no files": (lambda data: data.pop("files"), "is no manifest of an artefact"),
        "needs": (lambda data: data.update(needs="1"), "is no manifest of an artefact"),
        "huge": (files("structure", bytes=1 << 40), "structure-.*json is longer than"),
    }


@pytest.mark.parametrize("case", manifest_edits())
def test_a_manifest_edited_by_hand_is_refused(case, starts, tmp_path):
    edit, match = manifest_edits()[case]
    place(starts["convolutional"], tmp_path)
    path = tmp_path / "artefact.json"
    data = json.loads(path.read_text())
    data.pop("sha256")
    edit(data)
    path.write_text(json.dumps({**data, "sha256": store.digest(data)}))
    with pytest.raises(gp.ArtefactError, match=match):
        gp.load(tmp_path)


def test_a_manifest_that_is_too_long_is_not_read(starts, tmp_path):
    place(starts["convolutional"], tmp_path, manifest=b" " * (store.MANIFEST_LIMIT + 1))
    with pytest.raises(gp.ArtefactError, match=r"artefact.json is longer than"):
        gp.load(tmp_path)


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", '{"needs": 1}'.encode("utf-32"), b"[" * 100_000, b'{"needs": NaN}', b"1" * 10_000]
)
def test_json_that_cannot_be_read_is_refused(text, starts, tmp_path):
    place(starts["convolutional"], tmp_path)
    (tmp_path / "artefact.json").write_bytes(text)
    with pytest.raises(gp.ArtefactError, match=r"artefact.json is no JSON that can be read"):
        gp.load(tmp_path)


def test_a_newer_format_is_refused_and_a_newer_one_that_says_so_is_read(starts, tmp_path):
    content = starts["convolutional"]
    newer = edited(content, "manifest", lambda d: d.update(needs=2, format=2, made_with={"graphprune": "9.0"}))
    place(content, tmp_path, **newer)
    with pytest.raises(gp.ArtefactError, match=r"has format 2, written by graphprune '9.0'; .* update graphprune"):
        gp.load(tmp_path)
    more = tmp_path / "more"
    more.mkdir()
    added = edited(content, "manifest", lambda d: d.update(format=2, signature="later"))
    place(content, more, **added, **edited(content, "structure", lambda d: d.update(later={"a": 1})))
    assert len(loads(more)) == 2


def test_graphs_that_are_not_of_the_model_are_refused(starts, tmp_path):
    edits = {
        "its tensors are not those of the model": lambda d: d["tensors"].append("1.other"),
        "its limits are no text": lambda d: d.update(limits=3),
        "the graph cannot be read": lambda d: d.update(constants={"a": 3}),
        "a table of functions with a forward is expected": lambda d: d.update(functions=[]),
        "is not expected in|is missing in": lambda d: d["constants"].update({"a": ["buffer", "F32", [1]]}),
    }
    for number, (match, edit) in enumerate(edits.items()):
        directory = tmp_path / str(number)
        directory.mkdir()
        place(starts["convolutional"], directory, **edited(starts["convolutional"], "graph", edit))
        with pytest.raises(gp.ArtefactError, match=match):
            gp.load(directory)


@pytest.mark.parametrize("name", ["0.weight.x", "register_buffer", "0..weight", "0.__class__", 'a"b.weight', "forward"])
def test_tensors_with_names_that_modules_use_are_refused(name, starts, tmp_path):
    content = starts["convolutional"]

    def renamed(text):
        return text.replace(b'"7.bias"', json.dumps(name).encode())

    (length,) = struct.unpack("<Q", content["weights"][:8])
    header = renamed(content["weights"][8 : 8 + length])
    weights = struct.pack("<Q", len(header)) + header + content["weights"][8 + length :]
    names = {"structure": renamed(content["structure"]), "graph": renamed(content["graph"]), "weights": weights}
    place(content, tmp_path, **names)
    with pytest.raises(gp.ArtefactError, match=r"is no name of a tensor of a graph module"):
        gp.load(tmp_path)


# -- another model -------------------------------------------------------------------------------------------------


def test_another_architecture_is_refused_with_the_differences(result, tmp_path):
    gp.save(result, tmp_path)
    wider = fuzz.convolutional()
    wider[3], wider[7] = nn.Conv2d(6, 9, 3), nn.Linear(9, 5)
    gelu = fuzz.convolutional()
    gelu[2] = nn.GELU()
    unbiased = fuzz.convolutional()
    unbiased[0] = nn.Conv2d(3, 6, 3, bias=False)
    tied = fuzz.convolutional()
    tied[1].bias = tied[1].weight
    grouped = fuzz.convolutional()
    grouped[0].out_channels = 17
    cases = (
        (wider, r"3.weight is \[9, 6, 3, 3\] here, and \[7, 6, 3, 3\] in the artefact"),
        (gelu, r"2 is GELU here, and ReLU in the artefact"),
        (unbiased, r"0.bias is only in the artefact"),
        (tied, r"1.bias and 1.weight are one tensor only in the model"),
        (grouped, r"0.out_channels is not 6"),
        (CifarResNet(1), r"of another architecture than this CifarResNet:\n  the model is CifarResNet here"),
        (result.model, r"0.weight is \[3, 3, 3, 3\] here"),
    )
    for model, match in cases:
        with pytest.raises(gp.ArtefactError, match=match):
            gp.load(tmp_path, model)


def test_what_is_no_model_is_refused(result, tmp_path):
    gp.save(result, tmp_path)
    with pytest.raises(gp.ArtefactError, match="pass a module, or a function that makes one"):
        gp.load(tmp_path, 3)
    with pytest.raises(gp.ArtefactError, match="the factory gave a int"):
        gp.load(tmp_path, lambda: 3)
    with pytest.raises(gp.ArtefactError, match="it is 'saved' or 'model'"):
        gp.load(tmp_path, fuzz.convolutional(), weights="other")
    with pytest.raises(gp.ArtefactError, match="takes those of a model; pass it"):
        gp.load(tmp_path, weights="model")


def test_what_stays_on_the_meta_device_is_named(result, tmp_path):
    gp.save(result, tmp_path)
    with torch.device("meta"):
        instance = fuzz.convolutional()
    with pytest.raises(gp.ArtefactError, match="stays on the meta device"):
        gp.load(tmp_path, instance, weights="model")


# -- places that cannot be written to ------------------------------------------------------------------------------


def failing(monkeypatch, code, at):
    """Make the `at`-th write, flush or rename of a save fail, counted from 0; returns whether it was reached."""
    count = [-1]

    def counted(original):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == at:
                raise OSError(code, os.strerror(code))
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(files.os, "open", counted(os.open))
    monkeypatch.setattr(Path, "replace", counted(Path.replace))
    monkeypatch.setattr(store._Counted, "write", counted(store._Counted.write))
    return count


def test_a_full_disk_leaves_what_was_there(result, tmp_path, monkeypatch):
    old = gp.prune(fuzz.convolutional(), X, target=gp.Target(channels=0.9))
    gp.save(old, tmp_path / "there")
    before = unchanged(tmp_path / "there")
    at = 0
    while True:
        with monkeypatch.context() as patch:
            count = failing(patch, errno.ENOSPC, at)
            with contextlib.suppress(gp.ArtefactError):
                gp.save(result, tmp_path / "there")
                assert count[0] < at
                break
        assert unchanged(tmp_path / "there") == before
        with monkeypatch.context() as patch:
            failing(patch, errno.ENOSPC, at)
            with pytest.raises(gp.ArtefactError, match="No space left on device; nothing there was changed"):
                gp.save(result, tmp_path / "new" / "deep")
        assert not (tmp_path / "new").exists()
        at += 1
    assert at > 15
    assert torch.equal(gp.load(tmp_path / "there")(X), result.model(X))


def test_a_file_that_may_not_grow_is_an_error_of_ours(tmp_path):
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import artefact_fuzz as fuzz, graphprune as gp
result = gp.prune(fuzz.convolutional(), fuzz.STARTS["convolutional"][1], target=gp.Target(channels=0.5))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    gp.save(result, {str(tmp_path / "new")!r})
except gp.ArtefactError as error:
    assert "File too large" in str(error), error
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 7
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_a_directory_without_rights_is_an_error_of_ours(result, tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):  # the superuser may write anywhere
        failing(monkeypatch, errno.EACCES, 0)
    with pytest.raises(gp.ArtefactError, match=r"cannot write to .*closed.*: Permission denied"):
        gp.save(result, closed)
    assert list(closed.iterdir()) == []


def test_a_file_that_may_not_be_read_is_an_error_of_ours(result, tmp_path, monkeypatch):
    gp.save(result, tmp_path)

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(gp.ArtefactError, match=r"artefact.json cannot be read: Permission denied"):
        gp.load(tmp_path)


def test_a_file_in_the_place_of_the_directory_is_an_error_of_ours(result, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(gp.ArtefactError, match="file is a file; pass a directory"):
        gp.save(result, tmp_path / "file")
    with pytest.raises(gp.ArtefactError, match="Not a directory"):
        gp.save(result, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_names_of_files_follow_from_what_is_in_them(result, tmp_path):
    gp.save(result, tmp_path)
    for path in tmp_path.iterdir():
        if path.name != "artefact.json":
            assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] in path.name
            assert path.stat().st_mode & 0o077 == 0o666 & ~_umask() & 0o077


def _umask():
    old = os.umask(0)
    os.umask(old)
    return old
