"""How much of what the original computes a smaller model still computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from graphprune.calibrate import Batch, Criterion
from graphprune.trace import output_tensors, untouched


@dataclass(frozen=True)
class Quality:
    """A model on the batches it is calibrated on.

    Attributes:
        loss: mean loss per sample; None without a loss.
        error: distance of its outputs from the original's, relative to their norm.
        agreement: fraction of places at which the largest number along the last dim of the outputs' first table is the
            original's; None where there is no table.
        samples: how many samples that is of.
    """

    loss: float | None
    error: float
    agreement: float | None
    samples: int

    def nearer(self, other: Quality, original: Quality) -> bool:
        """Whether this is nearer to the original than `other` is: in loss, or without one in its outputs."""
        if self.loss is not None and other.loss is not None and original.loss is not None:
            return abs(self.loss - original.loss) < abs(other.loss - original.loss)
        return self.error < other.error


def qualities(
    model: nn.Module, small: nn.Module, batches: Iterable[Batch], criterion: Criterion | None, sample_dim: int
) -> list[Quality]:
    """Of the original and of a smaller model, in eval mode."""
    tallies = _Tally(), _Tally()
    for batch in batches:
        samples = next((t.shape[sample_dim] for t in batch.inputs.tensors() if t.dim() > sample_dim), 1)
        want: list[torch.Tensor] = []
        for which, tally in zip((model, small), tallies, strict=True):
            with untouched(which), torch.no_grad():
                output = batch.inputs.map(torch.clone).call(which)
                got = [t for t in output_tensors(output) if t.is_floating_point()]
                want = want or got
                loss = 0.0 if criterion is None else float(criterion.total(output, batch.target, samples))
            tally.add(got, want, loss, samples)
    return [tally.quality(criterion is not None) for tally in tallies]


class _Tally:
    def __init__(self) -> None:
        self.loss = self.difference = self.norm = 0.0
        self.same = self.places = self.samples = 0

    def add(self, got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], loss: float, samples: int) -> None:
        """Compare the outputs of one batch."""
        self.loss, self.samples = self.loss + loss, self.samples + samples
        pairs = [(g, w) for g, w in zip(got, want, strict=True) if g.shape == w.shape]  # caches hold fewer heads
        for g, w in pairs:
            self.difference += float((g.double() - w.double()).square().sum())
            self.norm += float(w.double().square().sum())
        for g, w in [(g, w) for g, w in pairs if w.dim() > 1 and w.shape[-1] > 1][:1]:
            same = g.argmax(-1) == w.argmax(-1)
            self.same, self.places = self.same + int(same.sum()), self.places + same.numel()

    def quality(self, with_loss: bool) -> Quality:
        """What was found."""
        error = (self.difference / self.norm) ** 0.5 if self.norm else 0.0
        agreement = self.same / self.places if self.places else None
        return Quality(self.loss / max(1, self.samples) if with_loss else None, error, agreement, self.samples)
