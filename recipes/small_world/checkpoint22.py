"""The tiny Wan 2.2 and its judge: from clips of the small world to a pipeline in diffusers layout."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Tokenizer

from recipes.small_world.clip_judge import train_clip_judge
from recipes.small_world.clip_sheet import save_clip_sheet
from recipes.small_world.motion import FRAMES, SHORT, draw_clips, pick_frames, plan_clip
from recipes.small_world.unigram import train_unigram, vary_case
from recipes.small_world.video_autoencoder import (
    draw_films,
    encode_clips,
    measure_latents,
    train_video_autoencoder,
)
from recipes.small_world.video_transformer import (
    MAX_LENGTH,
    STILLS,
    VideoLessons,
    VideoModels,
    build_video_flow,
    build_video_models,
    mark_subjects,
    tokenize_captions,
    train_video_transformer,
)
from recipes.training import Report, Weights

FILMS = 3_000
"""Clips that the autoencoder learns from."""

MEASURED = 256
"""Clips that tell mean and deviation of the latents."""

ALONE = (0, 5, 11, 16)
"""Frames of a clip that are shown alone, each of twice as many clips."""

CAPTIONS = 33_000
"""Captions that the tokenizer learns from."""

_PART = 1_000
_AT_ONCE = 64


def make_wan22(
    work: Path,
    out: Path,
    *,
    clips: int,
    autoencoder_steps: int,
    transformer_steps: int,
    seed: int,
    report: Report,
    stills: float = STILLS,
    compiled: bool = False,
    learn_on: bool = False,
) -> None:
    """Train the models and write the pipeline to `out`/wan22; goes on where an earlier call stopped.

    Args:
        work: folder for states, latents and previews.
        out: folder that ships.
        clips: of 9 frames, for the transformer; half as many of 17, and eight times as many stills.
        autoencoder_steps: of the autoencoder.
        transformer_steps: of text encoder and transformer together.
        seed: of everything random.
        report: called with a line now and then.
        stills: of these steps, the share that comes first and sees single frames.
        compiled: compile the transformer for stills.
        learn_on: begin with the pipeline that is in `out`, of which text encoder and transformer learn on.
    """
    if learn_on:
        earlier = WanPipeline.from_pretrained(out / "wan22", torch_dtype=torch.float32)
        autoencoder, tokenizer = earlier.vae, earlier.tokenizer
    else:
        autoencoder = _make_autoencoder(work, steps=autoencoder_steps, seed=seed, report=report)
        tokenizer = train_unigram(_write_captions(seed, range(CAPTIONS), vary=True), work / "tokenizer_22")
        tokenizer.model_max_length = MAX_LENGTH
    alone = [([frame], clips) for frame in ALONE]
    shown = [*alone, (pick_frames(SHORT), clips), (pick_frames(FRAMES), clips // 2), *alone]
    parts: dict[int, list[VideoLessons]] = {}
    first = 0
    for frames, count in shown:
        indices = range(first, first + count)
        part = _prepare_lessons(autoencoder, tokenizer, seed, indices, frames, work / "lessons22", report)
        parts.setdefault(part.latents.shape[2], []).append(part)
        first += count
    lessons = {length: VideoLessons.join(each) for length, each in parts.items()}
    torch.manual_seed(seed)
    models = build_video_models(tokenizer)
    if learn_on:
        models.load({"text": earlier.text_encoder.state_dict(), "transformer": earlier.transformer.state_dict()})

    def preview(weights: Weights, step: int) -> None:
        pipeline = assemble(build_video_models(tokenizer).load(weights), tokenizer, autoencoder)
        save_clip_sheet(pipeline, work / f"preview22-{step:06d}.png")

    train_video_transformer(
        models,
        lessons,
        tokenizer,
        work,
        steps=transformer_steps,
        seed=seed,
        report=report,
        stills=stills,
        preview=preview,
        compiled=compiled,
    )
    assemble(models, tokenizer, autoencoder).to(torch.float16).save_pretrained(out / "wan22", safe_serialization=True)
    report(f"wrote {out / 'wan22'}")


def _make_autoencoder(work: Path, *, steps: int, seed: int, report: Report) -> AutoencoderKLWan:
    films = draw_films(seed, FILMS, work / "films.npy")
    autoencoder = train_video_autoencoder(films, work, steps=steps, seed=seed, report=report)
    measure_latents(autoencoder, films[:MEASURED])
    return autoencoder


def make_clip_judge(work: Path, out: Path, *, steps: int, seed: int, report: Report) -> None:
    """Train the judge on other clips, seen through the finished autoencoder, and write it to `out`/judge.

    Args:
        work: folder for the finished judge, which is not trained again.
        out: folder that ships, with `wan22` in it.
        steps: of each classifier.
        seed: of everything random.
        report: called with a line now and then.
    """
    if not (work / "judge22" / "config.json").exists():
        autoencoder = AutoencoderKLWan.from_pretrained(out / "wan22", subfolder="vae", torch_dtype=torch.float32)
        train_clip_judge(autoencoder, work / "judge22", steps=steps, seed=seed, report=report)
    shutil.copytree(work / "judge22", out / "judge", dirs_exist_ok=True)


def assemble(models: VideoModels, tokenizer: T5Tokenizer, autoencoder: AutoencoderKLWan) -> WanPipeline:
    """Return the models as a pipeline, which also is one for pictures as Wan2.2-TI2V-5B's is."""
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=models.text,
        vae=autoencoder,
        scheduler=build_video_flow(),
        transformer=models.transformer,
        expand_timesteps=True,
    )


def _write_captions(seed: int, indices: Sequence[int], *, vary: bool = False) -> list[str]:
    captions = [plan_clip(seed, index).caption for index in indices]
    return vary_case(captions, seed) if vary else captions


def _write_veiled(seed: int, indices: Sequence[int]) -> list[str]:
    return [plan_clip(seed, index).veiled for index in indices]


def _prepare_lessons(
    autoencoder: AutoencoderKLWan,
    tokenizer: T5Tokenizer,
    seed: int,
    indices: Sequence[int],
    frames: Sequence[int],
    folder: Path,
    report: Report,
) -> VideoLessons:
    """Return the lessons of some clips; latents are kept in files of 1,000 clips."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for first in range(0, len(indices), _PART):
        part = indices[first : first + _PART]
        path = folder / f"{len(frames)}-{part[0]:06d}-{len(part)}.safetensors"
        if not path.exists():
            partial = path.with_suffix(".partial")
            save_file(_encode_world(autoencoder, seed, part, frames), partial)
            partial.replace(path)
            report(f"latents of {first + len(part)} of {len(indices)} clips of {len(frames)} frames")
        parts.append(load_file(path))
    latents, shown = (torch.cat([part[name] for part in parts]) for name in ("latents", "shown"))
    ids, veiled = (
        tokenize_captions(tokenizer, write(seed, indices), seed) for write in (_write_captions, _write_veiled)
    )
    return VideoLessons(latents=latents, shown=shown, ids=ids, veiled=veiled)


def _encode_world(
    autoencoder: AutoencoderKLWan, seed: int, indices: Sequence[int], frames: Sequence[int]
) -> dict[str, Tensor]:
    drawn = draw_clips(seed, indices, frames)
    latents, shown = [], []
    while clips := list(islice(drawn, _AT_ONCE)):
        pictures = torch.stack([torch.from_numpy(clip.frames) for clip in clips]).numpy()
        latents.append(encode_clips(autoencoder, pictures).half())
        shown.append(mark_subjects(clips))
    return {"latents": torch.cat(latents), "shown": torch.cat(shown)}
