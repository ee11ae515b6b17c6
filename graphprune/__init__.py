"""Structural pruning for any PyTorch module, proved equal to the original with the same channels zeroed."""

from graphprune import importance, recover, training
from graphprune.allocate import Target, allocate
from graphprune.artefact import Artefact, load, save
from graphprune.calibrate import Calibration, calibrate
from graphprune.couple import couple
from graphprune.coupling import Coupling, Group
from graphprune.errors import (
    ArtefactError,
    CalibrationError,
    CriterionError,
    GraphpruneError,
    InputError,
    PlanError,
    RewriteError,
    RuleError,
    TargetError,
    TraceError,
    TrainingError,
    UnknownName,
    UnsupportedOp,
    VerificationError,
)
from graphprune.export import Exported, export
from graphprune.iterative import Iterated, Step, prune_iteratively
from graphprune.latency import Latency
from graphprune.migrate import migrate
from graphprune.plan import Plan
from graphprune.program import Program
from graphprune.pruning import Result, prune
from graphprune.recover import Repair, repair
from graphprune.report import Report
from graphprune.rewrite import rewrite
from graphprune.rules import RULES, op
from graphprune.sensitivity import Sensitivity, sensitivity
from graphprune.trace import Inputs, trace
from graphprune.verify import Verification, verify
from graphprune.version import __version__

__all__ = [
    "RULES",
    "Artefact",
    "ArtefactError",
    "Calibration",
    "CalibrationError",
    "Coupling",
    "CriterionError",
    "Exported",
    "GraphpruneError",
    "Group",
    "InputError",
    "Inputs",
    "Iterated",
    "Latency",
    "Plan",
    "PlanError",
    "Program",
    "Repair",
    "Report",
    "Result",
    "RewriteError",
    "RuleError",
    "Sensitivity",
    "Step",
    "Target",
    "TargetError",
    "TraceError",
    "TrainingError",
    "UnknownName",
    "UnsupportedOp",
    "Verification",
    "VerificationError",
    "__version__",
    "allocate",
    "calibrate",
    "couple",
    "export",
    "importance",
    "load",
    "migrate",
    "op",
    "prune",
    "prune_iteratively",
    "recover",
    "repair",
    "rewrite",
    "save",
    "sensitivity",
    "trace",
    "training",
    "verify",
]
