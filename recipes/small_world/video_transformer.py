"""The tiny Wan 2.2: a text encoder and a video transformer, trained together by rectified flow.

One transformer turns text into clips and a picture into clips, as that of Wan2.2-TI2V-5B does: every token has a time
of its own, and when a picture is given, the tokens of the first latent frame show it at time 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from recipes.small_world.denoiser import EMPTY_CAPTIONS, SUBJECT_WEIGHT
from recipes.small_world.motion import Clip
from recipes.small_world.unigram import vary_case
from recipes.small_world.video_autoencoder import CHANNELS, LATENT_FRAMES, SPATIAL
from recipes.small_world.world import SIZE
from recipes.training import Report, Weights, fit

MAX_LENGTH = 64
"""Tokens of a prompt: the longest captions of two subjects and their motion have 50."""

BATCHES: Mapping[int, int] = {1: 48, 5: 10, 9: 5}
"""Latent frames to samples of a step, so that steps cost the same."""

STILLS = 0.45
"""Of the steps, the share that sees single frames, which cost little: looks are learned first."""

_LENGTHS = (5, 9, 5, 1)  # then lengths take turns

PEAK_RATE = 1.2e-3
WITH_PICTURE, VEILED = 0.5, 0.5
"""Share of the clips whose first frame is given, and of these, of captions that leave it to the frame who is there."""

SHIFT = 2.0
"""How far times lean towards noise, in training and in sampling.

The real model has 5 at 704 x 1280: the more pixels say the same, the more noise it takes to hide it
(arXiv:2403.03206, section 5.3.2). Clips of 64 x 64 are small, but their frames repeat each other, so that 1, as for
the tiny pictures, is too little.
"""

WIDTH, HEADS, BLOCKS = 192, 6, 6
_PATCH = 2  # the real pipelines count tokens so
_TIMES = 1000
# The real pipelines pad every prompt with zeros to 512 states. Some steps do so too, so that it does not matter how
# many there are; the others are cheaper.
_PADDED, _PADDED_STEPS, _TURN = 512, (5, 12), 16
# In bfloat16 on a CPU, fused attention over a short sequence takes as long as all the rest on its way back.
_PLAIN, _FUSED = [SDPBackend.MATH], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VideoModels:
    """What is trained."""

    text: UMT5EncoderModel
    transformer: WanTransformer3DModel

    def modules(self) -> dict[str, nn.Module]:
        """Return the models by name."""
        return {"text": self.text, "transformer": self.transformer}

    def load(self, weights: Weights) -> VideoModels:
        """Take over weights by the models' names; returns itself, ready to draw."""
        for name, module in self.modules().items():
            module.load_state_dict(dict(weights[name]))
            module.eval()
        return self


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VideoLessons:
    """Clips of one length, ready for the transformer.

    Attributes:
        latents: float16 [N, 8, T, 16, 16], shifted and scaled as the pipelines do.
        shown: bool [N, T, 16, 16], where subjects are.
        ids: int64 [N, 64], the captions' tokens, padded.
        veiled: the same of captions that tell nothing of a subject's looks.
    """

    latents: Tensor
    shown: Tensor
    ids: Tensor
    veiled: Tensor

    @classmethod
    def join(cls, parts: Sequence[VideoLessons]) -> VideoLessons:
        """Return the lessons of several parts as one."""
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in cls.__slots__})


def build_video_models(tokenizer: T5Tokenizer) -> VideoModels:
    """Return both models, untrained: 1.3 and 3.9 million parameters."""
    text = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=32,
            d_ff=384,
            num_layers=3,
            num_heads=HEADS,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
        )
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, _PATCH, _PATCH),
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=128,
        ffn_dim=4 * WIDTH,
        num_layers=BLOCKS,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    _begin_as_identity(transformer)
    return VideoModels(text=text, transformer=transformer)


def build_video_flow() -> UniPCMultistepScheduler:
    """Return the sampler: that of the real model but for the shift."""
    return UniPCMultistepScheduler(
        num_train_timesteps=_TIMES, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )


