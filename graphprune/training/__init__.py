"""Penalties that make channels small while a network is trained, in anybody's training loop.

`Slimming` shrinks the scales of normalisations, `GroupLasso` all weights of a channel at once, `GrowingL2` what a plan
removes. Each is a callable between `loss.backward()` and `optimizer.step()`.
"""

from graphprune.training.distribution import Distribution
from graphprune.training.growing import GrowingL2
from graphprune.training.lasso import GroupLasso
from graphprune.training.penalty import Penalty, Strength, ramp
from graphprune.training.slimming import Slimming

__all__ = [
    "Distribution",
    "GroupLasso",
    "GrowingL2",
    "Penalty",
    "Slimming",
    "Strength",
    "ramp",
]
