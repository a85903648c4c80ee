"""What a product relies on beside the edits: nothing printed, nothing global touched, names documented and typed."""

import dataclasses
import inspect
import logging
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageFile

import forgedit
from forgedit import EditConfig, TuneConfig

EVERYTHING = """
import logging, sys
from forgedit import EditConfig, Editor, SweepConfig, TuneConfig

editor = Editor.from_pretrained(sys.argv[1])
session = editor.tune(sys.argv[2], TuneConfig(num_steps=1, batch_size=1), target="A photo of a dog")
again = editor.tune(sys.argv[2], TuneConfig(num_steps=1, batch_size=1))
session.save(sys.argv[3] + "/a")
session.save(sys.argv[3] + "/b", "int4")
session = editor.load_session(sys.argv[3] + "/b")
assert session.edit("a dog " * 30, EditConfig(num_steps=1)).cut  # the library warns of that, to whom listens
list(session.sweep("a dog", SweepConfig(strategies=("none",), gammas=(1.0,), num_steps=1)))
editor.info()
logging.basicConfig(stream=sys.stdout)
session.edit("a dog " * 31, EditConfig(num_steps=1))
"""


def test_the_library_prints_nothing(folder, photo, tmp_path):
    """In a process of its own, as under pytest nothing reaches the terminal. The last edit is heard, by a listener."""
    command = [sys.executable, "-c", EVERYTHING, str(folder), str(photo), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    # bitsandbytes, where it is installed, says when it is imported (diffusers does) that it misses its kernels
    ours = [line for line in done.stderr.splitlines() if "kernels-community" not in line]
    assert (done.returncode, ours) == (0, [])
    (line,) = done.stdout.splitlines()
    assert line.startswith("WARNING:forgedit:the prompt is longer than 77 tokens; cut: ")


def test_the_log_has_no_handler_but_the_one_that_does_nothing():
    assert [type(handler) for handler in logging.getLogger("forgedit").handlers] == [logging.NullHandler]


def world():
    """What other code in the process could notice."""
    state = np.random.get_state()
    return {
        "torch's random numbers": torch.get_rng_state().tolist(),
        "numpy's random numbers": (state[1].tolist(), state[2]),
        "Python's random numbers": random.getstate(),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "warnings": list(warnings.filters),
        "loggers": [logging.getLogger(name).handlers[:] for name in (None, "forgedit", "transformers", "diffusers")],
        "truncated pictures": ImageFile.LOAD_TRUNCATED_IMAGES,
        "hooks": (sys.excepthook, sys.displayhook),
    }


def test_nothing_global_is_touched(editor, photo, tmp_path):
    before = world()
    session = editor.tune(photo, TuneConfig(num_steps=1, batch_size=1))
    session.save(tmp_path / "a", "int8")
    editor.load_session(tmp_path / "a").edit("a dog", EditConfig(num_steps=1))
    after = world()
    assert [name for name in before if before[name] != after[name]] == []


def test_the_world_is_looked_at():
    before = world()
    torch.rand(1)
    np.random.rand()
    random.random()
    after = world()
    assert [name for name in before if before[name] != after[name]] == [name for name in before if "random" in name]


PUBLIC = {name: getattr(forgedit, name) for name in forgedit.__all__}
CLASSES = {name: kind for name, kind in PUBLIC.items() if inspect.isclass(kind)}
METHODS = {
    f"{name}.{member}": getattr(value, "__func__", getattr(value, "fget", value))
    for name, kind in CLASSES.items()
    for member, value in vars(kind).items()
    if not member.startswith("_") and (inspect.isroutine(value) or isinstance(value, property | classmethod))
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_class_is_documented(name):
    """A dataclass without a docstring has one all the same: its signature."""
    words = vars(CLASSES[name])["__doc__"]
    assert words and not words.startswith(f"{name}(")


@pytest.mark.parametrize("name", [name for name in CLASSES if dataclasses.is_dataclass(CLASSES[name])])
def test_every_field_is_documented(name):
    kind = CLASSES[name]
    assert not [field.name for field in dataclasses.fields(kind) if field.name not in kind.__doc__]


@pytest.mark.parametrize("name", METHODS)
def test_every_public_method_is_documented(name):
    method = METHODS[name]
    assert method.__doc__
    parameters = [parameter for parameter in inspect.signature(method).parameters if parameter not in ("self", "cls")]
    assert not [parameter for parameter in parameters if parameter not in method.__doc__]
    if "raise " in inspect.getsource(method):
        assert "Raises:" in method.__doc__


def test_the_public_names():
    assert {"Editor.from_pretrained", "Editor.from_pipe", "Editor.tune", "Session.save"} <= METHODS.keys()
    others = {name for name in PUBLIC if name not in CLASSES}
    assert others == {"STRATEGIES"}
    assert all(issubclass(kind, forgedit.ForgeditError) for kind in CLASSES.values() if issubclass(kind, Exception))


def test_types_are_shipped():
    assert (Path(forgedit.__file__).parent / "py.typed").is_file()
