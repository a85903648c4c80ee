"""Every stage of one edit, as pytest-benchmark benches: `make bench`. Each runs with the arguments the editor gives it.

What is compared with what, before a number is written:
- what is computed, with the same stage in float64; a tune by its losses, at one sample a batch for the memory's sake
- the caption with the editor's; the forgetting merge with its definition
- a saved session with the one in memory: fp32 bit for bit, the edits by it too, the others within their format's error
"""

import copy
import math
from functools import cache

import numpy as np
import pytest
import torch

from bench.ops import allowed_merge_error, merge_error
from bench.subject import distance, in_double
from forgedit.config import parse_strategy
from forgedit.delta import DELTA_FORMATS
from forgedit_kernels import available_backends

# Relative errors against float64. cuDNN multiplies in TF32 by default, whose unit is 8192 times float32's.
ALLOWED = {"cpu": 1e-4, "cuda": 2e-2}
DELTA_ALLOWED = {"fp32": 0.0, "fp16": 1e-3, "int8": 1e-2, "int4": 0.2}
FEW_STEPS = 4  # of a tune: enough for a steady step, few enough for a laptop
FORGETTING = [("none", 0.0), ("encoderattn", 0.0)]  # keep 0 copies the originals back, anything between merges
FORGETTING += [(strategy, 0.3) for strategy in ("encoderkv", "encoderattn", "noencoder", "decoderattn")]


def close(subject):
    """The relative error allowed to what is computed in float32 on the subject's device."""
    return ALLOWED[subject.device.type]


def test_caption(stage, subject):
    call = subject.call("caption_photo", lambda: subject.editor.caption(subject.photo))
    stage("caption", call, lambda words: float(words != subject.editor.caption(subject.photo)))


def test_encode_photo(stage, subject):
    call = subject.tune_call("encode_image")
    vae, seed = subject.editor.model.vae, call.arguments["generator"].initial_seed()

    @cache
    def truth():
        """By hand: drawn in float64, the noise would not be the same."""
        pixels = torch.from_numpy(np.asarray(call.arguments["image"]) / 127.5 - 1).permute(2, 0, 1)[None]
        with torch.no_grad():
            posterior = in_double(vae).encode(pixels.to(subject.device)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed)).to(subject.device)
        return (posterior.mean + posterior.std * noise) * vae.config.scaling_factor

    stage("encode", call, lambda made: distance(made.latents, truth()), close(subject), case="photo")


def test_encode_prompt(stage, subject):
    call = subject.tune_call("encode_prompt")
    truth = cache(call.in_float64)
    stage("encode", call, lambda made: distance(made, truth()), close(subject), case="prompt")


def test_tune(stage, subject):
    call = subject.tune_call("tune")
    original = call.arguments["unet"]
    unet = copy.deepcopy(original)  # a tune writes in place, and the editor's weights are the originals' own memory
    whole = subject.editor.defaults.tune
    few = whole.replace(num_steps=FEW_STEPS)
    truth = cache(call.in_float64)

    @torch.no_grad()
    def restore():
        for weight, own in zip(unet.parameters(), original.parameters(), strict=True):
            weight.copy_(own).requires_grad_(False).grad = None

    def error(made):
        """Of the recorded tune, which is short and has one sample a batch; the timed one must be whole and finite."""
        if not (len(made.losses) == FEW_STEPS and np.isfinite(made.losses).all()):
            return float("nan")
        restore()
        return distance(torch.tensor(call(unet=unet).losses), torch.tensor(truth().losses))

    case, steps = f"batch {few.batch_size}", dict(steps=FEW_STEPS, full_steps=whole.num_steps)
    stage("tune", lambda: call(unet=unet, config=few), error, close(subject), case=case, setup=restore, **steps)


@pytest.mark.parametrize("blend", ["vs", "vp"])
def test_blend(stage, subject, blend):
    call = subject.edit_call("blend_embeddings", blend=blend, gamma=0.8)
    truth = cache(call.in_float64)
    stage("blend", call, lambda made: distance(made, truth()), close(subject), case=blend)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(("strategy", "keep"), FORGETTING)
def test_forget(stage, subject, strategy, keep, backend):
    if backend not in available_backends(subject.device):
        pytest.skip(f"backend {backend!r} cannot run on {subject.device}")
    call = subject.edit_call("forget_weights", strategy=strategy, keep=keep)
    original, tuned = call.arguments["original"], call.arguments["tuned"]
    working = {name: torch.full_like(weight, float("nan")) for name, weight in tuned.items()}
    reset = list(filter(parse_strategy(strategy), tuned))

    def error(made):
        """What is kept must be there bit for bit, and what is merged as near as allowed_merge_error says; absolute."""
        if list(made.reset) != reset or not all(torch.equal(working[n], tuned[n]) for n in tuned.keys() - set(reset)):
            return float("nan")
        if not reset:
            return 0.0
        merged = [[weights[name] for name in reset] for weights in (original, tuned, working)]
        found = merge_error(*merged, keep)
        return found if found <= allowed_merge_error(*merged[:2], keep) else float("nan")

    def forget():
        return call(working=working, backend=backend)

    stage("forget", forget, error, float("inf"), case=f"{strategy}, keep {keep:g}", backend=backend)


def test_sample(stage, subject):
    call = subject.edit_call("sample_ddim")
    truth, steps = cache(call.in_float64), call.arguments["num_steps"]
    case = f"guidance {call.arguments['guidance_scale']:g}"

    def error(made):
        return distance(made.latents, truth().latents)

    stage("sample", call, error, close(subject), case=case, steps=steps, full_steps=steps)


def test_decode(stage, subject):
    call = subject.edit_call("decode_latents", num_steps=1)
    truth = cache(call.in_float64)
    stage("decode", call, lambda made: distance(made.pixels, truth().pixels), close(subject))


def delta_error(tuned, restored, original):
    """The relative error of a session's delta, as Session.save reports it."""
    wrong = sum((restored[name].double() - weight.double()).square().sum().item() for name, weight in tuned.items())
    change = sum((original[name].double() - weight.double()).square().sum().item() for name, weight in tuned.items())
    return (wrong / change) ** 0.5


@pytest.mark.parametrize("delta", DELTA_FORMATS)
def test_save_session(stage, subject, delta, tmp_path):
    path, session = tmp_path / "session.safetensors", subject.session

    def error(saved):
        restored = subject.editor.load_session(path)
        found = delta_error(session.tuned, restored.tuned, subject.editor.originals())
        return found if math.isclose(found, saved.relative_error, rel_tol=1e-6) else float("nan")

    stage("save_session", lambda: session.save(path, delta), error, DELTA_ALLOWED[delta], dtype=delta)


@pytest.mark.parametrize("delta", DELTA_FORMATS)
def test_load_session(stage, subject, delta, tmp_path):
    path, session = tmp_path / "session.safetensors", subject.session
    session.save(path, delta)

    def error(loaded):
        return delta_error(session.tuned, loaded.tuned, subject.editor.originals())

    stage("load_session", lambda: subject.editor.load_session(path), error, DELTA_ALLOWED[delta], dtype=delta)


def test_edit_a_saved_session(stage, subject, tmp_path):
    path, session = tmp_path / "session.safetensors", subject.session
    session.save(path)

    @cache
    def truth():
        return session.edit(subject.target).latents

    def error(edit):
        return 0.0 if torch.equal(edit.latents, truth()) else float("nan")

    stage("edit", lambda: subject.editor.load_session(path).edit(subject.target), error, case="load, then edit")
