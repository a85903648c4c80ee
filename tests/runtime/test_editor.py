"""The editor keeps its promises: originals come back, sessions do not mix, progress and cancelling work."""

import copy
import dataclasses
import logging
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import forgedit.editor
import forgedit.engine.reference
from forgedit import (
    Cancelled,
    EditConfig,
    EditDiverged,
    Editor,
    InputError,
    StepEvent,
    SweepConfig,
    TuneConfig,
    TuneDiverged,
)
from forgedit.engine.learner import Learner
from forgedit.stages.encode import encode_image, resize_photo
from forgedit.stages.tune import tune

TUNE = TuneConfig(num_steps=3, batch_size=2, unet_lr=1e-3, caption="a cat")
EDIT = EditConfig(strategy="encoderattn", num_steps=3)


@pytest.fixture
def originals(editor):
    """After the test every working weight must be the original again, frozen and without a gradient."""
    yield
    for prefix, module in (("unet", editor.model.unet), ("text_encoder", editor.model.text_encoder)):
        for name, weight in module.named_parameters():
            assert torch.equal(weight, editor.originals()[f"{prefix}.{name}"]), name
            assert not weight.requires_grad and weight.grad is None


@pytest.fixture(scope="module")
def session(editor, photo):
    return editor.tune(photo, TUNE)


class CancelAt:
    """An event set by the progress callback at one step of one stage."""

    def __init__(self, stage, step):
        self.at, self.event, self.seen = (stage, step), threading.Event(), []

    def __call__(self, event):
        self.seen.append((event.stage, event.step))
        if (event.stage, event.step) == self.at:
            self.event.set()


def test_tuning_restores_the_originals(editor, photo, originals):
    editor.tune(photo, TUNE)


@pytest.mark.parametrize("profile", ["official", "dreambooth"])
def test_cancelling_a_tune(editor, photo, originals, profile):
    cancel = CancelAt("tune", 2)
    config = TUNE.replace(profile=profile, num_steps=3, batch_size=2)
    with pytest.raises(Cancelled, match="tune"):
        editor.tune(photo, config, on_step=cancel, cancel=cancel.event)
    assert cancel.seen[-1] == ("tune", 2)


@pytest.mark.parametrize("at", [("caption", 1), ("encode", 1), ("tune", 1), ("tune", 3)], ids=str)
def test_nothing_follows_the_step_that_cancels_a_tune(editor, photo, originals, at):
    cancel = CancelAt(*at)
    with pytest.raises(Cancelled, match=at[0]):
        editor.tune(photo, TUNE.replace(caption=None), on_step=cancel, cancel=cancel.event)
    assert cancel.seen[-1] == at


@pytest.mark.parametrize("at", [("blend", 1), ("forget", 1), ("sample", 1), ("sample", 2), ("decode", 1)], ids=str)
def test_nothing_follows_the_step_that_cancels_an_edit(session, originals, at):
    cancel = CancelAt(*at)
    with pytest.raises(Cancelled, match=at[0]):
        session.edit("a dog", EDIT, on_step=cancel, cancel=cancel.event)
    assert cancel.seen[-1] == at


def test_cancelling_a_sweep_keeps_what_it_yielded(session, originals):
    """In its second batch, after one step."""
    cancel, seen, edits = threading.Event(), [], []
    config = SweepConfig(strategies=("none", "encoderattn"), gammas=(1.0, 1.2), num_steps=2)

    def on_step(event):
        seen.append((event.stage, event.step))
        if len(edits) == 2 and event.stage == "sample":
            cancel.set()

    with pytest.raises(Cancelled, match="sample"):
        for edit in session.sweep("a dog", config, on_step=on_step, cancel=cancel):
            edits.append(edit)
    assert [edit.config for edit in edits] == config.edits()[:2]
    assert seen[-4:] == [("decode", 1), ("blend", 1), ("forget", 1), ("sample", 1)]


def test_cancelling_between_two_edits_of_a_sweep(session, originals):
    """What is finished is still given out; nothing more is computed."""
    cancel, seen, edits = threading.Event(), [], []
    config = SweepConfig(num_steps=1)
    sweep = session.sweep("a dog", config, on_step=seen.append, cancel=cancel)
    edits.append(next(sweep))
    cancel.set()
    count = len(seen)
    with pytest.raises(Cancelled, match="blend"):
        edits.extend(sweep)
    assert len(seen) == count and len(edits) <= len(config.gammas)


