"""What to reach, and within which limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphprune.errors import TargetError

BUDGETS = ("channels", "macs", "params", "memory", "latency")


@dataclass(frozen=True)
class Target:
    """What fraction to keep, of one quantity or of several at once, and within which limits.

    Args:
        channels: of the channels; as a mapping from group names or patterns (`"layer1.*"`) to fractions, of those
            groups, and of no others.
        macs: of the multiply-adds at the example inputs.
        params: of the parameters.
        memory: of the bytes that a run at the example inputs holds at most, weights and activations.
        latency: of the time that a run at the example inputs takes, as predicted from measurements.
        multiple_of: widths are whole multiples of this, or stay as they are.
        floor: the least that a group keeps: a number of channels if it is an int, a fraction if it is a float.
        max_removed: the most of a group that goes, a fraction; where there is a `floor` too, both hold.
        protect: names or patterns of groups that stay whole.
        tied: sets of group names or patterns whose widths stay equal; the groups of a set have one size.
    Raises:
        TargetError: no quantity is given, a value is out of range, or fractions contradict each other.

    Example:
        >>> Target(macs=0.5, params=0.6, multiple_of=8).budgets
        {'macs': 0.5, 'params': 0.6}
    """

    channels: float | Mapping[str, float] | None = None
    macs: float | None = None
    params: float | None = None
    memory: float | None = None
    latency: float | None = None
    multiple_of: int = 1
    floor: int | float = 1
    max_removed: float = 1.0
    protect: Sequence[str] = ()
    tied: Sequence[Sequence[str]] = ()

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        if not given:
            raise TargetError(f"Target needs at least one of {', '.join(BUDGETS)}, such as Target(macs=0.5)")
        for name, value in given.items():
            for each in value.values() if isinstance(value, Mapping) and name == "channels" else (value,):
                if isinstance(each, bool) or not isinstance(each, (int, float)) or not 0 < each <= 1:
                    raise TargetError(
                        f"Target({name}={value!r}): the fraction kept lies in (0, 1]; to remove 30 % write {name}=0.7"
                    )
        if isinstance(self.multiple_of, bool) or not isinstance(self.multiple_of, int) or self.multiple_of < 1:
            raise TargetError(f"Target(multiple_of={self.multiple_of!r}): a whole number of channels, at least 1")
        whole = isinstance(self.floor, int) and not isinstance(self.floor, bool) and self.floor >= 1
        if not whole and not (isinstance(self.floor, float) and 0 <= self.floor <= 1):
            raise TargetError(
                f"Target(floor={self.floor!r}): a number of channels, such as 4, or a fraction in [0, 1], such as 0.1"
            )
        if isinstance(self.max_removed, bool) or not 0 <= self.max_removed <= 1:
            raise TargetError(f"Target(max_removed={self.max_removed!r}): a fraction of each group, in [0, 1]")
        self._check_fractions()
        for name in ("protect", "tied"):
            if isinstance(getattr(self, name), str):
                raise TargetError(f"Target({name}={getattr(self, name)!r}): pass a list, even of one")

    def _check_fractions(self) -> None:
        """Refuse to keep less of a group than the least that it keeps.

        Raises:
            TargetError: that is asked for.
        """
        asked = self.channels.values() if isinstance(self.channels, Mapping) else [self.channels or 1.0]
        least = {"floor": self.floor if isinstance(self.floor, float) else 0.0, "max_removed": 1 - self.max_removed}
        for name, fraction in least.items():
            if fraction > min(asked, default=1.0) + 1e-9:
                raise TargetError(
                    f"Target(channels={self.channels!r}, {name}={getattr(self, name)!r}): no group may keep less than "
                    f"{fraction:g} of its channels; lower that limit, or keep at least as much"
                )

    @property
    def budgets(self) -> dict[str, float]:
        """The fractions that are costs: all but fractions by group."""
        found = {name: getattr(self, name) for name in BUDGETS}
        return {k: float(v) for k, v in found.items() if v is not None and not isinstance(v, Mapping)}

    def __str__(self) -> str:
        parts = [f"{name} {value:g}" for name, value in self.budgets.items()]
        if isinstance(self.channels, Mapping):
            parts += [f"channels of {name} {value:g}" for name, value in self.channels.items()]
        if self.multiple_of > 1:
            parts.append(f"multiples of {self.multiple_of}")
        return ", ".join(parts)
