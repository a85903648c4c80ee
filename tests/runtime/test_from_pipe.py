"""An editor over a loaded pipe: its weights shared, the pipe as it was before, during and after; or refused."""

import copy
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from forgedit import Cancelled, EditConfig, Editor, ModelError, TuneConfig, TuneDiverged
from tests.runtime import naive
from tests.runtime.test_editor import CancelAt

TUNE = TuneConfig(num_steps=2, batch_size=2, unet_lr=1e-3, caption="a cat")
DREAMBOOTH = TuneConfig(profile="dreambooth", num_steps=2, batch_size=2, text_encoder_lr=1e-3, caption="a cat")
EDIT = EditConfig(strategy="encoderattn", keep=0.3, num_steps=2)
MODULES = ("unet", "vae", "text_encoder")


def load_pipe(folder):
    parts = naive.load(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it wants steps_offset 1
        return StableDiffusionPipeline(
            unet=parts.unet,
            vae=parts.vae,
            text_encoder=parts.text_encoder,
            tokenizer=parts.tokenizer,
            scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


@pytest.fixture(scope="module")
def untouched(folder):
    return load_pipe(folder)


@pytest.fixture
def loaded(untouched):
    """A pipe as its owner may have left it: part of it in training."""
    loaded = copy.deepcopy(untouched)
    loaded.unet.train()
    loaded.unet.mid_block.requires_grad_(False)
    loaded.text_encoder.eval()
    return loaded


class Seen:
    """All that a pipe's owner can see of it; equal to another one only if every bit is."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.tensors, self.facts = {}, {}
        for part in MODULES:
            module = getattr(pipe, part)
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                self.tensors[part, name] = tensor.detach().clone()
                self.facts[part, name] = (
                    id(tensor), tensor.data_ptr(), tensor.dtype, tensor.device, tensor.stride(), tensor.requires_grad,
                    tensor.grad is None, tensor._version,
                )  # fmt: skip
            for name, each in module.named_modules():
                hooks = len(each._forward_hooks) + len(each._forward_pre_hooks) + len(each._backward_hooks)
                self.facts[part, name, "module"] = (id(each), each.training, hooks)
            self.facts[part, "config"] = copy.deepcopy(module.config)
        tokenizer = pipe.tokenizer
        self.facts["tokenizer"] = tokenizer.model_max_length, tokenizer._tokenizer.to_str()
        self.facts["scheduler"] = dict(pipe.scheduler.config)
        pixels, latents = torch.full((1, 3, 16, 16), 0.3), torch.full((2, 4, 8, 8), 0.5)
        with torch.no_grad():
            self.tensors["text_encoder"] = pipe.text_encoder(torch.arange(50, 58)[None]).last_hidden_state
            self.tensors["unet"] = pipe.unet(latents, 7, self.tensors["text_encoder"].expand(2, -1, -1)).sample
            self.tensors["encoded"] = pipe.vae.encode(pixels).latent_dist.mean
            self.tensors["decoded"] = pipe.vae.decode(latents).sample

    def is_still_so(self):
        now = Seen(self.pipe)
        return self.facts == now.facts and all(
            torch.equal(tensor, now.tensors[name]) for name, tensor in self.tensors.items()
        )


def test_what_is_seen_would_show_a_change(loaded):
    before = Seen(loaded)
    assert before.is_still_so()
    for change in (
        lambda: loaded.unet.conv_in.weight.data.mul_(1 + 1e-6),
        lambda: loaded.unet.eval(),
        lambda: loaded.vae.requires_grad_(False),
        lambda: loaded.unet.to(memory_format=torch.channels_last),
        lambda: setattr(loaded.tokenizer, "model_max_length", 5),
    ):
        before = Seen(loaded)
        change()
        assert not before.is_still_so()


def finished(editor, photo, watch):
    for config in (TUNE, DREAMBOOTH):
        session = editor.tune(photo, config, on_step=watch)
        session.edit("a dog", EDIT, on_step=watch)


def cancelled_tune(editor, photo, watch):
    cancel = CancelAt("tune", 1)
    with pytest.raises(Cancelled):
        editor.tune(photo, DREAMBOOTH, on_step=lambda event: (watch(event), cancel(event)), cancel=cancel.event)


def failed_tune(editor, photo, watch):
    with pytest.raises(TuneDiverged):
        editor.tune(photo, TUNE.replace(unet_lr=1e30), on_step=watch)


def cancelled_edit(editor, photo, watch):
    cancel = CancelAt("sample", 1)
    session = editor.tune(photo, TUNE)
    with pytest.raises(Cancelled):
        session.edit("a dog", EDIT, on_step=lambda event: (watch(event), cancel(event)), cancel=cancel.event)


@pytest.mark.parametrize("call", [finished, cancelled_tune, failed_tune, cancelled_edit])
def test_the_pipe_is_as_it_was_before_during_and_after(loaded, photo, call):
    before, stages = Seen(loaded), set()
    editor = Editor.from_pipe(loaded)

    def watch(event):
        stages.add(event.stage)
        assert before.is_still_so(), event

    call(editor, photo, watch)
    assert stages and before.is_still_so()


@pytest.mark.parametrize("config", [TUNE, DREAMBOOTH], ids=lambda config: config.profile)
def test_it_edits_as_an_editor_of_the_folder_does(loaded, editor, photo, tmp_path, config):
    ours = Editor.from_pipe(loaded)
    assert ours.fingerprint == editor.fingerprint and ours.info()["resolution"] == editor.info()["resolution"]
    session, expected = ours.tune(photo, config), editor.tune(photo, config)
    assert all(torch.equal(weight, expected.tuned[name]) for name, weight in session.tuned.items())
    latents = expected.edit("a dog", EDIT).latents
    assert torch.equal(session.edit("a dog", EDIT).latents, latents)
    session.save(tmp_path / "session")
    assert torch.equal(editor.load_session(tmp_path / "session").edit("a dog", EDIT).latents, latents)


def shared(ours, theirs):
    return {name for name, tensor in ours.items() if tensor.data_ptr() == theirs[name].data_ptr()}


def test_only_what_is_tuned_exists_twice(loaded, photo):
    editor = Editor.from_pipe(loaded, numerics="reference")
    theirs = {f"unet.{name}": weight for name, weight in loaded.unet.named_parameters()}
    theirs |= {f"text_encoder.{name}": weight for name, weight in loaded.text_encoder.named_parameters()}
    working = {f"unet.{name}": weight for name, weight in editor.model.unet.named_parameters()}
    working |= {f"text_encoder.{name}": weight for name, weight in editor.model.text_encoder.named_parameters()}
    vae = dict(loaded.vae.named_parameters())
    assert shared(dict(editor.model.vae.named_parameters()), vae) == vae.keys()
    assert shared(editor.originals(), theirs) == shared(working, theirs) == theirs.keys()
    during = []
    session = editor.tune(photo, TUNE, on_step=lambda event: during.append((event.stage, shared(working, theirs))))
    frozen = theirs.keys() - session.tuned.keys()
    assert [names == (frozen if stage == "tune" else theirs.keys()) for stage, names in during] == [True] * 4
    assert shared(working, theirs) == theirs.keys()
    session.edit("a dog", EDIT)
    assert shared(working, theirs) == frozen
    assert not shared(session.tuned, theirs) and not shared(session.tuned, working)


def test_what_becomes_of_the_pipes_modules_does_not_matter(loaded, photo):
    editor = Editor.from_pipe(loaded)
    session = editor.tune(photo, TUNE)
    expected = session.edit("a dog", EDIT).latents
    loaded.unet.half().set_attn_processor(AttnProcessor())
    loaded.vae.to("meta")
    loaded.text_encoder.register_forward_hook(lambda *_: pytest.fail("the pipe's module was called"))
    del loaded.tokenizer
    assert torch.equal(editor.tune(photo, TUNE).edit("a dog", EDIT).latents, expected)


def test_half_precision_is_copied_to_float32(loaded, photo, caplog):
    for part in MODULES:
        getattr(loaded, part).half()
    with caplog.at_level("INFO", "forgedit"):
        editor = Editor.from_pipe(loaded)
    assert "pipe's unet is not float32" in caplog.text
    for part in MODULES:
        ours = dict(getattr(editor.model, part).named_parameters())
        for name, weight in getattr(loaded, part).named_parameters():
            assert weight.dtype == torch.float16 and torch.equal(ours[name], weight.float())
    assert editor.tune(photo, TUNE).edit("a dog", EDIT).latents.isfinite().all()


def test_channels_last_is_copied(loaded, editor, photo):
    """torch's CPU backward pass crashes on it where blocks are frozen."""
    loaded.unet.to(memory_format=torch.channels_last)
    strides = [weight.stride() for weight in loaded.unet.parameters()]
    session = Editor.from_pipe(loaded).tune(photo, TUNE)
    assert torch.equal(session.embedding, editor.tune(photo, TUNE).embedding)
    assert [weight.stride() for weight in loaded.unet.parameters()] == strides


def test_a_captioner_is_shared_too(loaded, editor, pipe, photo):
    with pytest.raises(ModelError, match="no captioner"):
        Editor.from_pipe(loaded).tune(photo, TUNE.replace(caption=None))
    captioner = copy.deepcopy(pipe.captioner).train()
    ours = Editor.from_pipe(loaded, captioner=captioner, processor=pipe.processor)
    assert ours.caption(photo) == editor.caption(photo)
    mine, theirs = (dict(each.named_parameters(remove_duplicate=False)) for each in (ours.model.captioner, captioner))
    assert shared(mine, theirs) == theirs.keys() and captioner.training and not ours.model.captioner.training


def test_prediction_type_and_noise_schedule_are_the_schedulers(loaded, editor):
    assert Editor.from_pipe(loaded).model.prediction_type == "epsilon"
    assert torch.equal(Editor.from_pipe(loaded).model.alphas_cumprod, editor.model.alphas_cumprod)
    changed = dict(prediction_type="v_prediction", beta_end=0.02)
    loaded.scheduler = DDIMScheduler.from_config(loaded.scheduler.config, **changed)
    model = Editor.from_pipe(loaded).model
    assert model.prediction_type == "v_prediction"
    assert not torch.equal(model.alphas_cumprod, editor.model.alphas_cumprod)


def inpainting(pipe):
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9)


def with_lora(pipe):
    pipe.unet.conv_in.lora_A = torch.nn.Linear(4, 2)


def quantised(pipe):
    pipe.unet.conv_in.weight = torch.nn.Parameter(torch.ones(16, 4, 3, 3, dtype=torch.int8), requires_grad=False)


def other_samples(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda pipe: setattr(pipe, "text_encoder", None), "has no text_encoder"),
        (lambda pipe: setattr(pipe, "unet", torch.nn.Linear(2, 2)), "is a Linear; expected a UNet2DCondition"),
        (lambda pipe: setattr(pipe, "unet", torch.nn.DataParallel(pipe.unet)), "is a DataParallel; .* not compiled"),
        (inpainting, "inpainting"),
        (with_lora, r"2 tensors more .* such as 'conv_in\.lora_A\.bias'; fuse and unload"),
        (quantised, r"'conv_in\.weight' is torch\.int8 .*; load it not quantised"),
        (lambda pipe: pipe.vae.to("meta"), "the pipe's vae's weights are offloaded"),
        (other_samples, "prediction_type 'sample' is not supported"),
    ],
)
def test_a_pipe_that_cannot_be_edited_with(loaded, change, message):
    change(loaded)
    with pytest.raises(ModelError, match=message):
        Editor.from_pipe(loaded)


def test_wrong_arguments(loaded, pipe):
    with pytest.raises(ModelError, match="object has no unet; expected a loaded StableDiffusionPipeline"):
        Editor.from_pipe(object())
    with pytest.raises(ValueError, match="captioner and processor go together"):
        Editor.from_pipe(loaded, captioner=pipe.captioner)
    with pytest.raises(ModelError, match="captioner is a CLIPTextModel"):
        Editor.from_pipe(loaded, captioner=pipe.text_encoder, processor=pipe.processor)
    with pytest.raises(ValueError, match="backend 'abacus'"):
        Editor.from_pipe(loaded, backend="abacus")
