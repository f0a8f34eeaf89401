"""The tiny Stable Diffusion 3.5: three text encoders and a joint transformer, trained together by rectified flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from recipes.small_world import unigram
from recipes.small_world.denoiser import EMPTY_CAPTIONS, Lessons, tokenize
from recipes.small_world.tokenizer import MAX_LENGTH
from recipes.small_world.unigram import vary_case
from recipes.training import Report, Weights, fit

BATCH = 64
PEAK_RATE = 1.2e-3
WITHOUT_T5 = 0.15
"""Share of the samples that see no T5 states, so that the pipeline works without that encoder."""

WIDTH, HEADS, BLOCKS = 192, 6, 5
CLIP_L, CLIP_G = 192, 64
_TIMES = 1000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Models:
    """What is trained. `clip_l` begins as the text encoder of the tiny SD1.5, as the real one does."""

    clip_l: CLIPTextModelWithProjection
    clip_g: CLIPTextModelWithProjection
    t5: T5EncoderModel
    transformer: SD3Transformer2DModel

    def modules(self) -> dict[str, nn.Module]:
        """Return the models by name."""
        return {"clip_l": self.clip_l, "clip_g": self.clip_g, "t5": self.t5, "transformer": self.transformer}

    def load(self, weights: Weights) -> Models:
        """Take over weights by the models' names; returns itself, ready to draw."""
        for name, module in self.modules().items():
            module.load_state_dict(dict(weights[name]))
            module.eval()
        return self


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Readers:
    """The tokenizers: `first` and `second` differ in the token that pads, as the real ones do."""

    first: CLIPTokenizer
    second: CLIPTokenizer
    third: T5Tokenizer


def build_readers(folder: Path, captions: Sequence[str], work: Path, seed: int) -> Readers:
    """Return the tokenizers.

    Args:
        folder: with the files of the tiny SD1.5's tokenizer.
        captions: what the third learns its pieces from.
        work: folder for the third's files.
        seed: of the captions' capitals.
    """
    return Readers(
        first=CLIPTokenizer.from_pretrained(folder),
        second=CLIPTokenizer.from_pretrained(folder, pad_token="!"),
        third=unigram.train_unigram(vary_case(captions, seed), work),
    )


def build_models(readers: Readers, text: CLIPTextModel) -> Models:
    """Return the models, untrained but for `clip_l`, which takes over the tiny SD1.5's encoder."""
    clip_l = CLIPTextModelWithProjection(_clip_config(readers.first, CLIP_L, heads=6, hidden=512, layers=3))
    missing, _ = clip_l.load_state_dict(_with_prefix_of(clip_l, text), strict=False)
    if missing != ["text_projection.weight"]:
        raise ValueError(f"the tiny SD1.5's text encoder lacks {missing}")
    clip_g = CLIPTextModelWithProjection(_clip_config(readers.second, CLIP_G, heads=2, hidden=192, layers=3))
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(readers.third),
            d_model=CLIP_L + CLIP_G,
            d_kv=32,
            d_ff=384,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=BLOCKS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=CLIP_L + CLIP_G,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=CLIP_L + CLIP_G,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    _begin_as_identity(transformer)
    return Models(clip_l=clip_l, clip_g=clip_g, t5=t5, transformer=transformer)


def build_flow() -> FlowMatchEulerDiscreteScheduler:
    """Return the sampler: straight paths, without a shift, because 64 pixels are few."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=_TIMES, shift=1.0)


def tokenize_third(tokenizer: T5Tokenizer, captions: Sequence[str], seed: int) -> Tensor:
    """Return the captions' tokens for T5, int64 [N, 32]; where capitals make one too long, it stays as it was."""
    rows = tokenizer(vary_case(captions, seed), padding="max_length", max_length=unigram.MAX_LENGTH)["input_ids"]
    plain = tokenizer(list(captions), padding="max_length", max_length=unigram.MAX_LENGTH, truncation=True)["input_ids"]
    return torch.tensor(
        [row if len(row) == unigram.MAX_LENGTH else other for row, other in zip(rows, plain, strict=True)]
    )


