"""Forwards as data: read off source and graphs, written back, and refused where they are more than calls."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import fx, nn

import graphprune as gp
from graphprune import code
from graphprune.code.fx import literal

HELD = ["a.weight", "0.b", "training_"]


def function(*steps, parameters=None, result=None):
    return {"": {"parameters": parameters or [{"name": "x"}], "steps": [list(s) for s in steps], "result": result}}


def call(name, *args, **kwargs):
    return {"call": name, "args": list(args), **({"kwargs": kwargs} if kwargs else {})}


X = {"name": "x"}
RELU = call("aten.relu.default", X)


def test_source_is_read_and_written_back():
    source = """def forward(self, x, /, mask=None, *rest, scale=0.5, **more):
    torch._assert(x.shape[1] == 3 and 2 <= x.shape[0] * 2 < 9 and not mask is None and scale is not None, 'said')
    training = self.training
    weight = getattr(self.parts, "0").weight
    a = torch.ops.aten.add.Tensor(x, weight, alpha=-2);  weight = None
    b = torch.ops.aten.to.dtype(a, torch.float32)
    c = b[(slice(None, 3, None), -1)]
    d = torch.ops.aten.full.default([2, 3], -inf, dtype=torch.float64, layout=torch.strided, device=x.device)
    e = torch.ops.aten.full.default([2], nan, device=torch.device("cpu"), memory_format=torch.channels_last)
    f = (1 + 2) * 3 // (4 - -5) % 6
    g = torch.sym_max(f, 3)
    h = math.trunc(g) + math.floor(f)
    return {'a': [a, b], 'c': (c, d, e, h, None, True, 1.5, 'text', 2j)}
