"""Models by name: from timm, torchvision, Hugging Face, a Python file or an artefact."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from graphprune.artefact import Artefact
from graphprune.errors import InputError, nearest
from graphprune.trace import Inputs

PRETRAINED, RANDOM = "pretrained", "random"
FORMS = "timm:NAME, torchvision:NAME, hf:NAME-OR-DIR, FILE.py:FACTORY, or the directory of an artefact"
TOKENS = 16
"""Length of the text that a language model is traced with."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model, and what is known of its inputs.

    Attributes:
        name: how it was asked for.
        model: in eval mode.
        inputs: an example; None where there is none and it has to be given.
        mean, std: of the colours of images it was trained on.
    """

    name: str
    model: nn.Module
    inputs: Inputs | None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def example(self) -> Inputs:
        """The example inputs.

        Raises:
            InputError: they have to be given.
        """
        if self.inputs is None:
            raise InputError(
                f"{self.name} does not say what its inputs are; give an example: --input 1x3x224x224, int:1x16 "
                "or FILE.py:FUNCTION"
            )
        return self.inputs


def load(spec: str, weights: str | None = None, given: Sequence[str] = (), original: nn.Module | None = None) -> Loaded:
    """The model that `spec` names.

    Args:
        spec: see FORMS.
        weights: a file of a state dict (safetensors, or what `torch.save` wrote), "pretrained" or "random"; with None
            what the source gives: those of Hugging Face, and random ones from timm and torchvision, always the same.
        given: example inputs, one text each, see `example`; without any, those of the source.
        original: for an artefact, an instance of its class to load it into; with None it is loaded without its class.
    Raises:
        InputError: there is no such model, or the weights do not fit.
        ArtefactError: the directory holds no artefact that can be used.
    """
    source = spec.partition(":")[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)  # random weights are the same ones in each command
        found = _found(spec, weights, original)
    if weights not in (None, PRETRAINED, RANDOM):
        _put(found.model, Path(weights or ""))
    elif weights is not None and (source not in _SOURCES or Path(spec).is_dir()):
        raise InputError(f"--weights {weights} goes with timm, torchvision and hf models; for {spec} name a file")
    found.model.eval()
    return replace(found, inputs=example(given)) if given else found


def _found(spec: str, weights: str | None, original: nn.Module | None) -> Loaded:
    """The model, from where it is.

    Raises:
        InputError: the text is of no form.
    """
    source, _, name = spec.partition(":")
    if Path(spec).is_dir():
        return _artefact(spec, original)
    if source in _SOURCES and name:
        return _SOURCES[source](spec, name, weights)
    if ".py:" in spec:
        return _from_file(spec)
    raise InputError(f"no model {spec!r}: it is {FORMS}")


# -- sources ----------------------------------------------------------------------------------------------------------


def _noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _timm(spec: str, name: str, weights: str | None) -> Loaded:
    timm: Any = importlib.import_module("timm")
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    model = timm.create_model(name, pretrained=weights == PRETRAINED)
    found = timm.data.resolve_model_data_config(model)
    return Loaded(spec, model, Inputs.of(_noise(1, *found["input_size"])), tuple(found["mean"]), tuple(found["std"]))


def _torchvision(spec: str, name: str, weights: str | None) -> Loaded:
    models: Any = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise InputError(f"torchvision has no model {name!r}{nearest(name, models.list_models())}")
    model = models.get_model(name, weights="DEFAULT" if weights == PRETRAINED else None)
    size = 299 if name == "inception_v3" else 224
    return Loaded(spec, model, Inputs.of(_noise(1, 3, size, size)))


def _hugging_face(spec: str, name: str, weights: str | None) -> Loaded:
    transformers: Any = importlib.import_module("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind: Any = getattr(transformers, (config.architectures or [""])[0], None) or transformers.AutoModel
        make = getattr(kind, "_from_config", None) or kind.from_config
        model: nn.Module = make(config) if weights == RANDOM else kind.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        what = str(error).strip().splitlines()[0]
        raise InputError(f"{spec}: {what}; with --weights random its config is enough") from error
    return Loaded(spec, model, _inputs_of(model, config))


def _inputs_of(model: Any, config: Any) -> Inputs | None:
    """What a model of transformers is traced with, where its config says enough."""
    main = getattr(model, "main_input_name", "")
    if main == "pixel_values" and isinstance(getattr(config, "image_size", None), int):
        size = config.image_size
        return Inputs.of({main: _noise(1, getattr(config, "num_channels", 3), size, size)})
    if main == "input_ids" and isinstance(getattr(config, "vocab_size", None), int):
        generator = torch.Generator().manual_seed(0)
        return Inputs.of({main: torch.randint(config.vocab_size, (1, TOKENS), generator=generator)})
    return None


_SOURCES: Mapping[str, Callable[[str, str, str | None], Loaded]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _hugging_face,
}


def _from_file(spec: str) -> Loaded:
    made = called(spec)
    inputs = None
    if isinstance(made, tuple) and len(made) == 2:
        made, inputs = made[0], Inputs.of(made[1])
    if not isinstance(made, nn.Module):
        raise InputError(f"{spec} gives {type(made).__name__}; it gives a module, or a module and example inputs")
    return Loaded(spec, made, inputs)


def _artefact(spec: str, original: nn.Module | None) -> Loaded:
    found = Artefact.read(spec)
    inputs = [_like(i) for i in found.structure.inputs]
    named = {str(i["name"]): tensor for i, tensor in zip(found.structure.inputs, inputs, strict=True)}
    return Loaded(spec, found.load(original), Inputs.of(tuple(named.values())))


def _like(described: Mapping[str, Any]) -> torch.Tensor:
    dtype = getattr(torch, str(described["dtype"]), None)
    shape = [int(n) for n in described["shape"]]
    if not isinstance(dtype, torch.dtype) or math.prod(shape) > 1 << 28 or any(n < 0 for n in shape):
        raise InputError(f"the artefact's input {described.get('name')!r} cannot be made; give one with --input")
    return _noise(*shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


# -- files ------------------------------------------------------------------------------------------------------------


def attribute(spec: str) -> Any:
    """What `FILE.py:NAME` names.

    Raises:
        InputError: there is no such file or name, or the file cannot be imported.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file).resolve()
    if not path.is_file():
        raise InputError(f"{spec}: there is no file {file}")
    module = _imported(path)
    if not hasattr(module, name):
        known = [n for n in vars(module) if not n.startswith("_")]
        raise InputError(f"{file} has no {name!r}{nearest(name, known)}")
    return getattr(module, name)


