"""The resident engine against the reference path and against itself: what is equal bit for bit, and what nearly."""

import copy
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

import forgedit.engine.sampler
from forgedit import Cancelled, DeadlineExceeded, EditConfig, EditDiverged, Editor, SweepConfig, TuneConfig
from forgedit.config import STRATEGIES, parse_strategy
from forgedit.engine.numerics import true_float32
from forgedit.engine.sampler import ddim_schedule
from forgedit.model.fuse import FusedUNet
from forgedit.model.load import BUNDLED
from forgedit.stages.blend import blend_embeddings
from forgedit.stages.decode import decode_latents
from forgedit.stages.sample import ddim_step, ddim_timesteps
from forgedit_kernels import MergePlan, available_backends

TUNE = TuneConfig(num_steps=3, batch_size=2, unet_lr=1e-2, caption="a cat")
EDIT = EditConfig(strategy="encoderattn", num_steps=4)
MUG = "a photo of a red mug"
EXACT = 1e-4  # of the final latents, relative: what float32 in another order may cost over all steps


def distance(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def session(editor, photo):
    return editor.tune(photo, TUNE)


@pytest.fixture(scope="module")
def oracle(session, reference_editor):
    """The same learned photo, edited by the reference path."""
    return replace(session, editor=reference_editor, prompts={})


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("blend", [dict(gamma=1.3), dict(blend="vp", identity_weight=0.9, edit_weight=1.2)], ids=str)
def test_exact_is_the_reference(session, oracle, strategy, blend):
    config = replace(EDIT, strategy=strategy, keep=0.3, **blend)
    edit, expected = session.edit("a dog", config), oracle.edit("a dog", config)
    assert distance(edit.latents, expected.latents) < EXACT
    assert np.abs(np.asarray(edit.image, int) - np.asarray(expected.image, int)).max() <= 1


CHANGES = [dict(guidance_scale=1.0), dict(num_steps=50), dict(num_steps=70), dict(seed=3)]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_exact_is_the_reference_at_other_settings(session, oracle, change):
    config = replace(EDIT, **change)
    assert distance(session.edit("a dog", config).latents, oracle.edit("a dog", config).latents) < EXACT


def test_a_wrong_sampler_would_be_seen(session, oracle):
    """What EXACT must tell apart: one step fewer, another strength by a hundredth, another strategy."""
    expected = oracle.edit("a dog", EDIT).latents
    for change in (dict(num_steps=5), dict(gamma=1.01), dict(guidance_scale=7.6), dict(strategy="noencoder")):
        assert distance(session.edit("a dog", replace(EDIT, **change)).latents, expected) > EXACT, change


def test_a_dreambooth_session(editor, reference_editor, photo):
    tune = TUNE.replace(profile="dreambooth", num_steps=2, batch_size=2, unet_lr=1e-3, text_encoder_lr=1e-3)
    session = editor.tune(photo, tune)
    expected = replace(session, editor=reference_editor, prompts={}).edit("a dog", EDIT)
    assert distance(session.edit("a dog", EDIT).latents, expected.latents) < EXACT


def test_merging_in_place_is_a_fresh_unet(folder, photo):
    """Whatever was there before: every strategy in turn, each against a UNet merged and laid out anew."""
    editor = Editor.from_pretrained(folder)
    session = editor.tune(photo, TUNE)
    for strategy, keep in [(name, keep) for name in STRATEGIES for keep in (0.0, 0.3)]:
        session.edit("a dog", EditConfig(strategy=strategy, keep=keep, num_steps=1))
        merged = copy.deepcopy(editor.model.unet)
        for name, tuned in session.tuned.items():
            original, share = editor.originals()[name], keep if parse_strategy(strategy)(name) else 1.0
            weight = original if share == 0 else tuned if share == 1 else share * tuned + (1 - share) * original
            merged.get_parameter(name.removeprefix("unet.")).copy_(weight)
        fresh = FusedUNet(merged)
        for name, weight in editor._path._unet.weights.items():
            assert torch.equal(weight, fresh.weights[name]), (strategy, name)


def test_a_used_engine_is_a_new_one(session, folder, photo):
    """Kept keys and values, time projections, buffers and weights: equal bits to all of them computed anew."""
    wanted = [
        ("a dog", EDIT),
        ("a wall", EDIT),
        ("a dog", replace(EDIT, strategy="none", num_steps=3)),
        ("a dog", replace(EDIT, guidance_scale=1.0)),
        ("a dog", replace(EDIT, seed=1, gamma=0.7)),
        ("a dog", EDIT),
    ]
    used = [session.edit(target, config).latents for target, config in wanted]
    for (target, config), latents in zip(wanted, used, strict=True):
        fresh = replace(session, editor=Editor.from_pretrained(folder), prompts={})
        assert torch.equal(fresh.edit(target, config).latents, latents)


def test_edits_do_not_depend_on_their_place_in_a_batch(session):
    config = SweepConfig(strategies=("encoderattn",), gammas=(0.8, 1.0, 1.2), seeds=(0, 5), num_steps=2).edits()
    editor = session.editor
    there = {edit.config: edit.latents for edit in editor.edits(session, "a dog", config)}
    back = {edit.config: edit.latents for edit in editor.edits(session, "a dog", config[::-1])}
    assert len(there) == 6 and all(torch.equal(there[key], back[key]) for key in config)
    for key in config:
        assert distance(session.edit("a dog", key).latents, there[key]) < EXACT


def test_two_sessions_in_turn(editor, photo, session):
    other = editor.tune(photo, TUNE.replace(seed=1, profile="paper"))
    alone = [s.edit("a dog", EDIT).latents for s in (session, other)]
    for _ in range(2):
        for expected, s in zip(alone, (session, other), strict=True):
            assert torch.equal(s.edit("a dog", EDIT).latents, expected)


def test_tuning_between_edits_changes_nothing(editor, photo, session):
    before = session.edit("a dog", EDIT).latents
    editor.tune(photo, TUNE.replace(seed=7))
    assert torch.equal(session.edit("a dog", EDIT).latents, before)


def test_a_merge_that_fails_half_way_leaves_nothing_behind(session, monkeypatch):
    before = session.edit("a dog", EDIT).latents
    merge, calls = MergePlan.run, []

    def fail(plan, keep):
        calls.append(keep)
        if len(calls) == 2:
            raise RuntimeError("device lost")
        merge(plan, keep)

    monkeypatch.setattr(MergePlan, "run", fail)
    with pytest.raises(RuntimeError, match="device lost"):
        session.edit("a dog", replace(EDIT, strategy="decoderattn", keep=0.3))
    assert len(calls) == 2
    monkeypatch.undo()
    assert torch.equal(session.edit("a dog", EDIT).latents, before)


@pytest.mark.parametrize("at", [("blend", 1), ("forget", 1), ("sample", 1), ("sample", 3), ("decode", 1)], ids=str)
def test_a_cancelled_edit_leaves_nothing_behind(session, at):
    before = session.edit("a dog", EDIT).latents
    cancel = threading.Event()

    def on_step(event):
        if (event.stage, event.step) == at:
            cancel.set()

    with pytest.raises(Cancelled):
        session.edit("a wall", replace(EDIT, seed=9, strategy="none"), on_step, cancel)
    assert torch.equal(session.edit("a dog", EDIT).latents, before)


def test_one_diverged_edit_does_not_take_the_others_along(session):
    good, bad = replace(EDIT, gamma=1.0), replace(EDIT, gamma=1e38)
    made = session.editor.edits(session, "a dog", [good, bad, good])
    assert torch.isfinite(next(made).latents).all()
    with pytest.raises(EditDiverged):
        next(made)


@pytest.fixture(scope="module")
def bundled_session():
    """Something learned by the bundled model: pictures by a trained model, as noise says nothing of rounding."""
    editor = Editor.from_pretrained("bundled", numerics="reference")
    photo = Image.open(BUNDLED / "demo.png")
    return editor.tune(photo, editor.defaults.tune.replace(num_steps=2, batch_size=2, loss_threshold=0.0))


@pytest.mark.parametrize(("numerics", "dtype"), [("fast", torch.bfloat16), ("fast-float16", torch.float16)])
def test_fast_is_no_worse_than_diffusers_in_half(bundled_session, numerics, dtype):
    """Against float32's pictures, beside a plain half-precision loop over diffusers' modules."""
    default = bundled_session.editor.defaults.edit
    configs = [replace(default, num_steps=6, seed=seed) for seed in range(3)]
    expected = [bundled_session.edit(MUG, config).image for config in configs]
    fast = replace(bundled_session, editor=Editor.from_pretrained("bundled", numerics=numerics), prompts={})
    ours = [edit.image for edit in fast.editor.edits(fast, MUG, configs)]
    plain = [in_half(bundled_session, config, dtype) for config in configs]
    distances = [np.mean(list(map(decibels, made, expected))) for made in (ours, plain)]
    assert 30 < distances[0] < 90
    assert distances[0] > distances[1] - 0.5


def decibels(image, expected):
    error = np.square(np.asarray(image, float) - np.asarray(expected, float)).mean()
    return 10 * np.log10(255**2 / error)


@torch.no_grad()
def in_half(session, config, dtype):
    """One edit as a diffusers pipeline in `dtype` makes it: modules, embeddings and latents in half precision."""
    editor, model = session.editor, session.editor.model
    session.edit(MUG, replace(config, num_steps=1))  # brings the weights in
    unet, vae = (torch.nn.Module.to(copy.deepcopy(module), dtype) for module in (model.unet, model.vae))
    source, target, nothing = session.embedding, session.prompts[MUG].embedding, session.prompts[""].embedding
    embeddings = torch.cat([nothing, blend_embeddings(source, target, config)]).to(dtype)
    shape = (1, model.unet.config.in_channels, *(side // model.vae_scale for side in session.source.size[::-1]))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(config.seed)).to(dtype)
    alphas = editor.model.alphas_cumprod
    for timestep in ddim_timesteps(config.num_steps):
        plain, guided = unet(torch.cat([latents, latents]), timestep, embeddings).sample.chunk(2)
        earlier = max(timestep - len(alphas) // config.num_steps, 0)
        prediction = plain + config.guidance_scale * (guided - plain)
        latents = ddim_step(latents, prediction, alphas[timestep], alphas[earlier], model.prediction_type)
    assert latents.dtype == dtype
    return decode_latents(latents, vae).images[0]


def test_unknown_numerics(folder):
    with pytest.raises(ValueError, match="unknown numerics 'quick'; expected one of: reference, exact, fast"):
        Editor.from_pretrained(folder, numerics="quick")


def test_tf32_is_off_inside_and_put_back():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    with pytest.raises(KeyError), true_float32():
        assert not matmul.allow_tf32 and not cudnn.allow_tf32
        raise KeyError
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before


def test_a_sweep_goes_on_with_half_as_many_edits_when_memory_runs_out(editor, session, monkeypatch, caplog):
    configs = SweepConfig(strategies=("none",), gammas=(0.8, 1.0, 1.2, 1.4), num_steps=1).edits()
    expected = {config: session.edit("a dog", config).latents for config in configs}
    engine, tried = editor._path, []
    sample = engine.sample

    def small(embeddings, *args):
        tried.append(len(embeddings))
        if len(embeddings) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(embeddings, *args)

    monkeypatch.setattr(engine, "sample", small)
    monkeypatch.setattr(engine, "_most", 4)
    made = list(editor.edits(session, "a dog", configs))
    assert tried == [4, 2, 1, 1, 1, 1]
    assert [edit.config for edit in made] == configs
    assert all(torch.equal(edit.latents, expected[edit.config]) for edit in made)
    assert caplog.text.count("ran out of memory") == 2


def test_an_edit_that_does_not_fit_says_so(editor, session, monkeypatch):
    session.edit("a dog", EDIT)

    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(editor._path, "sample", full)
        patched.setattr(editor._path, "_most", 1)
        with pytest.raises(RuntimeError, match=r"48 by 16 pixels does not fit.*fast"):
            session.edit("a dog", EDIT)
    assert torch.isfinite(session.edit("a dog", EDIT).latents).all()


def test_memory_decides_how_many_edits_go_together(folder, session):
    shape = (4, 4, 12)
    plans = [Editor.from_pretrained(folder, memory_bytes=size) for size in (10**9, None)]
    several = replace(session, editor=plans[0], prompts={})
    several.edit("a dog", EDIT)
    plan = plans[0]._path.plan(shape)
    assert plans[0]._path.max_edits(shape) == plan.batch
    assert plan.peak <= 10**9 and plan.batch > 1
    tight = Editor.from_pretrained(folder, memory_bytes=plan.weights + 1000)
    with pytest.raises(RuntimeError, match="one edit of 4 by 12 latents needs"):
        replace(session, editor=tight, prompts={}).edit("a dog", EDIT)


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "unipc"])
def test_other_schedulers_come_to_the_same_picture(bundled_session, scheduler):
    """In 20 steps nearer to DDIM's 200 than DDIM in 20, and a sweep gives what single edits give."""
    editor = Editor.from_pretrained("bundled")
    session = replace(bundled_session, editor=editor, prompts={})
    default = replace(editor.defaults.edit, guidance_scale=2.0)
    truth = session.edit(MUG, replace(default, num_steps=200)).latents
    other, ddim = replace(default, num_steps=20, scheduler=scheduler), replace(default, num_steps=20)
    edits = list(editor.edits(session, MUG, [other, replace(other, gamma=1.1)]))
    assert distance(edits[0].latents, truth) < distance(session.edit(MUG, ddim).latents, truth)
    assert distance(session.edit(MUG, other).latents, edits[0].latents) < EXACT


def test_the_reference_path_takes_ddim_alone(oracle):
    with pytest.raises(ValueError, match="scheduler 'unipc' is not the method's"):
        oracle.edit("a dog", replace(EDIT, scheduler="unipc"))
    with pytest.raises(ValueError, match="unknown scheduler 'euler'; expected one of: ddim"):
        replace(EDIT, scheduler="euler")


def test_a_deadline_that_cannot_be_kept_is_refused_before_it_starts(folder, session):
    editor = Editor.from_pretrained(folder)
    again, seen = replace(session, editor=editor, prompts={}), []
    again.edit("a dog", EDIT, deadline_s=60.0)  # nothing was measured yet
    again.edit("a dog", EDIT)
    with pytest.raises(DeadlineExceeded, match="needs about"):
        again.edit("a dog", replace(EDIT, num_steps=1000), on_step=seen.append, deadline_s=0.05)
    assert not seen
    assert again.edit("a dog", EDIT, deadline_s=60.0).config == EDIT
    with pytest.raises(ValueError, match="deadline_s -1"):
        again.edit("a dog", EDIT, deadline_s=-1)


def test_stats_count_what_was_done(folder, session):
    editor = Editor.from_pretrained(folder)
    again = replace(session, editor=editor, prompts={})
    for _ in range(3):
        again.edit("a dog", EDIT)
    stages = editor.stats()["stages"]
    assert {name: stages[name]["count"] for name in ("blend", "forget", "step", "decode")} == dict.fromkeys(
        ("blend", "forget", "step", "decode"), 3
    )
    assert 0 < stages["step"]["p50"] <= stages["step"]["p99"] < 60
    assert editor.stats()["peak_bytes"] > 10**7
    assert editor.stats()["graphs"] == {"hits": 0, "misses": 0, "failed": {}}


@pytest.mark.parametrize("numerics", ["exact", "reference"])
def test_warming_up_changes_no_picture(folder, session, numerics):
    editor = Editor.from_pretrained(folder, numerics=numerics)
    cold = replace(session, editor=Editor.from_pretrained(folder, numerics=numerics), prompts={}).edit("a dog", EDIT)
    editor.warmup()
    editor.warmup([(48, 16), (32, 64)])
    assert torch.equal(replace(session, editor=editor, prompts={}).edit("a dog", EDIT).latents, cold.latents)
    with pytest.raises(ValueError, match="size 48 by 20 cannot be edited; expected multiples of 16 pixels"):
        editor.warmup([(48, 20)])


@pytest.mark.parametrize("backend", available_backends("cpu"))
def test_a_named_backend_serves_the_ops_that_have_it(bundled_session, backend):
    """'native' beside channels-last convolutions too, whose weights the native merge does not write."""
    config = replace(bundled_session.editor.defaults.edit, num_steps=3, keep=0.3)
    editor = Editor.from_pretrained("bundled", backend=backend)
    edit = replace(bundled_session, editor=editor, prompts={}).edit(MUG, config)
    assert distance(edit.latents, bundled_session.edit(MUG, config).latents) < EXACT


@pytest.mark.skipif("native" not in available_backends("cpu"), reason="the native module was not built on this machine")
def test_a_shape_that_a_named_backend_does_not_serve_is_an_error(folder, session):
    native = replace(session, editor=Editor.from_pretrained(folder, backend="native"), prompts={})
    with pytest.raises(RuntimeError, match=r"backend 'native' cannot run attention: got head dim 8.*use 'auto'"):
        native.edit("a dog", EDIT)


def test_buffers_of_many_sizes_do_not_pile_up(folder, session, monkeypatch):
    monkeypatch.setattr(forgedit.engine.sampler, "MOST_BUFFERS", 2)
    editor = Editor.from_pretrained(folder)
    again = replace(session, editor=editor, prompts={})
    before = again.edit("a dog", EDIT).latents
    for steps in (65, 66, 67):
        again.edit("a dog", replace(EDIT, num_steps=steps))
        assert len(editor._path._sampler._buffers) <= 2
    assert torch.equal(again.edit("a dog", EDIT).latents, before)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [1, 20, 50, 1000])
def test_only_a_step_that_changes_nothing_is_left_out(editor, num_steps, prediction_type):
    """The last step, by diffusers' own scheduler: what comes out of it is what goes in."""
    alphas = editor.model.alphas_cumprod
    schedule = ddim_schedule(alphas, num_steps, prediction_type)
    assert schedule.idle == 1 and schedule.timesteps[-1] == 0
    betas = 1 - alphas.double() / torch.cat([torch.ones(1), alphas[:-1].double()])
    options = dict(clip_sample=False, set_alpha_to_one=False, steps_offset=0, prediction_type=prediction_type)
    ddim = DDIMScheduler(trained_betas=betas.tolist(), **options)
    ddim.set_timesteps(num_steps)
    latents, prediction = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = ddim.step(prediction, 0, latents).prev_sample
    assert distance(step, latents) < 1e-7
    if num_steps > 1:
        before = ddim.step(prediction, int(schedule.timesteps[-2]), latents).prev_sample
        assert distance(before, latents) > 1e-5
