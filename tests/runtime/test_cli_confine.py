"""The rest of the photo on the command line: kept byte for byte, masks found and given, what is refused and when."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import forgedit.run
from forgedit.config import ChooseConfig
from forgedit.quality.change_mask import ChangeMask
from forgedit.quality.composite import fit_mask
from forgedit.quality.page_of_run import page_of_run, repeat_command
from tests.runtime.test_choose import ColourScorer
from tests.runtime.test_cli import files

FOUND = ["edit.png", "edit_whole.png", "heat.png", "mask.png", "original.png", "page.html", "report.json"]


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def report_of(folder) -> dict:
    return json.loads((folder / "report.json").read_text())


def blob(height: int, width: int) -> torch.Tensor:
    heat = torch.zeros(height, width)
    heat[4:12, 8:30] = 1
    return heat


@pytest.fixture
def finds(monkeypatch):
    """Gives a function: from then on the mask that is cut from this heat is found for every edit."""

    def find(heat):
        found = lambda editor, session, edit: ChangeMask.found(heat(*reversed(session.source.size)))  # noqa: E731
        monkeypatch.setattr("forgedit.editor.Editor.change_mask", found)

    return find


def check_kept(folder, photo: Image.Image, mask: np.ndarray, photo_size=(60, 30)) -> None:
    """The photo's bytes outside the mask, the edit's deep inside it, and files that say the same."""
    edit, whole, original = (read(folder / name) for name in ("edit.png", "edit_whole.png", "original.png"))
    assert edit.shape == whole.shape == original.shape == np.asarray(photo).shape
    assert np.array_equal(original, np.asarray(photo))
    assert np.array_equal(edit[~mask], original[~mask]) and (edit[mask] != original[mask]).any()
    assert (whole[~mask] != original[~mask]).any()  # there was something to put back
    assert np.array_equal(read(folder / "mask.png"), mask * np.uint8(255)) and mask.any() and not mask.all()
    change = report_of(folder)["change"]
    assert change["is_kept"] and change["refused"] == "" and change["mask"] == "mask.png"


def test_every_edit_says_where_it_changed(run, session_file, tmp_path):
    code, events, _ = run("edit", session_file, "a dog", "--out", "o", "--json")
    out = tmp_path / "work/o"
    report = report_of(out)
    change = report["change"]
    assert code == 0 and "keep_outside" not in report and "edit_whole.png" not in files(out)
    assert not change["is_kept"] and (change["mask"], change["heat"]) == ("mask.png", "heat.png")
    assert read(out / "mask.png").shape == read(out / "heat.png").shape == (30, 60)
    assert report["seconds"]["mask"] > 0 and page_of_run(report, out).change.share == change["share"]
    assert [event["share"] for event in events if event["event"] == "change"] == [change["share"]]


def test_kept_outside_what_is_found(run, photo, finds, tmp_path):
    finds(blob)
    code, text, err = run("edit", photo, "a dog", "--out", "o", "--keep-outside", "--feather", 0)
    out = tmp_path / "work/o"
    assert code == 0, err
    assert files(out) == FOUND
    check_kept(out, Image.open(photo), fit_mask(ChangeMask.found(blob(16, 48)).mask, (60, 30)))
    report = report_of(out)
    assert report["the_edit"]["file"] == "edit.png" and report["edits"][0]["file"] == "edit_whole.png"
    assert report["the_edit"]["psnr_to_original"] > report["edits"][0]["psnr_to_original"]
    page = page_of_run(report, out)
    assert page.change.is_kept and page.edit.picture == out / "edit.png" and len(page.sweep) == 1
    assert "o/edit.png" in text and "the photo's own pixels elsewhere" in text
    mask = read(out / "mask.png") > 0
    assert np.array_equal(read(out / "edit.png")[mask], read(out / "edit_whole.png")[mask])  # no feather


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_outside_is_the_upright_photo_byte_for_byte(run, tmp_path, mode, orientation):
    """A photo of another size than the model's, turned by its EXIF, transparent in places."""
    size, box = (70, 44), (13, 5, 30, 37)
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), dtype=np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "photo.png", exif=exif)
    rectangle = ",".join(map(str, box))
    code, _, err = run("edit", tmp_path / "photo.png", "a dog", "--out", "o", "--rectangle", rectangle)
    assert code == 0, err
    inside = np.zeros(size[::-1], dtype=bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    check_kept(tmp_path / "work/o", upright, inside)
    assert report_of(tmp_path / "work/o")["change"]["share"] == inside.mean()
    assert "heat" not in report_of(tmp_path / "work/o")["change"] and not (tmp_path / "work/o/heat.png").exists()


def test_a_session_with_its_photo_and_a_mask(run, photo, session_file, tmp_path):
    mask = np.zeros((60, 120), dtype=np.uint8)
    mask[12:36, 20:80] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = ("edit", session_file, "a dog", "--mask", tmp_path / "mask.png", "--photo", photo)
    code, _, err = run(*words, "--out", "o")
    assert code == 0, err
    out = tmp_path / "work/o"
    check_kept(out, Image.open(photo), mask[::2, ::2] > 0)
    asked = {"mask": str(tmp_path / "mask.png"), "photo": str(photo)}
    assert report_of(out)["keep_outside"] == asked
    again = shlex.split(repeat_command(report_of(out), is_session=True))[1:]
    assert run(*again, "--out", "p")[0] == 0
    assert (tmp_path / "work/p/edit.png").read_bytes() == (out / "edit.png").read_bytes()
    whole = out / "mask.png"  # what a run wrote is taken by the next one
    assert run(*words[:3], "--mask", whole, "--photo", photo, "--out", "q")[0] == 0
    assert (tmp_path / "work/q/edit.png").read_bytes() == (out / "edit.png").read_bytes()


def test_the_command_repeats_what_was_kept(run, photo, finds, tmp_path):
    finds(blob)
    for words in (["--keep-outside", "--feather", 3], ["--rectangle", "3,4,50,20"]):
        assert run("edit", photo, "a dog", "--out", "a", *words)[0] == 0
        again = shlex.split(repeat_command(report_of(tmp_path / "work/a")))[1:]
        assert run(*again, "--out", "b")[0] == 0
        first, second = ((tmp_path / "work" / name / "edit.png").read_bytes() for name in "ab")
        assert first == second


@pytest.mark.parametrize(
    ("heat", "message"),
    [(torch.zeros, "the mask is empty"), (lambda h, w: 1 - torch.eye(h, w) / 2, "the mask covers 97.9%")],
    ids=["nothing", "nearly everything"],
)
def test_a_refused_mask(run, session_file, photo, finds, tmp_path, heat, message):
    """The whole edit is not given out for one that kept the rest; without the wish it is a fact."""
    finds(heat)
    out = tmp_path / "work/o"
    assert run("edit", session_file, "a dog", "--out", "o")[0] == 0
    change = report_of(out)["change"]
    assert message in change["refused"] and not change["is_kept"] and "warnings" not in report_of(out)
    code, _, err = run("edit", session_file, "a dog", "--out", "o", "--keep-outside", "--photo", photo)
    assert code == 1 and message in err and "the whole edit is o/edit_whole.png" in err
    assert files(out) == [name for name in FOUND if name != "edit.png"]
    report = report_of(out)
    assert report["the_edit"]["file"] == "edit_whole.png" and not report["change"]["is_kept"]
    assert message in page_of_run(report, out).warnings[0] and message in (out / "page.html").read_text()


def test_a_demo_keeps_the_rest(run, finds, photo, tmp_path):
    finds(blob)
    code, _, err = run("demo", "--keep-outside")
    assert code == 0, err
    out = tmp_path / "work/out/demo"
    check_kept(out, Image.open(photo), fit_mask(ChangeMask.found(blob(16, 48)).mask, (60, 30)))
    report = report_of(out)
    (chosen,) = [edit["file"] for edit in report["edits"] if edit["settings"] == report["the_edit"]["settings"]]
    assert (out / chosen).read_bytes() == (out / "edit.png").read_bytes() != (out / "edit_whole.png").read_bytes()
    assert page_of_run(report, out).sweep[page_of_run(report, out).chosen].picture == out / chosen


def test_a_chosen_edit_is_scored_as_it_is_delivered(run, photo, finds, tmp_path, monkeypatch):
    monkeypatch.setattr("forgedit.model.Model.scorer", ColourScorer(), raising=False)
    monkeypatch.setattr("forgedit.run.choosing", lambda *_: ChooseConfig(least_margin=-1e-4, max_edits=1))
    finds(blob)
    words = ("edit", photo, "a blue square", "--caption", "a red square", "--out", "o")
    scores = {}
    for ways in (["--keep-outside"], ["--no-keep-outside"]):
        assert run(*words, *ways)[0] == 0
        report = report_of(tmp_path / "work/o")
        (entry,) = report["edits"]
        assert entry["file"].startswith("tried/") and "warnings" not in report
        assert report["the_edit"]["scores"] == page_of_run(report, tmp_path / "work/o").edit.scores == entry["scores"]
        scores[ways[0]] = entry["scores"]
    kept, whole = scores.values()
    assert kept["kept_db"] == 100 > whole["kept_db"] and kept["margin"] != whole["margin"]


REFUSED = {
    "two shapes": (["PHOTO", "--mask", "MASK", "--rectangle", "1,1,9,9"], "--mask and --rectangle both"),
    "a feather of nothing": (["PHOTO", "--feather", "3", "--no-keep-outside"], "--feather keeps the rest of the photo"),
    "a negative feather": (["PHOTO", "--keep-outside", "--feather", "-1"], "--feather -1 is out of range"),
    "a photo for a photo": (["PHOTO", "--keep-outside", "--photo", "PHOTO"], "goes with a session"),
    "a photo for nothing": (["SESSION", "--photo", "PHOTO", "--no-keep-outside"], "--photo keeps the rest"),
    "a session alone": (["SESSION", "--keep-outside"], "give the photo itself with --photo FILE"),
    "a session's rectangle alone": (["SESSION", "--rectangle", "1,1,9,9"], "give the photo itself with --photo FILE"),
    "another photo by size": (["SESSION", "--keep-outside", "--photo", "LARGER"], "--photo has 90 by 45 pixels"),
    "another photo": (["SESSION", "--keep-outside", "--photo", "OTHER"], "another than the one that was learned"),
    "no rectangle": (["PHOTO", "--rectangle", "1,2,3"], "expected left,top,right,bottom in whole pixels"),
    "a rectangle outside": (["PHOTO", "--rectangle", "0,0,61,20"], "reaches outside the photo"),
    "a rectangle of everything": (["PHOTO", "--rectangle", "0,0,60,30"], "covers 100.0% of the picture"),
    "no mask": (["PHOTO", "--mask", "none.png"], "cannot read the mask 'none.png'"),
    "a mask of another shape": (["PHOTO", "--mask", "MASK"], "the mask has 40 by 40 pixels, the photo 60 by 30"),
    "a mask among the results": (["PHOTO", "--mask", "MASK", "--out", "HERE"], "the mask lies in"),
    "a photo among the results": (
        ["SESSION", "--keep-outside", "--photo", "OTHER", "--out", "HERE"],
        "the photo lies in",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_made(name, run, photo, session_file, tmp_path, monkeypatch):
    """And all but what needs the session's own picture before a model is loaded."""
    words, message = REFUSED[name]
    here = tmp_path / "here"
    here.mkdir()
    with Image.open(photo) as image:
        image.resize((90, 45)).save(here / "larger.png")
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(here / "other.png")
    Image.new("L", (40, 40), 255).save(here / "mask.png")
    places = {"PHOTO": photo, "SESSION": session_file, "HERE": here}
    places |= {"LARGER": here / "larger.png", "OTHER": here / "other.png", "MASK": here / "mask.png"}
    if "another photo" not in name:
        monkeypatch.setattr("forgedit.editor.Editor.from_pretrained", lambda *_, **__: pytest.fail("a model is loaded"))
    photo_first, *rest = (places.get(word, word) for word in words)
    code, out, err = run("edit", photo_first, "a dog", *rest, *([] if "--out" in words else ["--out", "o"]))
    assert (code, out) == (2, "") and message in err
    assert files(tmp_path / "work") == [] and files(here) == ["larger.png", "mask.png", "other.png"]


def interrupt(*_):
    raise KeyboardInterrupt


def test_interrupted_while_the_mask_is_sought(run, session_file, photo, tmp_path, monkeypatch):
    """The whole edit is there, says that it is whole, and no edit.png pretends to more."""
    monkeypatch.setattr("forgedit.editor.Editor.change_mask", interrupt)
    code, _, err = run("edit", session_file, "a dog", "--out", "o", "--keep-outside", "--photo", photo)
    out = tmp_path / "work/o"
    assert code == 130 and "1 of 1 edits finished; kept: o" in err
    assert files(out) == ["edit_whole.png", "original.png", "page.html", "report.json"]
    report = report_of(out)
    assert report["interrupted"] and report["the_edit"]["file"] == "edit_whole.png" and "change" not in report
    assert "interrupted" in report["warnings"][0]
    code, _, _ = run("edit", session_file, "a dog", "--out", "o")
    assert code == 130 and files(out) == ["edit.png", "original.png", "page.html", "report.json"]
    words = ("--rectangle", "3,4,50,20", "--photo", photo)
    assert run("edit", session_file, "a dog", "--out", "o", *words)[0] == 0  # a given one needs no search


@pytest.mark.parametrize("name", ["edit.png", "mask.png"])
def test_interrupted_while_the_kept_edit_is_written(run, session_file, photo, finds, tmp_path, monkeypatch, name):
    finds(blob)
    write = forgedit.run._save

    def stop(image, path):
        if path.name == name:
            raise KeyboardInterrupt
        write(image, path)

    monkeypatch.setattr(forgedit.run, "_save", stop)
    code, _, err = run("edit", session_file, "a dog", "--out", "o", "--keep-outside", "--photo", photo)
    assert code == 130 and "perhaps without its report" in err
    assert "edit_whole.png" in files(tmp_path / "work/o") and name not in files(tmp_path / "work/o")
