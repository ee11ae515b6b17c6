"""What each op means for axes: a table from op names to rules."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from graphprune.rules.call import Applied, Call, Dims, Fixed, Literal, Replacement, Rule
from graphprune.rules.contract import CONTRACT
from graphprune.rules.cut import CUT
from graphprune.rules.index import INDEX
from graphprune.rules.norm import NORM, left
from graphprune.rules.pair import PAIR
from graphprune.rules.pointwise import POINTWISE
from graphprune.rules.recurrent import RECURRENT
from graphprune.rules.reduce import REDUCE
from graphprune.rules.registry import find, function, op, table
from graphprune.rules.shape import SHAPE
from graphprune.rules.space import SPACE
from graphprune.rules.vision import VISION
from graphprune.rules.whole import WHOLE

RULES: Mapping[str, Rule] = MappingProxyType(
    table(CONTRACT, RECURRENT, POINTWISE, NORM, REDUCE, SHAPE, CUT, SPACE, INDEX, PAIR, WHOLE, VISION)
)
"""Every rule of the library; extend it with `RULES | op(...)`."""

__all__ = [
    "RULES",
    "Applied",
    "Call",
    "Dims",
    "Fixed",
    "Literal",
    "Replacement",
    "Rule",
    "find",
    "function",
    "left",
    "op",
    "table",
]