def test_cancelling_from_another_thread(editor, photo, originals):
    """Whenever it comes, at most one more step is reported."""
    cancel, after = threading.Event(), []

    def on_step(event):
        if cancel.is_set():
            after.append(event)

    threading.Timer(0.2, cancel.set).start()
    with pytest.raises(Cancelled):
        editor.tune(photo, TUNE.replace(num_steps=100_000), on_step=on_step, cancel=cancel)
    assert len(after) <= 1


def test_cancelled_before_it_began(editor, photo, originals):
    event = threading.Event()
    event.set()
    with pytest.raises(Cancelled):
        editor.tune(photo, TUNE, cancel=event)


def test_interrupted_by_its_callback(editor, photo, originals):
    def interrupt(event):
        if event.stage == "tune":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        editor.tune(photo, TUNE, on_step=interrupt)


def test_a_loss_that_is_not_finite(editor, photo, originals):
    with pytest.raises(TuneDiverged, match="lower unet_lr"):
        editor.tune(photo, TUNE.replace(unet_lr=1e30))


@pytest.mark.parametrize("part", ["a weight", "the embedding"])
def test_a_last_step_that_leaves_values_not_finite(editor, photo, originals, monkeypatch, part):
    """The loss is looked at before each step, so it cannot tell of the last one."""

    def overflow(*arguments):
        learned = learn(*arguments)
        poisoned = [*learned.tuned.values()][-1] if part == "a weight" else learned.embedding
        poisoned.view(-1)[-1] = float("inf")
        return learned

    learn = Learner.learn
    monkeypatch.setattr(Learner, "learn", overflow)
    with pytest.raises(TuneDiverged, match="not finite; lower"):
        editor.tune(photo, TUNE)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("strength", [{"gamma": 1e38}, {"guidance_scale": 1e38}, {"guidance_scale": 1e8}], ids=str)
def test_latents_that_are_not_finite_or_too_large_to_decode(session, originals, strength):
    with pytest.raises(EditDiverged, match=f"lower .*{next(iter(strength))}"):
        session.edit("a dog", dataclasses.replace(EDIT, **strength))


def test_a_strategy_that_matches_nothing(session, originals):
    with pytest.raises(ValueError, match="matches none"):
        session.edit("a dog", EditConfig(strategy="down_blocks and nothing_like_it", num_steps=1))


def test_seeds(editor, photo, session):
    again, other = editor.tune(photo, TUNE), editor.tune(photo, TUNE.replace(seed=1))
    assert all(torch.equal(again.tuned[name], weight) for name, weight in session.tuned.items())
    assert not torch.equal(other.embedding, session.embedding)
    first, second = (session.edit("a dog", EditConfig(num_steps=2, seed=seed)) for seed in (0, 1))
    assert torch.equal(again.edit("a dog", EditConfig(num_steps=2)).latents, first.latents)
    assert not torch.equal(first.latents, second.latents)


def test_sessions_of_one_editor_do_not_mix(editor, photo, session):
    other = editor.tune(photo, TUNE.replace(profile="dreambooth", num_steps=2, batch_size=2, unet_lr=1e-3))
    alone = [s.edit("a dog", EDIT).latents for s in (session, other)]
    for _ in range(2):
        for expected, s in zip(alone, (session, other), strict=True):
            assert torch.equal(s.edit("a dog", EDIT).latents, expected)


def test_a_tuned_text_encoder_serves_its_own_session_alone(editor, photo, session):
    other = editor.tune(photo, TUNE.replace(profile="dreambooth", num_steps=2, batch_size=2, text_encoder_lr=1e-3))
    expected = session.edit("a wall", EDIT).latents
    for target in ("a dog", "a wall"):  # the second finds its weights loaded already
        other.edit(target, EDIT)
    unprompted = dataclasses.replace(session, prompts={})
    assert torch.equal(unprompted.edit("a wall", EDIT).latents, expected)
    assert not torch.equal(other.prompts["a wall"].embedding, unprompted.prompts["a wall"].embedding)


def test_two_editors_are_independent(editor, other_folder, photo, session):
    other = Editor.from_pretrained(other_folder)
    before = session.edit("a dog", EDIT).latents
    other.tune(photo, TUNE).edit("a dog", EDIT)
    assert torch.equal(session.edit("a dog", EDIT).latents, before)
    assert editor.fingerprint != other.fingerprint
    with pytest.raises(ValueError, match="another editor"):
        other.edit(session, "a dog")


