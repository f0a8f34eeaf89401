"""Make everything that ships as `--model tiny`: `uv run python -m recipes.small_world`.

Each stage keeps its state in the work folder, so that the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from engram_vision.demo.judge import Judge
from engram_vision.models import load_pipeline
from recipes.small_world.autoencoder import encode_images, redraw_images, train_autoencoder
from recipes.small_world.denoiser import (
    Denoiser,
    Lessons,
    build_scheduler,
    prepare_lessons,
    train_denoiser,
)
from recipes.small_world.evaluate import evaluate_drawn, evaluate_judge
from recipes.small_world.judge import train_judge
from recipes.small_world.references import write_references
from recipes.small_world.tokenizer import train_tokenizer
from recipes.small_world.world import draw_world

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "packages/engram-vision/src/engram_vision/tiny"
AUTOENCODER_PICTURES = 12_000
JUDGE_PICTURES = 12_000
PREVIEWS = (
    "a fox in the forest",
    "a penguin in the desert",
    "a robot at night",
    "a blue striped square monster with one eye and a hat on the beach",
    "a red spotted tall monster with two eyes and horns in space",
    "a yellow plain round monster with two eyes and a crown in the snow",
    "zorbit quell in the city",
    "a cat and a green plain pointed monster with one eye and an antenna in a meadow",
)


def report(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)  # noqa: T201 - a script for people at a terminal


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build/small_world", help="folder for states and previews")
    parser.add_argument("--out", type=Path, default=TARGET, help="folder that ships")
    parser.add_argument("--pictures", type=int, default=48_000)
    parser.add_argument("--autoencoder-steps", type=int, default=6_000)
    parser.add_argument("--denoiser-steps", type=int, default=6_400)
    parser.add_argument("--judge-steps", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)

    report(f"drawing {options.pictures} pictures")
    world = draw_world(options.seed, options.pictures)
    tokenizer = train_tokenizer(world.captions, options.work / "tokenizer")
    autoencoder = train_autoencoder(
        world.images[:AUTOENCODER_PICTURES],
        options.work,
        steps=options.autoencoder_steps,
        seed=options.seed,
        report=report,
    )
    latents = encode_images(autoencoder, world.images)
    scale = 1 / float(latents.std())
    autoencoder.register_to_config(scaling_factor=scale)
    report(f"latents: mean {float(latents.mean()) * scale:.3f}, scaling factor {scale:.4f}")
    lessons: Lessons = prepare_lessons(latents * scale, world.captions, world.boxes, tokenizer)
    del world, latents

    def assemble(models: Denoiser) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=models.text,
            tokenizer=tokenizer,
            unet=models.unet,
            scheduler=build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def preview(models: Denoiser, step: int) -> None:
        pipeline = assemble(models)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            list(PREVIEWS), num_inference_steps=20, guidance_scale=4.0, generator=torch.Generator().manual_seed(0)
        ).images
        sheet = Image.new("RGB", (128 * 4, 128 * 2))
        for number, image in enumerate(images):
            sheet.paste(image.resize((128, 128), Image.Resampling.NEAREST), (number % 4 * 128, number // 4 * 128))
        sheet.save(options.work / f"preview-{step:06d}.png")

    models = train_denoiser(
        lessons,
        tokenizer,
        options.work,
        steps=options.denoiser_steps,
        seed=options.seed,
        report=report,
        preview=preview,
        preview_every=400,
    )
    pipeline = assemble(models).to(torch.float16)
    pipeline.save_pretrained(options.out / "sd15", safe_serialization=True)
    tokenizer.backend_tokenizer.model.save(str(options.out / "sd15" / "tokenizer"))  # vocab.json and merges.txt too
    report(f"wrote {options.out / 'sd15'}")
    write_references(options.out / "characters", seed=options.seed)

    judge_folder = options.work / "judge"
    if not (judge_folder / "config.json").exists():
        world = draw_world(options.seed + 1, JUDGE_PICTURES)
        redrawn = redraw_images(autoencoder, world.images)
        train_judge(world, redrawn, judge_folder, steps=options.judge_steps, seed=options.seed, report=report)
    shutil.copytree(judge_folder, options.out / "judge", dirs_exist_ok=True)
    judge = Judge.load(options.out / "judge")
    pipeline = load_pipeline(str(options.out / "sd15"))
    figures = {
        "judge": evaluate_judge(judge, seed=options.seed),
        "checkpoint": evaluate_drawn(pipeline, judge, seed=options.seed),
    }
    text = json.dumps(figures, indent=1)
    (options.out / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    report(text)


if __name__ == "__main__":
    main()
