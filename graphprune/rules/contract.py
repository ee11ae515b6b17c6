"""Ops that multiply and sum: convolutions, linear layers, matrix products, attention, embeddings of any kind."""

from __future__ import annotations

from collections.abc import Sequence

from graphprune.errors import RuleError
from graphprune.rules.call import Call, Dims
from graphprune.rules.registry import function, op, table
from graphprune.rules.text import rule


def _conv(space: str, taps: str, out: str) -> dict[str, str]:
    """Pattern texts of convolutions with these spatial letters."""

    def marked(letters: str) -> str:
        return " ".join(f"{letter}!" for letter in letters.split())

    return {
        "text": f"*b (g i) {marked(space)}, (g o) i {marked(taps)}, (g o)? -> *b (g o) {marked(out)}",
        "macs": f"*b g i o {taps} {out}",
    }


def _transposed(space: str, taps: str, out: str) -> dict[str, str]:
    plain = _conv(space, taps, out)
    return {
        "text": plain["text"].replace("(g o) i", "(g i) o"),
        "macs": f"*b g i o {taps} {space}",
    }


_SPACES = {1: ("x", "u", "p"), 2: ("x y", "u v", "p q"), 3: ("x y z", "u v w", "p q r")}

_MATMUL = {
    (1, 1): rule("k, k -> ", macs="k", zero="a*b"),
    (1, 2): rule("k, *b k n -> *b n", macs="*b k n", zero="a*b"),
    (2, 1): rule("*b m k, k -> *b m", macs="*b m k", zero="a*b"),
    (2, 2): rule("*b m k, *b k n -> *b m n", macs="*b m k n", zero="a*b"),
}

_SCALE = {"scale": ("e", lambda size: size**-0.5)}
_SDPA = rule(
    "*b l! e, *b s! e, *b s! f, *b l! s!? -> *b l! f",
    macs="*b l s e + *b l s f",
    zero="c",
    summand="a*b",
    fixed=_SCALE,
)
_GROUPED_QUERY = rule(
    "*b (h r) l! e, *b h s! e, *b h s! f, *b (h r) l! s!? -> *b (h r) l! f",
    macs="*b h r l s e + *b h r l s f",
    zero="c",
    summand="a*b",
    fixed=_SCALE,
)


@function("matmul")
def matmul(call: Call) -> Sequence[Dims]:
    """A matrix product; which one depends on the ranks."""
    left, right = (len(call.dims(v)) for v in call.node.values())
    return _MATMUL[min(left, 2), min(right, 2)](call)


_ADDED = {
    "addmm": ("m k, k n -> m n", "m n k"),
    "baddbmm": ("b m k, b k n -> b m n", "b m k n"),
    "addbmm": ("b m k, b k n -> m n", "b m k n"),
    "addmv": ("m k, k -> m", "m k"),
    "addr": ("m, n -> m n", "m n"),
}


@function("addmm baddbmm addbmm addmv addr")
def added(call: Call) -> Sequence[Dims]:
    """A matrix product on top of a tensor that is broadcast to it."""
    product, macs = _ADDED[call.node.op.removesuffix("_")]
    letters = product.partition("-> ")[2].split()
    start = " ".join(letters[len(letters) - len(call.dims(call["self"])) :])
    return rule(f"{start}, {product}", macs=macs, zero="a + b*c", summand="b*c")(call)


@function("scaled_dot_product_attention")
def attention(call: Call) -> Sequence[Dims]:
    """Attention; with `enable_gqa` each key/value head serves a run of query heads."""
    query, key, *_ = call.node.values()
    for axis in (a for v in (query, key) for a in call.dims(v)[:-1] if call["dropout_p"]):
        call.pin(axis, f"{call.node.op} draws for every weight of its dropout")
    heads, kept = query.shape[-3] if len(query.shape) > 3 else 1, key.shape[-3] if len(key.shape) > 3 else 1
    if call["enable_gqa"] and heads != kept:
        return _GROUPED_QUERY(call, h=kept)
    return _SDPA(call)


