"""Every rule commutes with slicing; and the check that says so catches rules that are wrong."""

from __future__ import annotations

import pytest
import torch

from graphprune.rules import RULES, find, op
from tests.rules.case import c, ints, signed, t
from tests.rules.cases import CASES, STAND_INS, VALUELESS
from tests.rules.commute import CaughtWrong, check, node_of

aten = torch.ops.aten


@pytest.mark.parametrize("case", CASES, ids=[case.label for case in CASES])
def test_slicing_commutes_with_the_op(case):
    rule = find(RULES, case.name)
    assert rule is not None
    assert check(rule, case.op, case.args, case.kwargs) == case.free


def test_every_rule_is_held_to_the_property():
    held = {name for case in CASES for name in (case.name, case.name.removesuffix("_"))}
    assert set(RULES) - held - VALUELESS - set(STAND_INS) == set()
    assert all(RULES[name] is RULES[other] and other in held for name, other in STAND_INS.items())


def test_every_rule_names_an_op_that_exists():
    spaces = {name: name.rpartition(".") for name in RULES}
    assert [n for n, (s, _, leaf) in spaces.items() if not hasattr(getattr(torch.ops, s or "aten"), leaf)] == []


@pytest.mark.parametrize(
    ("made", "free"),
    [
        (aten.rand.default, 0),
        (aten.randn.default, 0),
        (aten.empty.memory_format, 2),
    ],
)
def test_ops_without_values_are_held_by_shape(made, free):
    from graphprune.axes import Axes
    from graphprune.rules import Call

    node, _ = node_of(made, ([2, 3],), {})
    axes = Axes()
    (dims,) = find(RULES, node.op)(Call(node, axes, {}, {}))
    axes.settle()
    assert tuple(a.size for a in dims) == (2, 3)
    assert sum(axes.pin_of(a) is None for a in dims) == free


WRONG = {
    "linear with the weight transposed": ("*b i, i o, o? -> *b o", {}, c(aten.linear.default, t(2, 5), t(5, 5), free=0)),
    "linear whose bias is forgotten": (
        "*b i, o i, o? -> *b o",
        {"zero": "a*b"},
        c(aten.linear.default, signed(2, 3, 5), signed(7, 5), signed(7), free=0),
    ),
    "grouped convolution without groups": (
        "b i *x!, o j! *k!, o? -> b o *y!",
        {"checked": False},
        c(aten.conv2d.default, signed(2, 6, 7, 5), signed(15, 2, 4, 3), signed(15), groups=3, free=0),
    ),
    "depthwise convolution whose groups are not written back": (
        "b g x! y!, g i! u! v!, g? -> b g p! q!",
        {"zero": "a*b + c"},
        c(aten.conv2d.default, signed(2, 6, 7, 5), signed(6, 1, 4, 3), None, groups=6, free=0),
    ),
    "softmax as if it were element-wise": ("*s -> *s", {}, c(aten.softmax.int, signed(2, 3, 5), 1, free=0)),
    "cumsum as if it were element-wise": ("*s -> *s", {}, c(aten.cumsum.default, signed(2, 3, 5), 1, free=0)),
    "roll as if it were element-wise": ("*s -> *s", {}, c(aten.roll.default, signed(2, 3), [1], [1], free=0)),
    "sigmoid as if it kept zeros": ("*s -> *s", {"zero": "a"}, c(aten.sigmoid.default, signed(2, 3), free=0)),
    "adding a number as if it kept zeros": ("*s -> *s", {"zero": "a"}, c(aten.add.Scalar, signed(2, 3), 1.0, free=0)),
    "reciprocal as if it were finite at zero": ("*s -> *s", {}, c(aten.reciprocal.default, t(2, 3), free=0)),
    "layer norm without its statistics": (
        "*b n, n?, n? -> *b n",
        {},
        c(aten.layer_norm.default, signed(2, 3, 5), [5], t(5), t(5), free=0),
    ),
    "layer norm whose shape is not written back": (
        "*b n!, n!?, n!? -> *b n!",
        {"zero": "a"},
        c(aten.layer_norm.default, signed(2, 3, 5), [5], t(5), t(5), free=0),
    ),
    "group norm over whole groups only": (
        "b (g c) *s, (g c)?, (g c)? -> b (g c) *s",
        {"g": "num_groups", "zero": "a*b? + c"},
        c(aten.group_norm.default, signed(2, 15, 7), 3, t(15), signed(15), free=0),
    ),
    "sum over channels that are not zero": ("b c~ *s -> b *s", {"zero": "a", "summand": ""}, c(aten.sum.dim_IntList, t(2, 3, 5), [1], free=0)),
    "mean as if it were a sum": ("b c~ *s -> b *s", {"zero": "a"}, c(aten.mean.dim, t(2, 3, 5), [1], free=0)),
    "maximum over channels": ("b c~ *s -> b *s", {"zero": "a"}, c(aten.amax.default, t(2, 3, 5) - 1, [1], free=0)),
    "embedding whose rows may go": ("v~ d, *i -> *i d", {"zero": "a"}, c(aten.embedding.default, signed(11, 5), ints(11, 2, 3), free=0)),
    "pooling whose positions may go": ("*b x~ y~ -> *b u! v!", {"zero": "a"}, c(aten.avg_pool2d.default, t(2, 3, 4, 6), [2], free=0)),
    "channel shuffle that does not shuffle": (
        "b (g c) *s -> b (g c) *s",
        {"g": "groups", "zero": "a"},
        c(aten.channel_shuffle.default, signed(2, 15, 4, 7), 3, free=0),
    ),
    "attention that forgets its scale": (
        "*b l! e, *b s! e, *b s! f, *b l! s!? -> *b l! f",
        {"zero": "c", "summand": "a*b"},
        c(aten.scaled_dot_product_attention.default, signed(2, 3, 5, 7), signed(2, 3, 4, 7), signed(2, 3, 4, 11), free=0),
    ),
    "pixel shuffle with the factors first": (
        "*b (r! s! c) x! y! -> *b c u! v!",
        {"r": "upscale_factor", "s": "upscale_factor", "zero": "a"},
        c(aten.pixel_shuffle.default, signed(2, 12, 3, 5), 2, free=0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_planted_wrong_rule_is_caught(name):
    text, options, case = WRONG[name]
    wrong = op(case.name, text, **options)[case.name]
    with pytest.raises((CaughtWrong, ValueError)):
        check(wrong, case.op, case.args, case.kwargs)
