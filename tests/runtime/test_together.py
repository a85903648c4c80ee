"""Several photos of one subject learned together: what each row learns, on both paths, in memory, and in a session."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from forgedit import EditConfig, Editor, InputError, TuneConfig
from forgedit.engine.learner import DTYPES, Learner
from forgedit.engine.tune_inputs import draw
from forgedit.engine.tune_plan import Way, peak_during, predicted_bytes
from forgedit.engine.tuner import Tuner
from forgedit.model.fuse import FusedUNet
from forgedit.session_file import read_session_file, write_session_file
from forgedit.stages.tune import photo_order, tune
from tests.runtime.test_tuner import CPU, EXACT, TUNE, Task, distance, equal


@pytest.fixture(scope="module")
def task(editor):
    """Three photos, which do not divide the four rows of a step."""
    return Task(editor, shape=(3, 4, 8, 8))


@pytest.fixture(scope="module")
def photos(photo):
    """Three pictures of other colours and another shape."""
    first = np.asarray(Image.open(photo))
    return [Image.fromarray(pixels) for pixels in (first, 255 - first, first[:, :40, ::-1].copy())]


# which row learns which photo


@pytest.mark.parametrize("photos", [1, 2, 3, 4, 7, 12])
def test_every_photo_is_learned_equally_often(photos):
    config = TuneConfig(num_steps=3, batch_size=4)
    order = photo_order(photos, config)
    assert order.shape == (3, 4) and order.flatten().tolist() == [row % photos for row in range(12)]
    counts = order.flatten().bincount()
    assert len(counts) == photos and counts.max() - counts.min() <= 1


def test_more_photos_than_samples():
    with pytest.raises(ValueError, match="13 photos are more than the 12 samples"):
        photo_order(13, TuneConfig(num_steps=3, batch_size=4))


def test_rows_are_noised_and_asked_for_by_their_own_photo(task):
    alphas, config = task.model.alphas_cumprod, TUNE.replace(num_steps=2)
    for prediction_type in ("epsilon", "v_prediction"):
        drawn = draw(task.latents, alphas, prediction_type, config, torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        for step, (noisy, timesteps, target) in enumerate(zip(*drawn, strict=True)):
            z = torch.stack([task.latents[(4 * step + row) % 3] for row in range(4)])
            noise = torch.randn(z.shape, generator=generator)
            t = torch.randint(0, 1000, (4,), generator=generator)
            a = alphas[t].view(-1, 1, 1, 1)
            assert torch.equal(timesteps, t) and torch.equal(noisy, a.sqrt() * z + (1 - a).sqrt() * noise)
            wanted = noise if prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z
            assert torch.equal(target, wanted)


def naively(task, rows):
    """METHOD section 2 with torch's Adam, in which row b of step s learns the photo rows(s, b)."""
    config, unet = task.config, copy.deepcopy(task.model.unet).requires_grad_(False)
    chosen = {name: unet.get_parameter(name.removeprefix("unet.")).requires_grad_() for name in task.names}
    source = task.embedding.clone().requires_grad_()
    groups = [dict(params=list(chosen.values()), lr=config.unet_lr), dict(params=[source], lr=config.embedding_lr)]
    adam, generator, losses = torch.optim.Adam(groups, eps=config.eps), torch.Generator().manual_seed(0), []
    for step in range(config.num_steps):
        z = torch.stack([task.latents[rows(step, row)] for row in range(config.batch_size)])
        noise = torch.randn(z.shape, generator=generator)
        t = torch.randint(0, 1000, (len(z),), generator=generator)
        a = task.model.alphas_cumprod[t].view(-1, 1, 1, 1)
        answer = unet(a**0.5 * z + (1 - a) ** 0.5 * noise, t, source.expand(len(z), -1, -1)).sample
        loss = ((answer - noise) ** 2).mean([1, 2, 3]).mean()
        losses.append(loss.item())
        adam.zero_grad()
        (loss * config.loss_scale).backward()
        adam.step()
    return {name: weight.detach() for name, weight in chosen.items()}, losses


def test_both_paths_learn_what_a_naive_loop_learns(task):
    unet = copy.deepcopy(task.model.unet)
    plain = tune(
        unet, task.model.text_encoder, task.ids, task.embedding, task.latents, task.model.alphas_cumprod, "epsilon",
        task.config, torch.Generator().manual_seed(0), lambda *_: None,
    )  # fmt: skip
    learned = {f"unet.{name}": unet.get_parameter(name).detach() for name in plain.tuned_names}
    expected, losses = naively(task, lambda step, row: (4 * step + row) % 3)
    assert plain.losses == pytest.approx(losses, rel=1e-6)
    assert distance(learned, expected, task.original) < 1e-4
    engine = task.learn(task.learner(EXACT))
    assert engine.losses == pytest.approx(losses, rel=1e-5)
    assert distance(engine.tuned, expected, task.original) < 0.01
    # each step from the first photo on, or one photo alone, is far beyond that
    for rows in (lambda step, row: row % 3, lambda step, row: 0):
        other, _ = naively(task, rows)
        assert distance(other, expected, task.original) > 0.1


