"""The grammar of the rule language: what a line of it is made of, and how it is read."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from graphprune.errors import RuleError

Mark = Literal["", "!", "~"]
Key: TypeAlias = tuple[str, int]
"""A name and, for `*names`, the position from the right."""


@dataclass(frozen=True)
class Name:
    """One name of a pattern; `star` stands for any number of dims."""

    letter: str
    mark: Mark = ""
    star: bool = False


@dataclass(frozen=True)
class Nest:
    """Names in round brackets (a product) or square brackets (a sum): one dim."""

    parts: tuple[Name | Nest, ...]
    total: bool

    @functools.cached_property
    def keys(self) -> tuple[Key, ...]:
        """What the names inside are found by."""
        return tuple((n.letter, 0) for n in flat(self.parts))


Token: TypeAlias = Name | Nest
Spread: TypeAlias = tuple[tuple[Token, int], ...]
"""One token per dim, with the position from the right inside a *name (0 for the others)."""


@dataclass(frozen=True)
class Operand:
    """The dims of one tensor."""

    tokens: tuple[Token, ...]
    optional: bool = False

    @functools.cached_property
    def stars(self) -> tuple[str, ...]:
        """The letters of its *names."""
        return tuple(t.letter for t in self.tokens if isinstance(t, Name) and t.star)

    def spread(self, rank: int, known: tuple[int | None, ...]) -> tuple[tuple[int, ...], Spread] | None:
        """How many dims each *name has in a tensor of `rank` dims, and the token of each dim; None if they do not fit.

        Args:
            rank: of the tensor.
            known: how many dims each of `stars` has elsewhere; of two of them, one may be None.
        """
        if (rank, known) not in self._spreads:
            self._spreads[rank, known] = self._spread(rank, known)
        return self._spreads[rank, known]

    @functools.cached_property
    def _spreads(self) -> dict[Any, tuple[tuple[int, ...], Spread] | None]:
        return {}

    def _spread(self, rank: int, known: tuple[int | None, ...]) -> tuple[tuple[int, ...], Spread] | None:
        free = rank - (len(self.tokens) - len(self.stars))
        counts = (free,) * len(known)  # of one *name, whatever it is elsewhere
        if len(known) == 2:
            first = free - (known[1] or 0) if known[0] is None else known[0]
            counts = first, free - first
        if free < 0 or (not counts and free) or any(c < 0 for c in counts):
            return None
        left, out = iter(counts), []
        for token in self.tokens:
            n = next(left) if isinstance(token, Name) and token.star else 1
            out += [(token, n - 1 - k) for k in range(n)]
        return counts, tuple(out)


@dataclass(frozen=True)
class Factor:
    """An operand inside a `zero` formula; `neutral` makes an absent one count as 1 instead of 0."""

    operand: int
    neutral: bool


Formula: TypeAlias = tuple[tuple[Factor, ...], ...]

_TOKEN = re.compile(r"\*?[a-z][a-z0-9_]*[!~]?|[()\[\]]")


def operands(side: str, text: str) -> tuple[Operand, ...]:
    """One side of a rule: its operands, separated by commas.

    Args:
        side: the part to read.
        text: the whole rule, quoted in errors.
    Raises:
        RuleError: it is malformed.
    """
    return tuple(_operand(part.strip(), text) for part in side.split(","))


def _operand(part: str, text: str) -> Operand:
    optional = part.endswith("?")
    tokens, rest = _tokens(_lex(part.removesuffix("?"), text), text, closing=None)
    assert not rest, rest
    if sum(isinstance(t, Name) and t.star for t in tokens) > 2:
        raise RuleError(f"{text!r}: an operand can have two *names at the most")
    return Operand(tokens, optional)


def _lex(part: str, text: str) -> list[str]:
    words = _TOKEN.findall(part)
    if "".join(words) != re.sub(r"\s", "", part):
        raise RuleError(f"{text!r}: cannot read {part.strip()!r}; names are lower case, marks are ! ~ and ?")
    return words


def _tokens(words: list[str], text: str, closing: str | None) -> tuple[tuple[Token, ...], list[str]]:
    out: list[Token] = []
    while words:
        word, words = words[0], words[1:]
        if word in "([":
            parts, words = _tokens(words, text, closing=")" if word == "(" else "]")
            out.append(Nest(parts, total=word == "["))
        elif word in ")]":
            if word != closing:
                raise RuleError(f"{text!r}: {word!r} closes nothing")
            return tuple(out), words
        else:
            out.append(_name(word))
    if closing is not None:
        raise RuleError(f"{text!r}: a bracket is not closed, {closing!r} is missing")
    return tuple(out), []


def _name(word: str) -> Name:
    mark: Mark = "!" if word.endswith("!") else "~" if word.endswith("~") else ""
    return Name(word.strip("*!~"), mark, word.startswith("*"))


def names(words: str, text: str) -> list[Name]:
    """A plain list of names, as in `macs`."""
    return [_name(word) for word in _lex(words, text)]


def flat(tokens: Sequence[Token]) -> list[Name]:
    """Every name in these tokens, those in brackets too."""
    return [n for t in tokens for n in ([t] if isinstance(t, Name) else flat(t.parts))]


def count(operands: Sequence[Operand]) -> dict[str, tuple[int, bool]]:
    """How often each letter is used, and whether it carries a mark anywhere."""
    counted: dict[str, tuple[int, bool]] = {}
    for operand in operands:
        for name in flat(operand.tokens):
            uses, marked = counted.get(name.letter, (0, False))
            counted[name.letter] = (uses + 1, marked or name.mark != "")
    return counted


def formula(text: str, operands: int, rule_text: str) -> Formula:
    """`a*b? + c` as terms of factors; the term `1` has no factor, the empty text no term (always zero).

    Raises:
        RuleError: a factor is not one of the operands.
    """
    terms = []
    for term in filter(None, (t.strip() for t in text.split("+"))):
        factors = []
        for factor in (f.strip() for f in term.split("*")):
            if factor == "1":
                continue
            index = ord(factor[0]) - ord("a")
            if factor[1:] not in ("", "?") or not 0 <= index < operands:
                raise RuleError(f"{rule_text!r}: zero={text!r} names operand {factor!r}; they are a, b, c, ..")
            factors.append(Factor(index, factor.endswith("?")))
        terms.append(tuple(factors))
    return tuple(terms)
