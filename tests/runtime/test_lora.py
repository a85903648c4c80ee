"""A session as a LoRA: the nearest of its rank, read by diffusers and PEFT, and whole or not there."""

import copy
import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, safe_open, save_file

from forgedit import SessionError, TuneConfig
from forgedit.cli import main
from forgedit.lora import factor, source_embedding
from tests.runtime import naive

TUNE = TuneConfig(num_steps=2, batch_size=2, unet_lr=1e-3, caption="a cat")


@pytest.fixture(scope="module")
def session(reference_editor, photo):
    return reference_editor.tune(photo, TUNE)


@pytest.fixture(scope="module")
def dreambooth(reference_editor, photo):
    return reference_editor.tune(
        photo, TUNE.replace(profile="dreambooth", num_steps=2, batch_size=2, text_encoder_lr=1e-3)
    )


def changes(session):
    return {name: (weight - session.editor.originals()[name]).double() for name, weight in session.tuned.items()}


def products(path):
    """The change that a file holds, float64, by weight name; multiplied here, by nobody's loader."""
    tensors = load_file(path)
    pairs = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            assert a.dtype == b.dtype == torch.float32
            assert a.shape[0] == b.shape[1] and b.shape[2:] == (1,) * (b.ndim - 2)
            product = b.flatten(1).double() @ a.flatten(1).double()
            pairs[name.replace("lora_A.", "")] = product.view(b.shape[0], *a.shape[1:])
    assert len(tensors) == 2 * len(pairs)
    return pairs


def norm(tensors):
    return sum(tensor.square().sum().item() for tensor in tensors) ** 0.5


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (40, 13), (13, 40), (64, 64)], ids=str)
@pytest.mark.parametrize("size", [1e-18, 1.0, 1e15])
def test_no_matrix_of_that_rank_is_nearer(shape, size):
    matrix = random(*shape) * size
    singular = torch.linalg.svdvals(matrix.double())
    for rank in {1, 5, min(shape), 70}:
        b, a = factor(matrix, rank)
        assert b.shape == (shape[0], rank) and a.shape == (rank, shape[1])
        best, size = singular[rank:].norm(), singular.norm()
        assert norm([b.double() @ a.double() - matrix.double()]) <= best * (1 + 1e-6) + 1e-6 * size


def test_a_flat_spectrum_and_a_steep_one():
    """Equal singular values, where any choice is right; and values from 1 to 1e-12, whose squares vanish in float32."""
    u, v = (torch.linalg.qr(random(24, 24, seed=seed).double())[0] for seed in (1, 2))
    for values in (torch.ones(24).double(), 10 ** torch.linspace(0, -12, 24).double()):
        matrix = (u * values) @ v
        for rank in (1, 6, 20):
            b, a = factor(matrix.float(), rank)
            assert norm([b.double() @ a.double() - matrix]) <= values[rank:].norm() * (1 + 1e-6) + 2e-6 * values.norm()


def test_both_factors_are_in_float16s_range():
    b, a = factor(random(320, 320) * 1e-6, 8)
    for part in (b, a):
        assert norm([part.half().double() - part.double()]) < 1e-3 * norm([part.double()])


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_the_file_holds_the_change_up_to_the_error_it_says(session, tmp_path, rank):
    saved = session.export_lora(tmp_path / "a.safetensors", rank)
    assert (saved.path, saved.rank, saved.num_bytes) == (tmp_path / "a.safetensors", rank, saved.path.stat().st_size)
    wanted, got = changes(session), products(saved.path)
    assert all(tensor.shape == wanted[name].shape for name, tensor in got.items())
    wrong = norm(change - got.get(name, 0) for name, change in wanted.items())
    assert saved.relative_error == pytest.approx(wrong / norm(wanted.values()), rel=1e-6)
    assert set(saved.left_out) == wanted.keys() - got.keys()
    assert all(wanted[name].ndim == 1 for name in saved.left_out) and saved.left_out
    missed = norm(wanted[name] for name in saved.left_out)
    assert saved.left_out_error == pytest.approx(missed / norm(wanted.values()), rel=1e-6)
    if rank == 32:  # the longest shorter side: only what is left out is missing
        assert saved.relative_error == pytest.approx(saved.left_out_error, rel=1e-4)


def test_a_higher_rank_is_nearer_and_larger(session, tmp_path):
    saved = [session.export_lora(tmp_path / str(rank), rank) for rank in (1, 2, 8, 32)]
    errors, sizes = [each.relative_error for each in saved], [each.num_bytes for each in saved]
    assert errors == sorted(errors, reverse=True) and sizes == sorted(sizes) and errors[0] > 2 * errors[-1]


