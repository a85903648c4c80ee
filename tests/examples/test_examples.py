"""The example programs run as they are, on the bundled model, with few steps."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from forgedit.model.load import BUNDLED

EXAMPLES = Path(__file__).parents[2] / "examples"
FEW = ("--tune-steps", "1", "--num-steps", "1")
TARGET = json.loads((BUNDLED / "demo.json").read_text())["target"]


@pytest.fixture
def photo(tmp_path):
    """A wide one, to see that its size comes back."""
    with Image.open(BUNDLED / "demo.png") as image:
        image.resize((96, 80)).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a program as its own; gives exit code, stdout and stderr."""

    def run(name, *words):
        monkeypatch.setattr("sys.argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


def test_embed(run, photo, tmp_path):
    code, out, err = run("embed.py", photo, TARGET, tmp_path / "edit.png", *FEW)
    assert (code, err) == (0, "")
    assert [line.split()[2] for line in out.splitlines()[:-1]] == [
        "caption", "encode", "tune", "blend", "forget", "sample", "decode",
    ]  # fmt: skip
    assert Image.open(tmp_path / "edit.png").size == (96, 80)


@pytest.mark.parametrize(
    "wrong, code, message",
    [
        ({"target": " "}, 2, "choose another photo or target: the target prompt is empty"),
        ({"photo": "none.jpg"}, 2, "choose another photo or target: cannot read the photo"),
        ({"--timeout": "0.01"}, 3, "not finished within 0.01 s"),
        ({"--model": "nowhere/at/all"}, 1, "nowhere"),
        ({"out": "no/folder/edit.png"}, 1, "No such file or directory"),
    ],
    ids=["target", "photo", "timeout", "model", "out"],
)
def test_embed_says_what_is_wrong(run, photo, tmp_path, wrong, code, message):
    words = {"photo": photo, "target": TARGET, "out": tmp_path / "edit.png", "--model": "bundled", "--timeout": "60"}
    words |= wrong
    if "out" in wrong:
        words["out"] = tmp_path / wrong["out"]
    flags = [word for name in ("--model", "--timeout") for word in (name, words[name])]
    ended, _, err = run("embed.py", words["photo"], words["target"], words["out"], *flags, *FEW)
    (line,) = err.splitlines()
    assert ended == code and message in line and not (tmp_path / "edit.png").exists()


def test_sweep(run, photo, tmp_path):
    words = ("sweep.py", photo, TARGET, tmp_path / "out", "--strategies", "none,encoderattn", "--gammas", "1,1.2", *FEW)
    code, out, err = run(*words)
    assert (code, err) == (0, "") and "learned" in out
    names = [f"{strategy}-{gamma}-0.png" for strategy in ("encoderattn", "none") for gamma in ("1", "1.2")]
    pictures = {path.name: Image.open(path) for path in (tmp_path / "out").glob("*.png")}
    assert pictures.pop("contact_sheet.png").width > 3 * 192
    assert sorted(pictures) == names and {picture.size for picture in pictures.values()} == {(96, 80)}
    before = np.asarray(pictures["none-1-0.png"])
    code, out, _ = run(*words)
    assert code == 0 and "learned" not in out  # the session was kept
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/none-1-0.png")), before)


def test_batch_folder(run, photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "b.jpg").write_bytes(photo.read_bytes())
    (folder / "a.png").write_bytes((BUNDLED / "demo.png").read_bytes())
    (folder / "cut.jpg").write_bytes(photo.read_bytes()[:500])
    (folder / "notes.txt").write_text("no photo")
    code, out, err = run("batch_folder.py", folder, TARGET, tmp_path / "out", *FEW, "--num-steps", "2")
    assert (code, err) == (0, "") and "2 edited, 2 skipped" in out
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [entry["photo"] for entry in report["edited"]] == ["a.png", "b.jpg"]
    assert {entry["photo"]: entry["why"].partition(":")[0] for entry in report["skipped"]} == {
        "cut.jpg": f"cannot read the photo '{folder / 'cut.jpg'}'",
        "notes.txt": f"cannot read the photo '{folder / 'notes.txt'}'",
    }
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "out").glob("*.png")}
    assert sizes == {"a.png.png": Image.open(BUNDLED / "demo.png").size, "b.jpg.png": (96, 80)}
    kept = np.asarray(Image.open(tmp_path / "out/a.png.png")) == np.asarray(Image.open(BUNDLED / "demo.png"))
    assert 0.1 < kept.all(axis=2).mean() < 1 and all(entry["why"] for entry in report["edited"])


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"embed.py", "sweep.py", "batch_folder.py"}
