"""Drawing pictures with a pipeline: the one path that `generate`, previews and the demo share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from engram_core import Adapter, InputError, PromptAudit
from engram_vision.conditions import prompt_length
from engram_vision.families import SD35, family_of
from engram_vision.loading import pipeline_tokenizers
from engram_vision.quiet import quiet_libraries

__all__ = ["Drawing", "draw", "find_cut", "find_silent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One picture to draw.

    Attributes:
        prompt: what to draw.
        seed: of the first noise.
    """

    prompt: str
    seed: int


def draw(
    pipeline: Any,
    drawings: Sequence[Drawing],
    *,
    steps: int,
    guidance: float,
    negative: str = "",
    width: int | None = None,
    height: int | None = None,
    batch_size: int = 4,
    advance: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """Return a picture for each drawing, with whatever is loaded into the pipeline.

    A picture depends on its prompt and seed. To compare two sets of pictures byte by byte, draw them in the same
    batches: matrix products of another shape may round differently.

    Args:
        pipeline: a text-to-image pipeline of a known family, on its device.
        drawings: what to draw.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        negative: negative prompt.
        width: pixels; None means the model's own.
        height: pixels, likewise.
        batch_size: pictures drawn at once.
        advance: called with the number of pictures that are done.

    Raises:
        InputError: the width or height is not one that the model can draw.
    """
    family = family_of(pipeline)
    # diffusers insists on 8; the transformer cuts latents into patches.
    multiple = max(8, pipeline.vae_scale_factor * (pipeline.patch_size if family is SD35 else 1))
    options = {"max_sequence_length": prompt_length(pipeline)} if family is SD35 else {}
    for side, pixels in (("width", width), ("height", height)):
        if pixels is not None and pixels % multiple:
            raise InputError(f"{side} is {pixels}, expected a multiple of {multiple}")
    images: list[Image.Image] = []
    for first in range(0, len(drawings), batch_size):
        batch = drawings[first : first + batch_size]
        # The noise comes from the CPU, so that a seed means the same picture on every device.
        generators = [torch.Generator("cpu").manual_seed(drawing.seed) for drawing in batch]
        with quiet_libraries():  # `find_cut` tells what diffusers would say of long prompts, once and in words
            images += pipeline(
                [drawing.prompt for drawing in batch],
                # Without one, XL takes states of zeros, which are not those of an empty text.
                negative_prompt=[negative] * len(batch) if negative else None,
                num_inference_steps=steps,
                guidance_scale=guidance,
                width=width,
                height=height,
                generator=generators,
                **options,
            ).images
        if advance is not None:
            advance(len(images))
    return images


def find_cut(pipeline: Any, prompts: Sequence[str]) -> list[str]:
    """Return a sentence for each prompt that is longer than the encoder reads."""
    sentences, tokenizers = [], pipeline_tokenizers(pipeline)
    for prompt in dict.fromkeys(prompts):
        for stream, tokenizer in tokenizers.items():
            ids, limit = tokenizer.encode(prompt), tokenizer.max_tokens
            if limit is not None and len(ids) > limit:
                sentences.append(f"{prompt!r} has {len(ids)} tokens, {stream} reads {limit}; the rest has no effect")
    return sentences


def find_silent(pipeline: Any, adapter: Adapter, prompts: Sequence[str]) -> list[str]:
    """Return a sentence for each trigger that stands in a prompt as text but does not fire, and why."""
    tokenizers = pipeline_tokenizers(pipeline)
    audit = PromptAudit(adapter, tokenizers, list(tokenizers))
    return [
        f"{silent.concept!r} stands in {prompt!r} but does not fire in {silent.stream}: {silent.reason}"
        for prompt in dict.fromkeys(prompts)
        for silent in audit.examine(prompt).silent
    ]
