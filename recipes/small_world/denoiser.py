"""The tiny text encoder and U-Net, trained together on latents of the small world."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from recipes.small_world.tokenizer import MAX_LENGTH
from recipes.small_world.world import SIZE, Box
from recipes.training import Report, Weights, fit

BATCH = 64
PEAK_RATE = 1.2e-3
EMPTY_CAPTIONS = 0.1
SUBJECT_WEIGHT = 2.25


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Denoiser:
    """What is trained: the two models that turn captions and noise into latents."""

    text: CLIPTextModel
    unet: UNet2DConditionModel

    def modules(self) -> dict[str, nn.Module]:
        """Return the models by name."""
        return {"text": self.text, "unet": self.unet}

    def load(self, weights: Weights) -> Denoiser:
        """Take over weights by the models' names; returns itself, ready to draw."""
        for name, module in self.modules().items():
            module.load_state_dict(dict(weights[name]))
            module.eval()
        return self


def build_denoiser(tokenizer: CLIPTokenizer) -> Denoiser:
    """Return both models, untrained: 1.2 and 7.3 million parameters."""
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=192,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96, 160),
        layers_per_block=1,
        attention_head_dim=4,  # diffusers' name for the number of heads
        norm_num_groups=16,
        cross_attention_dim=192,
    )
    return Denoiser(text=text, unet=unet)


def build_scheduler() -> DDIMScheduler:
    """Return the noise schedule: SD1.5's, stretched to end in pure noise, so that nights can be dark."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Lessons:
    """The training set, ready for the denoiser.

    Attributes:
        latents: float32 [N, 4, 16, 16], scaled to a standard deviation of 1.
        ids: int64 [N, 32], the captions' tokens, padded.
        weights: float32 [N, 16, 16], the loss weight of each latent pixel, mean 1.
    """

    latents: Tensor
    ids: Tensor
    weights: Tensor


def prepare_lessons(
    latents: Tensor, captions: Sequence[str], boxes: Sequence[Sequence[Box]], tokenizer: CLIPTokenizer
) -> Lessons:
    """Return the training set for scaled latents with their captions and the boxes of their subjects."""
    side = latents.shape[-1]
    scale = SIZE // side
    weights: npt.NDArray[np.float32] = np.ones((len(latents), side, side), np.float32)
    for weight, places in zip(weights, boxes, strict=True):
        for left, top, right, bottom in places:
            weight[top // scale : -(-bottom // scale), left // scale : -(-right // scale)] = SUBJECT_WEIGHT
    weights /= weights.mean(axis=(1, 2), keepdims=True)
    return Lessons(latents=latents, ids=tokenize(tokenizer, captions), weights=torch.from_numpy(weights))


def tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Return the captions' tokens, int64 [N, 32].

    Raises:
        ValueError: a caption is too long, so that its end would be lost.
    """
    rows = tokenizer(list(captions), padding="max_length")["input_ids"]
    longest = max(map(len, rows))
    if longest > MAX_LENGTH:
        caption = next(text for text, row in zip(captions, rows, strict=True) if len(row) == longest)
        raise ValueError(f"{caption!r} has {longest} tokens, the text encoder reads {MAX_LENGTH}")
    return torch.tensor(rows)


def train_denoiser(
    lessons: Lessons,
    tokenizer: CLIPTokenizer,
    folder: Path,
    *,
    steps: int,
    seed: int,
    report: Report,
    preview: Callable[[Weights, int], None] | None = None,
) -> Denoiser:
    """Train both models; goes on where an earlier call stopped.

    Args:
        lessons: the training set.
        tokenizer: of the captions.
        folder: for the state.
        steps: in all.
        seed: initial weights, batches and noise.
        report: called with a line now and then.
        preview: called with the averaged weights now and then.
    """
    torch.manual_seed(seed)
    models = build_denoiser(tokenizer)
    noiser = DDPMScheduler.from_config(build_scheduler().config)
    empty = tokenize(tokenizer, [""])[0]

    def loss_of(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(lessons.latents), (BATCH,), generator=rng)
        latents = lessons.latents[rows]
        ids = torch.where(torch.rand(BATCH, 1, generator=rng) < EMPTY_CAPTIONS, empty, lessons.ids[rows])
        noise = torch.randn(latents.shape, generator=rng)
        # One time in each of BATCH equal parts: even coverage makes the loss less noisy than free draws.
        times = ((torch.arange(BATCH) + torch.rand(BATCH, generator=rng)) * (1000 / BATCH)).long()
        with torch.autocast("cpu", torch.bfloat16):
            states = models.text(input_ids=ids).last_hidden_state
            guess = models.unet(noiser.add_noise(latents, noise, times), times, states).sample
        error = (guess.float() - noiser.get_velocity(latents, noise, times)).square()
        loss: Tensor = (error * lessons.weights[rows][:, None]).mean()
        return loss

    return models.load(
        fit(
            "denoiser",
            models.modules(),
            loss_of,
            folder=folder,
            steps=steps,
            peak_rate=PEAK_RATE,
            report=report,
            preview=preview,
        )
    )
