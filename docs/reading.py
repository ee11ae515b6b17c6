"""How the reference reads docstrings: sections without empty lines, examples, and lines about several names."""

from __future__ import annotations

import re
from typing import Any

import griffe

SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+):(.*\n?(?:\1 +.*\n?)*)", re.MULTILINE)
SECTION = re.compile(r"^(Args|Attributes|Example|Raises|Returns|Yields):$", re.MULTILINE)


class Reading(griffe.Extension):
    """Puts docstrings into the words that the parser of Google style knows, so that it can check their names."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the text of one docstring."""
        if obj.docstring is not None:
            text = SEVERAL.sub(_one_by_one, obj.docstring.value)
            text = SECTION.sub(r"\n\1:", text)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)


def _one_by_one(line: re.Match[str]) -> str:
    indent, names, said = line.groups()
    return "".join(f"{indent}{name}:{said if said.endswith(chr(10)) else said + chr(10)}" for name in names.split(", "))
