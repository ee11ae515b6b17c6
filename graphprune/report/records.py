"""What a report holds: plain data that outlives the model, its tensors and the session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Change:
    """One cost before and after."""

    before: int | float
    after: int | float

    @property
    def kept(self) -> float:
        """Fraction kept; 1 for a cost of nothing."""
        return self.after / self.before if self.before else 1.0


@dataclass(frozen=True)
class Op:
    """A call in the user's code.

    Attributes:
        op: what is called, such as "conv2d".
        module: path of the module whose forward calls it; empty for the model itself.
        source: the line, as `file.py:12`; empty where none was recorded.
        code: the text of that line.
    """

    op: str
    module: str
    source: str
    code: str

    def __str__(self) -> str:
        source = f" ({self.source})" if self.source else ""
        return f"{self.op} in {self.module or 'the model itself'}{source}"


@dataclass(frozen=True)
class Slot:
    """A dim of a parameter or buffer in which a group occurs, and what ties it to one listed before it.

    Attributes:
        name: of the tensor.
        dim: which of its dims.
        to: position, among the slots of the group, of the one it is tied to; None where it is tied to none before it.
        through: positions, among the ops of the report, of the calls that tie them, from that one to this.
    """

    name: str
    dim: int
    to: int | None = None
    through: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}[{self.dim}]"


@dataclass(frozen=True)
class Histogram:
    """How the scores of a group's channels are spread, in bins of equal width.

    Attributes:
        low, high: the ends.
        kept, removed: how many channels of each bin stayed and went.
        cut: the least score that stayed, if all that went are no higher; None if nothing went or scores did not decide.
        unseen: how many scores are infinite.
    """

    low: float
    high: float
    kept: tuple[int, ...]
    removed: tuple[int, ...]
    cut: float | None = None
    unseen: int = 0


@dataclass(frozen=True)
class Width:
    """One group before and after.

    Attributes:
        name: of the group.
        before, after: its channels.
        members: in how many dims of parameters and buffers it occurs.
        exactness: "exact" or "renormalised".
        cause: the normalisation, for a renormalised group.
        slots: the first of its members, and what ties them.
        scores: how its channels were scored; None if they were not.
        criterion: what scored it, if that was not the criterion that was asked for but its `otherwise`.
        whole: why what is left of it stays as it is, where steps have made it so; empty for a group that can shrink.
    """

    name: str
    before: int
    after: int
    members: int
    exactness: str
    cause: str = ""
    slots: tuple[Slot, ...] = ()
    scores: Histogram | None = None
    criterion: str = ""
    whole: str = ""


@dataclass(frozen=True)
class Pinned:
    """A part of some parameter's dims that stayed whole, and why."""

    name: str
    size: int
    members: int
    reason: str
    where: str


@dataclass(frozen=True)
class Layer:
    """A module with parameters or multiply-adds of its own.

    Attributes:
        name: its path; empty for the model itself.
        costs: "macs" and "params", before and after; with a predicted latency also that of the calls that it makes
            itself, in nanoseconds.
    """

    name: str
    costs: Mapping[str, Change] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """What a predicted time is made of, beside the calls of the layers.

    Attributes:
        besides: nanoseconds that the original takes besides its calls; no width changes them.
        together: how many calls were measured only as all their sizes shrank at once.
        share: their fraction of the time of the original.
    """

    besides: float
    together: int
    share: float


@dataclass(frozen=True)
class Stage:
    """A call that mixes channels or makes new ones: between which axes the model's data flows.

    Axes are counted through: first the groups, then what is pinned.

    Attributes:
        op: position among the ops of the report.
        reads, writes: positions of the axes it reads and of those it writes, ascending.
    """

    op: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
