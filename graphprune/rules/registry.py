"""How rules get their names: `op` makes entries, `table` joins them and refuses what is there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graphprune.errors import RuleError
from graphprune.rules.call import Rule
from graphprune.rules.text import rule


def op(names: str, text: str | Rule, **options: Any) -> dict[str, Rule]:
    """Rule entries for one or more ops.

    Args:
        names: ATen names without namespace and overload, separated by spaces; an in-place variant (`relu_`) is found
            under the plain name. Ops of other namespaces are written `namespace.name`.
        text: a line of the rule language (see `graphprune.rules.text`), or a function of a `Call`.
        options: keywords of `graphprune.rules.text.rule`.
    Returns:
        Entries to merge into a rule table: `couple(program, rules=RULES | op("my_namespace.my_op", "*b c -> *b c"))`.
    Raises:
        RuleError: the text is malformed, or a name is empty or repeated.
    """
    words = names.split()
    if not words or len(set(words)) != len(words):
        raise RuleError(f"op({names!r}): give each op one name, separated by spaces")
    made = rule(text, **options) if isinstance(text, str) else text
    return dict.fromkeys(words, made)


def function(names: str) -> Callable[[Rule], Rule]:
    """Mark a function of a `Call` as the rule of these ops; `table` collects the marked functions of a module."""

    def mark(f: Rule) -> Rule:
        f.ops = names  # type: ignore[attr-defined]
        return f

    return mark


def table(*entries: Mapping[str, Rule], module: Mapping[str, Any] | None = None) -> dict[str, Rule]:
    """Join rule entries and the functions of a module marked with `function`.

    Raises:
        RuleError: two rules for one op.
    """
    functions = [op(f.ops, f) for f in (module or {}).values() if callable(f) and hasattr(f, "ops")]
    joined: dict[str, Rule] = {}
    for part in (*entries, *functions):
        for name, made in part.items():
            if name in joined:
                raise RuleError(f"op {name!r} has two rules; remove one, or override it with RULES | op({name!r}, ...)")
            joined[name] = made
    return joined


def find(rules: Mapping[str, Rule], op_name: str) -> Rule | None:
    """The rule of an op; an in-place op falls back on the plain one."""
    return rules.get(op_name) or rules.get(op_name.removesuffix("_"))