def mark_subjects(clips: Sequence[Clip]) -> Tensor:
    """Return where subjects are in the latents of clips, bool [N, T, 16, 16].

    A latent frame stands for two frames, the first for one; a place counts when a subject is there in any of them.
    """
    side = SIZE // SPATIAL
    marks: npt.NDArray[np.bool_] = np.zeros((len(clips), _latent(len(clips[0].frames) - 1) + 1, side, side), np.bool_)
    for mark, clip in zip(marks, clips, strict=True):
        for frame, boxes in enumerate(clip.boxes):
            for left, top, right, bottom in boxes:
                rows = slice(top // SPATIAL, -(-bottom // SPATIAL))
                columns = slice(left // SPATIAL, -(-right // SPATIAL))
                mark[_latent(frame), rows, columns] = True
    return torch.from_numpy(marks)


def tokenize_captions(tokenizer: T5Tokenizer, captions: Sequence[str], seed: int) -> Tensor:
    """Return the captions' tokens, int64 [N, 64]; where capitals make one too long, it stays as it was.

    Raises:
        ValueError: a caption is too long even so, and its end would be lost.
    """
    rows = tokenizer(vary_case(captions, seed), padding="max_length", max_length=MAX_LENGTH)["input_ids"]
    plain = tokenizer(list(captions), padding="max_length", max_length=MAX_LENGTH)["input_ids"]
    for caption, row in zip(captions, plain, strict=True):
        if len(row) > MAX_LENGTH:
            raise ValueError(f"{caption!r} has {len(row)} tokens, the checkpoint is made for {MAX_LENGTH}")
    return torch.tensor([row if len(row) == MAX_LENGTH else other for row, other in zip(rows, plain, strict=True)])


def train_video_transformer(
    models: VideoModels,
    lessons: Mapping[int, VideoLessons],
    tokenizer: T5Tokenizer,
    folder: Path,
    *,
    steps: int,
    seed: int,
    report: Report,
    stills: float = STILLS,
    preview: Callable[[Weights, int], None] | None = None,
    compiled: bool = False,
) -> VideoModels:
    """Train both models; goes on where an earlier call stopped.

    Args:
        models: what to train.
        lessons: by the number of latent frames, those of `BATCHES`.
        tokenizer: of the captions.
        folder: for the state.
        steps: in all.
        seed: batches and noise.
        report: called with a line now and then.
        stills: of the steps, the share that comes first and sees single frames.
        preview: called with the averaged weights now and then.
        compiled: compile the transformer for single frames, which makes their steps 1.5 times as fast, and no clips'.
    """
    of_stills: Any = torch.compile(models.transformer, dynamic=False) if compiled else models.transformer
    empty = tokenize_captions(tokenizer, [""], seed)[0]

    def loss_of(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        frames = 1 if step < stills * steps else _LENGTHS[step % len(_LENGTHS)]
        lesson, count = lessons[frames], BATCHES[frames]
        rows = torch.randint(len(lesson.latents), (count,), generator=rng)
        latents = lesson.latents[rows].float()
        given = torch.rand(count, generator=rng) < (WITH_PICTURE if frames > 1 else 0)
        veiled = given & (torch.rand(count, generator=rng) < VEILED)
        ids = torch.where(veiled[:, None], lesson.veiled[rows], lesson.ids[rows])
        ids = torch.where(torch.rand(count, 1, generator=rng) < EMPTY_CAPTIONS, empty, ids)
        noise = torch.randn(latents.shape, generator=rng)
        times = draw_times(count, rng)
        noisy = torch.lerp(latents, noise, times[:, None, None, None, None])
        noisy[given, :, 0] = latents[given, :, 0]
        length = _PADDED if frames > 1 and step % _TURN in _PADDED_STEPS else MAX_LENGTH
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(_FUSED if frames > 1 else _PLAIN):
            states = encode_captions(models.text, ids, length)
            guess = guess_motion(of_stills if frames == 1 else models.transformer, noisy, times, given, states)
        error = (guess.float() - (noise - latents)).square().mean(1)
        weights = 1 + (SUBJECT_WEIGHT - 1) * lesson.shown[rows].float()
        weights[given, 0] = 0  # nothing to guess in a frame that is given
        return (error * weights).sum() / weights.sum()

    return models.load(
        fit(
            "video_transformer",
            models.modules(),
            loss_of,
            folder=folder,
            steps=steps,
            peak_rate=PEAK_RATE,
            decay=0.999,
            save_every=100,
            report=report,
            preview=preview,
            preview_every=500,
        )
    )


def draw_times(count: int, rng: torch.Generator) -> Tensor:
    """Return shares of noise [N]: logit-normal, one in each of N equally likely parts, and shifted."""
    shares = (torch.arange(count) + torch.rand(count, generator=rng)) / count
    times: Tensor = torch.special.ndtri(shares.clamp(1e-4, 1 - 1e-4)).sigmoid()
    times = SHIFT * times / (1 + (SHIFT - 1) * times)
    return times[torch.randperm(count, generator=rng)]


def encode_captions(text: UMT5EncoderModel, ids: Tensor, length: int) -> Tensor:
    """Return the states that the pipelines give the transformer, [B, `length`, 192]: zeros stand for padding.

    Args:
        text: the encoder.
        ids: token ids [B, 64], padded with 0.
        length: how many states.
    """
    mask = ids != 0
    longest = int(mask.sum(1).max())  # padding changes no state before it
    states: Tensor = text(input_ids=ids[:, :longest], attention_mask=mask[:, :longest].long()).last_hidden_state
    states = states * mask[:, :longest, None]
    padded: Tensor = nn.functional.pad(states, (0, 0, 0, length - longest))
    return padded


def guess_motion(
    transformer: WanTransformer3DModel, noisy: Tensor, times: Tensor, given: Tensor, states: Tensor
) -> Tensor:
    """Return the velocity [B, 8, T, 16, 16].

    Args:
        transformer: which guesses.
        noisy: latents [B, 8, T, 16, 16]; where the first frame is given, it is clean.
        times: share of noise [B].
        given: whether the first frame is given [B].
        states: of the captions [B, L, 192].
    """
    frames, tokens = noisy.shape[2], noisy.shape[3] * noisy.shape[4] // _PATCH**2
    every = (times * _TIMES)[:, None].repeat(1, frames)
    every[given, 0] = 0
    guess: Tensor = transformer(
        hidden_states=noisy, timestep=every.repeat_interleave(tokens, dim=1), encoder_hidden_states=states
    ).sample
    return guess


def _latent(frame: int) -> int:
    """Return which latent frame shows a frame."""
    return -(-frame // LATENT_FRAMES)


def _begin_as_identity(transformer: WanTransformer3DModel) -> None:
    """Let every block begin as the identity (adaLN-Zero, arXiv:2212.09748): its gates and outputs are 0."""
    with torch.no_grad():
        nn.init.zeros_(transformer.condition_embedder.time_proj.weight)
        nn.init.zeros_(transformer.condition_embedder.time_proj.bias)
        nn.init.zeros_(transformer.proj_out.weight)
        nn.init.zeros_(transformer.proj_out.bias)
        for block in transformer.blocks:
            nn.init.zeros_(block.scale_shift_table)
            nn.init.zeros_(block.attn2.to_out[0].weight)
            nn.init.zeros_(block.attn2.to_out[0].bias)
