"""Train the bundled model from nothing: `python -m bench.world.train PART`, the parts in this order:

pool       render the training scenes
vae        the autoencoder
latents    standardise its latents and encode the pool once
diffusion  UNet and text encoder together
judge      the classifier that counts successes (after latents: it also sees round trips)
captioner  the small BLIP
clip       the scorer (after export: it takes the model's tokenizer, and starts from its captioner; export it again)
export     write everything as a model folder (float16)
restore    the way back: a model folder's weights as a start for latents, diffusion, captioner (--init)

Each training part writes a log (JSON lines) and a checkpoint under --folder and goes on from it when called again.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from bench.world import captioner, clip, diffusion, export, judge, pool, vae
from bench.world.loop import Plan, launch

HOME = Path.home() / ".cache" / "forgedit-train"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("pool", "vae", "latents", "diffusion", "judge", "captioner", "clip", "export", "restore")
    parser.add_argument("part", choices=parts)
    parser.add_argument("--folder", type=Path, default=HOME, help="checkpoints, logs and rendered scenes")
    parser.add_argument("--steps", type=int, help="planned steps; the rate falls to zero over them")
    parser.add_argument("--batch", type=int, help="samples a worker and step")
    parser.add_argument("--rate", type=float, help="highest learning rate")
    parser.add_argument("--workers", type=int, default=2, help="single-thread processes; 1 on a GPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--init", default="", help="checkpoint whose averaged weights to start from")
    parser.add_argument("--out", type=Path, help="model folder to export to (clip: to start from)")
    args = parser.parse_args()
    data, latents = args.folder / "pool", args.folder / "latents.pt"
    shared = {"folder": args.folder, "workers": args.workers, "device": args.device, "init": args.init}
    if args.part == "pool":
        pool.build(data, args.scenes, workers=args.workers)
    elif args.part == "vae":
        plan = Plan("vae", steps=args.steps or 2400, batch=args.batch or 8, rate=args.rate or 2.5e-3, **shared)
        launch(plan, partial(vae.build, data=data))
    elif args.part == "latents":
        if (args.folder / "vae.pt").exists():
            vae.finish(args.folder / "vae.pt", data, args.folder / "vae_final.pt")
        diffusion.cache_latents(args.folder / "vae_final.pt", data, latents, args.device, args.workers)
    elif args.part == "diffusion":
        plan = Plan("diffusion", steps=args.steps or 5000, batch=args.batch or 24, rate=args.rate or 1e-3, **shared)
        launch(plan, partial(diffusion.build, latents=latents))
    elif args.part == "judge":
        judged = {**shared, "folder": args.folder / "judge"}
        plan = Plan("judge", steps=args.steps or 1500, batch=args.batch or 32, rate=args.rate or 2e-3, **judged)
        finished = args.folder / "vae_final.pt"
        launch(plan, partial(judge.build, data=data, vae=finished if finished.exists() else None))
        judge.export(plan.folder / "judge.pt")
    elif args.part == "captioner":
        captioned = {**shared, "folder": args.folder / "captioner"}
        plan = Plan(
            "captioner", steps=args.steps or 2500, batch=args.batch or 16, rate=args.rate or 1.2e-3, **captioned
        )
        launch(plan, partial(captioner.build, data=data))
        captioner.export(plan.folder / "captioner.pt", plan.folder / "model")
    elif args.part == "clip":
        contrasted = {**shared, "folder": args.folder / "clip"}
        plan = Plan("clip", steps=args.steps or 2600, batch=args.batch or 64, rate=args.rate or 1e-3, **contrasted)
        model = args.out or export.BUNDLED
        launch(plan, partial(clip.build, data=data, vae=args.folder / "vae_final.pt", model=model))
        clip.export(plan.folder / "clip.pt", model / "tokenizer", plan.folder / "model")
    elif args.part == "restore":
        export.restore(args.out or export.BUNDLED, args.folder)
    else:
        export.export(args.folder, args.out or export.BUNDLED)


if __name__ == "__main__":
    main()
