"""Build the Emoji World from a seed: `python worlds/emoji/build.py --out worlds/emoji/build`.

Stages, each resumable and each leaving its log of seconds and loss:

    vae       autoencoder                        (autoencoder.py)
    text      tokenizer and text encoder         (language.py)
    judges    two judges                         (judges.py)
    denoiser  the U-Net, after `vae` and `text`  (denoiser.py)
    polish    the decoder alone, once more; only where asked for (autoencoder.py)
    finish    everything into src/safelight/world, fp16

`--seconds stage=N` changes a stage's time budget. The denoiser also runs in several processes:
`torchrun --standalone --nproc-per-node 2 worlds/emoji/build.py --stage denoiser --threads 1`.

Needs the extra `[world]` and WordNet (Debian's `wordnet-base`). The drawings are committed;
`art.py` makes them anew from the icon packs.
"""

from __future__ import annotations

import argparse
import json
import os
from datetime import timedelta
from pathlib import Path

import torch

WORLD = Path(__file__).parents[2] / "src" / "safelight" / "world"
SECONDS = {  # what the shipped weights had in their second round
    "vae": 2400.0,
    "text": 2900.0,
    "judge-a": 560.0,
    "judge-b": 1080.0,
    "denoiser": 4420.0,
    "polish": 1500.0,
}
STAGES = ("vae", "text", "judges", "denoiser", "finish")
PICTURES = 72_000


def finish(out: Path, world: Path) -> None:
    """Every stage's averaged weights, fp16: one diffusers folder and two judges."""
    from autoencoder import CHANNELS
    from autoencoder import build as build_vae
    from denoiser import build as build_unet
    from denoiser import scheduler, stage
    from diffusers import StableDiffusionPipeline
    from judges import finish as finish_judge
    from language import Student, build_encoder, train_tokenizer
    from prompts import build as build_prompts

    from safelight.models.export import export
    from safelight.models.load import load

    tokenizer = train_tokenizer(out / "text", [])
    vae = stage(build_vae(), out / "vae", "vae")
    if (out / "polish").exists():
        vae = stage(vae, out / "polish", "vae")
    with torch.no_grad():  # the spread head is not trained: say "almost none"
        vae.quant_conv.weight[CHANNELS:] = 0
        vae.quant_conv.bias[CHANNELS:] = -12.0
    vae.register_to_config(
        scaling_factor=json.loads((out / "denoiser" / "scale.json").read_text())["scaling_factor"]
    )
    student = stage(Student(build_encoder(tokenizer)), out / "text", "student")
    unet = stage(build_unet(), out / "denoiser", "unet")
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=student.encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    export(load(pipeline), [], world / "model")
    about = {
        "name": "emoji-world",
        "sampling": {"steps": 20, "guidance": 3.0, "size": [64, 64]},
        "patches": [],
    }
    (world / "model" / "safelight.json").write_text(json.dumps(about, indent=1) + "\n")
    for which in "ab":
        finish_judge(out / f"judge-{which}", which, world / "judges")
    build_prompts(world / "prompts")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "build")
    stages = (*STAGES, "polish")
    parser.add_argument("--stage", choices=stages, action="append", help="only these; default all")
    parser.add_argument("--seconds", action="append", default=[], metavar="STAGE=N")
    parser.add_argument("--warm-start", type=Path, help="an earlier build to begin from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--world", type=Path, default=WORLD, help="where `finish` writes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo", timeout=timedelta(hours=1))
    budget = SECONDS | {k: float(v) for k, v in (s.split("=") for s in options.seconds)}
    stages = options.stage or STAGES

    if "vae" in stages:
        import autoencoder

        earlier = options.warm_start and options.warm_start / "vae"
        autoencoder.train(options.out / "vae", seconds=budget["vae"], start=earlier)
    if "text" in stages:
        import language

        language.train(options.out / "text", seconds=budget["text"])
        print(language.held_out_report(options.out / "text"))
    if "judges" in stages:
        import judges

        coded = judges.reencode(options.out)
        for which in "ab":
            judges.train(
                options.out / f"judge-{which}", which, seconds=budget[f"judge-{which}"], coded=coded
            )
    if "denoiser" in stages:
        import denoiser

        folders = (options.out / "denoiser", options.out / "vae", options.out / "text")
        earlier = options.warm_start and options.warm_start / "denoiser"
        denoiser.train(*folders, seconds=budget["denoiser"], pictures=PICTURES, start=earlier)
    if "polish" in stages:
        import autoencoder

        folders = (options.out / "polish", options.out / "vae", options.out / "denoiser")
        autoencoder.polish(*folders, seconds=budget["polish"])
    if "finish" in stages:
        finish(options.out, options.world)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    logs = {
        s: json.loads(line)
        for s in ("vae", "text", "judge-a", "judge-b", "denoiser", "polish")
        if (line := _log(options.out / s / "state.safetensors"))
    }
    (options.out / "log.json").write_text(json.dumps(logs))


def _log(path: Path) -> str | None:
    from safetensors import safe_open

    if not path.exists():
        return None
    with safe_open(path, "pt") as f:
        return f.metadata()["log"]


if __name__ == "__main__":
    main()
