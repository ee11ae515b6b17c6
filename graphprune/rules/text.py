"""The one-line rule language, in the manner of einops.

    op("conv2d", "b (g i) *x!, (g o) i *k!, (g o)? -> b (g o) *y!", macs="b g i o *k *y", g="groups", zero="a*b + c")

    name    an index set; the same name is the same index set
    (a b)   product, row-major        [a b]   sum, one after the other
    *s      any number of dims, aligned at the right; a single position couples nothing
    x!      positions matter, the index set stays whole
    x~      summed out
    ...?    at the end of an operand: it may be absent

A keyword binds a name to an argument of the op: its size is read from there when coupling and written back when
rewriting. `zero` says when a removed position holds zeros in the zeroed original: a sum of products of the operands
a, b, c, ..; the output is zero where every term has a factor that is. `1` is a term that never is, an absent operand
counts as 0, and as 1 if its letter carries `?`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphprune.axes import Atom, Axis, Prod, Sum
from graphprune.errors import RuleError
from graphprune.rules.call import Call, Dims, operand_values
from graphprune.rules.grammar import (
    Factor,
    Formula,
    Key,
    Name,
    Nest,
    Operand,
    Spread,
    Token,
    count,
    flat,
    formula,
    names,
    operands,
)


@dataclass(frozen=True)
class TextRule:
    """A parsed rule; calling it applies it to one op call.

    Attributes:
        text: the pattern as written.
        inputs, outputs: its operands.
        arguments: argument name per letter.
        statistics: letters over which the op takes statistics.
        macs: products of letter sizes that add up to the op's multiply-adds.
        zero: when outputs are zero at removed positions.
        summand: the same for what is summed over a letter that does not reach the output.
        fixed: arguments whose default depends on a letter: argument to (letter, value as a function of its size).
    """

    text: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    arguments: Mapping[str, str]
    statistics: tuple[Name, ...]
    macs: tuple[tuple[Name, ...], ...]
    zero: Formula
    summand: Formula
    fixed: Mapping[str, tuple[str, Any]]

    @functools.cached_property
    def whole(self) -> dict[str, Name]:
        """The names whose positions matter, by letter."""
        return {n.letter: n for o in (*self.inputs, *self.outputs) for n in flat(o.tokens) if n.mark == "!"}

    def __call__(self, call: Call, /, **sizes: int) -> Sequence[Dims]:
        """State what the pattern ties in this call; `sizes` gives letters that no single dim shows."""
        return _Match(self, call, sizes).apply()


def rule(
    text: str,
    *,
    statistics: str = "",
    macs: str = "",
    zero: str = "1",
    summand: str | None = None,
    fixed: Mapping[str, tuple[str, Any]] | None = None,
    checked: bool = True,
    **arguments: str,
) -> TextRule:
    """Parse one line of the rule language.

    Args:
        text: the pattern, `operands -> outputs`.
        statistics: letters over which the op takes statistics, so that removing one is not exact.
        macs: letters whose sizes multiply to the multiply-adds of the op; several products are joined by `+`.
        zero: when a removed position of an output holds zeros, see the top of this file.
        summand: the same for what is summed over a letter that is in no output; default `zero`.
        fixed: argument to (letter, function of its size): a default to be stated once the letter's width changes.
        checked: refuse a letter that is used once and carries no mark.
        arguments: letter = name of the op's argument that holds its size.
    Raises:
        RuleError: the text is malformed; the message quotes it and says what to change.

    Example:
        >>> rule("*b i, o i, o? -> *b o", macs="*b i o", zero="a*b + c").inputs[2].optional
        True
    """
    left, arrow, right = text.partition("->")
    if not arrow or "->" in right:
        raise RuleError(f"{text!r}: a rule has one '->' between operands and outputs")
    inputs = operands(left, text)
    outputs = operands(right, text)
    counted = count(inputs + outputs)
    for letter, (uses, marked) in counted.items():
        if checked and uses == 1 and not marked:
            raise RuleError(
                f"{text!r}: {letter!r} is used once; mark it {letter}! (positions matter) or {letter}~ (summed)"
            )
    for letter in arguments:
        if letter not in counted:
            raise RuleError(f"{text!r}: {letter}={arguments[letter]!r} names a letter that the pattern does not have")
    products = tuple(tuple(names(product, text)) for product in macs.split("+") if product.strip())
    for name in (*names(statistics, text), *(n for product in products for n in product)):
        if name.letter not in counted:
            raise RuleError(f"{text!r}: {name.letter!r} in statistics or macs is not in the pattern")
    return TextRule(
        text=text,
        inputs=inputs,
        outputs=outputs,
        arguments=dict(arguments),
        statistics=tuple(names(statistics, text)),
        macs=products,
        zero=formula(zero, len(inputs), text),
        summand=formula(zero if summand is None else summand, len(inputs), text),
        fixed=dict(fixed or {}),
    )


# -- applying ----------------------------------------------------------------------------------------------------


class _Match:
    """One application of a rule: letters found so far, and where they occur."""

    def __init__(self, rule: TextRule, call: Call, sizes: Mapping[str, int]) -> None:
        self.rule, self.call = rule, call
        operands = operand_values(call.node)
        self.values, self.first_output = operands[: len(rule.inputs)], len(operands)
        self.found: dict[Key, Axis] = {}
        self.rank: dict[str, int] = {}
        self.places: dict[Key, list[tuple[int, int]]] = {}
        self.written: list[list[list[Key]]] = []
        self.given: dict[str, int] = dict(sizes)
        for letter, argument in rule.arguments.items():
            value = call[argument]
            if isinstance(value, (list, tuple)):
                self.rank[letter] = len(value)
            elif isinstance(value, int):
                self.given[letter] = value

    def apply(self) -> list[Dims]:
        """State everything the pattern says of this call; return the axes of its outputs.

        Raises:
            RuleError: the pattern does not fit.
        """
        rule, call = self.rule, self.call
        for position, (operand, value) in enumerate(zip(rule.inputs, self.values, strict=False)):
            if value is not None:
                self._read(operand, call.dims(value), position)
            elif not operand.optional and call[_nth(call, position)] is None:
                raise RuleError(f"operand {position} of {rule.text!r} is absent in {call.node}")
        outputs = [
            self._write(operand, value.shape, self.first_output + i)
            for i, (operand, value) in enumerate(zip(rule.outputs, call.node.outputs, strict=False))
        ]
        self._state()
        terms = self._present(rule.zero)
        call.zero = [
            tuple(i == 0 and axis.size > 1 and self._zero(keys, terms) for axis, keys in zip(dims, keyed, strict=True))
            for i, (dims, keyed) in enumerate(zip(outputs, self.written, strict=True))
        ]
        return outputs

    # -- operands

    def _spread(self, operand: Operand, rank: int) -> Spread:
        """One token per dim.

        Raises:
            RuleError: the number of dims does not fit.
        """
        known = tuple(self.rank.get(letter) for letter in operand.stars)
        if known == (None, None):
            raise RuleError(f"{self.rule.text!r}: cannot tell how many dims each *name has in {self.call.node}")
        found = operand.spread(rank, known)
        if found is None:
            raise RuleError(f"{self.rule.text!r} does not fit a tensor of {rank} dims in {self.call.node}")
        for letter, dims in zip(operand.stars, found[0], strict=True):
            self.rank.setdefault(letter, dims)
        return found[1]

    def _read(self, operand: Operand, dims: Dims, position: int) -> None:
        for d, ((token, k), axis) in enumerate(zip(self._spread(operand, len(dims)), dims, strict=True)):
            self._bind(token, k, axis, (position, d))

    def _bind(self, token: Token, k: int, axis: Axis, place: tuple[int, int]) -> None:
        """State that `axis` is what `token` says."""
        if isinstance(token, Name):
            key = (token.letter, k)
            if axis.size > 1:
                self.places.setdefault(key, []).append(place)
            held = self.found.get(key)
            self.found[key] = axis if held is None else self.call.unify(held, axis)
            return
        if axis.size == 1 and any(self.found.get(key, axis).size > 1 for key in token.keys):
            return
        parts = self._nest(token, axis.size)
        made: Axis = Sum(*parts) if token.total else Prod(*parts)
        wide = [p for p in parts if p.size != (0 if token.total else 1)]
        whole = len(wide) == 1 and wide[0].size == axis.size
        if whole and isinstance(wide[0], Atom) and self._fresh(token, wide[0]):
            self._rename(token, wide[0], axis)
        else:
            self.call.unify(axis, wide[0] if whole else made)
        if axis.size > 1:
            for key in token.keys:
                self.places.setdefault(key, []).append(place)

    def _fresh(self, token: Nest, atom: Axis) -> bool:
        """Whether `atom` was made for this very token, so that the dim's own axis can stand for it."""
        return any(self.found[key] is atom and key not in self.places for key in token.keys)

    def _rename(self, token: Nest, atom: Axis, axis: Axis) -> None:
        for key in token.keys:
            if self.found[key] is atom:
                self.found[key] = axis

    def _nest(self, token: Nest, size: int) -> list[Axis]:
        """The axes of the parts of a bracket whose size is known; one part may be unknown so far.

        Raises:
            RuleError: the sizes do not fit, or more than one is unknown.
        """
        sizes = [self._size(p) for p in token.parts]
        unknown = [i for i, s in enumerate(sizes) if s is None]
        rest = 0 if token.total else 1
        for s in sizes:
            if s is not None:
                rest = rest + s if token.total else rest * s
        if len(unknown) > 1:
            raise RuleError(f"{self.rule.text!r}: the sizes inside a bracket cannot be told in {self.call.node}")
        for i in unknown:
            sizes[i] = size - rest if token.total else size // max(rest, 1)
            rest = rest + (sizes[i] or 0) if token.total else rest * (sizes[i] or 0)
        if rest != size:
            raise RuleError(f"{self.rule.text!r} does not fit a dim of {size} in {self.call.node}")
        return [self._part(p, s or 0) for p, s in zip(token.parts, sizes, strict=True)]

    def _size(self, token: Token) -> int | None:
        if isinstance(token, Nest):
            sizes = [self._size(p) for p in token.parts]
            if any(s is None for s in sizes):
                return None
            out = 0 if token.total else 1
            for s in sizes:
                out = out + (s or 0) if token.total else out * (s or 0)
            return out
        if (token.letter, 0) in self.found:
            return self.found[(token.letter, 0)].size
        return self.given.get(token.letter)

    def _part(self, token: Token, size: int) -> Axis:
        if isinstance(token, Nest):
            parts = self._nest(token, size)
            return Sum(*parts) if token.total else Prod(*parts)
        return self.found.setdefault((token.letter, 0), Atom(size))

    # -- outputs

    def _write(self, operand: Operand, shape: tuple[int, ...], position: int) -> Dims:
        out: list[Axis] = []
        keyed: list[list[Key]] = []
        for d, ((token, k), size) in enumerate(zip(self._spread(operand, len(shape)), shape, strict=True)):
            if isinstance(token, Name):
                key = (token.letter, k)
                if key not in self.found:
                    self.found[key] = Atom(size)
                axis, keys = self.found[key], [key]
            else:
                parts = self._nest(token, size)
                wide = [p for p in parts if p.size != (0 if token.total else 1)]
                axis = wide[0] if len(wide) == 1 else Sum(*parts) if token.total else Prod(*parts)
                keys = list(token.keys)
            if axis.size != size:
                raise RuleError(
                    f"{self.rule.text!r} gives dim {d} the size {axis.size}, but it is {size} in {self.call.node}"
                )
            for key in keys:
                if size > 1:
                    self.places.setdefault(key, []).append((position, d))
            out.append(axis)
            keyed.append(keys)
        self.written.append(keyed)
        return tuple(out)

    # -- what follows from the letters

    def _axes(self, name: Name) -> list[Axis]:
        if not name.star:
            return [self.found.get((name.letter, 0), Atom(1))]
        return [self.found[(name.letter, k)] for k in range(self.rank.get(name.letter, 0))]

    def _state(self) -> None:
        """Pins, literals, statistics, multiply-adds and sums."""
        rule, call = self.rule, self.call
        for name in rule.whole.values():
            for axis in self._axes(name):
                call.pin(axis, f"its positions matter to {call.node.op}")
        for letter, argument in rule.arguments.items():
            if isinstance(call[argument], int):
                call.literal(self.found.get((letter, 0), Atom(self.given[letter])), argument)
            elif isinstance(call[argument], (list, tuple)):
                for k in range(self.rank[letter]):
                    call.literal(self.found[(letter, k)], argument, self.rank[letter] - 1 - k)
        for name in rule.statistics:
            call.renormalised.extend(a for a in self._axes(name) if a.size > 1)
        written = {key for keyed in self.written for keys in keyed for key in keys}
        letters = {letter for letter, _ in written}
        for product in rule.macs:
            made = [a for name in product if name.letter in letters for a in self._axes(name)]
            call.multiply(made, [a for name in product if name.letter not in letters for a in self._axes(name)])
        for argument, (letter, value) in rule.fixed.items():
            axis = self.found[(letter, 0)]
            if call[argument] is None:
                call.fix(argument, value(axis.size), axis)
        call.ties.extend(tuple(p) for key, p in self.places.items() if len(p) > 1 and self.found[key].size > 1)
        for key, axis in self.found.items():
            if key in written or key[0] in rule.whole or axis.size <= 1:
                continue
            terms = tuple(t for t in self._present(rule.summand) if any(self._has(f, key) for f in t))
            if not self._zero([key], terms):
                call.pin(axis, f"{call.node.op} sums over it, and its removed channels are not zero there")

    def _zero(self, keys: Sequence[Key], terms: Formula) -> bool:
        """Whether every one of `terms` has a factor that is zero at removed positions of each of `keys`."""
        for key in keys:
            if self.found[key].size > 1:
                zero = self._zero_operands(key)
                if not all(any(f.operand in zero for f in term) for term in terms):
                    return False
        return True

    def _zero_operands(self, key: Key) -> set[int]:
        """The operands that hold zeros at removed positions of a letter."""
        found = set()
        for position, d in self.places.get(key, ()):
            value = self.values[position] if position < len(self.values) else None
            if value is not None and self.call.zeros(value)[d]:
                found.add(position)
        return found

    def _present(self, formula: Formula) -> Formula:
        """The terms without those that are zero everywhere: an operand is absent that does not count as one."""
        return tuple(t for t in formula if all(f.neutral or not self._absent(f.operand) for f in t))

    def _absent(self, operand: int) -> bool:
        if operand >= len(self.values):
            return True
        return self.values[operand] is None and not self.call[_nth(self.call, operand)]

    def _has(self, factor: Factor, key: Key) -> bool:
        return any(position == factor.operand for position, _ in self.places.get(key, ()))


def _nth(call: Call, position: int) -> str:
    """Name of the `position`-th single-tensor argument."""
    return call.node.tensors[position] if position < len(call.node.tensors) else ""
