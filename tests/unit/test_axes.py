"""The algebra on its own: what unification promises, whatever the facts and their order."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphprune.axes import Atom, Axes, Pin, Prod, Sum

# -- worlds: one index set of a given size, written in several ways ------------------------------------------------


@st.composite
def factorings(draw, size):
    """Ways to write `size` as a product, in any order."""
    out = []
    while size > 1 and len(out) < 2:
        out.append(draw(st.sampled_from([d for d in range(2, size + 1) if size % d == 0])))
        size //= out[-1]
    return [*out, size] if size > 1 else out


@st.composite
def expressions(draw, size, depth=2):
    """A random expression of `size` positions over fresh atoms."""
    kind = draw(st.sampled_from(["atom", "prod", "sum"])) if depth and size > 1 else "atom"
    if kind == "prod":
        return Prod(*[draw(expressions(f, depth - 1)) for f in draw(factorings(size))])
    if kind == "sum":
        at = draw(st.integers(1, size - 1))
        return Sum(draw(expressions(at, depth - 1)), draw(expressions(size - at, depth - 1)))
    return Atom(size)


@st.composite
def facts(draw):
    """Equations among a few expressions of one size, and between inner atoms of equal size."""
    size = draw(st.sampled_from([6, 8, 12, 24, 30]))
    written = [draw(expressions(size)) for _ in range(draw(st.integers(2, 4)))]
    equations = [(written[0], other) for other in written[1:]]
    atoms = [a for w in written for a in Axes().leaves(w)]
    for a in atoms:
        peers = [b for b in atoms if b is not a and b.size == a.size]
        if peers and draw(st.booleans()):
            equations.append((a, draw(st.sampled_from(peers))))
    return equations


def solved(equations):
    axes = Axes()
    for a, b in equations:
        axes.unify(a, b, "here")
    axes.settle()
    return axes


def numbered(axes, tops):
    """The free atoms of some axes, and a common numbering of their positions."""
    atoms = list(dict.fromkeys(leaf for top in tops for leaf in axes.leaves(top) if axes.pin_of(leaf) is None))
    starts = np.cumsum([0, *(a.size for a in atoms)])
    return atoms, dict(zip(atoms, starts.tolist(), strict=False))


def picture(axes, tops):
    """Per position of each top, the free positions that decide it, each named by all the places it decides.

    Equal for equal solutions, however the atoms came about.
    """
    _, first = numbered(axes, tops)
    decides = {}
    for row, top in enumerate(tops):
        for p, number in zip(*(a.tolist() for a in axes.places(top, first)), strict=True):
            decides.setdefault(number, set()).add((row, p))
    rows = [[set() for _ in range(top.size)] for top in tops]
    for places in decides.values():
        for row, p in places:
            rows[row][p].add(frozenset(places))
    return rows


@settings(max_examples=400, deadline=None)
@given(facts(), st.randoms(use_true_random=False))
def test_the_result_does_not_depend_on_the_order_of_the_facts(equations, random):
    tops = [side for equation in equations for side in equation]
    first = picture(solved(equations), tops)
    shuffled = [(b, a) if random.random() < 0.5 else (a, b) for a, b in equations]
    random.shuffle(shuffled)
    assert picture(solved(shuffled), tops) == first


@settings(max_examples=300, deadline=None)
@given(facts(), st.integers(0, 2**32 - 1))
def test_masks_of_unified_axes_are_equal_for_every_keep(equations, seed):
    axes, rng = solved(equations), np.random.default_rng(seed)
    tops = [side for equation in equations for side in equation]
    free = {leaf for top in tops for leaf in axes.leaves(top) if axes.pin_of(leaf) is None}
    keep = {leaf: rng.random(leaf.size) < 0.6 for leaf in free}
    for a, b in equations:
        assert axes.mask(a, keep).shape == (a.size,)
        assert np.array_equal(axes.mask(a, keep), axes.mask(b, keep))


@settings(max_examples=300, deadline=None)
@given(facts(), st.integers(0, 2**32 - 1))
def test_width_counts_what_the_mask_keeps(equations, seed):
    axes, rng = solved(equations), np.random.default_rng(seed)
    top = equations[0][0]
    keep = {leaf: rng.random(leaf.size) < 0.6 for leaf in axes.leaves(top) if axes.pin_of(leaf) is None}
    widths = {leaf: int(mask.sum()) for leaf, mask in keep.items()}
    _, at = np.unique(axes.places(top, numbered(axes, [top])[1])[1], return_counts=True)
    if at.size == 0 or at.max() == 1:  # an atom beside itself in a product keeps the diagonal of a square
        assert axes.width(top, widths) == axes.mask(top, keep).sum()


@settings(max_examples=300, deadline=None)
@given(facts())
def test_unification_never_changes_a_size(equations):
    tops = [side for equation in equations for side in equation]
    before = [top.size for top in tops]
    axes = solved(equations)
    assert [axes.width(top, {}) for top in tops] == before
    assert [len(axes.mask(top, {})) for top in tops] == before


@settings(max_examples=200, deadline=None)
@given(facts())
def test_a_pin_reaches_every_atom_of_what_it_pins_and_of_what_that_equals(equations):
    a, b = equations[0]
    axes = Axes()
    axes.pin(a, Pin("asked for"))
    for left, right in equations:
        axes.unify(left, right)
    axes.settle()
    assert all(axes.pin_of(leaf) is not None for leaf in [*axes.leaves(a), *axes.leaves(b)])


# -- the cases by name ---------------------------------------------------------------------------------------------


def masked(axes, axis, keep):
    return np.flatnonzero(axes.mask(axis, keep)).tolist()


def test_a_larger_factor_splits_when_the_smaller_divides_it():
    axes, twelve, three, four = Axes(), Atom(12), Atom(3), Atom(4)
    axes.unify(Prod(twelve, Atom(5)), Prod(three, four, Atom(5)))
    axes.settle()
    assert axes.leaves(twelve) == [three, four]
    assert masked(axes, twelve, keep={three: np.array([True, False, True])}) == [0, 1, 2, 3, 8, 9, 10, 11]


def test_factors_that_interleave_are_refined_to_common_ones():
    axes, left, right = Axes(), Prod(Atom(2), Atom(6)), Prod(Atom(4), Atom(3))
    axes.unify(left, right)
    axes.settle()
    assert axes.describe(left) == axes.describe(right) == "2 x 2 x 3"
    assert [axes.pin_of(a) for a in axes.leaves(left)] == [None] * 3


def test_concatenation_meeting_concatenation_cuts_the_longer_term():
    axes, eight, six, three = Axes(), Atom(8), Atom(6), Atom(3)
    axes.unify(Sum(eight, three), Sum(Atom(5), six))
    axes.settle()
    assert axes.describe(eight) == "5 + 3"
    assert axes.describe(six) == "3 + 3"


def test_groups_meeting_concatenation_split_where_it_is_aligned():
    axes, groups, inner = Axes(), Atom(6), Atom(4)
    axes.unify(Prod(groups, inner), Sum(Atom(8), Atom(16)))
    axes.settle()
    assert axes.describe(groups) == "2 + 4"
    assert axes.pin_of(inner) is None


@pytest.mark.parametrize(
    ("left", "right", "text"),
    [
        (lambda: Prod(Atom(3), Atom(4)), lambda: Prod(Atom(4), Atom(3)), "3 x 4 does not line up with 4 x 3"),
        (lambda: Prod(Atom(3), Atom(4)), lambda: Sum(Atom(5), Atom(7)), "3 x 4 does not line up with 5 + 7"),
        (lambda: Prod(Atom(6), Atom(35)), lambda: Prod(Atom(10), Atom(21)), "6 x 35 does not line up with 10 x 21"),
    ],
)
def test_misaligned_axes_are_pinned_whole_with_the_reason_and_never_raise(left, right, text):
    a, b = left(), right()
    axes = solved([(a, b)])
    pins = [axes.pin_of(leaf) for leaf in [*axes.leaves(a), *axes.leaves(b)]]
    assert len(pins) == 4
    assert {str(pin) for pin in pins} == {f"{text}, at here"}


def test_only_the_misaligned_stretch_is_pinned():
    axes, free, three = Axes(), Atom(10), Atom(7)
    axes.unify(Sum(free, Prod(Atom(3), Atom(4)), three), Sum(Atom(10), Prod(Atom(4), Atom(3)), Atom(7)))
    axes.settle()
    assert axes.pin_of(axes.leaves(free)[0]) is None
    assert axes.pin_of(axes.leaves(three)[0]) is None


def test_a_misalignment_is_forgiven_once_another_fact_aligns_it():
    axes, whole, rest = Axes(), Atom(6), Atom(5)
    outer, inner = Atom(2), Atom(3)
    axes.unify(whole, Prod(outer, inner))
    axes.unify(whole, Sum(Atom(1), rest))
    axes.unify(rest, Sum(Atom(2), Atom(3)))
    axes.settle()
    assert axes.describe(inner) == "1 + 2"
    assert [axes.pin_of(a) for a in axes.leaves(whole)] == [None]


def test_single_positions_couple_nothing():
    axes, one, other = Axes(), Atom(1), Atom(1)
    axes.unify(one, other)
    axes.settle()
    assert axes.leaves(one) == []
    assert axes.find(one) is not axes.find(other)


def test_axes_of_different_size_are_an_error_of_the_caller():
    with pytest.raises(ValueError, match="cannot unify axes of sizes 3 and 4"):
        Axes().unify(Atom(3), Atom(4))


def test_a_position_of_a_product_stays_only_if_both_factors_keep_theirs():
    axes, heads, dim = Axes(), Atom(2), Atom(3)
    keep = {heads: np.array([True, False]), dim: np.array([False, True, True])}
    assert axes.mask(Prod(heads, dim), keep).tolist() == [False, True, True, False, False, False]


def test_widths_may_be_symbols_and_give_the_polynomial():
    sympy = pytest.importorskip("sympy")
    axes, a, b = Axes(), Atom(5), Atom(7)
    x, y = sympy.symbols("x y")
    polynomial = axes.width(Sum(Prod(a, b), Prod(Atom(2), a)), {a: x, b: y})
    assert sympy.expand(polynomial - (x * y + 2 * x)) == 0


def test_places_name_every_occurrence_of_an_atom():
    axes, a, b = Axes(), Atom(2), Atom(3)
    at, which = axes.places(Sum(Prod(a, b), b, Atom(4)), {a: 10, b: 20})
    assert list(zip(at.tolist(), which.tolist(), strict=True)) == [
        *((0, 10), (1, 10), (2, 10), (3, 11), (4, 11), (5, 11)),
        *((0, 20), (1, 21), (2, 22), (3, 20), (4, 21), (5, 22)),
        *((6, 20), (7, 21), (8, 22)),
    ]


@settings(max_examples=200, deadline=None)
@given(facts(), st.integers(0, 2**32 - 1))
def test_places_and_masks_tell_the_same_story(equations, seed):
    axes, rng = solved(equations), np.random.default_rng(seed)
    top = equations[0][0]
    keep = {leaf: rng.random(leaf.size) < 0.6 for leaf in axes.leaves(top) if axes.pin_of(leaf) is None}
    atoms, first = numbered(axes, [top])
    joint = np.concatenate([keep[a] for a in atoms] or [np.ones(0, dtype=bool)])
    stays = np.ones(top.size, dtype=bool)
    at, which = axes.places(top, first)
    stays[at[~joint[which]]] = False
    assert np.array_equal(stays, axes.mask(top, keep))


def test_nesting_as_deep_as_a_long_network_is_no_problem():
    axes = Axes()
    axis = Atom(2)
    for _ in range(3000):
        axis = Sum(axis, Atom(2))
    flat = Atom(axis.size)
    axes.unify(flat, axis)
    axes.unify(flat, Sum(*(Atom(2) for _ in range(3001))))
    axes.settle()
    assert len(axes.leaves(flat)) == 3001
    assert axes.width(flat, {}) == 6002 == len(axes.mask(flat, {}))
    assert math.prod(p.size for p in axes.factors(axis)) == 6002
