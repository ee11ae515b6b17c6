"""What a scan found: how the loss rises with what a group loses; as data, as importance, and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from graphprune.coupling import Coupling
from graphprune.errors import CriterionError, InputError, counted
from graphprune.importance import Importance, Magnitude, Order, Scores, ordered
from graphprune.importance.fallback import Completed, scored_by

FORMAT = 1
SHOWN = 10
"""How many curves a legend names."""


@dataclass(frozen=True)
class Curve:
    """How the loss rises when some groups, alike in size, keep fewer channels and all others stay whole.

    Attributes:
        groups: their names; they are cut together.
        size: channels of each.
        widths: how many each keeps, ascending; all below `size`.
        increases: by how much the mean loss of a sample rises.
    """

    groups: tuple[str, ...]
    size: int
    widths: tuple[int, ...]
    increases: tuple[float, ...]

    def lost(self) -> torch.Tensor:
        """What one of the groups loses at each width, shape (size + 1,), float64; 0 at `size`.

        Lines between what was measured, made to rise as channels go (cutting may lower the loss: that counts as 0), and
        below the smallest width measured as steep as between that and the next one. Of groups that were cut together
        each has an equal share.
        """
        widths, rises = np.array([*self.widths, self.size]), np.array([*self.increases, 0.0])
        rises = np.maximum.accumulate(rises[::-1])[::-1]
        slope = (rises[0] - rises[1]) / (widths[1] - widths[0])
        widths, rises = np.append(0, widths), np.append(rises[0] + slope * widths[0], rises)
        return torch.from_numpy(np.interp(np.arange(self.size + 1), widths, rises)) / len(self.groups)


@dataclass(frozen=True, eq=False)
class Rescaled:
    """The order of another criterion, with losses that were measured.

    Attributes:
        order: says what stays at a width.
        lost: shape (size + 1,).
    """

    order: Order
    lost: torch.Tensor

    @property
    def size(self) -> int:
        """Number of channels."""
        return len(self.lost) - 1

    def keep(self, width: int) -> list[int]:
        """The positions that stay when `width` of them do, ascending."""
        return self.order.keep(width)


@dataclass(frozen=True)
class Scanned:
    """An importance that takes the order of channels from a criterion, and what their group loses from a scan.

    Groups that were not scanned get no scores, so they stay whole.

    Attributes:
        sensitivity: the scan.
        criterion: orders the channels.
    """

    sensitivity: Sensitivity
    criterion: Importance

    def __call__(self, model: nn.Module, coupling: Coupling) -> Scores:
        """An order for each group that was scanned.

        Raises:
            UnknownName: a group of the scan is not in the coupling.
            InputError: it has another size there.
            CriterionError: the criterion says nothing about it.
        """
        scores, found = self.criterion(model, coupling), {}
        for curve in self.sensitivity.curves.values():
            for name in curve.groups:
                size = coupling.group(name).size
                if size != curve.size:
                    raise InputError(
                        f"group {name!r} has {size} channels and had {curve.size} when it was scanned; scan this model"
                    )
                if name not in scores:
                    raise CriterionError(f"{type(self.criterion).__name__} has no scores for group {name!r}")
                found[name] = Rescaled(ordered(scores[name]), curve.lost())
        return Completed(found, {name: by for name, by in scored_by(scores).items() if name in found})


@dataclass(frozen=True)
class Sensitivity:
    """How much each group, or each class of groups, matters to the loss.

    Attributes:
        loss: mean loss per sample of the whole model.
        samples: how many samples it was measured on.
        curves: per group or class.
    """

    loss: float
    samples: int
    curves: Mapping[str, Curve]

    def importance(self, criterion: Importance = Magnitude()) -> Importance:  # noqa: B008 - frozen
        """An importance for `allocate` and `prune`: `criterion` says which channels go, the scan what that costs."""
        return Scanned(self, criterion)

    def to_json(self) -> str:
        """The scan as JSON text."""
        curves = {name: vars(curve) for name, curve in self.curves.items()}
        return json.dumps({"format": FORMAT, "loss": self.loss, "samples": self.samples, "curves": curves})

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """The scan that `to_json` wrote.

        Raises:
            InputError: the text is no such scan.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise InputError(f"scan format {data['format']} is not {FORMAT}, the one this version reads")
            curves = {
                name: Curve(tuple(c["groups"]), c["size"], tuple(c["widths"]), tuple(c["increases"]))
                for name, c in data["curves"].items()
            }
            return cls(data["loss"], data["samples"], curves)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a scan: {type(error).__name__}: {error}; write scans with to_json()") from error

    def worst_first(self) -> list[tuple[str, Curve]]:
        """The curves, that with the largest increase first."""
        return sorted(self.curves.items(), key=lambda item: -max(item[1].increases))

    def __str__(self) -> str:
        wide = max([len(name) for name in self.curves] + [5])
        lines = [
            f"loss {self.loss:.4g} on {counted(self.samples, 'sample')}; increase at each width",
            f"{'group':<{wide}}   size",
        ]
        for name, curve in self.worst_first():
            at = "  ".join(f"{w}: {i:+.4f}" for w, i in zip(curve.widths, curve.increases, strict=True))
            lines.append(f"{name:<{wide}}  {curve.size:>5}  {at}")
        return "\n".join(lines)

    def plot(self, axes: Any = None) -> Any:
        """Draw the increase of the loss over the fraction kept, one line per curve; the legend names the worst.

        Args:
            axes: of matplotlib; with None, the current ones.
        Returns:
            The axes.
        Raises:
            InputError: matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise InputError("plot needs matplotlib: pip install 'graphprune[plot]'") from error
        axes = pyplot.gca() if axes is None else axes
        for rank, (name, curve) in enumerate(self.worst_first()):
            kept = [width / curve.size for width in (*curve.widths, curve.size)]
            axes.plot(kept, [*curve.increases, 0.0], marker="o", label=name if rank < SHOWN else None)
        axes.set_xlabel("fraction kept")
        axes.set_ylabel("increase of the loss")
        axes.legend()
        return axes
