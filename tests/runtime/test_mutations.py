"""The parity comparison has teeth: break any one rule of METHOD in the naive transcription and it must object."""

from dataclasses import replace
from functools import cache

import pytest

from forgedit import EditConfig
from tests.runtime import naive
from tests.runtime.compare import PROFILES, TOLERANCE, difference, engine_latents, learn_naively, tuned_differences

NOT_ATTENTIONS = {name: lambda n: "down_blocks" in n and "attentions" not in n for name in naive.STRATEGIES}
NO_CROSS = {name: lambda n: "down_blocks" in n and "attn2" not in n for name in naive.STRATEGIES}
ONLY_KV = {name: lambda n: "down_blocks" in n and ("attn2.to_k" in n or "attn2.to_v" in n) for name in naive.STRATEGIES}
ALL = {name: lambda n: True for name in naive.STRATEGIES}

# item of METHOD and what is done wrong: (profile, the broken values of Rules)
TUNE_MUTATIONS = {
    "1 bilinear squash": ("squash", dict(squash_filters=("BILINEAR", "LANCZOS"))),
    "1 pixels in [0, 1]": ("official", dict(pixel_scale=(1.0, 0.0))),
    "3 posterior mode": ("official", dict(posterior="mode")),
    "3 scaling factor missing": ("official", dict(scale_latents=False)),
    "4 no final layer norm": ("official", dict(final_norm=False)),
    "5 down_blocks.0 trained": ("official", dict(frozen=("up_blocks.0",))),
    "5 up_blocks.0 trained": ("official", dict(frozen=("down_blocks.0",))),
    "5 mid block trained": ("official", dict(blocks=("down_blocks", "up_blocks", "mid_block"))),
    "5 convolutions and time embedding trained": (
        "official",
        dict(blocks=("down_blocks", "up_blocks", "conv_", "time")),
    ),
    "5 paper's blocks under official": ("official", dict(frozen=naive.FROZEN["paper"])),
    "5 official's blocks under paper": ("paper", dict(frozen=naive.FROZEN["official"])),
    "5 deepest decoder trained under paper": ("paper", dict(frozen=("down_blocks.3",))),
    "5 embedding not trained": ("official", dict(train_embedding=False)),
    "6 beta1": ("official", dict(adam_betas=(0.8, 0.999))),
    "6 beta2": ("official", dict(adam_betas=(0.9, 0.99))),
    "6 weight decay": ("official", dict(weight_decay=0.01)),
    "6 clipping": ("official", dict(clip_norm=1.0)),
    "6 rates decay": ("official", dict(lr_decay=0.9)),
    "6 rates swapped": ("official", dict(swap_rates=True)),
    "7 timesteps before noise": ("official", dict(noise_before_timesteps=False)),
    "7 another generator for the posterior": ("official", dict(one_generator=False)),
    "7 one noise for the batch": ("official", dict(one_noise_for_batch=True)),
    "7 one timestep for the batch": ("official", dict(one_timestep_for_batch=True)),
    "7 predicts v": ("official", dict(loss_target="v")),
    "7 predicts the picture": ("official", dict(loss_target="sample")),
    "7 linear betas": ("official", dict(beta_schedule="linear")),
    "7 last beta 0.02": ("official", dict(beta_end=0.02)),
    "8 stops after backward": ("stops", dict(stop_before_backward=False)),
    "8 counts steps from 1": ("stops", dict(first_step=1)),
    "8 stops at min_samples": ("stops", dict(samples_strict=False)),
    "8 stops at the threshold": ("at threshold", dict(stop_strict=False)),
    "9 loss not scaled": ("official", dict(loss_scale=1.0)),
    "9 loss scaled under paper": ("paper", dict(loss_scale=65536.0)),
    "9 eps divided as well": ("official", dict(eps=1e-4)),
    "17 text encoder frozen": ("dreambooth", dict(train_text_encoder=False)),
    "17 source not encoded again": ("dreambooth", dict(reencode=False)),
    "17 UNet trained in part": ("dreambooth", dict(blocks=("down_blocks", "up_blocks"))),
}


@pytest.fixture(scope="module")
def editor(reference_editor):
    return reference_editor


@pytest.fixture(scope="module")
def engine(editor, photo, pipe):
    """case -> config, unbroken rules, session and z of the engine."""

    @cache
    def tuned(case):
        config, rules = PROFILES[case if case in PROFILES else "official"]
        if case == "squash":
            config, rules = replace(config, resize="squash"), replace(rules, resize="squash")
        if case == "stops":
            config = replace(config, loss_threshold=1e9, min_samples=12)
        if case == "at threshold":
            loss = editor.tune(photo, config).losses[-2]
            config = replace(config, loss_threshold=loss, min_samples=0)
        session = editor.tune(photo, config)
        return config, rules, session, engine_latents(editor, photo, config)[1]

    return tuned


