"""The tuning engine against the method's plain path, and against itself."""

import copy
from functools import partial

import pytest
import torch
from torch.nn.functional import mse_loss

from forgedit import Editor, TuneConfig, TuneDiverged
from forgedit.engine.graphs import GraphCache
from forgedit.engine.learner import DTYPES, Learner
from forgedit.engine.tune_inputs import TuneInputs, draw
from forgedit.engine.tune_plan import Way
from forgedit.learning import trained_names
from forgedit.model.fuse import FusedUNet
from forgedit.stages.encode import encode_prompt
from forgedit.stages.tune import first_stop

CPU = torch.device("cpu")
TUNE = TuneConfig(num_steps=3, batch_size=4, unet_lr=1e-3, caption="a cat")
EXACT = Way("exact", 4, False)


def distance(one, other, originals):
    """Of two sets of learned weights, relative to what the second learned."""
    names = [name for name in other if name in originals]
    apart = sum((one[name] - other[name]).double().square().sum() for name in names)
    learned = sum((other[name] - originals[name]).double().square().sum() for name in names)
    return float((apart / learned).sqrt())


class Task:
    """One photo's latents and caption, for learners made by hand."""

    def __init__(self, editor, config=TUNE, shape=(1, 4, 8, 8)):
        self.editor, self.config = editor, config
        self.model, self.original = editor.model, editor.originals()
        self.names = trained_names(self.original, config)
        self.latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        self.ids, _ = editor._prompts.tokens("a cat")
        self.embedding = encode_prompt(self.ids, self.model.text_encoder)

    def learner(self, way, graphs=None):
        unet = FusedUNet(self.model.unet, DTYPES[way.mode])
        return Learner(unet, self.original, self.model.text_encoder, self.names, self.config, way, graphs=graphs)

    def learn(self, learner, config=None, on_step=lambda *_: None, latents=None):
        for name, weight in learner.unet.weights.items():
            weight.copy_(self.original[f"unet.{name}"])
        return learner.learn(self.inputs(config, on_step, latents))

    def inputs(self, config=None, on_step=lambda *_: None, latents=None):
        return TuneInputs(
            self.latents if latents is None else latents, self.embedding, self.ids, self.model.alphas_cumprod,
            self.model.prediction_type, self.names, config or self.config, torch.Generator().manual_seed(0), on_step,
        )  # fmt: skip


@pytest.fixture(scope="module")
def task(editor):
    return Task(editor)


def equal(one, other):
    same = one.losses == other.losses and torch.equal(one.embedding, other.embedding)
    return same and all(torch.equal(one.tuned[name], other.tuned[name]) for name in other.tuned)


# against the plain path


@pytest.mark.parametrize("profile", ["official", "paper", "dreambooth"])
def test_exact_learns_what_the_plain_path_learns(editor, reference_editor, photo, profile):
    config = TUNE.replace(profile=profile, num_steps=4, batch_size=2, unet_lr=1e-3)
    fast, plain = editor.tune(photo, config), reference_editor.tune(photo, config)
    assert fast.tuned.keys() == plain.tuned.keys()
    assert fast.losses == pytest.approx(plain.losses, rel=1e-5)
    originals = editor.originals()
    assert distance(fast.tuned, plain.tuned, originals) < 0.01  # Adam takes the sign of what cancels to almost nothing
    assert (fast.embedding - plain.embedding).norm() < 1e-3 * plain.embedding.norm()
    edits = [session.edit("a dog") for session in (fast, plain)]
    assert (edits[0].latents - edits[1].latents).norm() < 1e-3 * edits[1].latents.norm()
    # a tune that forgot to begin anew, or took another seed, is far beyond that
    other = editor.tune(photo, config.replace(seed=1))
    assert distance(other.tuned, plain.tuned, originals) > 0.1


