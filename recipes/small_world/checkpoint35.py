"""The tiny Stable Diffusion 3.5: from the world's captions and pictures to a pipeline in diffusers layout."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from transformers import CLIPTextModel

from recipes.small_world.autoencoder import encode_images
from recipes.small_world.denoiser import prepare_lessons
from recipes.small_world.sheet import save_sheet
from recipes.small_world.transformer import Models, Readers, build_flow, build_models, build_readers, train_transformer
from recipes.small_world.unigram import MAX_LENGTH
from recipes.small_world.world import World
from recipes.training import Report, Weights


def make_sd35(world: World, work: Path, out: Path, *, steps: int, seed: int, report: Report) -> None:
    """Train the models and write the pipeline to `out`/sd35; goes on where an earlier call stopped.

    Tokenizer, autoencoder and first text encoder are those of `out`/sd15.

    Args:
        world: the pictures.
        work: folder for states and previews.
        out: folder that ships.
        steps: of the transformer.
        seed: of everything random.
        report: called with a line now and then.
    """
    torch.manual_seed(seed)
    before = out / "sd15"
    text = CLIPTextModel.from_pretrained(before, subfolder="text_encoder", torch_dtype=torch.float32)
    autoencoder = AutoencoderKL.from_pretrained(before, subfolder="vae", torch_dtype=torch.float32)
    readers = build_readers(before / "tokenizer", world.captions, work / "tokenizer_3", seed)
    latents = encode_images(autoencoder, world.images)
    shift, scale = float(latents.mean()), 1 / float(latents.std())
    autoencoder = _rescale(autoencoder, shift, scale)
    report(f"latents: shift {shift:.4f}, scaling factor {scale:.4f}")
    lessons = prepare_lessons((latents - shift) * scale, world.captions, world.boxes, readers.first)
    models = build_models(readers, text)

    def preview(weights: Weights, step: int) -> None:
        pipeline = assemble(build_models(readers, text).load(weights), readers, autoencoder)
        save_sheet(pipeline, work / f"preview35-{step:06d}.png", max_sequence_length=MAX_LENGTH)

    train_transformer(
        models, lessons, world.captions, readers, work, steps=steps, seed=seed, report=report, preview=preview
    )
    pipeline = assemble(models, readers, autoencoder).to(torch.float16)
    pipeline.save_pretrained(out / "sd35", safe_serialization=True)
    for name, tokenizer in (("tokenizer", readers.first), ("tokenizer_2", readers.second)):
        tokenizer.backend_tokenizer.model.save(str(out / "sd35" / name))  # vocab.json and merges.txt too
    report(f"wrote {out / 'sd35'}")


def assemble(models: Models, readers: Readers, autoencoder: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Return the models as a pipeline."""
    return StableDiffusion3Pipeline(
        transformer=models.transformer,
        scheduler=build_flow(),
        vae=autoencoder,
        text_encoder=models.clip_l,
        tokenizer=readers.first,
        text_encoder_2=models.clip_g,
        tokenizer_2=readers.second,
        text_encoder_3=models.t5,
        tokenizer_3=readers.third,
    )


def _rescale(autoencoder: AutoencoderKL, shift: float, scale: float) -> AutoencoderKL:
    """Return the same autoencoder with another shift and scale of its latents."""
    # Not by changing its configuration, which tells the folder that it came from: that means nothing elsewhere.
    config = {name: value for name, value in autoencoder.config.items() if not name.startswith("_")}
    rescaled = AutoencoderKL(**config | {"scaling_factor": scale, "shift_factor": shift})
    rescaled.load_state_dict(autoencoder.state_dict())
    return rescaled
