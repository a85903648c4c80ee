"""An evaluation's rows on the disk: what is read, what is refused, who may write."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from forgedit import InputError
from forgedit.evaluate.cases import Case
from forgedit.evaluate.protocol import digest_of_case
from forgedit.evaluate.rows import alone, append_row, check_same_cases, read_rows

ROW = {"protocol": "p", "of": "photo", "case": "one", "kind": "", "way": "recommended", "seed": 0, "margin": 0.1}


def test_rows_come_back_and_a_cut_line_goes(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    rows = [ROW | {"seed": seed, "psnr_outside": None if seed else 24.5} for seed in range(3)]
    for row in rows:
        append_row(path, row)
    whole = path.read_bytes()
    for cut in (b'{"protocol": "p", "of', b"\xff\x00"):
        path.write_bytes(whole + cut)
        assert read_rows(path, "p") == rows and path.read_bytes() == whole
    path.write_bytes(b'{"protocol"')
    assert read_rows(path) == [] and path.read_bytes() == b""


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[]",
        "{}",
        "7",
        "[" * 100_000,
        *(json.dumps({name: value for name, value in ROW.items() if name != lost}) for lost in ROW if lost != "margin"),
        *(json.dumps(ROW | wrong) for wrong in ({"seed": "0"}, {"case": 1}, {"margin": "0.1"}, {"margin": [0.1]})),
        json.dumps(ROW | {"margin": True}),
    ],
)
def test_what_holds_no_rows_is_refused(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + text + "\n")
    with pytest.raises(InputError, match="no rows of an evaluation"):
        read_rows(path)


def test_a_folder_and_another_protocol_are_refused(tmp_path):
    with pytest.raises(InputError, match="is no file"):
        read_rows(tmp_path)
    path = tmp_path / "rows.jsonl"
    append_row(path, ROW)
    with pytest.raises(InputError, match="another model, other settings or an earlier version"):
        read_rows(path, "q")


def test_a_full_disk_is_named(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match="cannot write '/dev/full'") as refused:
        append_row(Path("/dev/full"), ROW)
    assert refused.value.errno == errno.ENOSPC


def test_a_case_is_its_photo_and_its_words(tmp_path):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(tmp_path / "a.png")
    cases = [
        Case("one", photo, target, caption)
        for photo in (red, blue, tmp_path / "a.png")
        for target in ("a dog", "a fish")
        for caption in (None, "a cat")
    ]
    digests = [digest_of_case(case) for case in cases]
    assert len(set(digests)) == len(digests)
    assert digest_of_case(Case("two", red, "a dog")) == digests[0]  # a name is no content
    check_same_cases([ROW], {"one": "photo", "two": "other"}, tmp_path)
    check_same_cases([ROW], {}, tmp_path)  # a case that is not asked for now
    with pytest.raises(InputError, match="'one' with another photo or other words"):
        check_same_cases([ROW], {"one": "other"}, tmp_path)


def test_one_process_writes_at_a_time_and_a_killed_one_locks_nothing(tmp_path):
    program = f"""
import pathlib, sys
from forgedit.evaluate.rows import alone
with alone(pathlib.Path({str(tmp_path)!r})):
    print("in", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(InputError, match="another evaluation writes to"), alone(tmp_path):
            pytest.fail("two processes write")
        other.kill()
        other.wait()
    with alone(tmp_path):
        pass