def test_half_precision_is_as_near_as_autocast(task):
    """At most 1.1 times as far from float32 as an eager loop of diffusers' modules under bfloat16 autocast."""
    exact = task.learn(task.learner(EXACT))
    fast = task.learn(task.learner(Way("fast", 4, False)))
    plain = autocast_loop(task)
    allowed = 1.1 * distance(plain, exact.tuned, task.original)
    assert 0 < distance(fast.tuned, exact.tuned, task.original) < allowed
    lean = task.learn(task.learner(Way("lean", 4, False)))
    assert distance(lean.tuned, exact.tuned, task.original) < 2 * allowed


def autocast_loop(task):
    """METHOD section 2 as one would write it in half precision: float32 weights, autocast, torch's Adam."""
    config = task.config
    unet = copy.deepcopy(task.model.unet).requires_grad_(False)
    chosen = [unet.get_parameter(name.removeprefix("unet.")).requires_grad_() for name in task.names]
    source = task.embedding.clone().requires_grad_()
    groups = [dict(params=chosen, lr=config.unet_lr), dict(params=[source], lr=config.embedding_lr)]
    optimizer = torch.optim.Adam(groups, eps=config.eps)
    drawn = draw(
        task.latents,
        task.model.alphas_cumprod,
        task.model.prediction_type,
        config,
        torch.Generator().manual_seed(0),
    )
    for noisy, timesteps, target in zip(*drawn, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            answer = unet(noisy, timesteps, source.expand(len(noisy), -1, -1), return_dict=False)[0]
        optimizer.zero_grad()
        (mse_loss(answer.float(), target) * config.loss_scale).backward()
        optimizer.step()
    return {name: weight.detach() for name, weight in zip(task.names, chosen, strict=True)}


# against itself


def test_layers_computed_twice_change_no_bit(task):
    assert equal(task.learn(task.learner(Way("exact", 4, True))), task.learn(task.learner(EXACT)))


@pytest.mark.parametrize("mode", ["exact", "fast", "lean"])
def test_parts_of_a_batch_are_the_batch(task, mode):
    whole, parts = (task.learn(task.learner(Way(mode, rows, False))) for rows in (4, 2))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5 if mode == "exact" else 0.02)
    apart = distance(parts.tuned, whole.tuned, task.original)
    assert apart < (0.01 if mode == "exact" else 0.5)
    # one part alone is another batch
    half = Task(task.editor, task.config.replace(batch_size=2))
    assert distance(half.learn(half.learner(Way(mode, 2, False))).tuned, whole.tuned, task.original) > max(0.1, apart)


@pytest.mark.parametrize("mode", ["exact", "fast", "lean"])
def test_a_used_engine_learns_as_a_new_one(task, mode):
    """After another photo, a tune cut short in the middle, and one of another size."""
    way = Way(mode, 2, False)
    used, fresh = task.learner(way), task.learn(task.learner(way))
    held = {name: weight.data_ptr() for name, weight in used.unet.weights.items()}

    def cut_short(step, *_):
        if step == 2:
            raise KeyboardInterrupt

    task.learn(used, latents=torch.ones(1, 4, 8, 8))
    with pytest.raises(KeyboardInterrupt):
        task.learn(used, on_step=cut_short)
    task.learn(used, latents=torch.ones(1, 4, 8, 16))
    assert equal(task.learn(used), fresh)
    assert held == {name: weight.data_ptr() for name, weight in used.unet.weights.items()}
    assert not any(weight.requires_grad for weight in used.unet.weights.values())


class Replaying:
    """Records work as CUDA would: what Python decided at the capture stays decided."""

    def __init__(self):
        self.captured = 0

    def warm_up(self, work):
        work()

    def capture(self, work, shared):
        self.captured += 1
        return type("Recorded", (), {"replay": staticmethod(work)})


