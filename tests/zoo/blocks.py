"""Every kind of block that random networks are made of, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from tests.zoo.blocks_map import MAPS
from tests.zoo.blocks_tokens import TOKENS

BLOCKS: Mapping[str, Callable[[int, int], nn.Module]] = {**MAPS, **TOKENS}
"""(width, factor) to a module from maps of 4 x 4 to maps of 4 x 4 with the width `out`."""
