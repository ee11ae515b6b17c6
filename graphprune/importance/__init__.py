"""How much each channel matters: one small file per criterion, all behind one protocol."""

from graphprune.importance.activation import Activation
from graphprune.importance.apoz import APoZ
from graphprune.importance.collaborative import Collaborative
from graphprune.importance.fisher import Fisher
from graphprune.importance.fpgm import FPGM
from graphprune.importance.gamma import Gamma
from graphprune.importance.lamp import LAMP
from graphprune.importance.magnitude import Magnitude
from graphprune.importance.protocol import Importance, Order, Removal, Scores, ordered
from graphprune.importance.random import Random
from graphprune.importance.rank import Rank
from graphprune.importance.reconstruction import Reconstruction
from graphprune.importance.taylor import Taylor
from graphprune.importance.weights import elements

__all__ = [
    "FPGM",
    "LAMP",
    "APoZ",
    "Activation",
    "Collaborative",
    "Fisher",
    "Gamma",
    "Importance",
    "Magnitude",
    "Order",
    "Random",
    "Rank",
    "Reconstruction",
    "Removal",
    "Scores",
    "Taylor",
    "elements",
    "ordered",
]
