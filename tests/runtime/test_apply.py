"""A session's weights in a plain diffusers UNet: the editor's own edits, and what is refused touches nothing."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from forgedit import EditConfig, TuneConfig
from tests.runtime import naive

TUNE = TuneConfig(num_steps=2, batch_size=2, unet_lr=1e-3, caption="a cat")
TARGET = "a dog"


@pytest.fixture(scope="module")
def session(reference_editor, photo):
    return reference_editor.tune(photo, TUNE)


@pytest.fixture(scope="module")
def dreambooth(reference_editor, photo):
    return reference_editor.tune(
        photo, TUNE.replace(profile="dreambooth", num_steps=2, batch_size=2, text_encoder_lr=1e-3)
    )


@pytest.fixture
def unet(pipe):
    return copy.deepcopy(pipe.unet)


def sample(pipe, unet, text_encoder, session, config):
    """METHOD's loop over diffusers' modules, by the naive transcription."""
    pipe = copy.copy(pipe)
    pipe.unet, pipe.text_encoder = unet, text_encoder
    target = naive.embed(pipe, TARGET, naive.METHOD).detach()
    blended = naive.blend_vs(session.embedding, target, config.gamma, naive.METHOD)
    width, height = session.source.size
    learned = naive.Learned(pipe, torch.empty(1, 4, height // 4, width // 4), session.embedding, [], 0)
    how = dict(steps=config.num_steps, guidance=config.guidance_scale, seed=config.seed)
    return naive.sample(unet, learned, blended, naive.METHOD, **how)


@pytest.mark.parametrize("strategy, keep", [("none", 0.0), ("encoderattn", 0.0), ("decoderattn", 0.3)])
def test_a_plain_unet_makes_the_editors_latents(session, pipe, unet, strategy, keep):
    config = EditConfig(strategy=strategy, keep=keep, num_steps=3, gamma=1.2)
    session.apply_to(unet, strategy=strategy, keep=keep)
    latents = session.edit(TARGET, config).latents
    assert torch.equal(sample(pipe, unet, pipe.text_encoder, session, config), latents)
    assert not torch.equal(sample(pipe, pipe.unet, pipe.text_encoder, session, config), latents)


def test_a_dreambooth_session_needs_the_text_encoder(dreambooth, pipe, unet):
    text_encoder = copy.deepcopy(pipe.text_encoder)
    with pytest.raises(ValueError, match="tuned the text_encoder too; give it as well"):
        dreambooth.apply_to(unet)
    config = EditConfig(strategy="encoderkv", num_steps=2)
    dreambooth.apply_to(unet, text_encoder, strategy="encoderkv")
    latents = sample(pipe, unet, text_encoder, dreambooth, config)
    assert torch.equal(latents, dreambooth.edit(TARGET, config).latents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_the_callers_dtype_and_layout(session, unet, dtype):
    unet.to(dtype).to(memory_format=torch.channels_last)
    before = dict(unet.named_parameters())
    session.apply_to(unet)
    for name, weight in unet.named_parameters():
        exact = session.tuned.get(f"unet.{name}", session.editor.originals()[f"unet.{name}"])
        assert weight is before[name] and weight.dtype == dtype and torch.equal(weight, exact.to(dtype)), name
    assert unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last)


def test_one_session_after_another_on_one_unet(session, reference_editor, photo, unet, pipe):
    other = reference_editor.tune(photo, TUNE.replace(seed=7))
    for each, strategy in ((other, "none"), (session, "noencoder"), (session, "none")):
        each.apply_to(unet, strategy=strategy)
    fresh = copy.deepcopy(pipe.unet)
    session.apply_to(fresh)
    assert all(map(torch.equal, unet.parameters(), fresh.parameters()))


def fewer_blocks(unet):
    down, up = unet.config.down_block_types[1:], unet.config.up_block_types[:-1]
    blocks = dict(down_block_types=down, up_block_types=up, block_out_channels=(32, 32, 32))
    return UNet2DConditionModel.from_config(unet.config, **blocks)


def wider_text(unet):
    return UNet2DConditionModel.from_config(unet.config, cross_attention_dim=48)


def offloaded(unet):
    return copy.deepcopy(unet).to("meta")


def another_base(unet):
    unet.conv_in.weight.data.view(-1)[0].mul_(1 + 2**-22)
    return unet


def no_floats(unet):
    unet.conv_in.weight = torch.nn.Parameter(unet.conv_in.weight.to(torch.int8), requires_grad=False)
    return unet


@pytest.mark.parametrize(
    "change, message",
    [
        (fewer_blocks, "weights fewer than the session's"),
        (wider_text, r"expected a float dtype and \[16, 32\]"),
        (offloaded, "is offloaded"),
        (no_floats, "torch.int8.*not quantised"),
        (another_base, "'unet.conv_in.weight' is not the base model's .* check_base=False"),
    ],
)
def test_what_is_refused_is_not_touched(session, unet, change, message):
    unet = change(unet)
    before = copy.deepcopy(unet.state_dict())
    with pytest.raises(ValueError, match=message):
        session.apply_to(unet)
    after = unet.state_dict()
    assert all(weight.is_meta or torch.equal(weight, after[name]) for name, weight in before.items())


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(strategy="encoderk"), "unknown strategy 'encoderk'"),
        (dict(strategy="'mid_block'"), "matches none"),
        (dict(keep=1.5), "keep 1.5 is out of range; expected 0 to 1"),
        (dict(keep=float("nan")), "out of range"),
    ],
)
def test_bad_settings_touch_nothing(session, pipe, unet, how, message):
    with pytest.raises(ValueError, match=message):
        session.apply_to(unet, **how)
    assert all(map(torch.equal, unet.parameters(), pipe.unet.parameters()))


def test_another_base_on_ones_own_responsibility(session, unet):
    another_base(unet)
    session.apply_to(unet, check_base=False)
    name = "up_blocks.1.resnets.0.conv1.weight"
    assert torch.equal(unet.get_parameter(name), session.tuned[f"unet.{name}"])


def test_the_text_encoder_of_another_base(session, unet, pipe):
    text_encoder = copy.deepcopy(pipe.text_encoder)
    session.apply_to(unet, text_encoder)
    next(text_encoder.parameters()).data.add_(1)
    with pytest.raises(ValueError, match=r"'text_encoder\..*not the base model's"):
        session.apply_to(unet, text_encoder)


def test_an_editors_own_memory_is_not_written_over(session, reference_editor):
    """Editor.from_pipe shares the pipe's weights: they are the editor's originals."""
    original = {name: weight.clone() for name, weight in reference_editor.originals().items()}
    with pytest.raises(ValueError, match=r"shares its weights with the session's editor .* copy.deepcopy\(pipe.unet\)"):
        session.apply_to(reference_editor.model.unet)
    assert all(torch.equal(weight, original[name]) for name, weight in reference_editor.originals().items())
