"""The engine against the naive transcription of METHOD.md: equal bits, on one thread."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from forgedit import STRATEGIES, EditConfig, TuneConfig
from forgedit.config import parse_strategy
from forgedit.stages.blend import blend_embeddings
from forgedit.stages.decode import decode_latents
from tests.runtime import naive
from tests.runtime.compare import (
    PROFILES,
    TOLERANCE,
    TUNE,
    difference,
    engine_latents,
    learn_naively,
    tuned_differences,
)

TARGET = "a dog"


@pytest.fixture(scope="module")
def editor(reference_editor):
    return reference_editor


@pytest.fixture(scope="module")
def learned_pair(editor, photo, pipe):
    """profile, resize -> (our session, the naive result), each computed once."""

    @cache
    def pair(profile, resize="fit"):
        config, rules = PROFILES[profile]
        config, rules = replace(config, resize=resize), replace(rules, resize=resize)
        return editor.tune(photo, config), learn_naively(pipe, photo, config, rules)

    return pair


@pytest.mark.parametrize("target", ["a dog", "A photo of a dog"])
def test_caption(editor, photo, pipe, target):
    ours = editor.caption(photo, target)
    assert ours == naive.caption(pipe, photo, target)
    assert ours.startswith("A photo of ") == target.startswith("A photo of ")


@pytest.mark.parametrize("resize, size", [("fit", (48, 16)), ("squash", (32, 32))])
def test_resized_photo(editor, photo, pipe, resize, size):
    config, rules = PROFILES["official"]
    image, _ = engine_latents(editor, photo, replace(config, resize=resize))
    expected = naive.prepare_image(photo, 32, replace(rules, resize=resize))
    assert image.size == size
    assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize(
    "profile, resize", [("official", "fit"), ("official", "squash"), ("paper", "fit"), ("dreambooth", "fit")]
)
def test_tuning_has_equal_bits(editor, photo, pipe, learned_pair, profile, resize):
    session, learned = learned_pair(profile, resize)
    _, z = engine_latents(editor, photo, session.config)
    assert tuned_differences(session, z, pipe, learned).worst() == 0
    assert np.array_equal(
        np.asarray(session.source), np.asarray(naive.prepare_image(photo, 32, naive.Rules(resize=resize)))
    )
    trained_text = any(name.startswith("text_encoder.") for name in session.tuned)
    assert trained_text == (profile == "dreambooth")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_merged_weights(editor, pipe, learned_pair, strategy, keep):
    session, learned = learned_pair("official")
    expected = dict(naive.forget(pipe, learned, strategy, keep, naive.METHOD).named_parameters())
    session.edit(TARGET, EditConfig(strategy=strategy, keep=keep, num_steps=1))
    for name, weight in editor.model.unet.named_parameters():
        assert torch.equal(weight, expected[name]), name


def test_strategies_are_the_table_of_method(pipe):
    names = [name for name, _ in pipe.unet.named_parameters()]
    for strategy, matches in naive.STRATEGIES.items():
        assert list(map(parse_strategy(strategy), names)) == list(map(matches, names))
    assert STRATEGIES.keys() == naive.STRATEGIES.keys()


@pytest.mark.parametrize("gamma", [0.0, 0.8, 1.0, 1.6])
def test_vector_subtraction(learned_pair, pipe, gamma):
    e_src, e_tgt = learned_pair("official")[0].embedding, naive.embed(pipe, TARGET, naive.METHOD).detach()
    ours = blend_embeddings(e_src, e_tgt, EditConfig(blend="vs", gamma=gamma))
    assert difference(ours, naive.blend_vs(e_src, e_tgt, gamma, naive.METHOD)) == 0


@pytest.mark.parametrize("identity, edit", [(0.8, 1.0), (1.0, 1.3), (1.1, 1.7)])
def test_vector_projection(learned_pair, pipe, identity, edit):
    e_src, e_tgt = learned_pair("official")[0].embedding, naive.embed(pipe, TARGET, naive.METHOD).detach()
    config = EditConfig(blend="vp", identity_weight=identity, edit_weight=edit)
    ours = blend_embeddings(e_src, e_tgt, config)
    assert difference(ours, naive.blend_vp(e_src, e_tgt, identity, edit, naive.METHOD)) == 0
    along = (ours - identity * e_src).mul(e_src).sum(-1) / e_src.square().sum(-1)
    assert along.abs().max() < TOLERANCE * 10  # what the target adds is orthogonal to the source, token by token


def test_projection_of_a_zero_source_is_the_target():
    target = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(blend_embeddings(torch.zeros(1, 3, 4), target, EditConfig(blend="vp")), target)


def test_weights_that_make_projection_the_target():
    e_src, e_tgt = torch.randn(2, 1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cosine = torch.cosine_similarity(e_src, e_tgt, dim=-1)
    identity = float(cosine * e_tgt.norm() / e_src.norm())
    blended = blend_embeddings(e_src, e_tgt, EditConfig(blend="vp", identity_weight=identity))
    assert difference(blended, e_tgt) < 1e-12


EDITS = {
    "official-none-vs": ("official", "fit", EditConfig(num_steps=7, gamma=1.3, seed=3)),
    "official-squash": ("official", "squash", EditConfig(num_steps=7, gamma=0.9, strategy="decoderattn", keep=0.2)),
    "paper-encoderattn-vp": (
        "paper",
        "fit",
        EditConfig(num_steps=7, blend="vp", identity_weight=0.9, edit_weight=1.3, strategy="encoderattn"),
    ),
    "official-50-steps": ("official", "fit", EditConfig(strategy="encoderattn")),
    "dreambooth": ("dreambooth", "fit", EditConfig(num_steps=7, strategy="encoderkv", guidance_scale=3.0)),
}


@pytest.mark.parametrize("case", EDITS)
def test_final_latents_and_picture(pipe, learned_pair, case):
    profile, resize, config = EDITS[case]
    session, learned = learned_pair(profile, resize)
    rules = naive.METHOD
    e_tgt = naive.embed(learned.pipe, TARGET, rules).detach()
    if config.blend == "vs":
        e = naive.blend_vs(learned.e_src, e_tgt, config.gamma, rules)
    else:
        e = naive.blend_vp(learned.e_src, e_tgt, config.identity_weight, config.edit_weight, rules)
    unet = naive.forget(pipe, learned, config.strategy, config.keep, rules)
    arguments = dict(steps=config.num_steps, guidance=config.guidance_scale, seed=config.seed)
    expected = naive.sample(unet, learned, e, rules, **arguments)
    edit = session.edit(TARGET, config)
    assert difference(edit.latents, expected) == 0
    pixels = naive.decode(learned.pipe, edit.latents, rules)
    assert torch.equal(decode_latents(edit.latents, session.editor.model.vae).pixels, pixels)
    assert np.abs(np.asarray(edit.image) / 255 - pixels[0].permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6


def early_stop_case(editor, photo, pipe, **changes):
    config, rules = PROFILES["official"]
    config = replace(config, **changes)
    return editor.tune(photo, config), learn_naively(pipe, photo, config, rules)


# with batches of 3, step 4 (from 0) is the first with 4 * 3 > 9, step 5 the first with 5 * 3 > 12
@pytest.mark.parametrize("min_samples, updates", [(9, 4), (11, 4), (12, 5), (15, 6)])
def test_early_stop_waits_for_its_samples(editor, photo, pipe, min_samples, updates):
    session, learned = early_stop_case(editor, photo, pipe, loss_threshold=1e9, min_samples=min_samples)
    _, z = engine_latents(editor, photo, session.config)
    assert learned.updates == updates
    assert session.stopped_early == (updates < TUNE["num_steps"])
    assert tuned_differences(session, z, pipe, learned).worst() == 0


def test_early_stop_on_both_sides_of_its_threshold(editor, photo, pipe, learned_pair):
    loss = learned_pair("official")[0].losses[4]
    at, _ = early_stop_case(editor, photo, pipe, loss_threshold=loss, num_steps=5)
    above, learned = early_stop_case(editor, photo, pipe, loss_threshold=float(np.nextafter(loss, 1e9)), num_steps=5)
    assert not at.stopped_early and above.stopped_early
    assert learned.updates == 4
    assert any(not torch.equal(at.tuned[name], above.tuned[name]) for name in at.tuned)


def test_official_numbers_stop_after_36_updates_at_the_earliest(editor, photo):
    """40 steps of 10, more than 350 samples: the step numbered 36 is the first that may stop."""
    session = editor.tune(photo, TuneConfig(caption="a cat", loss_threshold=1e9))
    assert session.stopped_early and len(session.losses) == 37