@function("embedding_bag")
def embedding_bag(call: Call) -> Sequence[Dims]:
    """Rows of a table, added, averaged or compared feature by feature; the rows stay whole."""
    rows, features = call.dims(call["weight"])
    for axis in (rows, *(a for v in call.node.values()[1:] for a in call.dims(v))):
        call.pin(axis, "embedding_bag looks up and divides its positions")
    bags, *others = (v.shape for v in call.node.outputs)
    wide = [tuple(features if n == features.size and k else call.pinned(n, "embedding_bag makes it")
                  for k, n in enumerate(shape)) for shape in others]  # fmt: skip
    call.zero = [(False, call.zeros(call["weight"])[1]), *(tuple(False for _ in shape) for shape in others)]
    return [(call.pinned(bags[0], "embedding_bag makes it"), features), *wide]


@function("_grouped_mm transformers.grouped_mm_fallback")
def grouped(call: Call) -> Sequence[Dims]:
    """Runs of rows, each multiplied by a matrix of its own (mixtures of experts); or a batch of products.

    Raises:
        RuleError: rows or columns are cut into runs in another way.
    """
    ranks = [len(call.dims(v)) for v in call.node.values()[:2]]
    if ranks == [3, 3] and call["offs"] is None:
        return _MATMUL[2, 2](call)
    if ranks != [2, 3]:
        raise RuleError(f"a grouped product of {ranks[0]} by {ranks[1]} dims has no rule, in {call.node}")
    return _RUNS_OF_ROWS(call)


_RUNS_OF_ROWS = rule("s! i, e! i o, e!?, o? -> s! o", macs="s i o", zero="a*b")


@function("einsum")
def einsum(call: Call) -> Sequence[Dims]:
    """The equation of an einsum is a rule."""
    equation = str(call["equation"]).replace(" ", "")
    if "->" not in equation:
        once = sorted({c for c in equation if c.isalpha() and equation.count(c) == 1})
        equation += "->" + ("..." if "..." in equation else "") + "".join(once)
    left, right = equation.split("->")
    names = {c: c if c.islower() else f"{c.lower()}0" for c in equation if c.isalpha()}

    def spell(part: str) -> str:
        return " ".join("*dots" if c == "." else names[c] for c in part.replace("...", "."))

    operands = [spell(part) for part in left.split(",")]
    product = "*".join(chr(ord("a") + i) for i in range(len(operands)))
    letters = dict.fromkeys(" ".join(operands).split())
    text = f"{', '.join(operands)} -> {spell(right)}"
    return rule(text, macs=" ".join(letters) if len(operands) > 1 else "", zero=product, checked=False)(call)


@function("convolution")
def convolution(call: Call) -> Sequence[Dims]:
    """The general form that other front ends may leave in a graph.

    Raises:
        RuleError: more than three spatial dims.
    """
    spaces = len(call.dims(call["weight"])) - 2
    if spaces not in _SPACES:
        raise RuleError(f"convolution over {spaces} spatial dims has no rule")
    pattern = (_transposed if call["transposed"] else _conv)(*_SPACES[spaces])
    return rule(pattern["text"], macs=pattern["macs"], zero="a*b + c", g="groups")(call)


CONTRACT = table(
    *(op(f"conv{n}d", **_conv(*letters), zero="a*b + c", g="groups") for n, letters in _SPACES.items()),
    *(op(f"conv_transpose{n}d", **_transposed(*letters), zero="a*b + c", g="groups") for n, letters in _SPACES.items()),
    op("linear", "*b i, o i, o? -> *b o", macs="*b i o", zero="a*b + c"),
    op("bilinear", "*b i, *b j, o i j, o? -> *b o", macs="*b i j o", zero="a*b*c + d"),
    op("mm", "m k, k n -> m n", macs="m k n", zero="a*b"),
    op("bmm", "b m k, b k n -> b m n", macs="b m k n", zero="a*b"),
    op("mv", "m k, k -> m", macs="m k", zero="a*b"),
    op("dot vdot", "k, k -> ", macs="k", zero="a*b"),
    op("outer ger", "m, n -> m n", zero="a*b"),
    op("embedding", "v! d, *i -> *i d", zero="a"),
    module=globals(),
)
