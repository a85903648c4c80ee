"""The report page as a file: whole, inert, self-contained, and its pictures the run's own."""

import base64
import dataclasses
import hashlib
import io
import json
import os
import re
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from forgedit.quality import embed
from forgedit.quality.markup import Markup, element
from forgedit.quality.page import Page, Score, Shown, write_page
from forgedit.quality.page_of_run import page_of_run, repeat_command
from tests.runtime.pages import HOSTILE, Reader, hostile_page, plain


@pytest.fixture
def page(tmp_path) -> Page:
    return hostile_page(tmp_path)


def read(page: Page, folder: Path) -> Reader:
    assert write_page(folder / "page.html", page) == (folder / "page.html").stat().st_size
    return Reader(folder / "page.html")


def decoded(uri: str) -> bytes:
    return base64.b64decode(uri.partition(";base64,")[2], validate=True)


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8))


def test_element_escapes_what_is_not_markup():
    made = element("p", "<b>", element("i", "&"), class_='"x"', hidden=True, id=None, aria_label="a'b")
    assert made == '<p class="&quot;x&quot;" hidden aria-label="a&#x27;b">&lt;b&gt;<i>&amp;</i></p>'
    assert element("p", Markup("<b>") + "<i>") == "<p>&lt;b&gt;&lt;i&gt;</p>"  # added to text, it is text again


def test_hostile_words_stay_words(page, tmp_path):
    reader = read(page, tmp_path)
    counts = Counter(tag for tag, _ in reader.tags)
    assert counts["script"] == counts["style"] == counts["title"] == 1
    assert "alert" not in reader.raw["script"] + reader.raw["style"]
    assert reader.text.count(HOSTILE) >= 15  # each place, title and command among them, shows them as they are
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]


