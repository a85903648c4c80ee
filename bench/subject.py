"""What the stage benches measure: an editor with one learned photo, and each stage with the editor's own arguments.

The stages are the reference path's; what the engine makes of them is measured by bench/edit.py.
"""

import copy
import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from torch import Tensor, nn

import forgedit.editor
import forgedit.engine.reference
import forgedit.learning
from bench.sd14 import RESOLUTION, sd14_model
from forgedit import Editor, Session, TuneConfig

DEMO = Path(forgedit.__file__).parent / "model" / "bundled"
PHOTO = DEMO / "demo.png"


@dataclass(frozen=True)
class Call:
    """A stage function and the arguments, by name, that the editor gave it; calling it repeats the stage."""

    function: Callable[..., Any]
    arguments: dict[str, Any]

    def __call__(self, **changes: Any) -> Any:
        """A generator is made anew from its seed each time, so that every call draws the same noise."""
        return self.function(**{name: _fresh(value) for name, value in (self.arguments | changes).items()})

    def in_float64(self, **changes: Any) -> Any:
        """The same in float64, on copies: what a result is compared with."""
        return self.function(**{name: in_double(_fresh(value)) for name, value in (self.arguments | changes).items()})


@dataclass(frozen=True)
class Subject:
    """model: as the rows name it; photo: RGB, pixels."""

    model: str
    editor: Editor
    photo: Image.Image

    @property
    def device(self) -> torch.device:
        return self.editor.model.alphas_cumprod.device

    @property
    def size(self) -> str:
        """Of the edited picture, pixels."""
        return "{}x{}".format(*self.photo.size)

    @cached_property
    def target(self) -> str:
        target: str = json.loads((DEMO / "demo.json").read_text(encoding="utf-8"))["target"]
        return target

    @cached_property
    def session(self) -> Session:
        """The photo learned in a few steps, enough to move every weight; made when a bench asks for it first, so that
        the benches of its own stages have a cold first call."""
        return self.editor.tune(self.photo, self._few_steps())

    def tune_call(self, stage: str) -> Call:
        """What a stage would be given by a short tune; the editor's weights are the originals afterwards."""
        return self.call(stage, lambda: self.editor.tune(self.photo, self._few_steps()))

    def edit_call(self, stage: str, **changes: Any) -> Call:
        """What a stage would be given by an edit with the editor's own settings, but for the changes."""
        config = replace(self.editor.defaults.edit, **changes)
        fresh = replace(self.session, prompts={})  # the editor spares itself what it did for a session before
        return self.call(stage, lambda: self.editor.edit(fresh, self.target, config))

    def call(self, stage: str, run: Callable[[], object]) -> Call:
        """The first call of a stage function that the editor would make while `run` runs, which ends there."""
        users = forgedit.learning, forgedit.editor, forgedit.engine.reference
        user = next(module for module in users if hasattr(module, stage))
        function = getattr(user, stage)
        with mock.patch.object(user, stage, side_effect=_Reached) as spy, suppress(_Reached):
            run()
        return Call(function, inspect.signature(function).bind(*spy.call_args.args, **spy.call_args.kwargs).arguments)

    def _few_steps(self) -> TuneConfig:
        return self.editor.defaults.tune.replace(num_steps=2, batch_size=1, caption="a photo of a blue heart")


def bundled(device: str, numerics: str = "reference") -> Subject:
    """The bundled model, and the photo that comes with it. numerics: the editor's"""
    editor = Editor.from_pretrained("bundled", device=device, numerics=numerics)
    return Subject("bundled", editor, Image.open(PHOTO).convert("RGB"))


def sd14(device: str, numerics: str = "reference") -> Subject:
    """Stable Diffusion 1.4's size; the photo is the bundled one, enlarged. numerics: the editor's"""
    photo = Image.open(PHOTO).convert("RGB").resize((RESOLUTION, RESOLUTION))
    return Subject("sd14", Editor(sd14_model(device), numerics=numerics), photo)


def distance(made: Tensor, truth: Tensor) -> float:
    """The largest difference as a share of the truth's largest value; not a number if either holds one."""
    return ((made.double() - truth.double()).abs().max() / truth.abs().max()).item()


class _Reached(Exception):
    """The editor has come to the stage asked for."""


def _fresh(value: Any) -> Any:
    return torch.Generator().manual_seed(value.initial_seed()) if isinstance(value, torch.Generator) else value


def in_double(value: Any) -> Any:
    """Tensors and modules as float64 copies, a module taking inputs of any precision; anything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if not isinstance(value, nn.Module):
        return value
    twin = copy.deepcopy(value).double()
    for module in (twin, *twin.children()):  # noise is drawn in float32, whatever the model's dtype
        module.register_forward_pre_hook(_double_inputs, with_kwargs=True)
    return twin


def _double_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return tuple(map(in_double, args)), {name: in_double(value) for name, value in kwargs.items()}