@pytest.mark.parametrize("way", [EXACT, Way("fast", 2, True), Way("lean", 4, False)], ids=str)
def test_replayed_steps_are_the_steps(task, way):
    config = task.config.replace(num_steps=4)
    capturer = Replaying()
    replayed = task.learner(way, GraphCache(CPU, capturer=capturer))
    task.learn(replayed, config)
    captured = capturer.captured
    again = task.learn(replayed, config)
    assert equal(again, task.learn(task.learner(way), config))
    assert capturer.captured == captured == 3 - (way.micro_batch == 4)  # a second photo captures nothing


@pytest.mark.parametrize("way", [EXACT, Way("fast", 2, False), Way("lean", 4, False)], ids=str)
def test_early_stop_on_both_sides_of_its_threshold(task, way):
    """Decided by the loss of that step, before its update."""
    config = task.config.replace(num_steps=5, min_samples=8)  # 4 rows a step: steps 0, 1 and 2 cannot stop
    assert first_stop(config) == 3 == next(step for step in range(9) if step * 4 > 8)
    whole = task.learn(task.learner(way), config.replace(loss_threshold=0.0))
    third = whole.losses[3]
    stopped = task.learn(task.learner(way), config.replace(loss_threshold=third * 1.01))
    # lean decides by a pass without gradients, for which other kernels are chosen
    assert stopped.stopped_early and stopped.losses[:3] == whole.losses[:3]
    assert stopped.losses[3] == pytest.approx(third, rel=1e-3 if way.mode == "lean" else 0)
    before = task.learn(task.learner(way), config.replace(num_steps=3))
    assert all(torch.equal(stopped.tuned[name], before.tuned[name]) for name in before.tuned)
    if whole.losses[4] > third:
        past = task.learn(task.learner(way), config.replace(loss_threshold=third * 0.99))
        assert not past.stopped_early and len(past.losses) == 5


def test_the_batch_decides_the_first_step_that_can_stop():
    assert first_stop(TuneConfig()) == 36
    assert first_stop(TuneConfig(loss_threshold=0.0)) == 40
    assert first_stop(TuneConfig(min_samples=0)) == 1


def test_lean_lets_gradients_go_as_it_uses_them(task):
    learner = task.learner(Way("lean", 4, False))
    task.learn(learner)
    assert all(leaf.tensor.grad is None for leaf in learner.unet.leaves)
    assert all(state.codes.dtype == torch.uint8 for state in learner._unet_plan.moments)


def test_bad_ways(task):
    with pytest.raises(ValueError, match="micro_batch 3 is out of range; expected a divisor of 4"):
        task.learner(Way("exact", 3, False))
    unet = FusedUNet(task.model.unet)
    with pytest.raises(ValueError, match=r"'fast' computes in torch\.bfloat16, got a UNet in torch\.float32"):
        Learner(unet, task.original, task.model.text_encoder, task.names, TUNE, Way("fast", 4, False))


# by the memory there is


@pytest.mark.parametrize("mode", ["exact", "fast", "lean"])
def test_a_loss_that_is_not_finite(task, mode):
    learner, fresh = task.learner(Way(mode, 4, False)), task.learn(task.learner(Way(mode, 4, False)))
    with pytest.raises(TuneDiverged, match="at step 0 of 3; lower unet_lr"):
        task.learn(learner, latents=torch.full((1, 4, 8, 8), float("nan")))
    assert equal(task.learn(learner), fresh)


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact", "fast", "lean"])
def test_graphs_are_bit_equal_and_nothing_grows(folder, mode):
    editor = Editor.from_pretrained(folder, "cuda")
    task = Task(editor)
    task.latents, learn = task.latents.cuda(), partial(task.learn, config=TUNE.replace(num_steps=5))
    eager = learn(task.learner(Way(mode, 4, False), GraphCache(torch.device("cuda"), most=0)))
    learner = task.learner(Way(mode, 4, False))
    for _ in range(2):
        assert equal(learn(learner), eager)
    assert learner._graphs.hits > 0 and not learner._graphs.failed
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    for _ in range(50):
        learn(learner)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= held
