"""Forwards as plain data: the calls that a graph module or a graft makes, as JSON, with no code in it.

A *function* is a dict:

    parameters   [{"name": "x"}, {"name": "mask", "default": null}, {"name": "args", "kind": "*"}]
    steps        [["conv2d", {"call": "aten.conv2d.default", "args": [{"name": "x"}, {"self": "stem.weight"}]}], ...]
    result       an expression

and an *expression* is a number, a text, true, false, null, a list of expressions, or a dict of one of these kinds:

    {"name": ..}                        a parameter or the result of an earlier step
    {"self": ..}                        a tensor of the module by its path, or its flag `training`
    {"graph": ..}                       another function, for the few ops that run one
    {"call": .., "args": .., "kwargs": ..}   an op of torch, or a function of the table in `ops`
    {"tuple": ..} {"dict": ..} {"slice": ..} {"dtype": ..} {"layout": ..} {"memory_format": ..} {"device": ..}
    {"float": "inf"} {"complex": ..}    what JSON has no number for

`from_graph` and `from_source` read such data off what the emitters make; `to_graph` and `to_source` make it anew. Data
from a file goes through `checked` first: only names of the module's own tensors and ops of a list get through.
"""

from graphprune.code.check import checked
from graphprune.code.fx import from_graph, to_graph
from graphprune.code.ops import allowed
from graphprune.code.read import from_source
from graphprune.code.write import to_source

__all__ = ["allowed", "checked", "from_graph", "from_source", "to_graph", "to_source"]
