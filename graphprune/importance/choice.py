"""Options of a criterion that are one of a few words."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from graphprune.errors import InputError


def check(criterion: object, **options: tuple[Any, Collection[Any]]) -> None:
    """Refuse an option that is none of its words.

    Args:
        criterion: whose options they are.
        options: per option, its value and what it may be.
    Raises:
        InputError: one of them is something else.
    """
    for name, (value, words) in options.items():
        if value not in words:
            known = ", ".join(repr(word) for word in words)
            raise InputError(f"{type(criterion).__name__}({name}={value!r}): it is one of {known}")
