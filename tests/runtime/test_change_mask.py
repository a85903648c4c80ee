"""Where to change: the mask found, the mask given, and what is composited; bytes outside it."""

import pytest
import torch

from forgedit import Editor
from forgedit.stages.sample import clean_and_noise

TIMESTEPS = torch.tensor([100, 500, 900])


@pytest.mark.parametrize("numerics", ["reference", "exact"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_predicted_noise_is_diffusers(folder, numerics, prediction_type):
    """Each prompt's answer alone, row by row, as noise; rows and prompts are not mixed up."""
    editor = Editor.from_pretrained(folder, numerics=numerics, prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(3, 4, 8, 8, generator=generator)
    embeddings = torch.randn(2, 77, 32, generator=generator)
    got = editor._method_path().predict(noisy, TIMESTEPS, embeddings)
    assert got.shape == (2, *noisy.shape)
    with torch.no_grad():
        for k, embedding in enumerate(embeddings):
            for b, timestep in enumerate(TIMESTEPS):
                one = noisy[b : b + 1]
                answer = editor.model.unet(one, timestep, embedding[None], return_dict=False)[0]
                noise = clean_and_noise(one, answer, editor.model.alphas_cumprod[timestep], prediction_type)[1]
                assert (got[k, b] - noise[0]).norm() <= 1e-5 * noise.norm()
                wrong = got[1 - k, b], got[k, b - 1]
                assert all((other - noise[0]).norm() > 1e-3 * noise.norm() for other in wrong)
