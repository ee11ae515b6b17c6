"""What criteria that look at data have in common: batches, or a calibration that was made before."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import nn

from graphprune.calibrate import Calibration, Gradients, Loss, Statistic, calibrate
from graphprune.coupling import Coupling
from graphprune.errors import CriterionError
from graphprune.importance.protocol import Importance


@dataclass(frozen=True)
class FromData:
    """A criterion that reads statistics of batches.

    Args:
        batches: any iterable of batches, see `graphprune.calibrate`; or a `Calibration` that holds what is needed, so
            that several criteria share one pass.
        sample_dim: which dim of inputs and outputs tells samples apart.
        otherwise: scores groups that the data says nothing about; with None such groups are an error.
        progress: show a progress bar; by default where the output is a terminal.
    """

    batches: Iterable[Any] | Calibration
    _: KW_ONLY
    sample_dim: int = 0
    otherwise: Importance | None = None
    progress: bool | None = None

    def calibration(
        self, model: nn.Module, coupling: Coupling, statistics: Collection[Statistic], loss: Loss | None = None
    ) -> Calibration:
        """The statistics, collected now unless they were before.

        Raises:
            CriterionError: the calibration given does not hold them, or is of a model with other groups.
        """
        if not isinstance(self.batches, Calibration):
            return calibrate(
                model,
                coupling,
                self.batches,
                statistics=statistics,
                loss=loss,
                sample_dim=self.sample_dim,
                progress=self.progress,
            )
        name = type(self).__name__
        missing = [s for s in statistics if s not in self.batches.statistics]
        if missing:
            raise CriterionError(
                f"{name} needs {', '.join(missing)}, and the calibration holds {', '.join(self.batches.statistics)}; "
                f"collect them with graphprune.calibrate(..., statistics={sorted(statistics)})"
            )
        if self.batches.sizes != {g.name: g.size for g in coupling.groups}:
            raise CriterionError(f"{name}: the calibration is of a model with other groups; calibrate this one")
        return self.batches


def seen(sums: Mapping[str, Any]) -> list[str]:
    """Names of the groups that any sample said something about."""
    return [name for name, held in sums.items() if bool(torch.as_tensor(held.count).all())]


def moved(gradients: Mapping[str, Gradients]) -> list[str]:
    """Names of the groups with which any sample's loss moves."""
    return [name for name, held in gradients.items() if held.squares.any()]
