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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from graphprune.axes import Atom, Axis, Prod, Sum
from graphprune.errors import RuleError
from graphprune.rules.call import Call, Dims, operand_values
from graphprune.rules.grammar import Factor, Formula, Name, Nest, Operand, Token, count, flat, formula, names, operands

Key: TypeAlias = tuple[str, int]
"""A name and, for `*names`, the position from the right."""


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
        self.values = operand_values(call.node)[: len(rule.inputs)]
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
            self._write(operand, value.shape, len(operand_values(call.node)) + i)
            for i, (operand, value) in enumerate(zip(rule.outputs, call.node.outputs, strict=False))
        ]
        self._state()
        call.zero = [
            tuple(
                i == 0 and axis.size > 1 and self._zero(keys, rule.zero) for axis, keys in zip(dims, keyed, strict=True)
            )
            for i, (dims, keyed) in enumerate(zip(outputs, self.written, strict=True))
        ]
        return outputs

    # -- operands

    def _spread(self, tokens: tuple[Token, ...], rank: int) -> list[tuple[Token, int]]:
        """One token per dim, with the position from the right inside a *name (0 for the others).

        Raises:
            RuleError: the number of dims does not fit.
        """
        stars = [t for t in tokens if isinstance(t, Name) and t.star]
        free = rank - (len(tokens) - len(stars))
        unknown = [s for s in stars if s.letter not in self.rank]
        if len(stars) == 2:
            if len(unknown) == 2:
                raise RuleError(f"{self.rule.text!r}: cannot tell how many dims each *name has in {self.call.node}")
            known = next(s for s in stars if s not in unknown)
            count = {s.letter: self.rank[s.letter] if s is known else free - self.rank[known.letter] for s in stars}
        else:
            count = {s.letter: free for s in stars}
        if free < 0 or (not stars and free) or any(c < 0 for c in count.values()):
            raise RuleError(f"{self.rule.text!r} does not fit a tensor of {rank} dims in {self.call.node}")
        out: list[tuple[Token, int]] = []
        for token in tokens:
            if isinstance(token, Name) and token.star:
                n = count[token.letter]
                self.rank.setdefault(token.letter, n)
                out.extend((token, n - 1 - k) for k in range(n))
            else:
                out.append((token, 0))
        return out

    def _read(self, operand: Operand, dims: Dims, position: int) -> None:
        for d, ((token, k), axis) in enumerate(zip(self._spread(operand.tokens, len(dims)), dims, strict=True)):
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
        if axis.size == 1 and any(self.found.get((n.letter, 0), axis).size > 1 for n in flat([token])):
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
            for name in flat([token]):
                self.places.setdefault((name.letter, 0), []).append(place)

    def _fresh(self, token: Nest, atom: Axis) -> bool:
        """Whether `atom` was made for this very token, so that the dim's own axis can stand for it."""
        return any(self.found[(n.letter, 0)] is atom and (n.letter, 0) not in self.places for n in flat([token]))

    def _rename(self, token: Nest, atom: Axis, axis: Axis) -> None:
        for name in flat([token]):
            if self.found[(name.letter, 0)] is atom:
                self.found[(name.letter, 0)] = axis

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
        for d, ((token, k), size) in enumerate(zip(self._spread(operand.tokens, len(shape)), shape, strict=True)):
            if isinstance(token, Name):
                key = (token.letter, k)
                if key not in self.found:
                    self.found[key] = Atom(size)
                axis, keys = self.found[key], [key]
            else:
                parts = self._nest(token, size)
                wide = [p for p in parts if p.size != (0 if token.total else 1)]
                axis = wide[0] if len(wide) == 1 else Sum(*parts) if token.total else Prod(*parts)
                keys = [(n.letter, 0) for n in flat([token])]
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
        names = flat([t for o in (*rule.inputs, *rule.outputs) for t in o.tokens])
        for name in {n.letter: n for n in names if n.mark == "!"}.values():
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
        for product in rule.macs:
            call.macs.append(tuple(a for name in product for a in self._axes(name)))
        for argument, (letter, value) in rule.fixed.items():
            axis = self.found[(letter, 0)]
            if call[argument] is None:
                call.fix(argument, value(axis.size), axis)
        call.ties.extend(tuple(p) for key, p in self.places.items() if len(p) > 1 and self.found[key].size > 1)
        written = {key for keyed in self.written for keys in keyed for key in keys}
        pinned = {n.letter for n in names if n.mark == "!"}
        for key, axis in self.found.items():
            if key in written or key[0] in pinned or axis.size <= 1:
                continue
            if not self._zero([key], rule.summand, only_with=True):
                call.pin(axis, f"{call.node.op} sums over it, and its removed channels are not zero there")

    def _zero(self, keys: list[Key], formula: Formula, only_with: bool = False) -> bool:
        """Whether every term of `formula` has a factor that is zero at removed positions of each of `keys`.

        `only_with` looks only at the terms that have an operand with that letter: the others are not summed over it.
        """
        return all(
            any(self._factor_zero(f, key) for f in term)
            for key in keys
            if self.found[key].size > 1
            for term in formula
            if self._present(term) and not (only_with and not any(self._has(f, key) for f in term))
        )

    def _present(self, term: tuple[Factor, ...]) -> bool:
        """A term with an absent operand is zero everywhere, unless that operand counts as one."""
        return all(f.neutral or not self._absent(f.operand) for f in term)

    def _absent(self, operand: int) -> bool:
        if operand >= len(self.values):
            return True
        return self.values[operand] is None and not self.call[_nth(self.call, operand)]

    def _has(self, factor: Factor, key: Key) -> bool:
        return any(position == factor.operand for position, _ in self.places.get(key, ()))

    def _factor_zero(self, factor: Factor, key: Key) -> bool:
        value = self.values[factor.operand] if factor.operand < len(self.values) else None
        if value is None:
            return False
        zeros = self.call.zeros(value)
        return any(zeros[d] for position, d in self.places.get(key, ()) if position == factor.operand)


def _nth(call: Call, position: int) -> str:
    """Name of the `position`-th single-tensor argument."""
    return call.node.tensors[position] if position < len(call.node.tensors) else ""
