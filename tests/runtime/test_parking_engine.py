"""The engine with its weights parked: the same bits, and all where it was, whatever happens."""

import copy
import weakref

import pytest
import torch

from forgedit import EditConfig, Editor, TuneConfig, TuneDiverged
from forgedit.engine.learner import Learner
from forgedit.engine.parking import Parking
from forgedit.engine.tune_plan import Way
from forgedit.engine.tuner import Tuner
from tests.runtime.test_from_pipe import Seen, load_pipe
from tests.runtime.test_parking import addresses, named

TUNE = TuneConfig(num_steps=2, batch_size=4, unet_lr=1e-3, caption="a cat")
EDIT = EditConfig(strategy="encoderattn", keep=0.3, num_steps=1)
PARKED = Way("exact", 4, False, parked=True)


@pytest.fixture
def parked(folder, monkeypatch):
    """An editor that learns every photo parked, on a CPU, and its Parking."""
    monkeypatch.setattr(Tuner, "_ways", lambda self, inputs: [Way(mode_of(inputs), 4, False, parked=True)])
    return parks(Editor.from_pretrained(folder))


def parks(editor):
    """As an editor on a GPU does."""
    editor._parking._pinned = False
    editor._method_path()._tuner._parking = editor._parking
    return editor


def mode_of(inputs):
    return "exact" if inputs.config.mode == "auto" else inputs.config.mode


def every(editor):
    model = editor.model
    return named(model.unet, model.text_encoder, model.vae, model.captioner)


