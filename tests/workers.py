"""Jobs for the tests of the zoo's worker processes, apart from them so that a worker need not import torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

Report = Callable[[dict[str, Any]], None]


def done(value: int, report: Report) -> None:
    report({"value": value})


def sleeping(report: Report) -> None:
    report({"first": 1, "at": "waiting"})
    time.sleep(60)


def growing(report: Report) -> None:
    report({"first": 1, "at": "growing"})
    held = []
    for _ in range(4000):
        held.append(bytearray(b"x") * 2**20)
        time.sleep(0.001)


def dying(report: Report) -> None:
    report({"first": 1})
    os._exit(7)


def raising(report: Report) -> None:
    raise ValueError("seven is too many\nsecond line")