def train_transformer(
    models: Models,
    lessons: Lessons,
    captions: Sequence[str],
    readers: Readers,
    folder: Path,
    *,
    steps: int,
    seed: int,
    report: Report,
    preview: Callable[[Weights, int], None] | None = None,
) -> Models:
    """Train all four models; goes on where an earlier call stopped.

    Args:
        models: what to train.
        lessons: latents, first tokens and loss weights.
        captions: of the lessons.
        readers: the tokenizers.
        folder: for the state.
        steps: in all.
        seed: batches and noise.
        report: called with a line now and then.
        preview: called with the averaged weights now and then.
    """
    third = tokenize_third(readers.third, captions, seed)
    empty = {"clip": tokenize(readers.first, [""])[0], "t5": tokenize_third(readers.third, [""], seed)[0]}
    pad_l, pad_g = readers.first.pad_token_id, readers.second.pad_token_id

    def loss_of(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(lessons.latents), (BATCH,), generator=rng)
        latents = lessons.latents[rows]
        unsaid = torch.rand(BATCH, 1, generator=rng) < EMPTY_CAPTIONS
        first = torch.where(unsaid, empty["clip"], lessons.ids[rows])
        ids = {
            "clip_l": first,
            "clip_g": repad(first, pad_l, pad_g),
            "t5": torch.where(unsaid, empty["t5"], third[rows]),
        }
        with_t5 = torch.rand(BATCH, generator=rng) >= WITHOUT_T5
        noise = torch.randn(latents.shape, generator=rng)
        # Logit-normal times, one in each of BATCH equally likely parts.
        shares = (torch.arange(BATCH) + torch.rand(BATCH, generator=rng)) / BATCH
        times = torch.special.ndtri(shares.clamp(1e-4, 1 - 1e-4)).sigmoid()
        noisy = torch.lerp(latents, noise, times[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            guess = guess_velocity(models, ids, with_t5, noisy, times)
        error = (guess.float() - (noise - latents)).square()
        return (error * lessons.weights[rows][:, None]).mean()

    return models.load(
        fit(
            "transformer",
            models.modules(),
            loss_of,
            folder=folder,
            steps=steps,
            peak_rate=PEAK_RATE,
            report=report,
            preview=preview,
        )
    )


def repad(ids: Tensor, before: int, after: int) -> Tensor:
    """Return CLIP ids with another token as the padding behind the closing one; but for that, tokenizers agree."""
    padding = (ids == before).cumsum(dim=1) > 1  # the closing token is the first, and pads in the first tokenizer
    return torch.where(padding, after, ids)


def guess_velocity(models: Models, ids: dict[str, Tensor], with_t5: Tensor, noisy: Tensor, times: Tensor) -> Tensor:
    """Return the velocity [B, 4, 16, 16], by the states the pipeline would give the transformer.

    Args:
        models: with their encoders.
        ids: stream to token ids [B, 32].
        with_t5: 0 or 1 for each sample [B]: whether T5's states are there.
        noisy: latents [B, 4, 16, 16].
        times: share of noise [B].
    """
    left = models.clip_l(input_ids=ids["clip_l"], output_hidden_states=True)
    right = models.clip_g(input_ids=ids["clip_g"], output_hidden_states=True)
    clip = torch.cat([left.hidden_states[-2], right.hidden_states[-2]], dim=-1)
    t5 = models.t5(input_ids=ids["t5"])[0] * with_t5[:, None, None]
    guess: Tensor = models.transformer(
        hidden_states=noisy,
        timestep=times * _TIMES,
        encoder_hidden_states=torch.cat([clip, t5], dim=1),
        pooled_projections=torch.cat([left.text_embeds, right.text_embeds], dim=-1),
    ).sample
    return guess


def _clip_config(tokenizer: CLIPTokenizer, width: int, *, heads: int, hidden: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _with_prefix_of(target: nn.Module, source: nn.Module) -> dict[str, Tensor]:
    """Return a text model's weights under the names that the model with a projection has for them."""
    names = set(target.state_dict())
    return {
        name if name in names else f"text_model.{name}": value.float() for name, value in source.state_dict().items()
    }


def _begin_as_identity(transformer: SD3Transformer2DModel) -> None:
    """Let every block begin as the identity (adaLN-Zero, arXiv:2212.09748): its gates and the output are 0."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (name.endswith("norm1.linear") or "norm1_context.linear" in name):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    for module in (transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
