"""A folder of plain Python: `model.py`, in which a module is spelt out call by call, and its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from graphprune import code
from graphprune.artefact import tensorfile, whole_graph
from graphprune.errors import ArtefactError
from graphprune.trace import Inputs, held
from graphprune.version import __version__

SOURCE, WEIGHTS = "model.py", "weights.safetensors"
FILES = frozenset({SOURCE, WEIGHTS, "__pycache__"})
_TEXT = '''\
"""{name}, as graphprune {version} wrote it: one module, spelt out call by call; `load()` gives it with its weights."""

import json
import math
import struct
from pathlib import Path

import torch
from torch import nn

{namespaces}
inf, nan = math.inf, math.nan

TENSORS = {{
{tensors}
}}


class {name}(nn.Module):
    """Its tensors are empty; `load` fills them."""

    def __init__(self):
        super().__init__()
        made = {{}}
        for name, (kind, dtype, shape, same) in TENSORS.items():
            *path, leaf = name.split(".")
            owner = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            made[name] = made.get(same) if same else torch.empty(shape, dtype=dtype)
            if kind == "parameter" and not same:
                made[name] = nn.Parameter(made[name], requires_grad=made[name].is_floating_point())
            if kind == "parameter":
                owner.register_parameter(leaf, made[name])
            else:
                owner.register_buffer(leaf, made[name], persistent=kind == "buffer")

{forward}

def load(weights=Path(__file__).with_name("{weights}")):
    """The model in eval mode."""
    model = {name}()
    with open(weights, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        start = file.tell()
        with torch.no_grad():
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                begin, end = header[name]["data_offsets"]
                file.seek(start + begin)
                data = bytearray(file.read(end - begin))
                if data:
                    tensor.copy_(torch.frombuffer(data, dtype=tensor.dtype).reshape(tensor.shape))
    return model.eval()
'''


def write(model: nn.Module, inputs: Inputs, folder: Path) -> str:
    """Write a model as a folder of Python; returns what is limited about it.

    Raises:
        ArtefactError: its graph holds what has no plain form.
        GraphpruneError: it cannot be traced.
    """
    graph_module, limits = whole_graph(model, inputs)
    functions, places = code.from_graph(graph_module)
    if len(functions) > 1:
        raise ArtefactError("the model has regions, such as autocast, that cannot be written as one function")
    function = _inlined(functions[""])
    name = type(model).__name__
    if not re.fullmatch(r"[A-Z]\w*", name, re.ASCII) or name in ("Path", "TENSORS"):
        name = "Pruned"
    first: dict[int, str] = {}
    rows, tensors = [], {}
    for path, tensor in held(graph_module):
        same = first.setdefault(id(tensor), path)
        owner: Any = graph_module.get_submodule(path.rpartition(".")[0])
        kept = path.rpartition(".")[2] not in owner._non_persistent_buffers_set
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer" if kept else "transient"
        shared = same if same != path else ""
        rows.append(f"    {path!r}: ({kind!r}, {tensor.dtype}, {tuple(tensor.shape)!r}, {shared!r}),")
        if not shared:
            tensors[path] = tensor
    body = code.to_source(function, before=_headings(function, places), ops="")
    text = _TEXT.format(
        name=name,
        version=__version__,
        namespaces="\n".join(f"{n} = torch.ops.{n}" for n in sorted(_namespaces(function)) or ["aten"]),
        tensors="\n".join(rows),
        forward="\n".join(f"    {line}".rstrip() for line in body.splitlines()) + "\n",
        weights=WEIGHTS,
    )
    (folder / SOURCE).write_text(text, encoding="utf-8")
    with (folder / WEIGHTS).open("wb") as file:
        tensorfile.writer(tensors)(file)
    return limits


def _inlined(function: Mapping[str, Any]) -> dict[str, Any]:
    """The function with `self.conv.weight` where a step named it."""
    named = {name: expression for name, expression in function["steps"] if _is_held(expression)}

    def replaced(value: Any) -> Any:
        if isinstance(value, list):
            return [replaced(v) for v in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {"name"}:
            return named.get(value["name"], value)
        return {k: {n: replaced(a) for n, a in v.items()} if k == "kwargs" else replaced(v) for k, v in value.items()}

    steps = [[name, replaced(expression)] for name, expression in function["steps"] if name not in named]
    return {"parameters": function["parameters"], "steps": steps, "result": replaced(function["result"])}


def _is_held(expression: Any) -> bool:
    return isinstance(expression, dict) and "self" in expression


def _headings(function: Mapping[str, Any], places: Mapping[str, str]) -> Any:
    """The module that steps come from, above the first of them."""
    above: dict[str, str] = {}
    current = ""
    for name, _ in function["steps"]:
        place = places.get(name, "")
        if place and place != current:
            above[name] = current = place
    return lambda name: above.get(name, "")


def _namespaces(value: Any) -> set[str]:
    """Namespaces of the ops that are called."""
    if isinstance(value, list):
        return {n for v in value for n in _namespaces(v)}
    if not isinstance(value, dict):
        return set()
    found = {n for v in value.values() for n in _namespaces(v)}
    name = value.get("call")
    return found | {name.split(".")[0]} if isinstance(name, str) and name.count(".") == 2 else found


def imported(folder: Path) -> nn.Module:
    """The model that the folder holds, whose source was written here."""
    path = folder / SOURCE
    names: dict[str, Any] = {"__name__": "graphprune_exported", "__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    made: nn.Module = names["load"]()
    return made
