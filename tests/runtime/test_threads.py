"""Several threads and several editors in one process: calls take turns, and nothing of one gets into another."""

import threading

import pytest
import torch

from forgedit import Cancelled, EditConfig, Editor, TuneConfig

TUNE = TuneConfig(num_steps=2, batch_size=2, unet_lr=1e-3, caption="a cat")
DREAMBOOTH = TuneConfig(profile="dreambooth", num_steps=2, batch_size=2, text_encoder_lr=1e-3, caption="a wall")
SOON = 60  # seconds after which a test that hangs fails

# what the two sessions are edited with, in turn: strategies and blends of which each leaves other weights behind
EDITS = (
    [
        EditConfig(strategy="encoderattn", keep=0.3, num_steps=3),
        EditConfig(strategy="none", blend="vp", edit_weight=1.3, num_steps=3),
        EditConfig(strategy="none", gamma=1.2, num_steps=3),
        EditConfig(strategy="nodecoder", num_steps=3),
    ],
    [
        EditConfig(strategy="decoderkv", blend="vp", identity_weight=0.9, num_steps=3),
        EditConfig(strategy="none", num_steps=3, seed=1),
        EditConfig(strategy="encoderattn", keep=0.3, num_steps=3),
        EditConfig(strategy="noencoder", blend="vp", num_steps=3),
    ],
)


def run_threads(*calls):
    """Each call in its own thread, torch on one thread in each; their results, or the first error."""
    results, errors = [None] * len(calls), []

    def run(index):
        torch.set_num_threads(1)
        try:
            results[index] = calls[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)
    return results


@pytest.fixture(scope="module")
def sessions(editor, photo):
    """The second one has a text encoder of its own."""
    return editor.tune(photo, TUNE), editor.tune(photo, DREAMBOOTH)


@pytest.fixture(scope="module")
def alone(folder, photo):
    """Each session's latents by an editor that never saw the other session."""
    latents = []
    for config, edits in zip((TUNE, DREAMBOOTH), EDITS, strict=True):
        session = Editor.from_pretrained(folder).tune(photo, config)
        latents.append([session.edit("a dog", edit).latents for edit in edits])
    return latents


def test_edits_of_two_threads_interleave_and_do_not_mix(sessions, alone):
    """Both threads stand at the barrier before each edit, so that each edit of one lies between two of the other."""
    barrier, seen = threading.Barrier(2, timeout=SOON), []

    def edit_all(index):
        latents = []
        for edit in EDITS[index]:
            barrier.wait()
            note = lambda event: seen.append((index, event.stage, event.step))  # noqa: E731
            latents.append(sessions[index].edit("a dog", edit, on_step=note).latents)
        return latents

    both = run_threads(lambda: edit_all(0), lambda: edit_all(1))
    for ours, expected in zip(both, alone, strict=True):
        assert [torch.equal(a, b) for a, b in zip(ours, expected, strict=True)] == [True] * 4
    one = [("blend", 1), ("forget", 1), ("sample", 1), ("sample", 2), ("sample", 3), ("decode", 1)]
    turns = [seen[start : start + len(one)] for start in range(0, len(seen), len(one))]
    assert all([(stage, step) for _, stage, step in turn] == one for turn in turns)  # an edit is never cut in two
    owners = [{index for index, _, _ in turn} for turn in turns]
    assert all(len(owner) == 1 for owner in owners)
    assert [owners[pair] | owners[pair + 1] for pair in range(0, 8, 2)] == [{0, 1}] * 4


def test_a_tune_and_edits_interleave_and_do_not_mix(editor, photo, sessions, alone):
    """While one thread edits, the other learns the photo again, fails to, and is cancelled."""
    barrier, cancel = threading.Barrier(2, timeout=SOON), threading.Event()

    def edit():
        latents = []
        for config in EDITS[0]:
            barrier.wait()
            latents.append(sessions[0].edit("a dog", config).latents)
        return latents

    def tune():
        tuned = []
        for error, on_step in ((None, None), (KeyError, fail), (Cancelled, stop), (None, None)):
            barrier.wait()
            if error is None:
                tuned.append(editor.tune(photo, DREAMBOOTH))
            else:
                with pytest.raises(error):
                    editor.tune(photo, DREAMBOOTH, on_step=on_step, cancel=cancel)
        return tuned

    def fail(event):
        if event.stage == "tune":
            raise KeyError

    def stop(event):
        if event.stage == "tune":
            cancel.set()

    latents, tuned = run_threads(edit, tune)
    assert [torch.equal(a, b) for a, b in zip(latents, alone[0], strict=True)] == [True] * 4
    for session in tuned:
        assert all(torch.equal(weight, sessions[1].tuned[name]) for name, weight in session.tuned.items())


def test_two_editors_work_at_the_same_time(folder, other_folder, photo):
    """In step with each other, so that neither finishes before the other has begun."""
    editors = Editor.from_pretrained(folder), Editor.from_pretrained(other_folder)

    def work(editor, on_step=None):
        session = editor.tune(photo, TUNE, on_step=on_step)
        return [session.embedding, *(session.edit("a dog", edit, on_step=on_step).latents for edit in EDITS[0][:2])]

    expected = [work(editor) for editor in editors]
    assert not torch.equal(expected[0][1], expected[1][1])
    barrier = threading.Barrier(2, timeout=SOON)
    both = run_threads(*(lambda editor=editor: work(editor, lambda _: barrier.wait()) for editor in editors))
    for ours, alone in zip(both, expected, strict=True):
        assert [torch.equal(a, b) for a, b in zip(ours, alone, strict=True)] == [True] * 3


def test_cancelled_while_it_waits_for_its_turn(editor, photo, sessions):
    begun, cancelled = threading.Event(), threading.Event()
    cancel = threading.Event()

    def hold(event):
        if event.stage == "tune" and not begun.is_set():
            begun.set()
            assert cancelled.wait(SOON)  # the other one ends while this one has its turn

    def wait_in_vain():
        assert begun.wait(SOON)
        threading.Timer(0.1, cancel.set).start()
        with pytest.raises(Cancelled, match="waiting"):
            sessions[0].edit("a dog", EDITS[0][0], cancel=cancel)
        cancelled.set()
        return True

    session, ended = run_threads(lambda: editor.tune(photo, TUNE, on_step=hold), wait_in_vain)
    assert ended and torch.equal(session.embedding, sessions[0].embedding)


@pytest.mark.parametrize("call", ["edit", "tune", "caption"])
def test_a_callback_that_calls_its_editor_is_told_so(editor, photo, sessions, call):
    """It would wait for itself for ever."""
    calls = {
        "edit": lambda event: sessions[0].edit("a dog"),
        "tune": lambda event: editor.tune(photo, TUNE),
        "caption": lambda event: editor.caption(photo),
    }
    with pytest.raises(RuntimeError, match="on_step called the editor that called it"):
        sessions[0].edit("a dog", EDITS[0][0], on_step=calls[call])
    assert sessions[0].edit("a dog", EDITS[0][0]).image
