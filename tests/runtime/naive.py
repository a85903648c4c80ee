"""METHOD.md, transcribed naively: diffusers' modules, nothing from the engine.

Every rule that can be got wrong is a value of Rules, so that a test can break one at a time. The defaults are METHOD's.
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor, CLIPTextModel, CLIPTokenizer

FROZEN = {"official": ("down_blocks.0", "up_blocks.0"), "paper": ("down_blocks.3", "up_blocks.0")}

STRATEGIES: dict[str, Callable[[str], bool]] = {
    "none": lambda n: False,
    "encoderkv": lambda n: "down_blocks" in n and "attn2.to_k" not in n and "attn2.to_v" not in n,
    "noencoder": lambda n: "down_blocks" in n,
    "encoderattn": lambda n: "down_blocks" in n and "attn" not in n,
    "encoderattn+encoder1": lambda n: "down_blocks" in n and "attn" not in n and "down_blocks.1" not in n,
    "decoderkv": lambda n: "up_blocks" in n and "attn2.to_k" not in n and "attn2.to_v" not in n,
    "nodecoder": lambda n: "up_blocks" in n,
    "decoderattn": lambda n: "up_blocks" in n and "attn" not in n,
    "decoderattn+decoder2": lambda n: "up_blocks" in n and "attn" not in n and "up_blocks.2" not in n,
}


@dataclass(frozen=True)
class Rules:
    # 1 prepare
    resize: str = "fit"  # or 'squash'
    squash_filters: tuple[str, str] = ("BICUBIC", "LANCZOS")
    pixel_scale: tuple[float, float] = (2.0, -1.0)
    posterior: str = "sample"
    scale_latents: bool = True
    final_norm: bool = True
    padding: str = "max_length"
    # 2 learn
    beta_schedule: str = "scaled_linear"
    beta_end: float = 0.012
    blocks: tuple[str, ...] = ("down_blocks", "up_blocks")
    frozen: tuple[str, ...] = FROZEN["official"]
    train_embedding: bool = True
    adam_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float | None = None
    lr_decay: float = 1.0
    swap_rates: bool = False
    noise_before_timesteps: bool = True
    one_generator: bool = True
    one_noise_for_batch: bool = False
    one_timestep_for_batch: bool = False
    loss_target: str = "noise"
    loss_scale: float = 65536.0
    eps: float = 1e-8
    stop_before_backward: bool = True
    stop_strict: bool = True
    samples_strict: bool = True
    first_step: int = 0
    # 6 DreamBooth
    train_text_encoder: bool = False
    reencode: bool = False
    # 3 edit embedding
    vs_swapped: bool = False
    vp_dim: int = -1
    vp_normalized: bool = True
    vp_projected_out: bool = True
    vp_weights_swapped: bool = False
    # 4 forget
    strategies: dict[str, Callable[[str], bool]] = dataclasses.field(default_factory=lambda: STRATEGIES)
    strategy_inverted: bool = False
    keep_inverted: bool = False
    # 5 sample
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = False
    clip_sample: bool = False
    eta: float = 0.0
    guidance_swapped: bool = False
    guidance_from_conditional: bool = False
    unconditional: str = ""
    from_noise: bool = True
    unscale_latents: bool = True
    decode_shift: float = 0.5


METHOD = Rules()


@dataclass
class Pipe:
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    captioner: BlipForConditionalGeneration
    processor: BlipProcessor


def load(folder: Path) -> Pipe:
    return Pipe(
        UNet2DConditionModel.from_pretrained(folder / "unet"),
        AutoencoderKL.from_pretrained(folder / "vae"),
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        BlipForConditionalGeneration.from_pretrained(folder / "captioner"),
        BlipProcessor.from_pretrained(folder / "captioner"),
    )


def caption(pipe: Pipe, photo: Path, target: str) -> str:
    out = pipe.captioner.generate(**pipe.processor(Image.open(photo).convert("RGB"), return_tensors="pt"))
    words = pipe.processor.tokenizer.decode(out[0], skip_special_tokens=True)
    return "A photo of " + words if "A photo of " in target else words


def prepare_image(photo: Path, side: int, rules: Rules) -> Image.Image:
    image = Image.open(photo).convert("RGB")
    if rules.resize == "squash":
        first, second = (getattr(Image, name) for name in rules.squash_filters)
        image = image.resize((side, side), first)
        return image.resize((side // 16 * 16, side // 16 * 16), second)  # 32 for a VAE of factor 8
    ratio = (side * side / (image.width * image.height)) ** 0.5  # latent sides in fours; 4 pixels a latent here
    return image.resize((round(image.width * ratio / 16) * 16, round(image.height * ratio / 16) * 16), Image.LANCZOS)


def embed(pipe: Pipe, prompt: str, rules: Rules) -> torch.Tensor:
    ids = pipe.tokenizer(prompt, padding=rules.padding, max_length=77, truncation=True, return_tensors="pt").input_ids
    if not rules.final_norm:
        return pipe.text_encoder(ids, output_hidden_states=True).hidden_states[-1]
    return pipe.text_encoder(ids).last_hidden_state


def scheduler(rules: Rules) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=rules.beta_end,
        beta_schedule=rules.beta_schedule,
        clip_sample=rules.clip_sample,
        set_alpha_to_one=rules.set_alpha_to_one,
        steps_offset=rules.steps_offset,
        timestep_spacing=rules.timestep_spacing,
        prediction_type=rules.prediction_type,
    )


def first_latents(pipe: Pipe, image: Image.Image, generator: torch.Generator, rules: Rules) -> torch.Tensor:
    factor, shift = rules.pixel_scale
    pixels = torch.tensor(np.array(image)).float() / 255 * factor + shift
    posterior = pipe.vae.encode(pixels.permute(2, 0, 1).unsqueeze(0).contiguous()).latent_dist
    z = posterior.sample(generator) if rules.posterior == "sample" else posterior.mode()
    return pipe.vae.config.scaling_factor * z if rules.scale_latents else z


@dataclass
class Learned:
    pipe: Pipe  # with the tuned weights
    z: torch.Tensor
    e_src: torch.Tensor
    losses: list[float]
    updates: int


def learn(
    original: Pipe, image: Image.Image, prompt: str, rules: Rules, *,
    steps: int, batch: int, unet_lr: float, embedding_lr: float, seed: int,
    threshold: float = 0.03, min_samples: int = 350,
) -> Learned:  # fmt: skip
    pipe = copy.copy(original)
    pipe.unet, pipe.text_encoder = copy.deepcopy(original.unet), copy.deepcopy(original.text_encoder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        z = first_latents(pipe, image, generator, rules).repeat(batch, 1, 1, 1)
        e_src = embed(pipe, prompt, rules)
    if not rules.one_generator:
        generator = torch.Generator().manual_seed(seed)
    chosen = []
    for name, parameter in pipe.unet.named_parameters():
        inside = any(block in name for block in rules.blocks) and not any(block in name for block in rules.frozen)
        trained = inside or not rules.blocks
        parameter.requires_grad_(trained)
        if trained:
            chosen.append(parameter)
    pipe.text_encoder.requires_grad_(rules.train_text_encoder)
    rates = (embedding_lr, unet_lr) if rules.swap_rates else (unet_lr, embedding_lr)
    groups = [{"params": chosen, "lr": rates[0]}]
    if rules.train_text_encoder:
        groups.append({"params": list(pipe.text_encoder.parameters()), "lr": rates[0]})
    elif rules.train_embedding and not rules.reencode:
        e_src.requires_grad_(True)
        groups.append({"params": [e_src], "lr": rates[1]})
    adam = torch.optim.Adam(groups, betas=rules.adam_betas, eps=rules.eps, weight_decay=rules.weight_decay)
    noising = scheduler(rules)
    losses, updates = [], 0
    for i in range(rules.first_step, rules.first_step + steps):
        if not rules.noise_before_timesteps:
            t = torch.randint(0, 1000, (batch,), generator=generator)
        noise = torch.randn(z.shape, generator=generator)
        if rules.noise_before_timesteps:
            t = torch.randint(0, 1000, (batch,), generator=generator)
        if rules.one_noise_for_batch:
            noise = noise[:1].repeat(batch, 1, 1, 1)
        if rules.one_timestep_for_batch:
            t = t[:1].repeat(batch)
        noisy = noising.add_noise(z, noise, t)
        source = embed(pipe, prompt, rules) if rules.train_text_encoder else e_src
        pred = pipe.unet(noisy, t, source.repeat(batch, 1, 1)).sample
        target = {"noise": noise, "v": noising.get_velocity(z, noise, t), "sample": z}[rules.loss_target]
        loss = ((pred - target) ** 2).mean([1, 2, 3]).mean()
        losses.append(loss.item())
        below = losses[-1] < threshold if rules.stop_strict else losses[-1] <= threshold
        enough = i * batch > min_samples if rules.samples_strict else i * batch >= min_samples
        if below and enough and rules.stop_before_backward:
            break
        adam.zero_grad()
        (loss * rules.loss_scale).backward()
        if rules.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(chosen, rules.clip_norm)
        adam.step()
        updates += 1
        for group in adam.param_groups:
            group["lr"] *= rules.lr_decay
        if below and enough:
            break
    if rules.reencode:
        with torch.no_grad():
            e_src = embed(pipe, prompt, rules)
    return Learned(pipe, z[:1], e_src.detach(), losses, updates)


def blend_vs(e_src: torch.Tensor, e_tgt: torch.Tensor, gamma: float, rules: Rules) -> torch.Tensor:
    return gamma * e_src + (1 - gamma) * e_tgt if rules.vs_swapped else gamma * e_tgt + (1 - gamma) * e_src


def blend_vp(e_src: torch.Tensor, e_tgt: torch.Tensor, identity: float, edit: float, rules: Rules) -> torch.Tensor:
    norm = e_src.norm(dim=rules.vp_dim, keepdim=True)
    u = e_src / torch.maximum(norm, torch.tensor(1e-12)) if rules.vp_normalized else e_src
    r = (e_tgt * u).sum(dim=rules.vp_dim, keepdim=True)
    e_edit = e_tgt - r * u if rules.vp_projected_out else r * u
    if rules.vp_weights_swapped:
        identity, edit = edit, identity
    return identity * e_src + edit * e_edit


def forget(original: Pipe, learned: Learned, strategy: str, keep: float, rules: Rules) -> UNet2DConditionModel:
    unet = copy.deepcopy(learned.pipe.unet)
    before = dict(original.unet.named_parameters())
    keep = 1 - keep if rules.keep_inverted else keep
    with torch.no_grad():
        for name, w in unet.named_parameters():
            same = torch.equal(w, before[name])  # untrained: the sum is w itself, but would round
            if rules.strategies[strategy](name) != rules.strategy_inverted and not same:
                w.copy_(keep * w + (1 - keep) * before[name])
    return unet


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    learned: Learned,
    e: torch.Tensor,
    rules: Rules,
    *,
    steps: int,
    guidance: float,
    seed: int,
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ddim = scheduler(rules)
    ddim.set_timesteps(steps)
    both = torch.cat([embed(learned.pipe, rules.unconditional, rules), e])
    x = torch.randn(learned.z.shape, generator=generator)
    if not rules.from_noise:
        x = ddim.add_noise(learned.z, x, ddim.timesteps[:1])
    for t in ddim.timesteps:
        u, c = unet(torch.cat([x, x]), t, both).sample.chunk(2)
        if rules.guidance_swapped:
            u, c = c, u
        guided = c + guidance * (c - u) if rules.guidance_from_conditional else u + guidance * (c - u)
        x = ddim.step(guided, t, x, eta=rules.eta, generator=generator).prev_sample
    return x


@torch.no_grad()
def decode(pipe: Pipe, x: torch.Tensor, rules: Rules) -> torch.Tensor:
    z = x / pipe.vae.config.scaling_factor if rules.unscale_latents else x
    return (pipe.vae.decode(z).sample / 2 + rules.decode_shift).clamp(0, 1)