def test_what_is_forgotten_is_not_in_it(session, tmp_path):
    saved = session.export_lora(tmp_path / "a", 32, strategy="noencoder")
    got = products(saved.path)
    assert got and not any("down_blocks" in name for name in (*got, *saved.left_out))
    half = products(session.export_lora(tmp_path / "b", 32, strategy="noencoder", keep=0.5).path)
    wanted = changes(session)
    for name in half:
        share = 0.5 if "down_blocks" in name else 1.0
        assert norm([half[name] - share * wanted[name]]) < 1e-3 * norm([wanted[name]])


def pipeline(pipe):
    """diffusers' own, over copies; steps_offset is what its constructor makes of it."""
    parts = dict(unet=copy.deepcopy(pipe.unet), text_encoder=copy.deepcopy(pipe.text_encoder), vae=pipe.vae)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return StableDiffusionPipeline(**parts, tokenizer=pipe.tokenizer, scheduler=scheduler, **none)


@torch.no_grad()
def answer(unet, session):
    return unet(random(2, 4, 8, 8), 321, session.embedding.repeat(2, 1, 1)).sample


@torch.no_grad()
def add(module, part, products):
    for name, weight in module.named_parameters():
        if f"{part}.{name}" in products:
            weight.add_(products[f"{part}.{name}"].float())


def test_diffusers_reads_it(session, pipe, tmp_path):
    pytest.importorskip("peft", reason="diffusers reads a LoRA with peft alone; it is in the extra 'dev'")
    saved = session.export_lora(tmp_path / "a.safetensors", 4)
    loaded, by_hand = pipeline(pipe), copy.deepcopy(pipe.unet)
    before = answer(loaded.unet, session)
    loaded.load_lora_weights(saved.path)
    add(by_hand, "unet", products(saved.path))
    change = norm([(answer(by_hand, session) - before).double()])
    assert norm([(answer(loaded.unet, session) - answer(by_hand, session)).double()]) < 1e-4 * change
    config = loaded.unet.peft_config["default_0"]
    assert (config.r, config.lora_alpha, not config.rank_pattern) == (4, 4, True)
    loaded.fuse_lora()
    loaded.unload_lora_weights()
    fused = dict(loaded.unet.named_parameters())
    for name, weight in by_hand.named_parameters():
        assert torch.allclose(fused[name], weight, rtol=0, atol=1e-6), name


def test_at_full_rank_diffusers_makes_the_sessions_answer(session, pipe, tmp_path):
    """All but what is left out; and a wrong scale, as of a reader that took another alpha, is far off."""
    pytest.importorskip("peft", reason="diffusers reads a LoRA with peft alone; it is in the extra 'dev'")
    saved = session.export_lora(tmp_path / "a.safetensors", 32)
    kept = {name: w for name, w in session.tuned.items() if name not in saved.left_out}
    unet = copy.deepcopy(pipe.unet)
    replace(session, tuned=kept).apply_to(unet, check_base=False)
    loaded = pipeline(pipe)
    before = answer(loaded.unet, session)
    loaded.load_lora_weights(saved.path)
    change = norm([(answer(unet, session) - before).double()])
    assert norm([(answer(loaded.unet, session) - answer(unet, session)).double()]) < 1e-3 * change
    loaded.set_adapters("default_0", 0.5)
    assert norm([(answer(loaded.unet, session) - answer(unet, session)).double()]) > 0.1 * change


def test_a_dreambooth_text_encoder_too(dreambooth, pipe, tmp_path):
    pytest.importorskip("peft", reason="diffusers reads a LoRA with peft alone; it is in the extra 'dev'")
    saved = dreambooth.export_lora(tmp_path / "a.safetensors", 4)
    assert any("embedding" in name for name in saved.left_out)
    loaded, by_hand = pipeline(pipe), copy.deepcopy(pipe)
    loaded.load_lora_weights(saved.path)
    add(by_hand.text_encoder, "text_encoder", products(saved.path))
    ours, theirs, before = (naive.embed(each, "a dog", naive.METHOD) for each in (by_hand, loaded, pipe))
    assert norm([(ours - theirs).double()]) < 1e-4 * norm([(ours - before).double()])


def test_an_edit_by_diffusers_alone(session, pipe, tmp_path):
    """The README's words: the LoRA, the blended embedding, and diffusers' own loop."""
    pytest.importorskip("peft", reason="diffusers reads a LoRA with peft alone; it is in the extra 'dev'")
    saved = session.export_lora(tmp_path / "a.safetensors", 4)
    loaded = pipeline(pipe)
    loaded.load_lora_weights(saved.path)
    target, nothing = loaded.encode_prompt("a dog", loaded.device, 1, True)
    edit = 1.1 * target + (1 - 1.1) * source_embedding(saved.path).to(target)
    how = dict(num_inference_steps=1, output_type="latent", latents=random(1, 4, 8, 8), guidance_scale=7.5)
    latents = loaded(prompt_embeds=edit, negative_prompt_embeds=nothing, **how).images
    plain = loaded(prompt_embeds=target, negative_prompt_embeds=nothing, **how).images
    assert latents.isfinite().all() and not torch.allclose(latents, plain)


