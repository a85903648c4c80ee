"""The judge: shapes, files, augmentation, and what it is asked about."""

import json

import pytest
import torch
from safetensors import safe_open

from bench.world import judge as J
from bench.world.judge import augment, judge_loss
from forgedit.world.judge import CLASSES, Judge, applies, load_judge, save_judge
from forgedit.world.scene import OBJECTS, PATTERNED, POSES, sample_scenes


def test_forward_shapes_and_size() -> None:
    judge = Judge()
    logits = judge(torch.zeros(3, 3, 64, 64))
    assert {name: tuple(value.shape) for name, value in logits.items()} == {name: (3, n) for name, n in CLASSES.items()}
    assert 0.3e6 < sum(p.numel() for p in judge.parameters()) < 0.6e6


def test_probabilities_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    judge, pixels = Judge().eval(), torch.rand(J.BATCH + 3, 3, 64, 64) * 2 - 1
    whole = judge.probabilities(pixels)
    assert torch.allclose(whole["colour"].sum(1), torch.ones(len(pixels)))
    assert torch.allclose(whole["object"][-1:], judge.probabilities(pixels[-1:])["object"], atol=1e-6)


def test_save_and_load(tmp_path) -> None:
    torch.manual_seed(0)
    judge, path = Judge().eval(), tmp_path / "judge.safetensors"
    save_judge(judge, path, {"steps": 7})
    loaded, pixels = load_judge(path), torch.rand(2, 3, 64, 64)
    assert not loaded.training and loaded.hidden.weight.dtype == torch.float32
    assert path.stat().st_size < 1 << 20
    for name, value in loaded(pixels).items():
        assert torch.allclose(value, judge(pixels)[name], atol=2e-2)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["facts"]) == {"steps": 7}


def test_a_missing_judge_says_what_to_run(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"bench\.world\.train judge"):
        load_judge(tmp_path / "none.safetensors")


def test_what_applies() -> None:
    objects = torch.arange(len(OBJECTS))
    assert applies(objects, "pose").tolist() == [name in POSES for name in OBJECTS]
    assert applies(objects, "pattern").tolist() == [name in PATTERNED for name in OBJECTS]
    assert applies(objects, "colour").all()


def test_loss_ignores_what_does_not_apply() -> None:
    scenes = sample_scenes(40, 0)
    logits = {name: torch.zeros(40, n) for name, n in CLASSES.items()}
    before, _ = judge_loss(logits, scenes)
    logits["pose"][~applies(scenes.object, "pose")] = 50.0 * torch.tensor([1.0, -1.0])
    after, figures = judge_loss(logits, scenes)
    assert torch.equal(before, after) and set(figures) == set(CLASSES)


def test_augmentation_is_mild_and_seeded() -> None:
    pixels = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    first, again = (augment(pixels, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == pixels.shape and first.abs().max() <= 1
    assert not torch.equal(first, pixels)
