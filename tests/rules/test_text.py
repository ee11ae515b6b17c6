"""The rule language: what it reads, and the message for everything it refuses."""

from __future__ import annotations

import pytest
import torch

import graphprune as gp
from graphprune.axes import Atom, Axes
from graphprune.rules import RULES, Call, find, function, op, table
from graphprune.rules.text import rule
from tests.rules.case import signed
from tests.rules.commute import node_of

aten = torch.ops.aten

MALFORMED = {
    "b c, c b": "has one '->' between operands and outputs",
    "b c -> b c -> b c": "has one '->' between operands and outputs",
    "b c -> b": "'c' is used once; mark it c! (positions matter) or c~ (summed)",
    "b (g c -> b (g c)": "a bracket is not closed, ')' is missing",
    "b g c) -> b g c": "')' closes nothing",
    "b (g c] -> b (g c)": "']' closes nothing",
    "b C -> b C": "cannot read 'b C'; names are lower case, marks are ! ~ and ?",
    "b c? d -> b c d": "cannot read 'b c? d'",
    "*a *b *c -> *a *b *c": "an operand can have two *names at the most",
}


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_rules_are_refused_when_they_are_written(text):
    with pytest.raises(gp.RuleError) as caught:
        rule(text)
    assert MALFORMED[text] in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"g": "groups"}, "g='groups' names a letter that the pattern does not have"),
        ({"macs": "b q"}, "'q' in statistics or macs is not in the pattern"),
        ({"statistics": "q"}, "'q' in statistics or macs is not in the pattern"),
        ({"zero": "a*z"}, "zero='a\\*z' names operand 'z'; they are a, b, c"),
    ],
)
def test_options_that_do_not_fit_the_pattern_are_refused(options, match):
    with pytest.raises(gp.RuleError, match=match):
        rule("b c -> b c", **options)


def test_two_rules_for_one_op_are_refused():
    with pytest.raises(gp.RuleError, match=r"op 'relu' has two rules; remove one, or override it with RULES \| op"):
        table(op("relu gelu", "*s -> *s"), op("tanh relu", "*s -> *s"))
    with pytest.raises(gp.RuleError, match="give each op one name"):
        op("relu relu", "*s -> *s")


def test_functions_of_a_module_join_a_table():
    @function("one two")
    def made(call):
        return [call.dims(call.first)]

    assert table(op("three", "*s -> *s"), module={"made": made, "other": 3}).keys() == {"one", "two", "three"}


def test_in_place_ops_are_found_under_the_plain_name():
    assert find(RULES, "relu_") is RULES["relu"]
    assert find(RULES, "no_such_op_") is None


def test_the_table_cannot_be_changed_but_extended():
    with pytest.raises(TypeError):
        RULES["relu"] = None  # type: ignore[index]
    assert "mine" in (RULES | op("mine", "*s -> *s"))


def applied(text, overload, *args, **options):
    node, held = node_of(overload, args, {})
    axes = Axes()
    dims = {v: tuple(Atom(size) for size in t.shape) for v, t in held.items()}
    call = Call(node, axes, dims, {v: (True,) * len(t.shape) for v, t in held.items()})
    return axes, list(dims.values()), call, rule(text, **options)(call)


def test_a_product_ties_each_factor():
    text = "b (g c) *s -> b (c g) *s"
    axes, (x,), _, (out,) = applied(text, aten.channel_shuffle.default, signed(1, 6, 1, 1), 2, g="groups")
    assert axes.describe(x[1]) == "2 x 3"
    assert axes.describe(out[1]) == "3 x 2"
    assert axes.leaves(x[1]) == axes.leaves(out[1])[::-1]


def test_a_sum_ties_each_term():
    axes, (a, b), _, (out,) = applied("b x, b y -> b [x y]", aten.hstack.default, [signed(2, 3), signed(2, 5)])
    axes.settle()
    assert axes.describe(out[1]) == "3 + 5"
    assert axes.leaves(out[1]) == [a[1], b[1]]
    assert axes.find(a[0]) is axes.find(b[0])


@pytest.mark.parametrize(
    ("text", "args", "match"),
    [
        ("b c d -> b c d", (signed(2, 3),), "does not fit a tensor of 2 dims"),
        ("b (c d e) -> b (c d e)", (signed(2, 12),), "the sizes inside a bracket cannot be told"),
        ("b c -> c b", (signed(2, 3),), "gives dim 0 the size 3, but it is 2"),
        ("*a *b -> *a *b", (signed(2, 3),), r"cannot tell how many dims each \*name has"),
    ],
)
def test_a_rule_that_does_not_fit_its_call_is_refused(text, args, match):
    with pytest.raises(gp.RuleError, match=match):
        applied(text, aten.relu.default, *args)


def test_an_operand_that_must_be_there_is_missed():
    with pytest.raises(gp.RuleError, match=r"operand 2 of .* is absent in linear"):
        applied("*b i, o i, o -> *b o", aten.linear.default, signed(2, 3), signed(5, 3))


def test_a_misfitting_rule_pins_and_is_reported_with_its_reason():
    model = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    rules = gp.RULES | gp.op("relu", "a b c -> a b c")
    coupling = gp.couple(gp.trace(model, torch.rand(4, 3)), rules=rules)
    assert coupling.groups == ()
    assert "'a b c -> a b c' does not fit a tensor of 2 dims in relu in 1" in coupling.unknown[0].why