def test_a_sweep_merges_once_per_strategy(reference_editor, photo, monkeypatch):
    calls = []
    real = forgedit.engine.reference.forget_weights

    def count(*args):
        calls.append(args[3])
        return real(*args)

    monkeypatch.setattr(forgedit.engine.reference, "forget_weights", count)
    config = SweepConfig(strategies=("decoderattn", "encoderkv"), gammas=(0.9, 1.0, 1.1), num_steps=1)
    session = reference_editor.tune(photo, TUNE)
    edits = list(session.sweep("a dog", config))
    assert calls == ["decoderattn", "encoderkv"]
    assert [edit.config for edit in edits] == config.edits()
    assert torch.equal(session.edit("a dog", config.edits()[4]).latents, edits[4].latents)


def test_events(editor, photo):
    events: list[StepEvent] = []
    session = editor.tune(photo, TUNE, on_step=events.append)
    assert [(e.stage, e.step, e.total) for e in events] == [
        ("caption", 1, 1), ("encode", 1, 1), ("tune", 1, 3), ("tune", 2, 3), ("tune", 3, 3),
    ]  # fmt: skip
    assert tuple(e.loss for e in events[2:]) == session.losses
    events.clear()
    edit = session.edit("a dog", EDIT, on_step=events.append)
    assert [e.stage for e in events] == ["blend", "forget", "sample", "sample", "sample", "decode"]
    assert edit.seconds.keys() == {"blend", "forget", "sample", "decode"}
    assert [e.seconds for e in events] == sorted(e.seconds for e in events)


@pytest.mark.parametrize("target", ["", "  \n"])
def test_empty_target(session, target):
    with pytest.raises(InputError, match="empty"):
        session.edit(target)


@pytest.mark.parametrize(
    "name, content", [("none.png", None), ("a.png", b"no picture"), ("a.gif", "GIF"), ("a.eps", "EPS")]
)
def test_photo_that_cannot_be_read(editor, tmp_path, name, content):
    if isinstance(content, str):
        Image.new("RGB", (40, 40)).save(tmp_path / name, content)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="cannot read the photo"):
        editor.tune(tmp_path / name, TUNE)


def test_a_pil_image_is_a_photo_and_stays_as_it_was(editor, photo, session):
    image = Image.open(photo).convert("RGBA")
    before = np.asarray(image).copy()
    assert torch.equal(editor.tune(image, TUNE).embedding, session.embedding)
    assert image.mode == "RGBA" and np.array_equal(np.asarray(image), before)


def test_a_cut_prompt_is_reported(session, caplog):
    with caplog.at_level(logging.WARNING, "forgedit"):
        session.edit("ab " * 40, EditConfig(num_steps=1))
    assert "longer than 77 tokens" in caplog.text


@pytest.mark.parametrize(
    "size, config, expected",
    [
        ((1024, 512), TuneConfig(), (736, 352)),
        ((512, 512), TuneConfig(), (512, 512)),
        ((100, 3000), TuneConfig(), (96, 2816)),
        ((800, 600), TuneConfig(width=256, height=256), (288, 224)),
        ((800, 600), TuneConfig(resize="squash"), (512, 512)),
        ((800, 600), TuneConfig(resize="squash", width=500, height=333), (480, 320)),
    ],
)
def test_sizes_for_stable_diffusion(size, config, expected):
    assert resize_photo(Image.new("RGB", size), config, 512, 8).size == expected


def test_everything_is_contiguous(editor, photo):
    """torch 2.13 crashes on the CPU in the backward pass of a channels-last UNet with frozen blocks."""
    image = Image.open(photo).resize((48, 16))
    assert encode_image(image, editor.model.vae, torch.Generator().manual_seed(0)).latents.is_contiguous()
    for module in (editor.model.unet, editor.model.vae, editor.model.text_encoder):
        assert all(weight.is_contiguous() for weight in module.parameters())


def test_a_channels_last_unet_is_refused(editor):
    unet = copy.deepcopy(editor.model.unet).to(memory_format=torch.channels_last)
    embedding, latents = torch.zeros(1, 77, 32), torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="not contiguous"):
        tune(
            unet, editor.model.text_encoder, torch.zeros(1, 77, dtype=torch.long), embedding, latents,
            editor.model.alphas_cumprod, "epsilon", TUNE, torch.Generator(), lambda *_: None,
        )  # fmt: skip


def test_info_and_backend(editor, folder):
    info = editor.info()
    assert info["unet_parameters"] == sum(weight.numel() for weight in editor.model.unet.parameters())
    assert info["backend"] in ("native", "reference") and info["versions"]["torch"] == torch.__version__
    with pytest.raises(ValueError, match="backend 'nativ'"):
        Editor.from_pretrained(folder, backend="nativ")
    assert Editor.from_pretrained(folder, backend="reference").backend == "reference"
