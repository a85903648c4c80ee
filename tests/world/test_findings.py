"""The open questions: their settings, how they are counted, and a whole small run on an untrained model."""

import json
import sys
from dataclasses import asdict, replace

import pytest
import torch

from bench.world import compare, findings, questions
from bench.world.choose import LADDER, QUICK
from bench.world.compare import Truth, as_told, lines, pairs_of
from bench.world.evaluate import Setting
from bench.world.findings import Makers
from bench.world.pairs import pairs_by_photo
from bench.world.questions import Arm, Learned, Question
from bench.world.resample import clustered, share
from forgedit import EditConfig, Editor
from forgedit.config import parse_rung
from forgedit.world.judge import CLASSES, Judge
from tests.world.test_evaluate import folder, verdict  # noqa: F401

DEFAULT = EditConfig(strategy="encoderattn", guidance_scale=3.0)
QUESTIONS = questions.questions(DEFAULT)


def test_every_question_compares_arms_it_has() -> None:
    for question in QUESTIONS.values():
        names = [arm.name for arm in question.arms]
        assert len(set(names)) == len(names)
        assert question.against and {name for pair in question.against for name in pair} <= set(names)
        reconstructs = {arm.name: arm.reconstructs for arm in question.arms}
        assert all(reconstructs[ours] == reconstructs[theirs] for ours, theirs in question.against)
        assert all(arm.edit.guidance_scale == 3.0 and arm.edit.seed == 0 for arm in question.arms)


def test_edits_are_those_that_a_choice_keeps() -> None:
    """Equal settings, and so equal pictures: what choose.py made is not made again."""
    base = replace(DEFAULT, keep=0.0, **QUICK)
    rungs = {json.dumps(asdict(replace(base, **parse_rung(rung)))) for rung in LADDER}
    usual = [arm for question in QUESTIONS.values() for arm in question.arms if arm.learned == Learned()]
    shared = {arm.name for arm in usual if json.dumps(asdict(arm.edit)) in rungs}
    assert shared >= {arm.name for arm in QUESTIONS["strategies"].arms}
    assert shared >= {"VS 0.8", "VS 1", "VS 1.2", "encoderattn, gamma 1", "decoderattn, gamma 1", "fp32"}


def test_what_is_asked() -> None:
    arms = {name: {arm.name: arm for arm in question.arms} for name, question in QUESTIONS.items()}
    assert arms["keep"]["encoderattn, keep 1"].edit == arms["keep"]["decoderattn, keep 1"].edit
    assert arms["steps"]["40 steps"].learned == Learned() and dict(arms["steps"]["10 steps"].learned.tune) == {
        "num_steps": 10,
        "loss_threshold": 0.0,
    }
    assert arms["source"]["target: none"].learned.source == "target"
    assert arms["blend"]["VP 0.8+1.3"].edit.identity_weight == 0.8 and not arms["blend"]["VP 0.8+1.3"].reconstructs
    assert arms["forgetting"]["nodecoder, gamma 0"].reconstructs
    with pytest.raises(KeyError):
        arms["forgetting"]["none, gamma 0.5"]


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth.of(Judge(), pairs_by_photo(7, 3, 0), 64)


def oracle(truth: Truth) -> Truth:
    """A judge that is right about sources and targets."""

    class Oracle(Judge):
        def probabilities(self, pixels):
            return verdict(truth.edits.target if torch.equal(pixels, truth.target) else truth.edits.source)

    return replace(truth, judge=Oracle())


