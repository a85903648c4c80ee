"""A disk that fills up, or a write that fails in some other way: one clear error, and no partial file."""

import errno
import os

import pytest
from PIL import Image

from forgedit import TuneConfig
from forgedit.atomic import write_atomic
from forgedit.cli import main


@pytest.fixture
def fill_disk(monkeypatch):
    """Gives a function: from then on the system finds no space for files whose name contains a word."""
    sync = os.fsync

    def fill(word):
        def full(number):
            if word in os.path.basename(os.readlink(f"/proc/self/fd/{number}")):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(number)

        monkeypatch.setattr(os, "fsync", full)

    return fill


def test_a_file_is_whole_before_it_has_its_name(tmp_path, fill_disk):
    place = tmp_path / "a.txt"
    assert write_atomic(place, lambda file: file.write_text("old")) == 3
    fill_disk("a.txt")
    with pytest.raises(OSError, match=r"^cannot write '.*a.txt': No space left on device$") as error:
        write_atomic(place, lambda file: file.write_text("new"))
    assert error.value.errno == errno.ENOSPC
    assert place.read_text() == "old" and list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_what_stops_a_write_passes_through(tmp_path, kind):
    def stop(file):
        file.write_text("half of it")
        raise kind

    with pytest.raises(kind):
        write_atomic(tmp_path / "a.txt", stop)
    assert not list(tmp_path.iterdir())


def test_saving_a_session(editor, photo, tmp_path, fill_disk):
    session = editor.tune(photo, TuneConfig(num_steps=1, batch_size=1, caption="a cat"))
    fill_disk("session")
    with pytest.raises(OSError, match=r"cannot write '.*session': No space left on device"):
        session.save(tmp_path / "session")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("last", ["s.session", "original.png", "edit.png", "mask.png", "heat.png", "report.json"])
def test_on_the_command_line(folder, photo, tmp_path, monkeypatch, capsys, fill_disk, last):
    """Each file a command writes is in turn the one there is no space for."""
    fill_disk(last)
    monkeypatch.chdir(tmp_path)
    words = ["edit", photo, "a dog", "--caption", "a cat", "--tune-num-steps", "1", "--batch-size", "1"]
    words += ["--num-steps", "1", "--model", folder, "--threads", "1", "--out", "o", "--save", "s.session"]
    assert main(list(map(str, words))) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("forgedit: cannot write") and last in line and line.endswith("No space left on device")
    before = ["s.session", "original.png", "edit.png", "mask.png", "heat.png", "report.json"].index(last)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == before and not [path for path in written if last in path.name]
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()


def test_a_sweep_ends_with_the_picture_that_cannot_be_written(folder, photo, tmp_path, monkeypatch, capsys, fill_disk):
    """Pictures are written beside the denoising of the next: what comes later is not written, nor computed for long."""
    fill_disk("01-")
    monkeypatch.chdir(tmp_path)
    words = ["sweep", photo, "a dog", "--caption", "a cat", "--tune-num-steps", "1", "--batch-size", "1", "--json"]
    words += ["--num-steps", "200", "--gammas", "1,1.1", "--strategies", "none,encoderattn", "--out", "o"]
    assert main([*map(str, words), "--model", str(folder), "--threads", "1"]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("forgedit: cannot write") and "01-" in err.splitlines()[-1]
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert len(names) == 2 and names[0].startswith("00-") and names[1] == "original.png"
    assert 200 <= out.count('"stage": "sample"') < 400  # the second batch began at most
