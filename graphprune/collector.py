"""Python's cyclic collector, paused while many small records are made that all stay.

A full collection walks everything the process holds, PyTorch's modules included, and finds nothing; one such walk takes
longer than coupling a network.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No automatic collection during the block, or the call of the function it decorates."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
