"""ONNX, by torch's exporter; run by onnxruntime to compare."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from graphprune.errors import ArtefactError
from graphprune.program import Program
from graphprune.trace import Inputs

NEEDS = ("onnx", "onnxscript", "onnxruntime")
"""The packages of `graphprune[export]`."""
EMBEDDED = 1_500_000_000
"""Bytes of weights above which they get a file of their own: one ONNX file holds no more than 2 GiB."""


def write(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write an exported program as ONNX.

    Raises:
        ArtefactError: a package is missing, or the exporter does not know an op.
    """
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ArtefactError(f'ONNX needs {", ".join(missing)}; type: pip install "graphprune[export]"')
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(program, (), path, dynamo=True, external_data=size > EMBEDDED, verbose=False)
    except Exception as error:
        cause: BaseException = error  # torch's message is about its own steps, and its cause about the model
        while cause.__cause__ is not None:
            cause = cause.__cause__
        said = str(cause).strip().splitlines()
        raise ArtefactError(
            f"torch cannot export this model to ONNX: {said[0] if said else type(error).__name__}"
        ) from error


def runner(path: Path, program: Program) -> Callable[[Inputs], list[torch.Tensor]]:
    """Runs the file with onnxruntime.

    Raises:
        ArtefactError: onnxruntime does not take it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ArtefactError(f"onnxruntime does not take the file: {str(error).splitlines()[0]}") from error
    wanted = {given.name for given in session.get_inputs()}
    names = [value.name for value in program.inputs]

    def run(inputs: Inputs) -> list[torch.Tensor]:
        arrays = [t.detach().cpu().contiguous().numpy() for t in inputs.tensors()]
        given = {name: array for name, array in zip(names, arrays, strict=True) if name in wanted}
        return [torch.from_numpy(array) for array in session.run(None, given)]

    return run
