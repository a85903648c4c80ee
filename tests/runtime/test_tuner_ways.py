"""Which way a photo is learned in the memory there is, and what follows when a way fails."""

import gc
import logging
import weakref

import pytest
import torch

from forgedit import Editor, TuneConfig, TuneDiverged
from forgedit.engine.learner import DTYPES, Learner
from forgedit.engine.tune_plan import PassCost, Way, choose_way, ladder, peak_during, predicted_bytes
from forgedit.engine.tuner import Tuner
from forgedit.model.fuse import FusedUNet
from tests.runtime.test_tuner import CPU, EXACT, TUNE, Task, distance


def test_the_ladder_goes_down():
    ways = [str(way) for way in ladder(["exact", "fast"], 10)]
    twice = ", the inside of layers computed twice"
    assert ways[:3] == [f"mode exact, {rows} rows at once" for rows in (10, 5)] + [
        f"mode exact, 10 rows at once{twice}"
    ]
    assert ways[-1] == f"mode fast, 1 rows at once{twice}" and len(ways) == 2 * (2 + 4)


def test_the_first_way_that_fits():
    ways = list(ladder(["exact", "fast", "lean"], 4))
    needed = {way: 100 - index for index, way in enumerate(ways)}
    assert choose_way(iter(ways), needed.__getitem__, 100)[0] == ways[0]
    assert choose_way(iter(ways), needed.__getitem__, 97) == (ways[3], 97)
    with pytest.raises(RuntimeError, match=r"at least 0\.00 MB \(mode lean, 1 rows .*the budget is 0\.00 MB"):
        choose_way(iter(ways), needed.__getitem__, 1)


def test_peak_on_a_cpu_counts_what_lives_together():
    def work():
        one = torch.zeros(1000, 1000)
        two = torch.zeros(500, 1000)
        del one
        torch.zeros_like(two)

    assert peak_during(work, CPU) == 6_000_000


@pytest.mark.parametrize(
    "way",
    [Way(mode, rows, rows < 4) for mode in ("exact", "fast", "lean") for rows in (4, 1)],
    ids=str,
)
def test_the_prediction_is_within_15_percent(editor, way):
    """Of what a learner is measured to hold, from its making to its end, on latents of 16 by 16."""
    task = Task(editor, shape=(1, 4, 16, 16))
    unet = FusedUNet(task.model.unet, DTYPES[way.mode])
    tuner = Tuner(task.model, task.original, "exact", unet, None, "auto")
    passing = tuner._pass_cost(way, task.inputs())
    trained = [task.original[name] for name in task.names]
    predicted = predicted_bytes(way, trained, task.config, task.latents.numel(), passing)

    def learn():
        learner = Learner(unet, task.original, task.model.text_encoder, task.names, task.config, way)
        task.learn(learner)

    assert predicted == pytest.approx(peak_during(learn, CPU), rel=0.15)


def test_a_pass_is_measured_by_rows():
    sizes = {1: 100, 2: 130}
    assert PassCost(70, 30, 0.1).of(10) == 370
    held = []

    def run(rows):
        held.append(torch.zeros(sizes[rows] * 1000, dtype=torch.uint8))

    measured = PassCost.measured(run, CPU)
    assert (measured.fixed, measured.row) == (70_000, 30_000) and measured.row_seconds > 0


def planned(editor, photo, **changes):
    session = editor.tune(photo, TUNE.replace(**changes))
    return editor._path._tuner.way, session


def test_memory_bytes_choose_the_way(folder, photo, caplog):
    editor = Editor.from_pretrained(folder)
    way, whole = planned(editor, photo)
    assert way == EXACT
    with caplog.at_level(logging.INFO, "forgedit"):
        way, roomy = planned(editor, photo, memory_bytes=10**12)
        assert way == EXACT and equal_sessions(roomy, whole)
        assert "tune: mode exact, 4 rows at once; predicted at most: " in caplog.text
        planned(editor, photo, memory_bytes=10**12)
        for stage in ("tune: ", "encode: "):
            assert caplog.text.count(stage) == 1  # the second photo of a size is not planned anew
        needed = {mode: least_budget(editor, photo, mode) for mode in ("exact", "lean")}
        way, tight = planned(editor, photo, memory_bytes=needed["exact"])
        assert (
            way.mode == "exact" and way.checkpointing and distance(tight.tuned, whole.tuned, editor.originals()) < 0.01
        )
        assert "mode exact does not fit" not in caplog.text
        way, _ = planned(editor, photo, memory_bytes=needed["lean"])
        assert way.mode == "lean" and "mode exact does not fit" in caplog.text
    with pytest.raises(RuntimeError, match=r"at least .*the budget is 1\.00 MB; give more memory"):
        planned(editor, photo, memory_bytes=10**6)
    with pytest.raises(RuntimeError, match=r"mode exact, \d rows"):
        planned(editor, photo, mode="exact", memory_bytes=needed["lean"])
    assert equal_sessions(planned(editor, photo)[1], whole)


