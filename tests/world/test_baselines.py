"""The comparison of methods: what is made, kept and counted."""

import json
import math
import sys

import pytest
import torch

from bench.world import baselines
from bench.world.baselines import Arm, Kept, accepted, arms, both, rungs
from bench.world.evaluate import Maker
from bench.world.pairs import pairs_by_photo
from forgedit import Editor
from forgedit.evaluate.baselines import BASELINES, Baseline, DreamBooth, Imagic, SDEdit, Tuned, Unchanged, Untuned
from forgedit.world.score import Scores

FAST = [Arm("photo unchanged", Baseline(Untuned(), Unchanged())), Arm("SDEdit", Baseline(Untuned(), SDEdit(0.02)))]


def test_what_learned_is_made_with_each_strategy() -> None:
    names = [arm.name for arm in arms()]
    assert len(set(names)) == len(names)
    for name, baseline in BASELINES.items():
        wanted = [f"{name}: {strategy}" for strategy in ("none", "encoderattn", "decoderattn")]
        assert [n for n in names if n.partition(": ")[0] == name] == (
            [name] if isinstance(baseline.learning, Untuned) else wanted
        )
    assert all(arm.strategy == "none" for arm in rungs(("SDEdit", "Imagic", "DreamBooth", "Forgedit")))
    assert {arm.name for arm in rungs(("Forgedit",))} == {"Forgedit 0.8", "Forgedit 1.0", "Forgedit 1.2"}
    with pytest.raises(ValueError, match=r"no rungs of \['other'\]; expected some of: DreamBooth, "):
        rungs(("other",))


def test_both_at_once() -> None:
    yes, no = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    other = torch.zeros(4)
    assert both(Scores(yes, no, other, other, other)).tolist() == [True, False, False, False]
    outside = torch.tensor([21.9, 22.0, math.nan, 30.0])
    assert accepted(Scores(yes, yes, other, other, outside)).tolist() == [False, True, False, False]
    assert accepted(Scores(~other.bool(), ~other.bool(), other, other, outside)).tolist() == [False, True, True, True]


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor.from_pretrained("bundled")


def test_pictures_are_kept(editor, tmp_path) -> None:
    maker = Maker(editor, pairs_by_photo(1, 3, 1), editor.defaults.tune, tmp_path)
    kept = Kept(maker, editor.defaults.edit)
    kept.make(0, FAST[:1])
    assert kept.complete(FAST, range(1)) == FAST[:1]
    before = kept.path(0, FAST[0]).stat().st_mtime_ns
    kept.make(0, FAST)
    assert kept.complete(FAST, range(1)) == FAST and kept.path(0, FAST[0]).stat().st_mtime_ns == before
    assert kept.path(0, FAST[0]) != kept.path(0, FAST[1]) and kept.pictures(FAST[1], range(1)).shape == (1, 3, 64, 64)
    assert kept.seconds(FAST[1], range(1), "picture") > 0
    assert not [*tmp_path.glob("*.partial"), *tmp_path.glob(".*.tmp")]


def test_what_is_learned_of_a_photo_serves_its_edits(editor, tmp_path, monkeypatch) -> None:
    """Forgedit's own session is the maker's; Imagic's is of one target."""
    maker = Maker(editor, pairs_by_photo(2, 3, 1), editor.defaults.tune, tmp_path)
    learned = Untuned().learn(editor, maker.photos[0], maker.captions[0], maker.targets[0])
    asked: list[str] = []

    def learn(name):
        return lambda *_: asked.append(name) or learned

    monkeypatch.setattr(maker, "session", learn("Forgedit"))
    for kind in (Imagic, DreamBooth):
        monkeypatch.setattr(kind, "learn", learn(kind.__name__))
    kept = Kept(maker, editor.defaults.edit)
    wanted = [Arm(repr(kind), Baseline(kind(), Unchanged())) for kind in (Tuned, Imagic, DreamBooth)]
    for pair in (0, 1, 3):
        kept.make(pair, wanted)
    assert asked == ["DreamBooth", "Imagic", "Forgedit", "Imagic", "DreamBooth", "Imagic", "Forgedit"]
    assert len(list(tmp_path.glob("*.png"))) == 9


def test_a_whole_comparison(tmp_path, monkeypatch, capsys) -> None:
    """Two shards, then the table, the rows and the sheet; learning and forgetting are tests/runtime's."""
    monkeypatch.setattr(baselines, "arms", lambda: FAST)
    out, grid = tmp_path / "rows.jsonl", tmp_path / "grid.png"
    common = ["baselines", "--pairs", "6", "--first", "6", "--seed", "1", "--work", str(tmp_path / "work")]
    for shard in ("0/2", "1/2"):
        monkeypatch.setattr(sys, "argv", [*common, "--shard", shard, "--make-only"])
        baselines.main()
    assert len(list((tmp_path / "work").rglob("*.png"))) == 12
    monkeypatch.setattr(sys, "argv", [*common, "--out", str(out), "--grid", str(grid)])
    baselines.main()
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    unchanged = {row["part"]: row["value"] for row in rows if row["case"] == "photo unchanged"}
    assert unchanged["success and kept"] == unchanged["success"] == 0 and unchanged["rest kept"] == 1
    assert unchanged["PSNR outside"] > 50 and {"seconds a picture", "seconds a tune"} <= unchanged.keys()
    assert grid.exists() and "SDEdit" in capsys.readouterr().out
