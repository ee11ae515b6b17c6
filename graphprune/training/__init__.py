"""What makes channels small, or takes them away, while a network is trained in anybody's loop.

`Slimming` shrinks the scales of normalisations, `GroupLasso` all weights of a channel at once, `GrowingL2` what a plan
removes: each is a callable between `loss.backward()` and `optimizer.step()`. `GroupFisher` removes a channel every few
steps. All of them can be attached to an optimizer.
"""

from graphprune.report import History
from graphprune.training.callbacks import lightning_callback, transformers_callback
from graphprune.training.distribution import Distribution
from graphprune.training.fisher import GroupFisher, Removed
from graphprune.training.growing import GrowingL2
from graphprune.training.lasso import GroupLasso
from graphprune.training.penalty import Penalty, Strength, ramp
from graphprune.training.slimming import Slimming

__all__ = [
    "Distribution",
    "GroupFisher",
    "GroupLasso",
    "GrowingL2",
    "History",
    "Penalty",
    "Removed",
    "Slimming",
    "Strength",
    "lightning_callback",
    "ramp",
    "transformers_callback",
]
