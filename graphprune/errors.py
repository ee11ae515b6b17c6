"""The exceptions of graphprune: one tree, so `except GraphpruneError` catches all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphpruneError(Exception):
    """Anything graphprune refuses to do; the message says what, where, why and what to do next."""


class InputError(GraphpruneError):
    """An argument of a public call cannot be used as it is."""


class TraceError(GraphpruneError):
    """The model could not be traced with these example inputs."""


class RuleError(GraphpruneError):
    """A rule's text is wrong, a rule is registered twice, or a rule does not fit the call it is applied to."""


class UnsupportedOp(GraphpruneError):
    """Ops without a rule touch channels, and `on_unknown="error"` was asked for."""


class UnknownName(GraphpruneError):
    """A name that is not in the model or in the coupling."""


class CalibrationError(GraphpruneError):
    """A pass over the user's batches cannot give the statistics it is asked for."""


class CriterionError(GraphpruneError):
    """An importance criterion has nothing to say about a group."""


class TrainingError(GraphpruneError):
    """Training cannot go on."""


class PlanError(GraphpruneError):
    """A plan does not fit the model it is used on."""


class TargetError(GraphpruneError):
    """A target is out of range, or cannot be reached."""


class RewriteError(GraphpruneError):
    """The smaller module could not be built."""


class ArtefactError(GraphpruneError):
    """What is to be saved, loaded or exported, or the files of it, cannot be used."""


class VerificationError(GraphpruneError):
    """The pruned model does not compute what the zeroed original computes."""


def counted(number: int, one: str, more: str = "") -> str:
    """A number with the noun it counts; `more` is what the noun becomes where an s does not do."""
    return f"{number} {one if number == 1 else more or one + 's'}"


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A sentence naming the real names closest to `name`, empty when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)
    return f"; did you mean {', '.join(repr(c) for c in close)}?" if close else ""