@pytest.mark.parametrize("mutation", TUNE_MUTATIONS)
def test_broken_learning_is_rejected(engine, photo, pipe, mutation):
    case, broken = TUNE_MUTATIONS[mutation]
    config, rules, session, z = engine(case)
    learned = learn_naively(pipe, photo, config, replace(rules, **broken))
    assert tuned_differences(session, z, pipe, learned).worst() > TOLERANCE


@pytest.mark.parametrize("case", ["official", "paper", "dreambooth", "squash", "stops", "at threshold"])
def test_unbroken_learning_is_accepted(engine, photo, pipe, case):
    config, rules, session, z = engine(case)
    assert tuned_differences(session, z, pipe, learn_naively(pipe, photo, config, rules)).worst() <= TOLERANCE


EDIT = dict(num_steps=7, strategy="encoderattn", keep=0.3, seed=3)
VS = EditConfig(gamma=1.3, **EDIT)
VP = EditConfig(blend="vp", identity_weight=0.9, edit_weight=1.3, **EDIT)
RESET = EditConfig(gamma=1.3, **EDIT | dict(strategy="encoderkv", keep=0.0))

EDIT_MUTATIONS = {
    "unbroken vs": (VS, {}),
    "unbroken vp": (VP, {}),
    "unbroken reset": (RESET, {}),
    "10 gamma on the source": (VS, dict(vs_swapped=True)),
    "11 projected along tokens": (VP, dict(vp_dim=1)),
    "11 projected on the whole": (VP, dict(vp_dim=(1, 2))),
    "11 not normalized": (VP, dict(vp_normalized=False)),
    "11 the parallel part kept": (VP, dict(vp_projected_out=False)),
    "11 weights swapped": (VP, dict(vp_weights_swapped=True)),
    "12 strategy inverted": (VS, dict(strategy_inverted=True)),
    "12 keep inverted": (VS, dict(keep_inverted=True)),
    "12 attn matches attentions": (VS, dict(strategies=NOT_ATTENTIONS)),
    "12 attn means attn2": (VS, dict(strategies=NO_CROSS)),
    "12 everything reset": (VS, dict(strategies=ALL)),
    "12 encoderkv of the DreamBooth script": (RESET, dict(strategies=ONLY_KV)),
    "14 steps_offset 1": (VS, dict(steps_offset=1)),
    "14 set_alpha_to_one": (VS, dict(set_alpha_to_one=True)),
    "14 trailing spacing": (VS, dict(timestep_spacing="trailing")),
    "14 linspace spacing": (VS, dict(timestep_spacing="linspace")),
    "14 clipped": (VS, dict(clip_sample=True)),
    "14 eta 1": (VS, dict(eta=1.0)),
    "14 guidance order swapped": (VS, dict(guidance_swapped=True)),
    "14 guidance added to the conditional": (VS, dict(guidance_from_conditional=True)),
    "14 unconditional is not empty": (VS, dict(unconditional="a")),
    "14 starts from the photo": (VS, dict(from_noise=False)),
    "14 linear betas": (VS, dict(beta_schedule="linear")),
    "16 latents not unscaled": (VS, dict(unscale_latents=False)),
    "16 decoded around 0": (VS, dict(decode_shift=0.0)),
}


@pytest.mark.parametrize("mutation", EDIT_MUTATIONS)
def test_broken_edit_is_rejected(engine, photo, pipe, learned, mutation):
    """Compares the latents, and the picture of the engine's own latents."""
    config, broken = EDIT_MUTATIONS[mutation]
    rules = replace(naive.METHOD, **broken)
    edit = engine("official")[2].edit("a dog", config)
    e_tgt = naive.embed(pipe, "a dog", rules).detach()
    if config.blend == "vs":
        e = naive.blend_vs(learned.e_src, e_tgt, config.gamma, rules)
    else:
        e = naive.blend_vp(learned.e_src, e_tgt, config.identity_weight, config.edit_weight, rules)
    unet = naive.forget(pipe, learned, config.strategy, config.keep, rules)
    latents = naive.sample(unet, learned, e, rules, steps=7, guidance=config.guidance_scale, seed=3)
    pixels, expected = (naive.decode(pipe, edit.latents, r) for r in (naive.METHOD, rules))
    worst = max(difference(edit.latents, latents), difference(pixels, expected))
    assert (worst > TOLERANCE) == bool(broken)


@pytest.fixture(scope="module")
def learned(photo, pipe):
    return learn_naively(pipe, photo, *PROFILES["official"])


def test_padding_matters(pipe):
    """Item 4: all 77 rows are used, so a prompt that is not padded is another embedding."""
    padded = naive.embed(pipe, "a cat", naive.METHOD)
    assert padded.shape[1] == 77 > naive.embed(pipe, "a cat", replace(naive.METHOD, padding="do_not_pad")).shape[1]
