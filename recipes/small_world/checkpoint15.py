"""The tiny Stable Diffusion 1.5 and its judge: from the world to a pipeline in diffusers layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from recipes.small_world.autoencoder import encode_images, redraw_images, train_autoencoder
from recipes.small_world.denoiser import Denoiser, build_denoiser, build_scheduler, prepare_lessons, train_denoiser
from recipes.small_world.judge import train_judge
from recipes.small_world.sheet import save_sheet
from recipes.small_world.tokenizer import train_tokenizer
from recipes.small_world.world import World, draw_world
from recipes.training import Report, Weights

AUTOENCODER_PICTURES = 12_000
JUDGE_PICTURES = 12_000


def make_sd15(
    world: World, work: Path, out: Path, *, autoencoder_steps: int, denoiser_steps: int, seed: int, report: Report
) -> None:
    """Train the models and write the pipeline to `out`/sd15; goes on where an earlier call stopped.

    Args:
        world: the pictures.
        work: folder for states and previews.
        out: folder that ships.
        autoencoder_steps: of the autoencoder.
        denoiser_steps: of text encoder and U-Net together.
        seed: of everything random.
        report: called with a line now and then.
    """
    tokenizer = train_tokenizer(world.captions, work / "tokenizer")
    autoencoder = train_autoencoder(
        world.images[:AUTOENCODER_PICTURES], work, steps=autoencoder_steps, seed=seed, report=report
    )
    latents = encode_images(autoencoder, world.images)
    scale = 1 / float(latents.std())
    autoencoder.register_to_config(scaling_factor=scale)
    report(f"latents: mean {float(latents.mean()) * scale:.3f}, scaling factor {scale:.4f}")
    lessons = prepare_lessons(latents * scale, world.captions, world.boxes, tokenizer)

    def preview(weights: Weights, step: int) -> None:
        models = build_denoiser(tokenizer).load(weights)
        save_sheet(_assemble(models, tokenizer, autoencoder), work / f"preview-{step:06d}.png")

    models = train_denoiser(lessons, tokenizer, work, steps=denoiser_steps, seed=seed, report=report, preview=preview)
    pipeline = _assemble(models, tokenizer, autoencoder).to(torch.float16)
    pipeline.save_pretrained(out / "sd15", safe_serialization=True)
    tokenizer.backend_tokenizer.model.save(str(out / "sd15" / "tokenizer"))  # vocab.json and merges.txt too
    report(f"wrote {out / 'sd15'}")


def make_judge(work: Path, out: Path, *, steps: int, seed: int, report: Report) -> None:
    """Train the judge on another world, seen through the finished autoencoder, and write it to `out`/judge.

    Args:
        work: folder for the finished judge, which is not trained again.
        out: folder that ships, with `sd15` in it.
        steps: of each classifier.
        seed: of everything random.
        report: called with a line now and then.
    """
    if not (work / "judge" / "config.json").exists():
        world = draw_world(seed + 1, JUDGE_PICTURES)
        autoencoder = AutoencoderKL.from_pretrained(out / "sd15", subfolder="vae", torch_dtype=torch.float32)
        redrawn = redraw_images(autoencoder, world.images)
        train_judge(world, redrawn, work / "judge", steps=steps, seed=seed, report=report)
    shutil.copytree(work / "judge", out / "judge", dirs_exist_ok=True)


def _assemble(models: Denoiser, tokenizer: CLIPTokenizer, autoencoder: AutoencoderKL) -> StableDiffusionPipeline:
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
