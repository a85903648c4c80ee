"""Benchmarks' folders as they really come: photos of every kind, words of every alphabet, lists that say odd things."""

import json

import numpy as np
import pytest
from PIL import Image

from forgedit import InputError
from forgedit.evaluate.cases import read_editeval, read_tedbench

WORDS = ("рыжий кот", "红色的鸟", "أرنب أحمر", "🐦 on a branch", "e\u0301 combining", "a b\u200dc", "bird " * 500)


def noise(*shape, kind=np.uint8):
    return Image.fromarray(np.random.default_rng(0).integers(0, np.iinfo(kind).max, shape).astype(kind))


@pytest.fixture
def listed(tmp_path):
    """Gives a function: one list of cases under a name, over one photo of 20 by 30 pixels."""
    noise(30, 20, 3).save(tmp_path / "a.png")

    def write(name, entries):
        text = entries if isinstance(entries, str) else json.dumps(entries)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    return write


def entry(**changes):
    return {"task": "colour", "index": 1, "source": "a bird", "target": "a red bird", "image": "a.png"} | changes


def test_photos_of_every_kind_and_words_of_every_alphabet(listed, tmp_path):
    pictures = {
        "wide.png": noise(100, 6000, 3),
        "tall.png": noise(3000, 16, 3),
        "sixteen_bits.png": noise(30, 20, kind=np.uint16),
        "clear.png": noise(30, 20, 4),
        "grey.png": noise(30, 20),
        "inks.jpg": noise(30, 20, 4).convert("CMYK"),
        "фото 1.webp": noise(30, 20, 3),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    entries = [{"img_name": name, "target_text": words} for name, words in zip(pictures, WORDS, strict=True)]
    cases = read_tedbench(listed("input_list.json", entries))
    assert [case.target for case in cases] == list(WORDS)
    assert cases[-1].name == "006-фото 1"


def test_one_photo_may_have_many_targets(listed):
    entries = [{"img_name": "a.png", "target_text": words} for words in ("a cat", "a dog", "a cat")]
    assert len({case.name for case in read_tedbench(listed("input_list.json", entries))}) == 3


def test_a_mark_before_the_first_letter_is_passed_over(listed):
    (case,) = read_editeval(listed("prompts.json", "\ufeff" + json.dumps([entry()])))
    assert case.name == "colour-1"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[" * 100_000, "cannot read .*prompts.json.*recursion.*expected a JSON list"),
        ([entry(), entry(target="a blue bird")], "1 names stand for several cases .*'colour-1'.*another index"),
        ([entry(image=7)], "entry 0 .* has no 'image'; expected words"),
        ([entry(image="a" * 5000)], "cannot look for the photo 'a{60}' in .*File name too long"),
        ([entry(image="a\0.png")], "image has the control character"),
        ([entry(image="\ud800.png")], "image has the control character"),
        ([entry(index={"a": 1})], r"entry 0 .* has the index \{'a': 1\}; expected a number or words"),
        ([entry(index=True)], "has the index True"),
        ([entry(task="a\nb")], "task has the control character"),
        ([entry(sha256=7)], "SHA-256 differs"),
        ([entry(image="/etc/hostname")], "leads out of"),
    ],
    ids=["nested", "twice", "number", "long name", "zero byte", "surrogate", "index", "truth", "task", "hash", "root"],
)
def test_a_list_that_says_odd_things_is_refused(listed, entries, message):
    with pytest.raises(InputError, match=message):
        read_editeval(listed("prompts.json", entries))


@pytest.mark.parametrize("leave_out", [False, True])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: noise(1, 1, 3).save(path), "has 1 by 1 pixels; expected at least 16 a side"),
        (lambda path: path.write_bytes(path.read_bytes()[:600]), "truncated; expected a whole"),
        (lambda path: path.write_bytes(b""), "unknown format"),
        (lambda path: Image.new("1", (12000, 12000)).save(path), "12000 by 12000 pixels; expected at most 64 mega"),
    ],
    ids=["one pixel", "cut", "empty", "huge"],
)
def test_a_photo_that_cannot_be_edited_is_refused_even_where_missing_ones_are_left_out(
    listed, tmp_path, spoil, message, leave_out
):
    spoil(tmp_path / "a.png")
    with pytest.raises(InputError, match=message):
        read_editeval(listed("prompts.json", [entry()]), leave_out)