def test_a_perfect_edit_and_the_photo_unchanged(truth) -> None:
    question = Question((Arm("all", DEFAULT), Arm("nothing", DEFAULT)), (("all", "nothing"),), by="kinds")
    made = lines("q", question, {"all": truth.target, "nothing": truth.source}, oracle(truth))
    seen = {(line.measure, line.part): line.figure.value for found in made.values() for line in found}
    assert seen["q: all", "success and kept"] == seen["q: all", "structure as told"] == 1
    assert seen["q: nothing", "success"] == 0 and seen["q: nothing", "rest kept"] == 1
    assert seen["q: all", "structure"] == pytest.approx(1) and seen["q: all", "colour distance"] == pytest.approx(0)
    assert seen["q: all above nothing", "success and kept"] == seen["q: all above nothing", "success, pose"] == 1
    assert seen["q: all above nothing", "structure"] > 0.02 and seen["q: all above nothing", "colour distance"] < -1


def test_attributes_as_told(truth) -> None:
    source = truth.edits.source
    probabilities = verdict(source)
    assert as_told(probabilities, source, tuple(CLASSES)).all()
    probabilities["colour"] = probabilities["colour"].roll(1, dims=1)
    assert as_told(probabilities, source, compare.STRUCTURE).all()
    assert not as_told(probabilities, source, compare.APPEARANCE).any()
    probabilities = verdict(source)
    probabilities["pose"] = probabilities["pose"].roll(1, dims=1)
    posed = torch.tensor([kind == "pose" for kind in truth.edits.kind])
    assert not as_told(probabilities, source, compare.STRUCTURE)[posed].any()
    assert as_told(probabilities, source, compare.STRUCTURE).any()  # what has no pose has lost none


def test_a_share_is_of_sums_and_its_interval_of_cases() -> None:
    whole = torch.tensor([1.0, 2.0, 3.0, 2.0])
    found = share([(whole / 4, whole)])
    assert found.value == found.low == found.high == 0.25 and found.n == 4
    between = share([(whole / 2, whole), (whole.flip(0) / 4, whole.flip(0))])
    assert between.value == pytest.approx(0.25)
    uneven = share([(torch.tensor([0.0, 2.0, 0.0, 2.0]), whole)])
    assert uneven.value == 0.5 and uneven.low < 0.3 and uneven.high > 0.7