def least_budget(editor, photo, mode):
    """What a mode's smallest way needs, as a refusal says it, to two digits after the point."""
    with pytest.raises(RuntimeError) as refused:
        planned(editor, photo, mode=mode, memory_bytes=1000)
    return round((float(str(refused.value).partition("at least ")[2].partition(" MB")[0]) + 0.01) * 1e6)


def equal_sessions(one, other):
    return all(torch.equal(one.tuned[name], other.tuned[name]) for name in other.tuned)


def test_release_lets_go_of_what_learning_needs(folder, photo):
    editor = Editor.from_pretrained(folder)
    editor.release()
    first = editor.tune(photo, TUNE)
    (unet, _) = editor._path._tuner._unets[torch.float32]
    learner = weakref.ref(editor._path._tuner._learner[1])
    assert any(leaf.tensor.grad is not None for leaf in unet.leaves)
    edit = first.edit("a dog")
    editor.release()
    gc.collect()
    assert learner() is None and not any(leaf.tensor.grad is not None for leaf in unet.leaves)
    assert torch.equal(first.edit("a dog").latents, edit.latents)
    assert equal_sessions(editor.tune(photo, TUNE), first)


@pytest.mark.parametrize("mode", ["fast", "lean"])
def test_a_named_mode_learns_beside_exact_edits(editor, photo, mode):
    session = editor.tune(photo, TUNE.replace(mode=mode))
    assert editor._path._tuner.way == Way(mode, 4, False)
    assert all(weight.dtype == torch.float32 for weight in session.tuned.values())
    first = session.edit("a dog")
    plain = editor.tune(photo, TUNE)
    assert not equal_sessions(session, plain)
    assert torch.equal(session.edit("a dog").latents, first.latents)


def test_the_plain_path_has_no_modes(reference_editor, photo):
    for changes in ({"mode": "fast"}, {"memory_bytes": 10**9}):
        with pytest.raises(ValueError, match="no modes and no memory plan"):
            reference_editor.tune(photo, TUNE.replace(**changes))
    with pytest.raises(ValueError, match="unknown mode 'quick'; expected one of: auto, exact, fast, lean"):
        TuneConfig(mode="quick")


# what goes wrong


def failing(learn, ways, error):
    """Learner.learn, which raises `error` after one step in these ways."""

    def instead(self, inputs):
        if self.way in ways:
            torch.randn(7, generator=inputs.generator)  # what was drawn must not matter
            raise error
        return learn(self, inputs)

    return instead


def test_out_of_memory_goes_one_way_down(folder, photo, monkeypatch, caplog):
    editor = Editor.from_pretrained(folder)
    config = TUNE.replace(mode="exact")
    ways = list(ladder(["exact"], 4))
    expected = editor.tune(photo, config)
    monkeypatch.setattr(Learner, "learn", failing(Learner.learn, ways[:1], torch.OutOfMemoryError("no")))
    session = editor.tune(photo, config)
    assert editor._path._tuner.way == ways[1] and "ran out of memory in mode exact, 4 rows" in caplog.text
    assert distance(session.tuned, expected.tuned, editor.originals()) < 0.01
    monkeypatch.setattr(Learner, "learn", failing(Learner.learn, ways, torch.OutOfMemoryError("no")))
    with pytest.raises(RuntimeError, match="does not fit into the device's memory"):
        editor.tune(photo, config)


def test_a_tune_that_diverges_is_tried_once_in_the_next_safer_mode(folder, photo, monkeypatch, caplog):
    editor = Editor.from_pretrained(folder, numerics="fast")
    exact = Editor.from_pretrained(folder).tune(photo, TUNE)
    learn = Learner.learn
    monkeypatch.setattr(Learner, "learn", failing(learn, [Way("fast", 4, False)], TuneDiverged("no")))
    session = editor.tune(photo, TUNE)
    assert equal_sessions(session, exact) and "once more in mode exact" in caplog.text
    with pytest.raises(TuneDiverged):  # a mode that was named is not left
        editor.tune(photo, TUNE.replace(mode="fast"))
    monkeypatch.setattr(Learner, "learn", failing(learn, [EXACT, Way("fast", 4, False)], TuneDiverged("no")))
    with pytest.raises(TuneDiverged):
        editor.tune(photo, TUNE)
    monkeypatch.setattr(Learner, "learn", learn)
    assert torch.equal(session.edit("a dog").latents, editor.edit(session, "a dog").latents)
