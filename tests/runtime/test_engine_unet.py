"""Our layout of the UNet against diffusers' own module, whose weights it holds."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

import forgedit.model.fuse
from forgedit import ModelError
from forgedit.model.fuse import FusedUNet

DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
SHAPES = {
    "stable diffusion 1": dict(attention_head_dim=2),
    "stable diffusion 2": dict(attention_head_dim=(2, 4, 4), use_linear_projection=True),
    "first block without cross-attention": dict(
        attention_head_dim=2, down_block_types=("DownBlock2D", *DOWN[1:]), up_block_types=(*UP[:2], "UpBlock2D")
    ),
    "two layers": dict(attention_head_dim=4, layers_per_block=2, transformer_layers_per_block=2),
}


def distance(got, expected):
    return float((got - expected).norm() / expected.norm())


def small_unet(**config):
    torch.manual_seed(0)
    blocks = dict(down_block_types=DOWN, up_block_types=UP) | config
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32, 32), norm_num_groups=8, cross_attention_dim=24, **blocks
    )
    for weight in unet.parameters():  # biases and norms start at values that hide what is left out
        if weight.dim() == 1:
            weight.data += 0.3 * torch.randn(weight.shape)
    return unet.requires_grad_(False).eval()


def answer(fused, latents, timestep, embeddings):
    inputs = latents.to(fused.dtype).contiguous(memory_format=torch.channels_last)
    return fused(inputs, fused.project_timesteps(torch.tensor([timestep])), fused.project_prompts(embeddings))


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (7, 9), (1, 4)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_fused_unet_is_diffusers(shape, size):
    unet = small_unet(**SHAPES[shape])
    fused = FusedUNet(unet)
    latents, embeddings = torch.randn(3, 4, *size), torch.randn(6, 7, 24)
    for timestep in (0, 981):
        expected = unet(torch.cat([latents, latents]), timestep, embeddings).sample
        assert distance(answer(fused, latents, timestep, embeddings), expected) < 2e-6
    unguided = unet(latents, 981, embeddings[3:]).sample
    assert distance(answer(fused, latents, 981, embeddings[3:]), unguided) < 2e-6


def test_features_stay_channels_last(monkeypatch):
    """Every norm is given channels-last features: else tokens are no views, and each op copies."""
    seen, ours = [], forgedit.model.fuse.group_norm_silu

    def group_norm_silu(x, **arguments):
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return ours(x, **arguments)

    monkeypatch.setattr(forgedit.model.fuse, "group_norm_silu", group_norm_silu)
    fused = FusedUNet(small_unet(attention_head_dim=2))
    prediction = answer(fused, torch.randn(1, 4, 8, 8), 500, torch.randn(2, 7, 24))
    assert len(seen) > 20 and all(seen) and prediction.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", [name for name, _ in small_unet(attention_head_dim=2).named_parameters()])
def test_every_weight_counts(name, every_weight):
    """A weight that the layout forgot, or took for another, would leave the answer as it was, or move it elsewhere."""
    unet, fused, latents, embeddings = every_weight
    before = unet.get_parameter(name).clone()
    changed = before + 0.1 * torch.randn(before.shape)
    unet.get_parameter(name).copy_(changed)
    fused.weights[name].copy_(changed)
    expected, got = unet(latents, 500, embeddings).sample, answer(fused, latents, 500, embeddings)
    for weight in (unet.get_parameter(name), fused.weights[name]):
        weight.copy_(before)
    assert distance(got, expected) < 2e-6
    assert distance(got, answer(fused, latents, 500, embeddings)) > 1e-5


@pytest.fixture(scope="module")
def every_weight():
    unet = small_unet(attention_head_dim=2)
    return unet, FusedUNet(unet), torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24)


def test_diffusers_module_is_left_alone():
    unet = small_unet(attention_head_dim=2)
    before = copy.deepcopy(unet.state_dict())
    fused = FusedUNet(unet)
    for weight in fused.weights.values():
        weight.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())
    assert type(unet.mid_block.resnets[0]).__module__.startswith("diffusers")


def test_a_unet_of_another_structure_is_refused():
    with pytest.raises(ModelError, match=r"scale_shift.*reference"):
        FusedUNet(small_unet(attention_head_dim=2, resnet_time_scale_shift="scale_shift"))
