"""Settings refuse what cannot be meant, and strategies read as they should."""

import dataclasses

import pytest

from forgedit import STRATEGIES, Defaults, EditConfig, SweepConfig, TuneConfig
from forgedit.config import parse_strategy

DOWN_ATTN = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
DOWN_CONV = "down_blocks.1.resnets.0.conv1.weight"
DOWN_ATTENTIONS = "down_blocks.1.attentions.0.proj_in.weight"
UP_CONV = "up_blocks.2.resnets.0.conv1.weight"
NAMES = [DOWN_ATTN, DOWN_CONV, DOWN_ATTENTIONS, UP_CONV]


@pytest.mark.parametrize(
    "strategy, reset",
    [
        ("down_blocks and not attn", [DOWN_CONV, DOWN_ATTENTIONS]),
        ("'down_blocks'", [DOWN_ATTN, DOWN_CONV, DOWN_ATTENTIONS]),
        ('"up_blocks"', [UP_CONV]),
        ("not down_blocks", [UP_CONV]),
        ("not not up_blocks", [UP_CONV]),
        ("attn2.to_k or up_blocks", [DOWN_ATTN, UP_CONV]),
        ("up_blocks or down_blocks and conv1", [DOWN_CONV, UP_CONV]),
        ("(up_blocks or down_blocks) and conv1", [DOWN_CONV, UP_CONV]),
        ("not (attn or up_blocks)", [DOWN_CONV, DOWN_ATTENTIONS]),
        ("(down_blocks)and(not 'attn')", [DOWN_CONV, DOWN_ATTENTIONS]),
        ("encoderattn", [DOWN_CONV, DOWN_ATTENTIONS]),
        ("none", []),
    ],
)
def test_strategy(strategy, reset):
    assert [name for name in NAMES if parse_strategy(strategy)(name)] == reset


@pytest.mark.parametrize("strategy", ["encoderk", "encoderattn+encodr1", "", "down_blocks"])
def test_unknown_strategy_lists_the_names(strategy):
    with pytest.raises(ValueError, match="unknown strategy") as error:
        EditConfig(strategy=strategy)
    assert all(name in str(error.value) for name in STRATEGIES)


@pytest.mark.parametrize(
    "strategy",
    ["down_blocks and", "and down_blocks", "(down_blocks", "down_blocks)", "down_blocks attn", "not (", "()", "a & b",
     "'down_blocks", "a and or b", "(" * 5000, "__import__('os').system('x')"],
)  # fmt: skip
def test_malformed_strategy(strategy):
    with pytest.raises(ValueError, match="malformed strategy"):
        parse_strategy(strategy)


@pytest.mark.parametrize(
    "config, values, field",
    [
        (TuneConfig, dict(profile="offical"), "profile"),
        (TuneConfig, dict(resize="crop"), "resize"),
        (TuneConfig, dict(num_steps=0), "num_steps"),
        (TuneConfig, dict(num_steps=1.5), "num_steps"),
        (TuneConfig, dict(batch_size=True), "batch_size"),
        (TuneConfig, dict(unet_lr=-1e-5), "unet_lr"),
        (TuneConfig, dict(embedding_lr=float("nan")), "embedding_lr"),
        (TuneConfig, dict(loss_scale=0.0), "loss_scale"),
        (TuneConfig, dict(width=8), "width"),
        (TuneConfig, dict(seed=-1), "seed"),
        (TuneConfig, dict(text_encoder_lr=1e-6), "text_encoder_lr"),
        (TuneConfig, dict(profile="dreambooth", embedding_lr=1e-3), "embedding_lr"),
        (EditConfig, dict(blend="vsp"), "blend"),
        (EditConfig, dict(keep=1.1), "keep"),
        (EditConfig, dict(gamma=float("inf")), "gamma"),
        (EditConfig, dict(guidance_scale="7"), "guidance_scale"),
        (EditConfig, dict(num_steps=0), "num_steps"),
        (SweepConfig, dict(strategies=()), "strategies"),
        (SweepConfig, dict(strategies="none"), "strategies"),
        (SweepConfig, dict(keep=2.0), "keep"),
        (SweepConfig, dict(blend="x"), "blend"),
    ],
)
def test_bad_value_names_its_field(config, values, field):
    with pytest.raises(ValueError, match=field):
        config(**values)


def test_defaults_are_methods():
    tune, edit = TuneConfig(), EditConfig()
    assert (tune.num_steps, tune.batch_size, tune.unet_lr, tune.embedding_lr) == (40, 10, 6e-5, 1e-3)
    assert (tune.loss_threshold, tune.min_samples, tune.loss_scale, tune.eps) == (0.03, 350, 65536.0, 1e-8)
    assert (edit.num_steps, edit.guidance_scale, edit.keep, edit.strategy) == (50, 7.5, 0.0, "none")
    dreambooth = TuneConfig(profile="dreambooth")
    assert (dreambooth.num_steps, dreambooth.batch_size, dreambooth.loss_threshold) == (100, 4, 0.0)
    assert dreambooth.unet_lr == dreambooth.text_encoder_lr == 5e-6


def test_changing_the_profile_brings_its_presets():
    tune = TuneConfig(unet_lr=6e-4, seed=3)
    assert tune.replace(profile="paper") == TuneConfig(profile="paper", unet_lr=6e-4, seed=3)
    assert tune.replace(profile="dreambooth") == TuneConfig(profile="dreambooth", seed=3)
    assert tune.replace(profile="dreambooth", num_steps=7).num_steps == 7
    assert tune.replace(num_steps=7) == dataclasses.replace(tune, num_steps=7)
    with pytest.raises(ValueError, match="profile"):
        tune.replace(profile="x")


def test_sweep_grid():
    edits = SweepConfig(strategies=["none", "noencoder"], gammas=[0.9, 1.1], seeds=[0, 1], num_steps=9).edits()
    assert [(e.strategy, e.gamma, e.seed) for e in edits[:3]] == [("none", 0.9, 0), ("none", 0.9, 1), ("none", 1.1, 0)]
    assert len(edits) == 8 and {e.num_steps for e in edits} == {9}
    edits = SweepConfig(blend="vp", strategies=("none",), identity_weights=(0.9,), edit_weights=(1.0, 1.5)).edits()
    assert [(e.identity_weight, e.edit_weight) for e in edits] == [(0.9, 1.0), (0.9, 1.5)]


def test_folder_settings_are_merged():
    defaults = Defaults.merged({"tune": {"unet_lr": 6e-4}, "sweep": {"gammas": [1.0]}})
    assert defaults.tune == TuneConfig(unet_lr=6e-4) and defaults.edit == EditConfig()
    assert defaults.sweep.gammas == (1.0,)
    with pytest.raises(ValueError, match="sections"):
        Defaults.merged({"tunes": {}})
    with pytest.raises(TypeError, match="lr"):
        Defaults.merged({"tune": {"lr": 1}})
