"""Sessions: saved and loaded with equal bits, refused when anything about the file is wrong."""

import dataclasses
import errno
import json
import os
import resource

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file

import forgedit.session_file
from bench.sessions import measure
from forgedit import EditConfig, Editor, SessionError, TuneConfig
from forgedit.delta import DELTA_FORMATS

TUNE = TuneConfig(num_steps=2, batch_size=2, unet_lr=1e-3, caption="a cat")
EDIT = EditConfig(strategy="encoderattn", keep=0.3, num_steps=3)


@pytest.fixture(scope="module")
def session(editor, photo):
    return editor.tune(photo, TUNE)


@pytest.fixture
def saved(session, tmp_path):
    session.save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def rewrite(path, change):
    """Change tensors or metadata of a session file and leave the rest, its SHA-256 too, as it was."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("profile", ["official", "dreambooth"])
def test_saved_and_loaded_sessions_edit_alike(editor, folder, photo, tmp_path, profile):
    session = editor.tune(photo, TUNE.replace(profile=profile, num_steps=2, batch_size=2))
    before = session.edit("a dog", EDIT)
    session.save(tmp_path / "session.safetensors")
    loaded = Editor.from_pretrained(folder).load_session(tmp_path / "session.safetensors")
    assert loaded.tuned.keys() == session.tuned.keys()
    assert all(torch.equal(loaded.tuned[name], weight) for name, weight in session.tuned.items())
    assert torch.equal(loaded.embedding, session.embedding)
    assert (loaded.caption, loaded.config, loaded.losses) == (session.caption, session.config, session.losses)
    assert (loaded.stopped_early, loaded.seconds) == (session.stopped_early, session.seconds)
    assert np.array_equal(np.asarray(loaded.source), np.asarray(session.source))
    after = loaded.edit("a dog", EDIT)
    assert torch.equal(after.latents, before.latents)
    assert np.array_equal(np.asarray(after.image), np.asarray(before.image))


def norm(tensors):
    return sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5


@pytest.mark.parametrize("delta", DELTA_FORMATS)
def test_save_says_size_and_error(editor, session, tmp_path, delta):
    saved = session.save(tmp_path / "a.safetensors", delta)
    assert (saved.path, saved.delta) == (tmp_path / "a.safetensors", delta)
    assert saved.num_bytes == saved.path.stat().st_size
    loaded = editor.load_session(saved.path)
    wrong = norm(loaded.tuned[name].double() - weight.double() for name, weight in session.tuned.items())
    change = norm(weight.double() - editor.originals()[name].double() for name, weight in session.tuned.items())
    assert saved.relative_error == pytest.approx(wrong / change, rel=1e-9)
    least, most = {"fp32": (0, 0), "fp16": (1e-6, 1e-3), "int8": (1e-3, 1e-2), "int4": (3e-2, 0.2)}[delta]
    assert least <= saved.relative_error <= most


def test_each_format_is_smaller_than_the_one_before(session, tmp_path):
    sizes = [session.save(tmp_path / delta, delta).num_bytes for delta in DELTA_FORMATS]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] / 3


@pytest.mark.parametrize("profile", ["official", "dreambooth"])
def test_a_rounded_session_edits_almost_alike(editor, photo, tmp_path, profile):
    session = editor.tune(photo, TUNE.replace(profile=profile))
    exact = session.edit("a dog", EDIT).latents
    untuned = dataclasses.replace(session, tuned={name: editor.originals()[name] for name in session.tuned}, prompts={})
    change = norm([exact - untuned.edit("a dog", EDIT).latents])
    for delta, share in {"fp16": 0.01, "int8": 0.05, "int4": 0.5}.items():
        session.save(tmp_path / delta, delta)
        loaded = editor.load_session(tmp_path / delta)
        assert torch.equal(loaded.embedding, session.embedding) and loaded.tuned.keys() == session.tuned.keys()
        assert all(weight.dtype == session.tuned[name].dtype for name, weight in loaded.tuned.items())
        assert norm([loaded.edit("a dog", EDIT).latents - exact]) < share * change


def test_unknown_delta_writes_nothing(session, tmp_path):
    with pytest.raises(ValueError, match="unknown delta 'int2'; expected one of: fp32, fp16, int8, int4"):
        session.save(tmp_path / "a.safetensors", "int2")
    assert not os.listdir(tmp_path)


def test_a_weight_that_is_not_finite_writes_nothing(session, tmp_path):
    name = next(iter(session.tuned))
    broken = dataclasses.replace(session, tuned={**session.tuned, name: torch.full_like(session.tuned[name], np.nan)})
    with pytest.raises(ValueError, match="not finite"):
        broken.save(tmp_path / "a.safetensors", "int8")
    assert not os.listdir(tmp_path)


def test_only_trained_tensors_are_saved(editor, session, saved):
    names = set(load_file(saved)) - {"embedding", "source"}
    assert names == set(session.tuned)
    assert not any("down_blocks.0." in name or "mid_block" in name or "conv_in" in name for name in names)


def flip_a_payload_bit(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def change_record(path):
    rewrite(path, lambda tensors, metadata: metadata.update(record=metadata["record"].replace("a cat", "a cow")))


def drop_tensor(path):
    rewrite(path, lambda tensors, metadata: tensors.pop("unet.up_blocks.2.resnets.0.conv1.weight"))


def change_version(path):
    rewrite(path, lambda tensors, metadata: metadata.update(format_version="99"))


def drop_metadata(path):
    rewrite(path, lambda tensors, metadata: metadata.clear())


@pytest.mark.parametrize(
    "damage, message",
    [
        (flip_a_payload_bit, "altered"),
        (change_record, "altered"),
        (drop_tensor, "altered"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "truncated"),
        (lambda path: path.write_bytes(b"not a session"), "truncated or not a session"),
        (change_version, "format '99' is not known; expected 3"),
        (drop_metadata, "metadata lacks"),
    ],
    ids=["bit", "record", "tensor", "truncated", "text", "version", "metadata"],
)
def test_damaged_file_is_refused(editor, saved, damage, message):
    before = {name: weight.clone() for name, weight in editor.model.unet.state_dict().items()}
    damage(saved)
    with pytest.raises(SessionError, match=message):
        editor.load_session(saved)
    assert all(torch.equal(before[name], weight) for name, weight in editor.model.unet.state_dict().items())


@pytest.mark.parametrize("delta", DELTA_FORMATS)
def test_every_truncation_is_refused(editor, session, tmp_path, delta):
    path = tmp_path / "a.safetensors"
    session.save(path, delta)
    content = path.read_bytes()
    for length in (0, 1, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(SessionError, match="truncated"):
            editor.load_session(path)


def sign(tensors, metadata):
    metadata["payload_sha256"] = forgedit.session_file.payload_digest(tensors, metadata)


def unknown_delta(tensors, metadata):
    metadata["record"] = metadata["record"].replace('"int8"', '"int2"')


def another_delta(tensors, metadata):
    metadata["record"] = metadata["record"].replace('"int8"', '"int4"')


def scales_gone(tensors, metadata):
    del tensors[next(name for name in tensors if name.endswith(":scales"))]


def another_weight(tensors, metadata):
    tensors["unet.nowhere"] = torch.zeros(3)


def no_embedding(tensors, metadata):
    del tensors["embedding"]


def unknown_setting(tensors, metadata):
    metadata["record"] = metadata["record"].replace('"unet_lr"', '"lr"')


@pytest.mark.parametrize(
    "change, message",
    [
        (unknown_delta, "unknown delta 'int2'"),
        (another_delta, "expected torch.uint8"),
        (scales_gone, "expected scales"),
        (another_weight, "'unet.nowhere', which the model lacks"),
        (no_embedding, "lacks 'embedding'"),
        (unknown_setting, "unexpected keyword argument 'lr'"),
    ],
)
def test_a_signed_file_that_does_not_fit_is_refused(editor, session, tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    session.save(path, "int8")

    def change_and_sign(tensors, metadata):
        change(tensors, metadata)
        sign(tensors, metadata)

    rewrite(path, change_and_sign)
    with pytest.raises(SessionError, match=message):
        editor.load_session(path)


def test_a_session_is_not_passed_to_another_base(other_folder, saved):
    other = Editor.from_pretrained(other_folder)
    rewrite(saved, lambda tensors, metadata: metadata.update(base_fingerprint=other.fingerprint))
    with pytest.raises(SessionError, match="altered"):
        other.load_session(saved)


@pytest.mark.parametrize(
    "change", [{"prediction_type": "v_prediction"}, {"alphas_cumprod": torch.linspace(0.9, 0.1, 1000)}]
)
def test_the_same_weights_read_otherwise_are_another_base(editor, saved, change):
    other = Editor(dataclasses.replace(editor.model, **change))
    with pytest.raises(SessionError, match=other.fingerprint):
        other.load_session(saved)


def test_another_base_is_refused_and_both_are_named(editor, other_folder, saved):
    other = Editor.from_pretrained(other_folder)
    with pytest.raises(SessionError) as error:
        other.load_session(saved)
    assert editor.fingerprint in str(error.value) and other.fingerprint in str(error.value)


def test_no_such_file(editor, tmp_path):
    with pytest.raises(FileNotFoundError):
        editor.load_session(tmp_path / "none.safetensors")


def test_a_loaded_session_does_not_follow_its_file(editor, session, saved):
    """Another program cuts the file short and writes other bytes into it, in place."""
    loaded = editor.load_session(saved)
    with open(saved, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.truncate(0)
        file.write(b"\xff" * size)
    assert all(torch.equal(loaded.tuned[name], weight) for name, weight in session.tuned.items())


def test_as_many_threads_as_torch_has_give_one_digest(session, saved):
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    digests = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        digests.add(forgedit.session_file.payload_digest(load_file(saved), metadata))
    assert digests == {metadata["payload_sha256"]}


def test_tensors_that_change_places_are_seen(editor, saved):
    def swap(tensors, metadata):
        first, second = (f"unet.up_blocks.{block}.attentions.0.norm.weight" for block in (2, 3))
        tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()

    rewrite(saved, swap)
    with pytest.raises(SessionError, match="altered"):
        editor.load_session(saved)


def test_a_failed_save_leaves_the_old_file(session, saved, monkeypatch):
    old = saved.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        session.save(saved)
    assert saved.read_bytes() == old and os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("delta", DELTA_FORMATS)
def test_a_full_disk_leaves_no_partial_file(session, tmp_path, monkeypatch, delta):
    def fill(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(forgedit.session_file, "save_file", fill)
    with pytest.raises(OSError, match=r"cannot write .*a\.safetensors.*No space left") as error:
        session.save(tmp_path / "a.safetensors", delta)
    assert error.value.errno == errno.ENOSPC
    assert not os.listdir(tmp_path)


def test_a_write_the_system_stops_leaves_the_old_file(session, saved):
    """Unfaked: the process may write 100,000 bytes to a file and no more."""
    old, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert len(old) > 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write"):
            session.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == old and os.listdir(saved.parent) == [saved.name]


def test_file_then_name_are_brought_to_the_disk(session, tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (done.append(os.readlink(f"/proc/self/fd/{number}")), sync(number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("rename"), replace(old, new)))
    session.save(tmp_path / "a.safetensors")
    assert done[0].endswith(".tmp") and done[1:] == ["rename", str(tmp_path)]


def test_saving_into_a_missing_folder(session, tmp_path):
    with pytest.raises(OSError, match="cannot write"):
        session.save(tmp_path / "none" / "a.safetensors")


def test_record_is_json(saved):
    with safe_open(saved, "pt") as file:
        record = json.loads(file.metadata()["record"])
    assert record["caption"] == "a cat" and record["config"]["num_steps"] == 2


def test_the_bench_measures_each_format(editor, photo):
    rows = list(measure(editor, Image.open(photo), "a dog", TUNE, EDIT, calls=2))
    assert [row.dtype for row in rows] == list(DELTA_FORMATS)
    assert rows[0].edit_psnr is None and rows[0].error == 0  # equal pictures
    assert [row.num_bytes for row in rows] == sorted((row.num_bytes for row in rows), reverse=True)
    assert rows[3].edit_psnr is not None and 20 < rows[3].edit_psnr < 100