def called(spec: str) -> Any:
    """What `FILE.py:NAME` names, called where it is a function or class; a module stays as it is.

    Raises:
        InputError: it is not there, or fails.
    """
    found = attribute(spec)
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        return found()
    except Exception as error:
        raise InputError(f"{spec}() fails: {type(error).__name__}: {error}") from error


def _imported(path: Path) -> ModuleType:
    """The module of a file, imported once, with the files beside it in reach.

    Raises:
        InputError: its code fails.
    """
    name = path.stem
    known = sys.modules.get(name)
    if known is not None:
        if getattr(known, "__file__", None) == str(path):
            return known
        name = f"{name}_{abs(hash(path)):x}"  # another module has that name
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise InputError(f"{path.name} is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(found)
    sys.path.insert(0, str(path.parent))
    try:
        with torch.random.fork_rng():  # what follows draws the same whether or not the file was imported before
            torch.manual_seed(0)
            found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{path.name} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _put(model: nn.Module, file: Path) -> None:
    """Load a file of weights; no code in it is run.

    Raises:
        InputError: it is not there, is none, or does not fit.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"--weights {file}: {type(error).__name__}: {_first(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise InputError(f"--weights {file}: it holds no state dict")
    if state and all(name.startswith("module.") for name in state):  # of DataParallel
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        wrong = [line.strip() for line in str(error).splitlines()[1:4]]
        raise InputError(f"--weights {file} do not fit {type(model).__name__}: {' '.join(wrong)}") from error


def _first(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def example(given: Sequence[str]) -> Inputs:
    """Example inputs from texts: a shape such as 1x3x224x224, `int:1x16` for tokens, or `FILE.py:FUNCTION`.

    Raises:
        InputError: a text is none of these.
    """
    if len(given) == 1 and ".py:" in given[0]:
        return Inputs.of(called(given[0]))
    tensors = []
    for text in given:
        kind, _, shape = text.rpartition(":")
        parts = shape.split("x")
        if kind not in ("", "int", "float") or not all(p.isdigit() and int(p) > 0 for p in parts):
            raise InputError(f"--input {text}: it is a shape such as 1x3x224x224 or int:1x16, or FILE.py:FUNCTION")
        sizes = [int(p) for p in parts]
        tensors.append(torch.ones(sizes, dtype=torch.long) if kind == "int" else _noise(*sizes))
    return Inputs.of(tuple(tensors))