def test_the_source_embedding_is_in_it(session, tmp_path):
    saved = session.export_lora(tmp_path / "a.safetensors", 2, strategy="encoderattn")
    assert torch.equal(source_embedding(saved.path), session.embedding)
    with safe_open(saved.path, "pt") as file:
        record = json.loads(file.metadata()["forgedit"])
    assert record["caption"] == "a cat" and record["base_fingerprint"] == session.editor.fingerprint
    assert (record["rank"], record["strategy"], record["relative_error"]) == (2, "encoderattn", saved.relative_error)


def test_no_source_embedding(session, tmp_path):
    with pytest.raises(FileNotFoundError):
        source_embedding(tmp_path / "none")
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(SessionError, match="its metadata lacks 'forgedit'"):
        source_embedding(tmp_path / "other")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(SessionError, match="no safetensors file"):
        source_embedding(tmp_path / "text")


@pytest.mark.parametrize("rank", [0, -1, 33, True, 2.0])
def test_a_bad_rank_writes_nothing(session, tmp_path, rank):
    with pytest.raises(ValueError, match=f"rank {rank!r} is out of range; expected a whole number from 1 to 32"):
        session.export_lora(tmp_path / "a", rank)
    assert not os.listdir(tmp_path)


def test_a_change_that_is_not_finite_writes_nothing(session, tmp_path):
    name = "unet.up_blocks.2.resnets.0.conv1.weight"
    broken = replace(session, tuned={**session.tuned, name: torch.full_like(session.tuned[name], np.nan)})
    with pytest.raises(ValueError, match=f"'{name}' is not finite"):
        broken.export_lora(tmp_path / "a", 2)
    assert not os.listdir(tmp_path)


def test_nothing_has_changed(session, tmp_path):
    same = replace(session, tuned={name: session.editor.originals()[name] for name in session.tuned})
    with pytest.raises(ValueError, match="nothing that a LoRA can hold has changed"):
        same.export_lora(tmp_path / "a", 2)
    assert not os.listdir(tmp_path)


def test_no_place_to_write(session, tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"cannot write .*none"):
        session.export_lora(tmp_path / "none" / "a", 2)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*No space left"):
        session.export_lora(tmp_path / "a", 2)
    assert not os.listdir(tmp_path)


@pytest.fixture
def file(session, tmp_path):
    session.save(tmp_path / "one.session")
    return tmp_path / "one.session"


def export(folder, *words):
    return main(["export", *map(str, words), "--model", str(folder), "--threads", "1"])


def test_on_the_command_line(session, folder, file, tmp_path, capsys):
    lora = tmp_path / "a.safetensors"
    assert export(folder, file, "--lora", lora, "--rank", 4, "--strategy", "encoderattn") == 0
    size = lora.stat().st_size
    out = capsys.readouterr().out
    assert f"LoRA: {lora}, rank 4, {size:,} bytes, relative error of the change 0." in out and "left out" in out
    assert export(folder, file, "--lora", lora, "--rank", 4, "--json") == 0
    (event,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (event["event"], event["path"], event["rank"]) == ("lora", str(lora), 4)
    assert 0 < event["left_out_error"] < event["relative_error"] < 1 and len(event["left_out"]) > 1


@pytest.mark.parametrize(
    "words, message",
    [
        (("--rank", 0), "rank 0 is out of range"),
        (("--rank", 4, "--strategy", "encoderk"), "unknown strategy 'encoderk'"),
        (("--rank", 4, "--keep", 2), "keep 2.0 is out of range"),
        (("--rank", "four"), "invalid int value"),
        ((), "the following arguments are required: --rank"),
    ],
)
def test_wrong_words(folder, file, tmp_path, capsys, words, message):
    assert export(folder, file, "--lora", tmp_path / "a", *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_wrong_places(folder, file, photo, tmp_path, capsys):
    held = file.read_bytes()
    for session, lora, message in (
        (tmp_path / "none", tmp_path / "a", "no session"),
        (photo, tmp_path / "a", "not a session"),
        (file, file, "is the session; choose another file"),
        (file, tmp_path / "none" / "a", "cannot write"),
    ):
        assert export(folder, session, "--lora", lora, "--rank", 2) == 2
        assert message in capsys.readouterr().err
    assert file.read_bytes() == held and os.listdir(tmp_path) == [file.name]
