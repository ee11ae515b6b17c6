"""How much each channel matters: one small file per criterion, all behind one protocol."""

from graphprune.importance.fpgm import FPGM
from graphprune.importance.gamma import Gamma
from graphprune.importance.lamp import LAMP
from graphprune.importance.magnitude import Magnitude
from graphprune.importance.protocol import Importance, Order, Removal, Scores, ordered
from graphprune.importance.random import Random
from graphprune.importance.weights import elements

__all__ = [
    "FPGM",
    "LAMP",
    "Gamma",
    "Importance",
    "Magnitude",
    "Order",
    "Random",
    "Removal",
    "Scores",
    "elements",
    "ordered",
]
