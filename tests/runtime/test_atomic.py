"""A file is what it was, or whole: also where the process that writes it is killed."""

import subprocess
import sys

import pytest

from forgedit import SessionError, TuneConfig
from forgedit.atomic import write_atomic

HALF = """
import sys, time
from pathlib import Path
from forgedit.atomic import write_atomic

def write(temporary):
    with temporary.open("wb") as file:
        file.write(Path(sys.argv[2]).read_bytes()[:-100])
        file.flush()
        print("half", flush=True)
        time.sleep(600)

write_atomic(Path(sys.argv[1]), write)
"""


def killed_half_way(path, contents):
    """A process that was killed before the last 100 bytes of `contents` were written to `path`."""
    words = [sys.executable, "-c", HALF, str(path), str(contents)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "half\n"
        child.kill()


def test_a_killed_save_leaves_the_session_that_was_there(editor, photo, tmp_path):
    session = editor.tune(photo, TuneConfig(num_steps=1, caption="a cat"))
    session.save(tmp_path / "new.safetensors")
    path = tmp_path / "photo.safetensors"
    killed_half_way(path, tmp_path / "new.safetensors")
    assert not path.exists()  # no partial file under the name asked for
    session.save(path)
    whole = path.read_bytes()
    killed_half_way(path, tmp_path / "new.safetensors")
    assert path.read_bytes() == whole and editor.load_session(path).caption == "a cat"
    for left in tmp_path.glob(".photo.safetensors.*.tmp"):  # what a killed process leaves is hidden, and no session
        with pytest.raises(SessionError):
            editor.load_session(left)


def test_what_is_written_is_whole_and_alone(tmp_path):
    path = tmp_path / "a"
    assert write_atomic(path, lambda temporary: temporary.write_bytes(b"abc")) == 3
    with pytest.raises(ZeroDivisionError):
        write_atomic(path, lambda temporary: temporary.write_bytes(b"x") / 0)
    with pytest.raises(OSError, match="cannot write"):
        write_atomic(tmp_path / "none" / "a", lambda temporary: temporary.write_bytes(b"x"))
    assert path.read_bytes() == b"abc" and list(tmp_path.iterdir()) == [path]