def equal(one, other):
    same = one.losses == other.losses and torch.equal(one.embedding, other.embedding)
    return same and one.tuned.keys() == other.tuned.keys() and all(
        torch.equal(one.tuned[name], other.tuned[name]) for name in other.tuned
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain(editor, photo):
    return editor.tune(photo, TUNE)


def test_a_photo_learned_parked_is_the_photo(parked, photo, plain):
    moved, there, refs = [], {}, []

    def watch(event):
        if event.stage == "encode":
            there.update(addresses(every(parked)))
            refs[:] = [weakref.ref(weight) for weight in parked._weights.original.values()]
        elif event.stage == "tune":
            now, originals = addresses(every(parked)), parked.originals()
            moved.append(all(now[name] != there[name] for name in now) and not any(ref() for ref in refs))
            assert all(originals[name].data_ptr() == now[name] for name in originals)

    session = parked.tune(photo, TUNE, on_step=watch)
    assert moved == [True, True]
    assert equal(session, plain) and session.way == str(PARKED) and "in host memory what is not learned" in session.way
    assert torch.equal(session.edit("a dog", EDIT).latents, plain.edit("a dog", EDIT).latents)
    assert equal(parked.tune(photo, TUNE, on_step=watch), plain)  # what the edit merged held originals too
    assert moved == [True] * 4
    tuner = parked._path._tuner
    assert not tuner._parking._away and tuner._learner is None
    assert all(torch.equal(w, plain.editor.originals()[name]) for name, w in parked.originals().items())
    parked.release()
    assert not tuner._parking._copies


@pytest.mark.parametrize("changes", [{"mode": "lean"}, {"profile": "dreambooth", "num_steps": 1}], ids=str)
def test_other_modes_and_the_text_encoder(parked, editor, photo, changes):
    config, seen = TUNE.replace(**changes), []
    there = addresses(every(parked))

    def watch(event):
        if event.stage == "tune":
            now = addresses(every(parked))
            seen.append({name.partition(".")[0] for name in now if now[name] == there[name]})

    session = parked.tune(photo, config, on_step=watch)
    assert seen[0] == ({"text_encoder"} if config.profile == "dreambooth" else set())
    assert equal(session, editor.tune(photo, config))


def cancelled(editor, photo, monkeypatch):
    def on_step(event):
        if event.stage == "tune":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        editor.tune(photo, TUNE, on_step=on_step)


def diverged(editor, photo, monkeypatch):
    with pytest.raises(TuneDiverged):
        editor.tune(photo, TUNE.replace(mode="exact", unet_lr=1e30))


def out_of_memory(editor, photo, monkeypatch):
    update, left = Learner._update, iter([True])

    def scarce(self):
        if next(left, False):
            return update(self)
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(Learner, "_update", scarce)
    with pytest.raises(RuntimeError, match="in host memory what is not learned"):
        editor.tune(photo, TUNE)
    monkeypatch.setattr(Learner, "_update", update)


def test_no_room_to_come_back_to(parked, photo, plain, monkeypatch):
    """The device was filled meanwhile, by another program."""
    place, left = Parking._place, iter([True] * len(every(parked)) + [True] * 7 + [False])

    def full(self, names, value):
        if not next(left, True):
            raise torch.OutOfMemoryError("no")
        place(self, names, value)

    monkeypatch.setattr(Parking, "_place", full)
    with pytest.raises(RuntimeError, match="does not fit"):
        parked.tune(photo, TUNE)
    assert next(left, None) is None and not parked._path._tuner._parking._away
    assert equal(parked.tune(photo, TUNE), plain)


@pytest.mark.parametrize("failure", [cancelled, diverged, out_of_memory])
def test_what_fails_leaves_all_where_it_was(parked, photo, plain, monkeypatch, failure):
    learners, restore = [], Parking.restore

    def learner(*args, **kwargs):
        made = Learner(*args, **kwargs)
        learners.append(weakref.ref(made))
        return made

    def watched(self):
        assert not any(ref() for ref in learners)  # its room is free before anything comes back
        restore(self)

    monkeypatch.setattr("forgedit.engine.tuner.Learner", learner)
    monkeypatch.setattr(Parking, "restore", watched)
    failure(parked, photo, monkeypatch)
    monkeypatch.setattr("forgedit.engine.tuner.Learner", Learner)
    monkeypatch.setattr(Parking, "restore", restore)
    assert len(learners) == 1
    waiting = {copied.data_ptr() for copied in parked._path._tuner._parking._copies.values()}
    assert waiting and not waiting & set(addresses(every(parked)).values())
    originals = plain.editor.originals()
    assert all(torch.equal(w, originals[name]) for name, w in parked.originals().items())
    working = addresses(parked._weights.working)
    assert all(weight.data_ptr() == working[name] for name, weight in parked.originals().items())
    assert equal(parked.tune(photo, TUNE), plain)


def test_a_callers_pipe_is_never_parked(folder, photo, monkeypatch):
    pipe = load_pipe(folder)
    assert Editor.from_pipe(pipe)._parking.num_bytes() == 0
    # but of one in half precision we hold copies, which are ours to move
    half = copy.deepcopy(pipe).to(torch.bfloat16)
    editor = parks(Editor.from_pipe(half))
    assert editor._parking.num_bytes() == sum(w.nbytes for w in named(pipe.unet, pipe.text_encoder, pipe.vae).values())
    monkeypatch.setattr(Tuner, "_ways", lambda self, inputs: [PARKED])
    owned = {name: (weight.data_ptr(), weight._version) for name, weight in named(half.unet, half.vae).items()}
    editor.tune(photo, TUNE)
    assert owned == {name: (weight.data_ptr(), weight._version) for name, weight in named(half.unet, half.vae).items()}
    # what a pipe shares stays though the rest, here a captioner in half precision, moves
    model = Editor.from_pretrained(folder).model
    captioner = model.captioner.to(torch.bfloat16)
    editor, before = parks(Editor.from_pipe(pipe, captioner, model.processor)), Seen(pipe)
    assert editor._parking.num_bytes() == 2 * sum(w.nbytes for w in captioner.parameters())
    editor.tune(photo, TUNE, on_step=lambda event: before.is_still_so() or pytest.fail(event.stage))
    assert before.is_still_so()