@pytest.mark.parametrize("mode", ["exact", "fast", "lean"])
def test_one_photo_given_thrice_is_that_photo(task, mode):
    """By bits: what a row learns is its photo's value, not its place."""
    learner, one = task.learner(Way(mode, 4, False)), task.latents[:1]
    alone = task.learn(learner, latents=one)
    assert equal(task.learn(learner, latents=one.expand(3, -1, -1, -1)), alone)
    assert not equal(task.learn(learner), alone)


def test_rows_in_parts_learn_the_same(task):
    whole, parts = (task.learn(task.learner(Way("exact", rows, False))) for rows in (4, 2))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert distance(parts.tuned, whole.tuned, task.original) < 0.01


def test_the_plan_counts_the_photos(editor):
    task = Task(editor, shape=(5, 4, 16, 16))
    way, unet = EXACT, FusedUNet(task.model.unet, DTYPES["exact"])
    tuner = Tuner(task.model, task.original, "exact", unet, None, "auto")
    passing = tuner._pass_cost(way, task.inputs())
    trained = [task.original[name] for name in task.names]
    told = [predicted_bytes(way, trained, task.config, 1024, passing, photos=photos) for photos in (1, 5)]
    samples = task.config.num_steps * task.config.batch_size
    assert told[1] - told[0] == 4 * 1024 * (samples + 5)

    def learn():
        learner = Learner(unet, task.original, task.model.text_encoder, task.names, task.config, way)
        task.learn(learner)

    assert told[1] == pytest.approx(peak_during(learn, CPU), rel=0.15)


# the editor


@pytest.mark.parametrize("numerics", ["exact", "reference"])
def test_a_session_of_several(editor, reference_editor, photos, tmp_path, numerics):
    editor = {"exact": editor, "reference": reference_editor}[numerics]
    alone, together = editor.tune(photos[0], TUNE), editor.tune(photos[0], TUNE, others=photos[1:])
    assert (alone.num_photos, together.num_photos) == (1, 3)
    assert np.array_equal(together.source, alone.source) and together.photo_size == photos[0].size
    assert distance(together.tuned, alone.tuned, editor.originals()) > 0.05
    again = editor.tune(photos[0], TUNE, others=photos[1:])
    assert equal(again, together)
    saved = together.save(tmp_path / "session")
    loaded = editor.load_session(saved.path)
    assert loaded.num_photos == 3
    one, other = (session.edit("a dog", EditConfig(num_steps=2)) for session in (loaded, together))
    assert torch.equal(one.latents, other.latents)


def test_a_file_of_before_has_one_photo(editor, photos, tmp_path):
    session = editor.tune(photos[0], TUNE.replace(num_steps=1))
    session.save(tmp_path / "new")
    tensors, record = read_session_file(tmp_path / "new", editor.fingerprint)
    del record["num_photos"]
    write_session_file(tmp_path / "old", tensors, record, editor.fingerprint)
    assert editor.load_session(tmp_path / "old").num_photos == 1


def test_others_are_brought_to_the_first_ones_size(editor, photos, monkeypatch):
    """The third is 40 by 30 pixels, the others 60 by 30: what covers their shape is kept, above and below are cut."""
    seen, encode = [], editor.model.vae.encode
    monkeypatch.setattr(editor.model.vae, "encode", lambda pixels: seen.append(pixels) or encode(pixels))
    editor.tune(photos[0], TUNE.replace(num_steps=1), others=photos[1:])
    assert len({pixels.shape for pixels in seen}) == 1 and len(seen) == 3
    height, width = seen[2].shape[2:]
    middle = photos[2].crop((0, 5, 40, 25)).resize((width, height), Image.Resampling.LANCZOS)
    got = (seen[2][0].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(got - np.asarray(middle)).mean() < 4  # the crop is of 40 by 20 pixels to within a rounded size
    squashed = photos[2].resize((width, height), Image.Resampling.LANCZOS)
    assert np.abs(got - np.asarray(squashed)).mean() > 2 * np.abs(got - np.asarray(middle)).mean()


def test_too_many_photos_leave_the_editor_as_it_was(editor, photos):
    before = {name: weight.clone() for name, weight in editor.originals().items()}
    with pytest.raises(ValueError, match="3 photos are more than the 2 samples"):
        editor.tune(photos[0], TUNE.replace(num_steps=1, batch_size=2), others=photos[1:])
    assert all(torch.equal(weight, before[name]) for name, weight in editor.originals().items())


def test_a_photo_among_the_others_that_cannot_be_read(editor, photos, tmp_path):
    with pytest.raises(InputError, match="unknown format"):
        (tmp_path / "no.png").write_text("not a picture")
        editor.tune(photos[0], TUNE, others=[tmp_path / "no.png"])


def test_it_is_marked_experimental():
    assert "others: experimental" in Editor.tune.__doc__
