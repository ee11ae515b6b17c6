"""Sees the op calls of a model as `torch.export` would: before autograd, autocast and decompositions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._dispatch.python import enable_pre_dispatch, enable_python_dispatcher
from torch._subclasses.schema_check_mode import SchemaCheckMode


class PreDispatch(SchemaCheckMode):  # type: ignore[no-untyped-call]
    """A dispatch mode at the pre-dispatch key. The base class is the one that torch lets stand there on its own."""

    def __init__(self) -> None:
        super().__init__()
        self._dispatch_key = torch.DispatchKey.PreDispatch

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled meanwhile, and the guard against it costs more than a call."""
        return False

    @contextmanager
    def seeing(self) -> Iterator[None]:
        """See the calls of the block."""
        with (
            torch.compiler.set_stance("force_eager"),
            _as_if_exporting(),
            enable_pre_dispatch(),
            enable_python_dispatcher(),
            self,
        ):
            yield


@contextmanager
def _as_if_exporting() -> Iterator[None]:
    """Let models that ask take the path they take for `torch.export`: one that does not depend on values."""
    before = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
    torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = before
