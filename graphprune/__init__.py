"""Structural pruning for any PyTorch module, proved equal to the original with the same channels zeroed."""

from graphprune import importance, recover, training
from graphprune.allocate import Target, allocate
from graphprune.calibrate import Calibration, calibrate
from graphprune.couple import couple
from graphprune.coupling import Coupling, Group
from graphprune.errors import (
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

__version__ = "0.1.0"

__all__ = [
    "RULES",
    "Calibration",
    "CalibrationError",
    "Coupling",
    "CriterionError",
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
    "allocate",
    "calibrate",
    "couple",
    "importance",
    "migrate",
    "op",
    "prune",
    "prune_iteratively",
    "recover",
    "repair",
    "rewrite",
    "sensitivity",
    "trace",
    "training",
    "verify",
]