def test_nothing_is_loaded(page, tmp_path):
    """Addresses are data alone, and the policy holds the hashes of the page's own style and script."""
    reader = read(page, tmp_path)
    named = [value for _, a in reader.tags for name, value in a.items() if name in ("src", "href", "srcset", "action")]
    assert len(named) == 2 + 2 + 3 and all(value.startswith("data:image/png;base64,") for value in named)
    assert not [a for _, a in reader.tags if "style" in a]  # the policy would refuse it
    assert "url(" not in reader.raw["style"] and "@import" not in reader.raw["style"]
    (policy,) = [a["content"] for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data:"
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(reader.raw[tag].encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"


def test_pictures_are_the_files_own_bytes(page, tmp_path):
    original, *others = map(decoded, read(page, tmp_path).pictures())
    assert original == (tmp_path / "original.png").read_bytes()
    shown = [page.edit.picture, page.change.mask, page.change.heat, *(edit.picture for edit in page.sweep)]
    for data, picture in zip(others, shown, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(picture))


def test_a_large_photo_is_shown_smaller_and_says_so(page, tmp_path):
    noise((2000, 500)).save(tmp_path / "large.png")
    reader = read(dataclasses.replace(page, original=tmp_path / "large.png"), tmp_path)
    shown = Image.open(io.BytesIO(decoded(reader.pictures()[0])))
    assert (shown.format, shown.size) == ("WEBP", (1024, 256))
    assert "Pictures are shown at 1024 × 256 of 2000 × 500 pixels, as WebP of quality 90." in reader.text
    assert "shown at" not in read(dataclasses.replace(page, original=noise((1024, 256))), tmp_path).text


def test_many_pictures_share_a_budget(monkeypatch):
    pictures = [noise((600, 300))] * 3
    kept = embed.embed_many(pictures)
    assert [(picture.exact, picture.size, picture.note) for picture in kept] == [(True, (600, 300), "")] * 3
    monkeypatch.setattr(embed, "MANY_BYTES", sum(picture.num_bytes for picture in kept) - 1)
    fewer = embed.embed_many(pictures)
    assert {(picture.exact, picture.size) for picture in fewer} == {(False, (512, 256))}
    assert sum(picture.num_bytes for picture in fewer) < embed.MANY_BYTES
    assert fewer[0].note == "shown at 512 × 256 of 600 × 300 pixels, as WebP of quality 90"


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P"])
def test_pictures_of_every_mode(mode):
    picture = noise((1100, 550)).convert(mode)
    assert embed.embed(picture).size == (1024, 512)
    small = picture.crop((0, 0, 20, 10))
    shown = Image.open(io.BytesIO(decoded(embed.embed(small).uri)))
    assert shown.convert("RGBA").tobytes() == small.convert("RGBA").tobytes()


def test_a_picture_that_is_no_png_is_refused_and_the_old_page_stays(page, tmp_path):
    read(page, tmp_path)
    before = (tmp_path / "page.html").read_bytes()
    (tmp_path / "original.png").write_bytes(b"GIF89a")
    with pytest.raises(OSError, match="cannot identify"):
        write_page(tmp_path / "page.html", page)
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        write_page(tmp_path / "page.html", dataclasses.replace(page, original=tmp_path / "gone.png"))
    with pytest.raises(OSError, match=r"no/page\.html"):
        write_page(tmp_path / "no/page.html", hostile_page(tmp_path))
    assert (tmp_path / "page.html").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_scores_in_order_with_the_best_marked(page, tmp_path):
    reader = read(page, tmp_path)
    text = " ".join(reader.text.split())
    assert "0.750, the best" in text and "1.000 px, the best" in text and text.count(", the best") == 2
    assert "−0.250" in text and "10.0 dB" in text
    grid = [json.loads(a["data-scores"]) for tag, a in reader.tags if "data-scores" in a]
    assert grid == [[0.5, 1.0, 20.0], [-0.25, 3.0, 10.0], [0.75, None, None]]
    assert [a.get("class") for tag, a in reader.tags if "data-scores" in a] == [None, "chosen", None]


def test_scores_that_are_no_numbers_are_dashes(page, tmp_path):
    odd = Shown(plain((0, 0, 0)), "odd", scores={"agreement": float("inf"), "distance": float("nan")})
    reader = read(dataclasses.replace(page, sweep=[*page.sweep, odd]), tmp_path)
    assert [json.loads(a["data-scores"]) for _, a in reader.tags if "data-scores" in a][-1] == [None] * 3
    assert not re.search(r"\binf\b", reader.text) and reader.text.count("–") > read(page, tmp_path).text.count("–")


def test_the_least_page(tmp_path):
    """One edit and nothing else known of it: no empty part, no heading without a body."""
    page = Page("a blue bird", "a bird", plain((1, 2, 3)), Shown(plain((3, 2, 1)), "none"))
    text = read(page, tmp_path).text
    assert [
        part for part in ("All 1", "The one edit", "Where", "Time", "To make", "Settings", "Sort") if part in text
    ] == []


def test_a_sweep_without_a_choice(page, tmp_path):
    reader = read(dataclasses.replace(page, edit=None, chosen=None), tmp_path)
    assert "none was chosen" in reader.text and "Chosen" not in reader.text


def test_a_page_of_nothing_is_refused():
    with pytest.raises(ValueError, match="without an edit and without a sweep"):
        Page("t", "c", plain((0, 0, 0)), None)
    with pytest.raises(ValueError, match="chosen 1 is out of range; expected one of the sweep's 1"):
        Page("t", "c", plain((0, 0, 0)), None, [Shown(plain((0, 0, 0)), "one")], chosen=1)


def test_a_file_name_that_is_no_text(page, tmp_path):
    command = os.fsdecode(b"forgedit edit ph\xf6to.png")
    assert "ph\\udcf6to.png" in read(dataclasses.replace(page, command=command), tmp_path).text


def test_a_run_has_a_page(run, tmp_path):
    code, _, _ = run("demo")
    assert code == 0
    folder = tmp_path / "work/out/demo"
    report = json.loads((folder / "report.json").read_text())
    page = page_of_run(report, folder, repeat_command(report))
    assert page.sweep[page.chosen].settings == report["the_edit"]["settings"] == page.edit.settings
    assert page.reason == "The setting the model folder recommends; no score chose it."
    assert list(page.seconds) == [
        *("load", "caption", "encode", "tune"),
        *(f"{stage}, 12 edits" for stage in ("blend", "forget", "sample", "decode")),
        "mask",
    ]
    reader = read(page, tmp_path)
    assert "All 12 edits" in reader.text and "encoderattn, gamma 1.4" in reader.text and "Versions" in reader.text
    shown = [(folder / name).read_bytes() for name in ("original.png", "edit.png", "mask.png", "heat.png")]
    shown += [(folder / entry["file"]).read_bytes() for entry in report["edits"]]
    assert [decoded(uri) for uri in reader.pictures()] == shown


def test_what_a_report_may_hold_besides(run, photo, tmp_path):
    run("sweep", photo, "a dog", "--out", "o", "--gammas", "1,1.2", "--strategies", "none", "--caption", "a cat")
    folder = tmp_path / "work/o"
    report = json.loads((folder / "report.json").read_text())
    assert page_of_run(report, folder).edit is None
    report["edits"][0] |= {"scores": {"margin": 0.5}, "rejected": "too little kept", "cut": "the end"}
    report["the_edit"] = {"file": "edit.png", "settings": report["edits"][1]["settings"], "rule": "best"}
    report |= {"interrupted": True, "warnings": ["look"]}
    report["change"] = {"mask": "mask.png", "share": 0.1, "is_kept": True}
    plain((255, 255, 255)).save(folder / "mask.png")
    plain((9, 9, 9)).save(folder / "edit.png")
    page = page_of_run(report, folder, scores=(Score("margin", "Margin"),))
    assert (page.chosen, page.sweep[0].rejected, page.sweep[0].scores) == (1, "too little kept", {"margin": 0.5})
    assert [shown.label for shown in page.sweep] == ["none, gamma 1", "none, gamma 1.2"]
    for entry in report["edits"]:
        entry["is_reference_schedule"], entry["settings"]["scheduler"] = False, "unipc"
    assert "another scheduler" in page_of_run(report, folder).warnings[-1]
    report["choose"] = {"scheduler": "unipc"}
    assert not any("another scheduler" in words for words in page_of_run(report, folder).warnings)
    report["edits"][0]["settings"]["seed"] = 7  # seeds are told where they tell edits apart
    labels = [shown.label for shown in page_of_run(report, folder).sweep]
    assert labels == ["none, gamma 1, seed 7", "none, gamma 1.2, seed 0"]
    assert page.warnings[0] == "look" and "the end" in page.warnings[1] and "interrupted" in page.warnings[2]
    text = read(page, tmp_path).text
    assert "covers 10.0% of the picture. Outside it, the edit has the photo's own pixels" in text


def test_the_command_repeats_the_edit(run, photo, tmp_path):
    """Not only the flags: the picture comes out bit by bit."""
    words = ("--gamma", 1.3, "--strategy", "down_blocks and not attn", "--seed", 4, "--tune-seed", 5, "--unet-lr", 2e-3)
    run("edit", photo, 'a dog\'s "bed"', "--out", "a", "--caption", "a cat", *words)
    work = tmp_path / "work"
    report = json.loads((work / "a/report.json").read_text())
    assert page_of_run(report, work / "a").sweep == []
    program, *again = shlex.split(repeat_command(report))
    assert program == "forgedit" and "--tune-seed=5" in again and "--num-steps=2" not in again
    assert run(*again, "--out", "b")[0] == 0
    assert (work / "a/edit.png").read_bytes() == (work / "b/edit.png").read_bytes()


def test_the_command_for_a_session_leaves_the_learning_out(run, session_file, tmp_path):
    run("edit", session_file, "a dog", "--out", "a", "--gamma", 0.7)
    report = json.loads((tmp_path / "work/a/report.json").read_text())
    _, *again = shlex.split(repeat_command(report, is_session=True))
    assert run(*again, "--out", "b")[0] == 0
    assert (tmp_path / "work/a/edit.png").read_bytes() == (tmp_path / "work/b/edit.png").read_bytes()
