"""Times that were measured, kept on disk: one file per device, number of threads and version of torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from graphprune.errors import InputError
from graphprune.files import write_whole
from graphprune.latency.calls import Measure, OpCall

FORMAT = "graphprune latency 1"


class Store:
    """Seconds per call, from disk, or measured.

    Args:
        measure: times what is not known yet.
        path: the file; None keeps nothing.
        identity: what the times hold for.
    Raises:
        InputError: the folder cannot be written to.
    """

    def __init__(self, measure: Measure, path: Path | None, identity: dict[str, Any]) -> None:
        self.measure, self.path, self.identity = measure, path, identity
        self.measured = 0
        if path is not None:
            _prepare(path.parent)
        self.known = self._read()

    def __contains__(self, call: OpCall) -> bool:
        return call.key in self.known

    def __call__(self, call: OpCall) -> float:
        """Seconds of one call."""
        if (key := call.key) not in self.known:
            self.known[key] = float(self.measure(call))
            self.measured += 1
        return self.known[key]

    def write(self) -> None:
        """Keep what was measured, beside what another process has written meanwhile."""
        if self.path is None or not self.measured:
            return
        self.known = self._read() | self.known
        text = json.dumps({"format": FORMAT, **self.identity, "seconds": self.known}, indent=0)
        try:
            write_whole(self.path, lambda file: file.write(text.encode()))
            self.measured = 0
        except OSError as error:  # the times are known, and what they are for goes on
            warnings.warn(f"what was measured could not be kept in {self.path}: {error}", stacklevel=2)

    def _read(self) -> dict[str, float]:
        """What the file holds; of one that is damaged or not for this device, nothing, with a warning."""
        if self.path is None or not self.path.exists():
            return {}
        try:
            found = json.loads(self.path.read_text())
            times = {str(key): float(seconds) for key, seconds in found.pop("seconds").items()}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            found, times = f"damaged: {error}", {}
        if found != {"format": FORMAT, **self.identity} or not all(math.isfinite(s) and s > 0 for s in times.values()):
            warnings.warn(f"{self.path} holds no times for this device, it is written anew: {found}", stacklevel=2)
            return {}
        return times


def identity(device: torch.device) -> dict[str, Any]:
    """What times depend on, besides the call."""
    kind = device.type
    autocast = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "off"
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "autocast": autocast,
    }


def file_of(folder: str | os.PathLike[str] | None, identity: dict[str, Any]) -> Path:
    """Where times of that identity are kept; by default in the user's folder for caches."""
    base = Path(folder) if folder is not None else _caches() / "graphprune" / "latency"
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return base / f"{digest}.json"


def device_name(device: torch.device) -> str:
    """The name of the hardware."""
    module: Any = getattr(torch, device.type, None)
    if device.type != "cpu":
        name: Callable[[torch.device], str] | None = getattr(module, "get_device_name", None)
        return f"{device.type} {name(device) if name else ''}".strip()
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    named = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return f"cpu {named[0] if named else platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


def _caches() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _prepare(folder: Path) -> None:
    """Make the folder, before anything is measured.

    Raises:
        InputError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if not usable:
        raise InputError(f"{folder} cannot be written to; pass gp.Latency(cache=...) another folder, or cache=False")
