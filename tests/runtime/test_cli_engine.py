"""The command line's way to the engine: numerics, memory, profile, autotune."""

import json
from importlib import import_module

import numpy as np
import pytest
from PIL import Image

from forgedit import autotune
from forgedit.profile import roofline
from forgedit_kernels import table

ATTENTION = import_module("forgedit_kernels.attention")  # the package's own name is the op
SESSION_EDIT = ("a dog", "--out", "o", "--num-steps", 2)
QUICK_PROFILE = ("--edits", 1, "--traced-steps", 1, "--batches", 1, "--num-steps", 1, "--tune-num-steps", 1)


@pytest.fixture
def own_tables(tmp_path, monkeypatch):
    """No table of the user's or ours, and no waiting for steady seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(autotune, "SECONDS", 0.0)
    table.forget_tables()
    yield
    table.forget_tables()


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_numerics_change_the_arithmetic_and_are_reported(run, session_file, tmp_path):
    pictures = {}
    for numerics in ("reference", "exact", "fast", "fast-float16"):
        words = ("edit", session_file, "a dog", "--out", numerics, "--num-steps", 4, "--numerics", numerics)
        assert run(*words)[0] == 0
        report = json.loads((tmp_path / "work" / numerics / "report.json").read_text())
        assert report["numerics"] == numerics
        pictures[numerics] = pixels(tmp_path / "work" / numerics / "edit.png")
    off = {name: np.abs(picture - pictures["reference"]).max() for name, picture in pictures.items()}
    assert off["exact"] <= 1 < off["fast"]
    assert off["fast-float16"] < off["fast"] < 64
    assert run("edit", session_file, *SESSION_EDIT)[0] == 0
    assert json.loads((tmp_path / "work/o/report.json").read_text())["numerics"] == "exact"


def test_memory_decides_how_many_edits_go_together(run, session_file, editor, tmp_path):
    words = ("sweep", session_file, "a dog", "--strategies", "none", "--num-steps", 3, "--json", "--out")
    shape = editor.model.latent_shape(48, 16)
    editor.edit(editor.load_session(session_file), "a dog")  # lays the engine out
    held = editor._path.plan(shape).weights
    steps, pictures = {}, {}
    for name, memory in (("many", "8GB"), ("few", f"{held + 1_600_000}")):
        code, events, err = run(*words, name, "--memory", memory)
        assert code == 0, err
        steps[name] = [event["stage"] for event in events if event["event"] == "step"].count("sample")
        pictures[name] = [pixels(path) for path in sorted((tmp_path / "work" / name / "sweep").iterdir())]
    assert steps["many"] == 3 and steps["few"] in (6, 12)
    assert np.array_equal(pictures["many"], pictures["few"])


def test_too_little_memory_fails_and_leaves_nothing(run, session_file, tmp_path):
    code, out, err = run("edit", session_file, *SESSION_EDIT, "--memory", "1MB")
    assert (code, out) == (1, "") and "one edit of 4 by 12 latents needs" in err
    assert not list((tmp_path / "work").iterdir())


def test_memory_plans_how_a_photo_is_learned(run, photo, tmp_path):
    words = ("tune", photo, "--caption", "a cat", "--num-steps", "1", "--batch-size", "4", "--save", "s.safetensors")
    code, out, err = run(*words, "--memory", "8GB")
    assert code == 0, err
    assert "tune: mode exact, 4 rows at once; predicted at most: " in out and "of 8.00 GB, some " in out
    assert "(mode exact, 4 rows at once)" in out
    code, out, err = run(*words, "--mode", "lean", "--memory", "1MB")
    assert code == 1 and "learning this photo needs at least" in err
    code, out, err = run(*words, "--mode", "quick")
    assert code == 2 and "expected one of: auto, exact, fast, lean" in err


def test_profile(run, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "SIZES", {"cpu": ((64,), 2**16)})  # products and copies that take no time
    code, events, _ = run("profile", photo, "a dog", "--caption", "a cat", "--out", "p", *QUICK_PROFILE, "--json")
    assert code == 0
    made = sorted(event["path"] for event in events if event["event"] == "file")
    assert made == sorted(f"p/{path.name}" for path in (tmp_path / "work/p").iterdir())
    assert {"p/profile.md", "p/ops.json", "p/trace.json", "p/roofline.png"} <= set(made)
    stages = {event["stage"] for event in events if event["event"] == "step"}
    assert {"tune", "sample", "decode"} <= stages
    record = json.loads((tmp_path / "work/p/ops.json").read_text())
    assert any(row["flops"] for row in record["phases"])  # counted on the plain path


def test_autotune_writes_the_table_that_the_next_run_follows(run, session_file, own_tables, monkeypatch):
    code, events, _ = run("autotune", "--sizes", "48x16", "--json")
    (path,) = [event["path"] for event in events if event["event"] == "table"]
    measured = [event for event in events if event["event"] == "measured"]
    with open(path, encoding="utf-8") as file:
        written = json.load(file)
    assert code == 0
    assert {(event["op"], event["shape"]) for event in measured} == {
        (op, key) for op, entries in written["ops"].items() for key in entries
    }
    assert {"attention", "merge_weights", "group_norm_silu"} <= written["ops"].keys()
    calls = []
    real = ATTENTION.attention_reference
    monkeypatch.setattr(
        ATTENTION, "attention_reference", lambda *args, **named: calls.append(1) or real(*args, **named)
    )
    seen = {}
    for backend in ("sdpa", "reference"):
        for entry in written["ops"]["attention"].values():
            entry["backend"] = backend
        with open(path, "w", encoding="utf-8") as file:
            json.dump(written, file)
        table.forget_tables()  # a new process reads it anew
        calls.clear()
        assert run("edit", session_file, *SESSION_EDIT)[0] == 0
        seen[backend] = len(calls)
    assert seen["sdpa"] == 0 < seen["reference"]


def test_a_damaged_table_is_named(run, session_file, own_tables):
    path = table.user_folder() / table.table_name(autotune.torch.device("cpu"))
    path.parent.mkdir(parents=True)
    path.write_text("{")
    code, _, err = run("edit", session_file, *SESSION_EDIT)
    assert code == 1 and str(path) in err and "'forgedit autotune' writes a new one" in err


WRONG = {
    "unknown numerics": (["edit", "PHOTO", "a dog", "--numerics", "quick"], "invalid choice: 'quick'"),
    "the method's path and another's scheduler": (
        ["edit", "SESSION", "a dog", "--numerics", "reference", "--scheduler", "unipc"],
        "numerics 'reference' takes 'ddim' alone",
    ),
    "no amount of memory": (["edit", "SESSION", "a dog", "--memory", "lots"], "cannot read 'lots'"),
    "no memory": (["edit", "SESSION", "a dog", "--memory", "0GB"], "less than one byte"),
    "profile: no target": (["profile", "PHOTO", " "], "target prompt is empty"),
    "profile: no photo": (["profile", "none.png", "a dog"], "none.png"),
    "profile: a session": (["profile", "SESSION", "a dog"], "cannot read the photo"),
    "profile: no edits": (["profile", "PHOTO", "a dog", "--edits", "0"], "edits: 0 is out of range"),
    "profile: batches": (["profile", "PHOTO", "a dog", "--batches", "1,many"], "'1,many' cannot be read"),
    "autotune: one side": (["autotune", "--sizes", "512"], "cannot read '512'"),
    "autotune: no side": (["autotune", "--sizes", "0x16"], "size 0 by 16 cannot be edited"),
    "autotune: a size between": (["autotune", "--sizes", "50x16"], "expected multiples of 16 pixels"),
    "autotune: no edits": (["autotune", "--edits", "0"], "--edits 0 is out of range"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(run, name, photo, session_file, tmp_path):
    words, message = WRONG[name]
    places = {"PHOTO": photo, "SESSION": session_file}
    code, out, err = run(*(places.get(word, word) for word in words))
    assert (code, out) == (2, "") and message in err.splitlines()[-1]
    assert not list((tmp_path / "work").iterdir())