"""
    data = json.loads(json.dumps(code.from_source(source), allow_nan=False))
    assert [p.get("kind", "") for p in data["parameters"]] == ["/", "", "*", "keyword", "**"]
    written = code.to_source(data)
    assert code.from_source(written) == data
    assert code.to_source(code.from_source(written)) == written
    assert "weight = None" in written  # results are let go after their last use
    names = {"torch": torch, "math": math, "inf": float("inf"), "nan": float("nan")}
    exec(compile(written, "written", "exec"), names)
    exec(compile(source.replace("forward", "original"), "source", "exec"), names)
    for bad in (torch.rand(2, 5), torch.rand(5, 3)):
        with pytest.raises(AssertionError, match="said"):
            names["forward"](nn.Module(), bad, torch.ones(1))


@pytest.mark.parametrize(
    "line",
    ["y = x.data", "y = open('a')", "y = lambda: 1", "y = [i for i in x]", "y = torch.load('a')", "y = x @ x", "y = {1.5: x}",
     "y = x not in x", "y = torch.nothing"],
)  # fmt: skip
def test_source_that_is_more_than_calls_has_no_form(line):
    with pytest.raises(gp.ArtefactError, match="has no form as data"):
        code.from_source(f"def forward(self, x):\n    {line}\n    return y\n")
    with pytest.raises(gp.ArtefactError, match="has no form as data"):
        code.from_source("def forward(self, x):\n    del x\n    return y\n")
    with pytest.raises(gp.ArtefactError, match="y is defined twice"):
        code.from_source("def forward(self, x):\n    y = x.shape\n    y = y[0]\n    return y\n")


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(3, 4)])
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x, pair, *, named):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.parts[0](x)
        z = torch.full((x.shape[0], 4), float("-inf"), device=x.device)
        z = torch.where(y > 0, y.float(), z).masked_fill(named["mask"], 0.0) + self.table + pair[1]
        return {"out": z[:, 1:3], "sizes": (x.shape[0] * 2, None), "list": [pair[0]]}


def test_a_graph_is_read_and_written_back():
    torch.manual_seed(0)
    net = Everything().eval()
    mask = torch.tensor([[True, False, False, True]])
    given = gp.Inputs((torch.rand(2, 3), (torch.rand(2), torch.rand(4))), {"named": {"mask": mask}})
    program = gp.trace(net, given, dynamic_batch=False, front_end="export")
    module = program.source.module(check_guards=False)
    functions, places = code.from_graph(module)
    assert len(functions) == 2
    assert "parts.0" in places.values() or places
    functions = json.loads(json.dumps(functions, allow_nan=False))
    held = [*dict(module.named_parameters()), *dict(module.named_buffers())]
    again = code.to_graph(code.checked(functions, held, where="it"), module_of(module), "Again")
    assert type(again).__name__ == "Again"
    want, got = given.call(net), given.call(again)
    assert torch.equal(want["out"], got["out"])
    assert got["sizes"] == (4, None)
    assert torch.equal(got["list"][0], given.args[1][0])


def module_of(module):
    root = nn.Module()
    root.parts = nn.ModuleList([nn.Module()])
    root.parts[0].weight, root.parts[0].bias = (
        module.parts.get_parameter("0.weight"),
        module.parts.get_parameter("0.bias"),
    )
    for name, tensor in module.named_buffers():
        root.register_buffer(name, tensor)
    return root


def test_graphs_that_are_more_than_calls_have_no_form():
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_method("relu", (x,)))
    with pytest.raises(gp.ArtefactError, match="call_method of relu has no form as data"):
        code.from_graph(fx.GraphModule(nn.Module(), graph))
    graph = fx.Graph()
    graph.output(graph.call_function(torch.load, (graph.placeholder("x"),)))
    with pytest.raises(gp.ArtefactError, match="a call of load has no form as data"):
        code.from_graph(fx.GraphModule(nn.Module(), graph))
    with pytest.raises(gp.ArtefactError, match="a object has no form as data"):
        literal(object())
    assert [literal(v) for v in (float("inf"), 2j, slice(1, None), torch.int8, torch.device("cpu"))] == [
        *({"float": "inf"}, {"complex": [0.0, 2.0]}, {"slice": [1, None, None]}, {"dtype": "int8"}, {"device": "cpu"})
    ]


def test_arguments_that_are_objects_have_no_form():
    class Cache:
        def __init__(self, held):
            self.held = held

    class Net(nn.Module):
        def forward(self, x, cache):
            return x + cache.held

    module = gp.trace(Net(), (torch.rand(2), Cache(torch.rand(2))), front_end="export").source.module(
        check_guards=False
    )
    with pytest.raises(gp.ArtefactError, match="a Cache among the arguments has no form as data"):
        code.from_graph(module)


def deep(n):
    value = X
    for _ in range(n):
        value = [value]
    return value


REFUSED = {
    "no table": ([], "a table of functions with a forward is expected"),
    "no forward": ({"f": function()[""]}, "a table of functions with a forward is expected"),
    "fields": ({"": {"steps": []}}, "a function has parameters, steps, result"),
    "no list": ({"": {"parameters": 3, "steps": [], "result": None}}, "a list is expected"),
    "step": (function(["y"]), "a step is a name and an expression"),
    "name of a function": ({**function(), "a b": function()[""]}, "'a b' is no name of a variable"),
    "keyword": (function(["import", RELU]), "'import' is no name of a variable"),
    "code as a name": (function(["y = 1; import os; z", RELU]), "is no name of a variable"),
    "dunder": (function(["__class__", RELU]), "is no name of a variable"),
    "reserved": (function(["torch", RELU]), "'torch' is no name of a variable"),
    "no name": (function([3, RELU]), "3 is no name of a variable"),
    "twice": (function(["x", RELU]), "'x' is defined twice"),
    "parameter": (function(parameters=["x"]), "a parameter has a name, a kind and a default"),
    "kind": (function(parameters=[{"name": "x", "kind": "="}]), "a parameter is of kind '='"),
    "default of many": (function(parameters=[{"name": "x", "kind": "*", "default": 1}]), r"a parameter is of kind '\*'"),
    "order": (function(parameters=[{"name": "x", "kind": "*"}, {"name": "y"}]), "in no order that Python takes"),
    "defaults": (function(parameters=[{"name": "x", "default": 1}, {"name": "y"}]), "without a default follows"),
    "default": (function(parameters=[{"name": "x", "default": {"self": "a.weight"}}]), "the default of a parameter is"),
    "default list": (function(parameters=[{"name": "x", "default": []}]), "the default of a parameter is"),
    "undefined": (function(["y", call("aten.relu.default", {"name": "z"})]), "'z' is used and not defined"),
    "later": (function(["y", {"name": "z"}], ["z", RELU]), "'z' is used and not defined"),
    "not held": (function(["y", {"self": "b.weight"}]), "'b.weight' is no tensor of the module"),
    "attribute": (function(["y", {"self": "forward.__globals__"}]), "is no tensor of the module"),
    "graph": (function(["y", {"graph": "f"}]), "'f' is no function"),
    "kind of expression": (function(["y", {"eval": "1"}]), "there is no expression of the kind"),
    "two kinds": (function(["y", {"name": "x", "self": "a.weight"}]), "there is no expression of the kind"),
    "no expression": (function(result={}), "there is no expression of the kind"),
    "deep": (function(result=deep(40)), "nested deeper than 30"),
    "call": (function(["y", {"call": "aten.relu.default", "code": 1}]), "a call has a name, args and kwargs"),
    "call of 3": (function(["y", {"call": 3}]), "a call has a name, args and kwargs"),
    "kwargs": (function(["y", {"call": "aten.relu.default", "args": [X], "kwargs": []}]), "kwargs is a table"),
    "strange op": (function(["y", call("os.system.default", "id")]), "calls os.system, which is not among the ops"),
    "file": (function(["y", call("aten.from_file.default", "/etc/passwd")]), "calls aten.from_file, which is not"),
    "other namespace": (function(["y", call("profiler.relu.default", X)]), "calls profiler.relu, which is not"),
    "no overload": (function(["y", call("aten.relu.nothing", X)]), "there is no op aten.relu.nothing in this process"),
    "not an op": (function(["y", call("aten.relu.__class__", X)]), "aten.relu.__class__ is no op"),
    "no op name": (function(["y", call("__import__('os').system", X)]), "is no name of an op"),
    "too many": (function(["y", call("aten.relu.default", X, X)]), "aten.relu.default does not take these arguments"),
    "unknown argument": (function(["y", call("aten.relu.default", X, code=1)]), "does not take these arguments"),
    "given twice": (function(["y", call("aten.relu.default", X, self=X)]), "does not take these arguments"),
    "higher": (function(["y", call("higher_order.cond", X)]), "'higher_order.cond', which it may not"),
    "higher without": (function(["y", call("higher_order.wrap_with_autocast", X)]), "which it may not"),
    "function to an op": (
        {**function(["y", call("aten.relu.default", {"graph": "f"})]), "f": function()[""]},
        "'aten.relu.default' takes no function",
    ),
    "count": (function(["y", call("add", X)]), "'add' takes 2 arguments"),
    "of a number": (function(["y", call("item", 3, 0)]), "'item' is asked of 3, which is no result"),
    "dict": (function(result={"dict": [["a"]]}), "a dict is a list of keys and values"),
    "slice": (function(result={"slice": [1]}), "a slice has three parts"),
    "device": (function(result={"device": "cpu'); import os; ('"}), "is no device"),
    "dtype": (function(result={"dtype": "load"}), "'load' is no dtype"),
    "layout": (function(result={"layout": []}), "is no layout"),
    "float": (function(result={"float": "1"}), "'1' is no number"),
    "complex": (function(result={"complex": [1, "2"]}), "a complex number has two parts"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_more_than_calls_is_refused(case):
    functions, match = REFUSED[case]
    with pytest.raises(gp.ArtefactError, match=match):
        code.checked(functions, HELD, where="it")


def test_the_checker_lets_calls_through():
    functions = function(
        ["y", RELU], ["z", {"self": "a.weight"}], ["t", {"self": "training"}], result=[X, {"tuple": [X]}]
    )
    assert code.checked(functions, HELD, where="it") is functions


def test_ops_that_take_more_than_data_are_refused_though_they_have_a_rule(monkeypatch):
    monkeypatch.setattr(code.ops, "RULES", gp.RULES | gp.op("set", "*s -> *s"))
    with pytest.raises(gp.ArtefactError, match=r"calls aten.set.source_Storage, which takes more than data as source"):
        code.allowed("aten.set.source_Storage")


def test_ops_of_the_rules_exist_or_belong_to_packages():
    names = [f"aten.{name}" for name in ("relu", "conv2d", "linear", "batch_norm", "layer_norm", "softmax")]
    overloads = ("default", "int")
    assert all(any(hasattr(getattr(torch.ops.aten, n.split(".")[1]), o) for o in overloads) for n in names)
    assert all(code.allowed(f"{n}.default") for n in names[:-1])