def test_intervals_are_of_photos() -> None:
    """Three equal pairs of a photo say no more than one."""
    one = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    three = one.repeat_interleave(3)
    once, thrice = clustered(one, torch.arange(6)), clustered(three, torch.arange(18) // 3)
    assert replace(once, n=18) == thrice
    wrong = clustered(three, torch.arange(18))
    assert thrice.high - thrice.low > 1.4 * (wrong.high - wrong.low)
    some = clustered(torch.tensor([1.0, 3.0, torch.nan, 5.0]), torch.tensor([0, 0, 1, 2]))
    assert some.n == 3 and some.value == 3.0
    assert clustered(torch.ones(9, dtype=torch.bool), torch.arange(9) // 3).low < 0.8  # Wilson's
    assert clustered(torch.full((2,), torch.nan), torch.arange(2)).n == 0


def test_one_reconstruction_of_a_photo(truth) -> None:
    """And it is compared with whichever pair of its photo."""
    plain = Arm("plain", replace(DEFAULT, gamma=0.0))
    target = Arm("target", replace(DEFAULT, gamma=0.0), Learned(source="target"))
    assert list(pairs_of(plain, 7)) == [0, 3, 6] and list(pairs_of(target, 4)) == [0, 1, 2, 3]
    made = {"plain": truth.source[::3], "target": truth.source}
    question = Question((plain, target), (("target", "plain"),))
    parts = lines("q", question, made, truth).values()
    found = {(line.measure, line.part): line.figure for part in parts for line in part}
    assert found["q: plain", "structure"].n == 7 and found["q: target", "structure"].n == 21
    between = found["q: target above plain", "structure"]
    assert between.value == between.low == between.high == 0 and between.n == 21


def test_reconstructions_lose_what_is_taken(truth) -> None:
    """Two halves that differ: one moves edges and keeps colours, the other the reverse."""
    arms = tuple(arm for arm in QUESTIONS["forgetting"].arms if arm.reconstructs)
    made = dict.fromkeys([arm.name for arm in arms], truth.source)
    made["everything, gamma 0"] = truth.target.roll(1, dims=0)
    made["noencoder, gamma 0"], made["nodecoder, gamma 0"] = truth.source.flip(3), truth.source.flip(1)
    found = {name: compare.measures(arm, made[name], truth) for arm in arms for name in [arm.name]}
    seen = {(line.measure, line.part): line.figure.value for line in compare.share_lines(found)}
    assert seen["encoderattn, share lost", "structure"] == seen["encoderattn, share lost", "appearance"] == 0
    assert seen["noencoder, share lost", "structure above appearance"] > 0.3
    assert seen["nodecoder, share lost", "structure above appearance"] < -0.3


@pytest.mark.slow
def test_a_delta_and_the_target_as_source_are_other_pictures(folder, tmp_path) -> None:  # noqa: F811
    makers = Makers(Editor.from_pretrained(folder), pairs_by_photo(2, 3, 0), tmp_path)
    plain, rounded = makers.of(Learned()), makers.of(Learned(delta="int4"))
    assert makers.of(Learned()) is makers.first and makers.of(Learned(source="target")).captions == plain.targets
    arms = [Arm("usual", DEFAULT), Arm("int4", DEFAULT, Learned(delta="int4"))]
    makers.make(0, arms)
    setting = Setting("usual", DEFAULT)
    assert plain.path(0, setting) != rounded.path(0, setting) and rounded.path(0, setting).exists()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1  # one session, read back in two formats
    made = [makers.pictures(arm, 1) for arm in arms]
    assert made[0] is not None and made[1] is not None and made[0].shape == made[1].shape == (1, 3, 64, 64)
    assert makers.pictures(arms[0], 2) is None


@pytest.mark.slow
def test_a_whole_run(folder, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    """Two shards, then rows and a sheet; the settings are few, and of every way to learn."""
    base = replace(DEFAULT, num_steps=1, strategy="none")
    learned = (Learned(), Learned((("num_steps", 2),)), Learned(source="target"), Learned(delta="int8"))
    arms = tuple(Arm(f"arm {i}", base, learned[i]) for i in range(4))
    small = {"small": Question(arms, (("arm 1", "arm 0"),), by="kinds")}
    monkeypatch.setattr(findings, "questions", lambda default: small)
    out = tmp_path / "rows.jsonl"
    common = ["--model", str(folder), "--pairs", "9", "--first", "6", "--work", str(tmp_path / "work")]
    common += ["--judge", str(folder / "judge.safetensors")]
    monkeypatch.setattr(sys, "argv", ["findings", "measure", *common])
    with pytest.raises(FileNotFoundError, match="small: pictures are missing of arm 0, arm 1"):
        findings.main()
    for shard in ("0/2", "1/2"):
        monkeypatch.setattr(sys, "argv", ["findings", "make", *common, "--shard", shard])
        findings.main()
    monkeypatch.setattr(sys, "argv", ["findings", "measure", *common, "--out", str(out), "--grid", str(tmp_path)])
    findings.main()
    assert "small: arm 1 above arm 0" in capsys.readouterr().out and (tmp_path / "small.png").exists()
    rows = {(row["case"], row["part"]): row for row in map(json.loads, out.read_text().splitlines())}
    first, second, third = (rows[f"small: arm {i}", "success"] for i in (1, 2, 3))
    assert first["tune"] == {"num_steps": 2} and second["source"] == "target"
    assert third["delta"] == "int8" and third["edit"]["num_steps"] == 1
    assert "tune" not in rows["small: arm 1 above arm 0", "success"]
    assert all(row["question"] == "small" and row["n"] <= 6 for row in rows.values())
    monkeypatch.setattr(sys, "argv", ["findings", "make", *common, "--questions", "other"])
    with pytest.raises(SystemExit):
        findings.main()
    assert "unknown questions ['other']; expected some of: small" in capsys.readouterr().err
