"""How near the engine's edits are to the reference path's: `python -m bench.equality [--device cpu] [--seeds 4]`.

One photo is learned by the reference path; then every strategy is edited on every path with several seeds. 'exact' is
measured by its final latents. 'fast' and 'fast-float16' are measured by their pictures, beside those of a plain
diffusers loop in the same precision over the same weights: the engine may be at most half a decibel worse.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

import torch
from PIL import Image

from bench import subject as subjects
from bench.denoise import Task, diffusers_loop
from bench.program import parse, parser_of, write_lines
from forgedit import EditConfig, Editor, Session
from forgedit.engine.numerics import NUMERICS
from forgedit.quality.metrics import psnr, ssim
from forgedit.stages.blend import blend_embeddings
from forgedit.stages.decode import decode_latents

STRATEGIES = ("none", "encoderattn", "decoderattn")
EXACT = 1e-4  # relative, of the final latents
WORSE = 0.5  # decibels


def half_precision(session: Session, target: str, config: EditConfig, dtype: torch.dtype) -> Image.Image:
    """The edit by a diffusers loop in `dtype`: modules, embeddings and latents; on the reference's merged weights."""
    model = session.editor.model
    prompts = [session.prompts[words].embedding for words in ("", target)]
    embeddings = torch.cat([prompts[0], blend_embeddings(session.embedding, prompts[1], config)])
    sides = [side // model.vae_scale for side in session.source.size[::-1]]
    noise = torch.randn(
        (1, model.unet.config.in_channels, *sides), generator=torch.Generator().manual_seed(config.seed)
    )
    task = Task(
        unet=model.unet,
        embeddings=embeddings,
        noise=noise.to(embeddings.device),
        alphas_cumprod=model.alphas_cumprod,
        prediction_type=model.prediction_type,
        num_steps=config.num_steps,
        guidance_scale=config.guidance_scale,
    )
    vae = torch.nn.Module.to(copy.deepcopy(model.vae), dtype)
    with torch.no_grad():
        return decode_latents(diffusers_loop(task, dtype)(), vae).images[0]


def lines(editor_for: Callable[[str], Editor], photo: Image.Image, target: str, seeds: int) -> Iterator[dict[str, Any]]:
    """One line a path and figure."""
    reference = editor_for("reference")
    session = reference.tune(photo)
    default = reference.defaults.edit
    grid = [dataclasses.replace(default, strategy=name, seed=seed) for name in STRATEGIES for seed in range(seeds)]
    truth, plain = [], {name: [] for name in NUMERICS if name.startswith("fast")}
    for config in grid:
        truth.append(session.edit(target, config))
        for name, pictures in plain.items():  # while the reference's UNet holds this strategy's weights
            pictures.append(half_precision(session, target, config, NUMERICS[name]))
    for name in ("exact", *plain):
        editor = editor_for(name)
        own = dataclasses.replace(session, editor=editor, prompts={})
        made = list(editor.edits(own, target, grid))
        gaps = [
            ((edit.latents - right.latents).norm() / right.latents.norm()).item()
            for edit, right in zip(made, truth, strict=True)
        ]
        line = dict(op="equality", backend=name, dtype=str(NUMERICS[name])[6:], edits=len(grid), latents=max(gaps))
        if name == "exact":
            yield line | dict(allowed=EXACT, met=max(gaps) <= EXACT)
            continue
        for figure, metric in (("psnr", psnr), ("ssim", ssim)):
            pairs = zip(made, plain[name], truth, strict=True)
            values = [(metric(edit.image, right.image), metric(half, right.image)) for edit, half, right in pairs]
            line |= {figure: mean(ours for ours, _ in values), f"plain_{figure}": mean(theirs for _, theirs in values)}
        yield line | dict(allowed=line["plain_psnr"] - WORSE, met=line["psnr"] >= line["plain_psnr"] - WORSE)


def main() -> None:
    parser = parser_of(__doc__, "equality")
    parser.add_argument("--seeds", type=int, default=4)
    args = parse(parser)
    subject = subjects.bundled(args.device)

    def editor_for(numerics: str) -> Editor:
        return Editor.from_pretrained("bundled", device=args.device, numerics=numerics)

    made = lines(editor_for, subject.photo, subject.target, args.seeds)
    write_lines("equality", made, subject.device, args, "not equal enough")


if __name__ == "__main__":
    main()
