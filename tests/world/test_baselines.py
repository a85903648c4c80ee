"""The comparison of methods: what is made, kept and counted."""

import json
import math
import sys

import pytest
import torch

from bench.world import baselines
from bench.world.baselines import Arm, Kept, accepted, arms, both, rungs
from bench.world.evaluate import Maker, held_out_pairs
from forgedit import Editor
from forgedit.evaluate.baselines import BASELINES, Baseline, SDEdit, Tuned, Unchanged, Untuned
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
    assert all(arm.strategy == "none" for arm in rungs())


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
    maker = Maker(editor, held_out_pairs(5, 1), editor.defaults.tune, tmp_path)
    kept = Kept(maker, editor.defaults.edit)
    kept.make(0, FAST[:1])
    assert kept.complete(FAST, range(1)) == FAST[:1]
    before = kept.path(0, FAST[0]).stat().st_mtime_ns
    kept.make(0, FAST)
    assert kept.complete(FAST, range(1)) == FAST and kept.path(0, FAST[0]).stat().st_mtime_ns == before
    assert kept.path(0, FAST[0]) != kept.path(0, FAST[1]) and kept.pictures(FAST[1], range(1)).shape == (1, 3, 64, 64)
    assert kept.seconds(FAST[1], range(1), "picture") > 0
    assert not list(tmp_path.glob("*.partial"))


def test_what_forgedit_learned_is_the_makers(editor, tmp_path, monkeypatch) -> None:
    maker = Maker(editor, held_out_pairs(5, 1), editor.defaults.tune, tmp_path)
    learned = Untuned().learn(editor, maker.photos[0], maker.captions[0], maker.targets[0])
    asked: list[int] = []
    monkeypatch.setattr(maker, "session", lambda pair: asked.append(pair) or learned)
    kept = Kept(maker, editor.defaults.edit)
    kept.make(0, [Arm("SDEdit, tuned: none", Baseline(Tuned(), Unchanged())), *FAST[:1]])
    assert asked == [0] and len(list(tmp_path.glob("*.png"))) == 2


def test_a_whole_comparison(tmp_path, monkeypatch, capsys) -> None:
    """Two shards, then the table, the rows and the sheet; learning and forgetting are tests/runtime's."""
    monkeypatch.setattr(baselines, "arms", lambda: FAST)
    out, grid = tmp_path / "rows.jsonl", tmp_path / "grid.png"
    common = ["baselines", "--pairs", "5", "--first", "2", "--seed", "1", "--work", str(tmp_path / "work")]
    for shard in ("0/2", "1/2"):
        monkeypatch.setattr(sys, "argv", [*common, "--shard", shard, "--make-only"])
        baselines.main()
    assert len(list((tmp_path / "work").rglob("*.png"))) == 4
    monkeypatch.setattr(sys, "argv", [*common, "--out", str(out), "--grid", str(grid)])
    baselines.main()
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    unchanged = {row["part"]: row["value"] for row in rows if row["case"] == "photo unchanged"}
    assert unchanged["success and kept"] == unchanged["success"] == 0 and unchanged["rest kept"] == 1
    assert unchanged["PSNR outside"] > 50 and {"seconds a picture", "seconds a tune"} <= unchanged.keys()
    assert grid.exists() and "SDEdit" in capsys.readouterr().out
