"""Training the judge of clips: what a single frame shows, wherever the subject is, and what motion a clip shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from transformers import ResNetConfig, ResNetForImageClassification

from engram_video.demo.motions import LOOKS, MOTION_PHRASES, look_at
from recipes.small_world.judge import train_judge
from recipes.small_world.motion import Clip, draw_clips, pick_frames
from recipes.small_world.video_autoencoder import redraw_clips
from recipes.small_world.world import Box, World
from recipes.state import cosine
from recipes.training import Report

REGIONS: Mapping[str, Box] = {"alone": (0, 0, 64, 64), "left": (0, 12, 40, 64), "right": (24, 12, 64, 64)}
"""Where the judge of frames looks for a subject: everywhere, or where one of two can go."""

MOTIONS = tuple(MOTION_PHRASES)

_CLIPS, _WINDOWS = 3_000, ((0, 1, 2, 3, 4), (4, 5, 6, 7, 8), (8, 9, 10, 11, 12), (12, 13, 14, 15, 16))
_MOVING = 3_000
_BATCH, _PEAK_RATE, _MOTION_STEPS = 64, 2e-3, 500


def train_clip_judge(autoencoder: AutoencoderKLWan, folder: Path, *, steps: int, seed: int, report: Report) -> None:
    """Train all classifiers and write them to a folder: for `Judge`, and within it `motion` for `MotionJudge`.

    Args:
        autoencoder: half of what the judge learns from has gone through it and back.
        folder: where to write.
        steps: of each classifier of frames.
        seed: initial weights and batches.
        report: called with a line now and then.
    """
    model = train_motions(seed, report)
    clips = [
        clip
        for number, window in enumerate(_WINDOWS)
        for clip in draw_clips(seed + 1, range(number * _CLIPS, (number + 1) * _CLIPS), window)
    ]
    redrawn = redraw_clips(autoencoder, np.stack([clip.frames for clip in clips])).reshape(-1, 64, 64, 3)
    train_judge(spread_frames(clips), redrawn, folder, steps=steps, seed=seed, report=report, regions=REGIONS)
    model.half().save_pretrained(folder / "motion")


def train_motions(seed: int, report: Report) -> ResNetForImageClassification:
    """Return a classifier of motions, trained on drawn clips and their mirror images."""
    torch.manual_seed(seed)
    drawn = [clip for clip in draw_clips(seed + 2, range(_MOVING), pick_frames(LOOKS)) if clip.plan.subjects]
    looks = np.stack([look_at(clip.frames) for clip in drawn])
    labels = np.array([MOTIONS.index(clip.plan.motion) for clip in drawn])
    mirror = np.array([MOTIONS.index({"left": "right", "right": "left"}.get(name, name)) for name in MOTIONS])
    model = build_motion_classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), _PEAK_RATE, weight_decay=1e-2)
    total = 0.0
    for step in range(_MOTION_STEPS):
        rng = np.random.default_rng([seed, step])
        rows = rng.integers(len(looks), size=_BATCH)
        batch, wanted = looks[rows], labels[rows]
        if step % 2:
            batch, wanted = batch[..., ::-1].copy(), mirror[wanted]
        noise = torch.from_numpy(rng.normal(0, 0.05, batch.shape).astype(np.float32)) * float(rng.random())
        optimizer.param_groups[0]["lr"] = cosine(step, _MOTION_STEPS, peak=_PEAK_RATE, warm_up=50)
        loss = torch.nn.functional.cross_entropy(
            model(torch.from_numpy(batch).div(127.5).sub(1) + noise).logits, torch.from_numpy(wanted)
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        total += float(loss.detach())
        if (step + 1) % 100 == 0:
            report(f"judge of motions {step + 1}/{_MOTION_STEPS}: loss {total / 100:.4f}")
            total = 0.0
    return model.eval()


def build_motion_classifier() -> ResNetForImageClassification:
    """Return an untrained classifier of 0.07 million parameters."""
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=LOOKS,
            embedding_size=16,
            hidden_sizes=[16, 24, 32, 48],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            num_labels=len(MOTIONS),
            id2label=dict(enumerate(MOTIONS)),
            label2id={name: number for number, name in enumerate(MOTIONS)},
        )
    )


def spread_frames(clips: Sequence[Clip]) -> World:
    """Return every frame of clips as a picture of its own; they share captions and subjects."""
    count = len(clips[0].frames)
    plans = [clip.plan for clip in clips for _ in range(count)]
    return World(
        images=np.concatenate([clip.frames for clip in clips]),
        captions=[plan.caption for plan in plans],
        scenes=[plan.scene for plan in plans],
        subjects=[plan.subjects for plan in plans],
        boxes=[boxes for clip in clips for boxes in clip.boxes],
    )
