"""Choosing an edit: how far the ladder is climbed, which edit wins, and what is refused. The scorer sees colours."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from forgedit import Cancelled, ChooseConfig, Edit, EditConfig, Editor, InputError, ModelError
from forgedit.config import Defaults, parse_rung
from forgedit.model import load_model
from forgedit.quality.change_mask import ChangeMask
from forgedit.quality.choose import Evidence, Verdict, climb, decide, kept, rungs
from forgedit.quality.metrics import psnr

PHOTO = Image.new("RGB", (16, 16), (200, 40, 40))
CAPTION, TARGET = "a red square", "a blue square"
NOWHERE = ChangeMask(Image.new("L", PHOTO.size, 0), 0.0)


class ColourScorer:
    """A picture is its mean colour, a text the colour it names."""

    name = "colours"

    def embed_images(self, images):
        rows = torch.tensor(np.array([np.asarray(image.convert("RGB")).mean((0, 1)) for image in images]))
        return torch.nn.functional.normalize(rows.float(), dim=1)

    def embed_texts(self, texts):
        rows = [[255.0, 0, 0] if "red" in text else [0, 0, 255.0] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(rows), dim=1)


def session(*colours, seconds=0.0, monkeypatch=None, mask=None):
    """A learned photo whose edits have these colours, one after another; `asked` lists what was asked for.

    mask: found for each of them, None for one that covers nothing
    """
    coming, asked = iter(colours), []
    if monkeypatch is not None:
        now = [0.0]
        monkeypatch.setattr("forgedit.quality.choose.time.perf_counter", lambda: now[0])

    def edits(_, target, configs, on_step=None, cancel=None):
        for config in configs:
            asked.append(config)
            if monkeypatch is not None:
                now[0] += seconds
            yield Edit(Image.new("RGB", PHOTO.size, next(coming)), torch.zeros(1), config, target, {})

    def change_mask(_, edit):
        return NOWHERE if mask is None else mask

    editor = SimpleNamespace(edits=edits, change_mask=change_mask)
    return SimpleNamespace(source=PHOTO, caption=CAPTION, editor=editor, asked=asked)


RED, PURPLE, BLUE, BRIGHT = (200, 40, 40), (120, 40, 120), (40, 40, 200), (90, 90, 255)
LADDER = ("none:1.0", "none:1.3", "encoderattn:0.9:1", "decoderattn:0.9+1.3")


def climbed(found, **settings):
    config = ChooseConfig(**{"ladder": LADDER, "least_margin": 0.1, "least_kept_db": 5.0} | settings)
    candidates = list(climb(found, TARGET, config, EditConfig(seed=7, guidance_scale=3.0), ColourScorer()))
    return decide(candidates, config)


def test_the_first_good_edit_ends_the_climb():
    found = session(RED, PURPLE, BLUE, BLUE)
    choice = climbed(found)
    assert [candidate.edit.image.getpixel((0, 0)) for candidate in choice.candidates] == [RED, PURPLE, BLUE]
    assert choice.chosen is choice.candidates[2] and choice.chosen.verdict.good
    assert choice.reason.startswith("good enough")


def test_the_rungs_are_the_ladders_over_the_base():
    found = session(*[RED] * 4)
    climbed(found)
    base = EditConfig(guidance_scale=3.0)
    changes = [
        dict(strategy="none", gamma=1.0, seed=7),
        dict(strategy="none", gamma=1.3, seed=7),
        dict(strategy="encoderattn", gamma=0.9, seed=8),
        dict(strategy="decoderattn", blend="vp", identity_weight=0.9, edit_weight=1.3, seed=7),
    ]
    assert found.asked == [EditConfig(guidance_scale=3.0, **change) for change in changes]
    assert rungs(ChooseConfig(ladder=LADDER, max_edits=2), base) == rungs(ChooseConfig(ladder=LADDER), base)[:2]


def test_a_quick_sampler_is_the_ladders_alone():
    base, quick = EditConfig(num_steps=50), ChooseConfig(ladder=LADDER, scheduler="unipc", num_steps=20)
    assert {(config.scheduler, config.num_steps) for config in rungs(quick, base)} == {("unipc", 20)}
    assert rungs(ChooseConfig(ladder=LADDER), base) == [
        replace(config, scheduler="ddim", num_steps=50) for config in rungs(quick, base)
    ]
    for wrong in (dict(scheduler="euler"), dict(num_steps=0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ChooseConfig(**wrong)


def test_the_plain_path_keeps_the_methods_sampler(folder):
    model = load_model(folder)
    model = replace(model, defaults=replace(model.defaults, choose=ChooseConfig(scheduler="unipc", num_steps=20)))
    assert Editor(model).defaults.choose.num_steps == 20
    assert Editor(model, numerics="reference").defaults.choose == ChooseConfig()


def test_where_none_is_good_the_agreeing_one_that_kept_most_wins():
    choice = climbed(session(RED, BRIGHT, BLUE, RED), least_kept_db=40.0)
    assert choice.chosen.edit.image.getpixel((0, 0)) == BLUE  # agrees as BRIGHT does, nearer to the photo
    assert choice.chosen.verdict.agrees and not choice.chosen.verdict.good
    assert choice.chosen.verdict.evidence.kept_db > choice.candidates[1].verdict.evidence.kept_db
    assert "kept most" in choice.reason and len(choice.candidates) == 4


def left_of(column):
    """A mask of all pixels left of one."""
    mask = Image.new("L", PHOTO.size, 0)
    mask.paste(255, (0, 0, column, PHOTO.height))
    return ChangeMask(mask, column / PHOTO.width)


def test_what_was_kept_is_measured_outside_the_change():
    picture = PHOTO.copy()
    picture.paste(BLUE, (0, 0, 8, 16))
    assert kept(picture, PHOTO, left_of(8)) == 100.0 > kept(picture, PHOTO, left_of(4)) > kept(picture, PHOTO, None)
    assert kept(picture, PHOTO, NOWHERE) == kept(picture, PHOTO, None) < 15
    assert kept(picture, PHOTO, left_of(16)) == kept(picture, PHOTO, None)  # nothing is left to have been kept
    with pytest.raises(ValueError, match="count; expected at least one"):
        psnr(picture, PHOTO, np.zeros((16, 16), dtype=bool))


def test_a_climb_finds_where_each_edit_changed():
    where = left_of(16 - 1)
    choice = climbed(session(RED, BLUE, mask=where))
    assert [candidate.mask for candidate in choice.candidates] == [where] * 2
    chosen = choice.chosen
    assert chosen.verdict.evidence.kept_db == kept(chosen.picture, PHOTO, where) == 100.0
    whole = climbed(session(RED, BLUE, mask=where), keep_outside=False).chosen
    assert whole.verdict.evidence.kept_db == kept(whole.edit.image, PHOTO, where) < 15
    assert (chosen.is_kept, whole.is_kept, whole.picture) == (True, False, whole.edit.image)


def test_what_is_handed_out_is_judged():
    """Blue in a sliver only is no blue square any more: the climb goes on to where the mask is large enough."""
    masks = iter([left_of(2), left_of(14), left_of(14)])
    found = session(BLUE, BLUE, BLUE)
    found.editor.change_mask = lambda *_: next(masks)
    choice = climbed(found)
    assert [candidate.verdict.agrees for candidate in choice.candidates] == [False, True]
    assert choice.chosen.picture.getpixel((0, 0)) == BLUE and choice.chosen.picture.getpixel((15, 0)) == RED
    assert "the photo put back elsewhere" in choice.reason
    assert len(climbed(session(BLUE, mask=left_of(2)), keep_outside=False).candidates) == 1


def test_where_nearly_everything_changed_the_edit_is_whole():
    choice = climbed(session(BLUE, BLUE, BLUE, BLUE, mask=left_of(16)), least_kept_db=40.0)
    chosen = choice.chosen
    assert chosen.picture is chosen.edit.image and not chosen.is_kept and "covers 100.0%" in chosen.refused
    assert not chosen.verdict.good and len(choice.candidates) == 4 and "none kept 40 dB" in choice.reason


def test_a_mask_of_ones_own_is_not_sought():
    found = session(BLUE)
    found.editor.change_mask = lambda *_: pytest.fail("sought")
    config, given = ChooseConfig(ladder=LADDER, least_margin=0.1), left_of(12)
    (candidate,) = climb(found, TARGET, config, EditConfig(), ColourScorer(), mask=given)
    assert candidate.mask is given and candidate.is_kept
    photo = PHOTO.resize((32, 32))
    edit = replace(candidate.edit, photo_size=(32, 32))
    shown = replace(candidate, edit=edit).at_photo_size(photo)
    assert shown.size == (32, 32) and shown.getpixel((31, 0)) == RED and shown.getpixel((0, 0)) == BLUE
    assert replace(candidate, edit=edit, is_kept=False).at_photo_size(photo).getpixel((31, 0)) == BLUE


def test_of_good_ones_that_kept_alike_the_most_agreeing_wins():
    choice = climbed(session(PURPLE, BLUE, mask=left_of(12)), at_once=2, least_margin=-1.0)
    assert [candidate.verdict.good for candidate in choice.candidates] == [True, True]
    assert choice.chosen is choice.candidates[1] and "best of those" in choice.reason


def test_where_none_agrees_the_nearest_wins_though_it_kept_less():
    choice = climbed(session(RED, PURPLE, RED, RED))
    assert choice.chosen is choice.candidates[1] and not choice.chosen.verdict.agrees
    assert choice.chosen.verdict.evidence.kept_db < choice.candidates[0].verdict.evidence.kept_db == 100.0
    assert "none shows" in choice.reason


def test_evidence_is_what_it_says():
    evidence = climbed(session(RED, BLUE)).candidates[0].verdict.evidence
    assert evidence.identity == pytest.approx(1.0) and evidence.kept_db == 100.0 and evidence.kept_ssim == 1.0
    assert evidence.direction == pytest.approx(0.0, abs=1e-5)
    norm = np.hypot(200, np.hypot(40, 40))
    assert evidence.similarity == pytest.approx(40 / norm) and evidence.margin == pytest.approx((40 - 200) / norm)
    changed = climbed(session(BLUE)).candidates[0].verdict.evidence
    assert changed.direction == pytest.approx(1.0) and changed.margin == pytest.approx((200 - 40) / norm)


def test_several_edits_between_two_looks():
    found = session(RED, BLUE, RED, RED)
    assert len(climbed(found, at_once=2).candidates) == 2
    found = session(BLUE, RED, RED, RED)  # the first was good, but both were asked for
    assert len(climbed(found, at_once=2).candidates) == 2


@pytest.mark.parametrize(("budget", "made"), [(0.0, 1), (1.9, 1), (2.0, 2), (3.5, 3), (100.0, 4)])
def test_the_budget_counts_what_an_edit_took(budget, made, monkeypatch):
    found = session(*[RED] * 4, seconds=1.0, monkeypatch=monkeypatch)
    assert len(climbed(found, budget_s=budget).candidates) == made


def test_without_a_scorer_it_says_what_to_give():
    with pytest.raises(ModelError, match="--scorer"):
        next(climb(session(RED), TARGET, ChooseConfig(), EditConfig(), None))
    with pytest.raises(ValueError, match="no edits"):
        decide([], ChooseConfig())


@pytest.mark.parametrize(
    ("margin", "kept", "agrees", "good"), [(0.1, 20, True, True), (0.1, 19.9, True, False), (0.09, 99, False, False)]
)
def test_thresholds_are_met_by_reaching_them(margin, kept, agrees, good):
    evidence = Evidence(margin, 0.3, 0.3, kept, 0.9, 0.9)
    config = ChooseConfig(least_margin=0.1, least_kept_db=20)
    verdict = Verdict.of(evidence, config)
    assert (verdict.agrees, verdict.good) == (agrees, good)
    assert bool(verdict.rejected(config)) != good
    assert ("margin" in verdict.rejected(config), "kept" in verdict.rejected(config)) == (
        not agrees,
        agrees and not good,
    )


@pytest.mark.parametrize("rung", ["none", "none:", "none:x", "none:1:2:3", "none:1+2+3", "none:1:-1", "none:1:1.5", ""])
def test_a_rung_that_cannot_be_read_is_shown(rung):
    with pytest.raises(ValueError, match="expected STRATEGY:GAMMA"):
        parse_rung(rung)


def test_a_rung_is_text():
    with pytest.raises(ValueError, match="a rung is 7; expected text"):
        Defaults.merged({"choose": {"ladder": [7]}})


def test_a_rung_of_an_unknown_strategy_names_those_there_are():
    with pytest.raises(ValueError, match="unknown strategy 'nix'; expected one of: none"):
        ChooseConfig(ladder=("nix:1.0",))


@pytest.mark.parametrize(
    "bad",
    [
        {"ladder": ()},
        {"max_edits": 0},
        {"at_once": 0},
        {"budget_s": -1.0},
        {"least_margin": 3.0},
        {"least_kept_db": -1.0},
        {"keep_outside": 1},
    ],
)
def test_a_bad_setting_is_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ChooseConfig(**bad)


def test_a_model_folder_may_recommend_it():
    assert Defaults.merged({"choose": {"max_edits": 3}}).choose == ChooseConfig(max_edits=3)


def test_a_learned_photo_chooses(editor, photo, monkeypatch):
    """The public way, on a tiny model: edits, their order, cancelling, refusals."""
    tuned = editor.tune(photo, editor.defaults.tune.replace(num_steps=2, caption="a red square"))
    config, base = ChooseConfig(ladder=LADDER[:2], least_kept_db=99.0), EditConfig(num_steps=2)
    with pytest.raises(ModelError, match="no scorer"):
        tuned.choose(TARGET, config, base)
    monkeypatch.setitem(editor.model.__dict__, "scorer", ColourScorer())
    choice = tuned.choose(TARGET, config, base)
    assert [candidate.edit.config.gamma for candidate in choice.candidates] == [1.0, 1.3]
    again = tuned.edit(TARGET, choice.chosen.edit.config)
    assert again.image.tobytes() == choice.chosen.edit.image.tobytes()
    with pytest.raises(InputError, match="empty"):
        tuned.choose(" ", config, base)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        tuned.choose(TARGET, config, base, cancel=cancel)
