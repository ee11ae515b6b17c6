"""Takes times: of single calls on tensors made for them, and of whole models."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphprune.latency.calls import OpCall, Operand

COLD = 64 * 2**20
"""Bytes that weights are read from in turn, so that each is out of the caches when it is read again."""
REPEATS, LEAST = 5, 2e-3
"""A call is timed that often, and until that many seconds are spent."""
MOST = 50
TICK = 1e-7
"""No call takes less; clocks may say so."""
BLOCK = 31 * 2**20
"""Bytes of a block that glibc will keep for reuse, rather than give back to the system, once it has seen one freed."""


class Stopwatch:
    """Times calls on one device.

    What a call takes is the shortest of its times: all that disturbs it makes it longer.

    Args:
        device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wait, self.now = waiting(device), clock(device)
        settle(device)
        self._pools: dict[torch.dtype, torch.Tensor] = {}
        self._next = 0

    def __call__(self, call: OpCall) -> float:
        """Seconds of one call."""
        with torch.no_grad():
            hot = [self._random(operand) for operand in call.operands() if not self._is_cold(operand)]
            times: list[float] = []
            for run in range(-2, MOST):  # the first call of a shape compiles its kernel
                args, kwargs = self._arguments(call, hot)
                self.wait()
                start = self.now()
                result = call.op(*args, **kwargs)
                self.wait()
                times.append(self.now() - start)
                del result
                if run < 0:
                    times.clear()
                elif len(times) >= REPEATS and sum(times) >= LEAST:
                    break
        return max(min(times), TICK)

    def _arguments(self, call: OpCall, hot: Sequence[torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Weights that were not read for as long as possible, and everything else as it was."""
        again = iter(hot)
        return call.with_operands(lambda o: _laid_out(self._weight(o), o) if self._is_cold(o) else next(again))

    def _is_cold(self, operand: Operand) -> bool:
        return (
            operand.weight
            and operand.dtype.is_floating_point
            and math.prod(operand.shape) <= COLD // operand.dtype.itemsize
        )

    def _random(self, operand: Operand) -> torch.Tensor:
        """Values that are random, as some kernels branch on them, and not shared, as some write to them."""
        count = math.prod(_sizes(operand))
        if not operand.dtype.is_floating_point:
            return _laid_out(torch.zeros(count, dtype=operand.dtype, device=self.device), operand)
        pool = self._pool(operand.dtype)
        return _laid_out(torch.cat([*[pool] * (count // len(pool)), pool[: count % len(pool)]]), operand)

    def _weight(self, operand: Operand) -> torch.Tensor:
        pool, count = self._pool(operand.dtype), math.prod(_sizes(operand))
        start = self._next if self._next + count <= len(pool) else 0
        self._next = start + -(-count // 64) * 64
        return pool[start : start + count]

    def _pool(self, dtype: torch.dtype) -> torch.Tensor:
        """Random numbers."""
        if dtype not in self._pools:
            few = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).to(self.device, dtype)
            self._pools[dtype] = few.repeat(max(1, COLD // (dtype.itemsize * 2**20)))
        return self._pools[dtype]


def waiting(device: torch.device) -> Callable[[], None]:
    """What waits until a device is done."""
    module: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(module, "synchronize"):
        return lambda: None
    return lambda: module.synchronize(device) if device.type != "mps" else module.synchronize()


def settle(device: torch.device) -> None:
    """Bring the allocator to where it ends up in a process that runs for long.

    Before, it gives memory back and takes it anew in each run, or does not, depending on what was allocated earlier:
    the same model was seen to take 12 and 16 ms.
    """
    if device.type == "cpu":
        torch.empty(BLOCK, dtype=torch.uint8)


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds that pass; of one thread on a CPU those in which it runs, as other processes may want the CPU too."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def medians(runs: Sequence[Callable[[], Any]], device: torch.device, *, seconds: float = 2.0) -> list[float]:
    """Seconds of each of several runs, taken in turn: the median of as many times as fit, at least 5.

    Args:
        runs: what is timed.
        device: on which they run.
        seconds: how long it may take in all.
    """
    settle(device)
    wait, now = waiting(device), clock(device)
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    started = time.perf_counter()
    while len(times[0]) < REPEATS or (time.perf_counter() - started < seconds and len(times[0]) < MOST):
        for run, found in zip(runs, times, strict=True):
            wait()
            start = now()
            run()
            wait()
            found.append(now() - start)
    return [statistics.median(found) for found in times]


def _laid_out(flat: torch.Tensor, operand: Operand) -> torch.Tensor:
    back = sorted(range(len(operand.order)), key=operand.order.__getitem__)
    return flat.view(_sizes(operand)).permute(back).expand(operand.shape)


def _sizes(operand: Operand) -> tuple[int, ...]:
    """Sizes in the order of the memory, one position for a dim that is expanded."""
    return tuple(1 if d in operand.expanded else operand.shape[d] for d in operand.order)
