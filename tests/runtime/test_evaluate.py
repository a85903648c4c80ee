"""Evaluations: what folders are refused, that intervals are right, that a stopped run goes on, that tables say it."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from forgedit import Editor, InputError
from forgedit.evaluate.bootstrap import bootstrap, paired
from forgedit.evaluate.cases import Case, read_editeval, read_tedbench
from forgedit.evaluate.protocol import Protocol, digest_of, parse_way, run_protocol, way_names
from forgedit.evaluate.rows import read_rows
from forgedit.evaluate.table import figures, gather, lines
from forgedit.evaluate.world import world_cases
from forgedit.quality.change_mask import ChangeMask
from forgedit.world.render import changed_mask, render
from forgedit.world.scene import sample_edits
from forgedit.world.score import to_images


def write_tedbench(folder, entries, photo):
    (folder / "originals").mkdir(parents=True)
    for name in {entry["img_name"] for entry in entries}:
        shutil.copy(photo, folder / "originals" / name)
    (folder / "input_list.json").write_text(json.dumps(entries))
    return folder


def write_editeval(folder, entries, photo):
    (folder / "images").mkdir(parents=True)
    for entry in entries:
        if entry["image"]:
            shutil.copy(photo, folder / entry["image"])
    (folder / "prompts.json").write_text(json.dumps(entries))
    return folder


def entry(index, image="images/one.png", **more):
    said = {"task": "object_addition", "index": index, "source": "a cat", "target": "a dog", "image": image}
    return said | more


def test_tedbench_is_read(tmp_path, photo):
    entries = [dict(img_name="dog.png", target_text="a sitting dog"), dict(img_name="dog.png", target_text="a cat")]
    cases = read_tedbench(write_tedbench(tmp_path / "ted", entries, photo))
    assert [(case.name, case.target, case.caption) for case in cases] == [
        ("000-dog", "a sitting dog", None),
        ("001-dog", "a cat", None),
    ]
    assert all(case.photo.is_file() for case in cases)


def test_editeval_is_read_and_what_has_no_photo_is_left_out_when_told(tmp_path, photo):
    folder = write_editeval(tmp_path / "eval", [entry(1), entry(2, image=None), entry(3)], photo)
    with pytest.raises(InputError, match=r"1 of 3 photos .*object_addition-2.*--leave-out"):
        read_editeval(folder)
    cases = read_editeval(folder, leave_out=True)
    assert [(case.name, case.caption, case.kind) for case in cases] == [
        ("object_addition-1", "a cat", "object_addition"),
        ("object_addition-3", "a cat", "object_addition"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no prompts.json"),
        ("{", "cannot read"),
        ("{}", "holds no cases"),
        ("[]", "holds no cases"),
        ("[1]", "holds no cases"),
        ('[{"task": "a", "source": "b"}]', "has no 'target'"),
        ('[{"task": "a", "source": "b", "target": " "}]', "has no 'target'"),
        ('[{"task": "a", "source": "b", "target": "c\\u0007"}]', "control character"),
        ('[{"task": "a", "source": "b", "target": "c", "image": "images/none.png"}]', "1 of 1 photos"),
        ('[{"task": "a", "source": "b", "target": "c", "image": "../../x.png"}]', "leads out of"),
    ],
)
def test_a_malformed_folder_is_refused_with_its_place(tmp_path, text, message):
    if text is not None:
        (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_editeval(tmp_path)


def test_a_photo_that_is_another_or_none_is_refused(tmp_path, photo):
    folder = write_editeval(tmp_path / "eval", [entry(1, sha256="0" * 64)], photo)
    with pytest.raises(InputError, match="SHA-256 differs"):
        read_editeval(folder)
    (folder / "prompts.json").write_text(json.dumps([entry(1)]))
    (folder / "images" / "one.png").write_text("no picture")
    with pytest.raises(InputError, match="cannot read"):
        read_editeval(folder)


def test_the_bootstrap_covers_what_the_normal_interval_covers():
    values = torch.randn(400, 5, generator=torch.Generator().manual_seed(0)) + torch.randn(
        400, 1, generator=torch.Generator().manual_seed(1)
    )
    figure, means = bootstrap(values), values.double().mean(dim=1)
    half = 1.96 * float(means.std()) / 20
    assert figure.value == pytest.approx(float(means.mean())) and figure.n == 400
    assert figure.low == pytest.approx(figure.value - half, abs=0.1 * half)
    assert figure.high == pytest.approx(figure.value + half, abs=0.1 * half)
    as_if_seeds_were_cases = bootstrap(values.reshape(-1))  # the plausible mistake: too narrow
    assert as_if_seeds_were_cases.high - as_if_seeds_were_cases.low < 0.6 * (figure.high - figure.low)


def test_pairs_cancel_what_cases_have_in_common():
    case = 100 * torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    figure = paired(case + 1.0, case.expand(50, 1))
    assert figure.value == pytest.approx(1.0) and figure.high - figure.low < 1e-3
    assert bootstrap(torch.full((3, 2), torch.nan)).n == 0
    assert bootstrap(torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan]])).n == 1


def test_the_truth_of_the_world_knows_true_edits_from_none():
    cases, truth = world_cases(10, seed=3, side=64)
    assert len({case.name for case in cases}) == 10 and len({case.kind for case in cases[:5]}) == 5
    edits = sample_edits(2, 3)
    place = [edits.kind.index(case.kind) for case in cases[:5]]
    true = to_images(render(edits.target[torch.tensor(place)], 64)[0])
    for index, picture in enumerate(true):
        assert truth(index, picture)["accepted"] == 1.0
        left = truth(index, cases[index].photo)
        assert (left["success"], left["kept"], left["accepted"]) == (0.0, 1.0, 0.0)
        assert left["psnr_outside"] > 50  # rounded to bytes
    other = truth(0, true[1])
    assert other["accepted"] == 0.0
    with pytest.raises(InputError, match="multiple of 5"):
        world_cases(7, 0, 64)


def test_the_truth_of_the_world_measures_masks():
    cases, truth = world_cases(10, seed=3, side=64)
    edits, (index, case) = sample_edits(2, 3), next(found for found in enumerate(cases) if found[1].kind == "colour")
    place = [edits.kind.index("colour")]
    (true,) = to_images(render(edits.target[torch.tensor(place)], 64)[0])
    (changed,) = changed_mask(edits.source[torch.tensor(place)], edits.target[torch.tensor(place)], 64)[0].numpy()
    drifted = Image.blend(true, Image.new("RGB", true.size, "grey"), 0.1)

    def scores(inside):
        mask = Image.fromarray(inside.astype(np.uint8) * 255)
        return truth(index, drifted, ChangeMask(mask, float(inside.mean())))

    right, shifted, nothing = (scores(inside) for inside in (changed, np.roll(changed, 8, 1), changed & False))
    assert right["mask_iou"] == 1 and right["mask_refused"] == 0
    assert right["psnr_outside_kept"] > 50 > right["psnr_outside"]  # rounded to bytes
    union = (changed | np.roll(changed, 8, 1)).sum()
    assert shifted["mask_iou"] == pytest.approx((changed & np.roll(changed, 8, 1)).sum() / union)
    assert right["psnr_outside"] < shifted["psnr_outside_kept"] < right["psnr_outside_kept"]
    assert (nothing["mask_iou"], nothing["mask_refused"]) == (0, 1) and np.isnan(nothing["psnr_outside_kept"])
    assert scores(changed | True)["mask_refused"] == 1
    assert "mask_iou" not in truth(index, drifted) and case.kind == "colour"


def test_ways_are_read_and_refused():
    assert {"recommended", "auto", "sdedit", "sdedit-tuned", "imagic", "photo-unchanged"} <= set(way_names())
    assert parse_way("imagic:encoderattn").strategy == "encoderattn" and parse_way("imagic").strategy == "none"
    assert parse_way("auto").making is None and parse_way("recommended").strategy is None
    for bad, message in (("nix", "unknown way 'nix'"), ("imagic:nix", "unknown strategy"), ("auto:none", "leave out")):
        with pytest.raises(InputError, match=message):
            parse_way(bad)


@pytest.fixture(scope="module")
def own_editor(model):
    return Editor.from_pretrained(model)


@pytest.fixture
def protocol(photo):
    cases = [Case("one", photo, "a dog", "a cat", "object"), Case("two", photo, "a fish", "a cat", "object")]
    return Protocol(cases, [parse_way("recommended"), parse_way("photo-unchanged")], range(2))


def test_a_stopped_run_goes_on_and_gives_what_a_whole_one_gives(tmp_path, own_editor, protocol, monkeypatch):
    whole = list(run_protocol(protocol, own_editor, tmp_path / "whole.jsonl"))
    assert [(row["case"], row["way"], row["seed"]) for row in whole] == [
        (case, way, seed) for case in ("one", "two") for way in ("recommended", "photo-unchanged") for seed in (0, 1)
    ]
    assert all((row["share_changed"] > 0) == (row["way"] == "recommended") for row in whole)
    path = tmp_path / "rows.jsonl"
    stopped = run_protocol(protocol, own_editor, path)
    for _ in range(3):
        next(stopped)
    stopped.close()
    with path.open("ab") as file:
        file.write(b'{"protocol": "cut')  # a killed process's last line
    rest = list(run_protocol(protocol, own_editor, path))
    assert len(rest) == 5 and rest[0]["case"] == "one" and rest[0]["seed"] == 1

    def pictures(rows):
        timed = ("seconds_edit", "seconds_tune", "peak_bytes")
        return [{name: value for name, value in row.items() if name not in timed} for row in rows]

    assert pictures(read_rows(path)) == pictures(whole)
    monkeypatch.setattr(own_editor, "tune", lambda *_: pytest.fail("nothing was left to learn"))
    assert list(run_protocol(protocol, own_editor, path)) == []


ROW = {"protocol": "other", "of": "photo", "case": "one", "kind": "", "way": "recommended", "seed": 0, "margin": 0.1}


def test_rows_of_other_settings_are_refused(tmp_path, own_editor, protocol, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    with pytest.raises(InputError, match="other settings"):
        next(run_protocol(protocol, own_editor, path))
    now = digest_of(own_editor)
    monkeypatch.setattr("forgedit.evaluate.protocol.FIELDS_SINCE", 1)
    assert digest_of(own_editor) != now  # rows of before are of an earlier version


def rows_of(**values):
    """Rows of ways 'a' and 'b', three cases, two seeds; values by field: a function of way, case and seed."""
    return [
        {"way": way, "case": case, "seed": seed, "seconds_edit": 1.0, "seconds_tune": 4.0}
        | {field: value(way, case, seed) for field, value in values.items()}
        for way in "ab"
        for case in "xyz"
        for seed in (0, 1)
    ]


def test_the_table_has_means_and_paired_differences():
    rows = rows_of(accepted=lambda way, case, seed: float(way == "b" or case == "x"), psnr_outside=lambda *_: None)
    assert gather(rows, "accepted")["a"].tolist() == [[1, 1], [0, 0], [0, 0]]
    found = figures(rows)
    assert found["accepted"]["a"].value == pytest.approx(1 / 3) and found["accepted"]["b"].value == 1
    assert "psnr_outside" not in found
    lacking = rows_of(share_changed=lambda way, *_: 0.25 if way == "a" else None)
    assert list(figures(lacking)["share_changed"]) == ["a"] and "share changed  a" in "\n".join(lines(lacking))
    assert found["seconds_accepted"]["b"].value == (6 * 1.0 + 3 * 4.0) / 6
    assert found["seconds_accepted"]["a"].value == (6 * 1.0 + 3 * 4.0) / 2
    assert lines(rows)[-1].startswith("accepted, b above a: +0.667 [")
    incomplete = rows[:-1]  # what one way lacks is compared with nothing
    assert len(gather(incomplete, "accepted")["a"]) == 2


def test_none_accepted_costs_infinitely_much():
    found = figures(rows_of(accepted=lambda *_: 0.0))
    assert found["seconds_accepted"]["a"].value == np.inf


def test_the_command_on_a_folder(run, tmp_path, photo):
    folder = write_editeval(tmp_path / "eval", [entry(1), entry(2)], photo)
    words = ("evaluate", "editeval", folder, "--ways", "recommended,photo-unchanged", "--seeds", 1, "--out", "made")
    code, events, _ = run(*words, "--json")
    assert code == 0
    assert [event["case"] for event in events if event["event"] == "row"] == ["object_addition-1"] * 2 + [
        "object_addition-2"
    ] * 2
    with open("made/report.json", encoding="utf-8") as file:
        report = json.load(file)
    assert report["figures"]["kept_db"]["photo-unchanged"]["value"] == 100.0
    assert report["figures"]["kept_db"]["recommended"]["value"] < 100.0
    assert "not quality" in report["meaning"]
    code, text, _ = run(*words)
    assert code == 0 and "PSNR outside the mask found, dB" in text
    assert "object_addition-1 " not in text  # nothing was made again


def test_the_command_on_the_world(run):
    code, text, _ = run(
        *("evaluate", "world", "--pairs", 5, "--first", 2, "--seeds", 1, "--ways", "recommended,photo-unchanged")
    )
    assert code == 0 and "accepted, photo-unchanged above recommended:" in text
    assert "mask IoU" in text and "PSNR outside if kept, dB" in text and "mask refused" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("world", "somewhere"), "leave out"),
        (("world", "--pairs", 7), "multiple of 5"),
        (("world", "--seeds", 0), "--seeds 0"),
        (("world", "--first", 0), "--first 0"),
        (("world", "--ways", "recommended,nix"), "unknown way"),
        (("world", "--ways", "imagic,imagic"), "names one twice"),
        (("world", "--ways", "auto"), "--scorer"),
        (("editeval",), "no folder of editeval"),
        (("editeval", "nowhere"), "no prompts.json"),
    ],
)
def test_the_command_refuses(run, words, message):
    code, _, err = run("evaluate", *words)
    assert code == 2 and message in err


def test_the_customers_photos_can_be_read():
    from pathlib import Path

    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "editeval_v1_512"
    if not folder.is_dir():
        pytest.skip("no ../shared/data/editeval_v1_512 beside this checkout")
    cases = read_editeval(folder, leave_out=True)
    assert len(cases) == 31 and all(Image.open(case.photo).size == (512, 512) for case in cases)
