"""What the frozen model makes of the training data, computed once: latents of pictures, states of captions.

Shapes: V views (pictures, mirrored and cropped), T texts, L positions, d width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from engram_core import InputError, Registry, StreamTokenizer, Variant
from engram_core.registry import CONTEXTS
from engram_vision.dataset import CaptionedImage, caption_with
from engram_vision.images import Note, fit_square, ignore_note, load_picture

__all__ = ["FrozenData", "FrozenTexts", "encode_texts", "encode_views", "freeze", "vary_caption"]

_VAE_BATCH = 4
_TEXT_BATCH = 16

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrozenTexts:
    """Texts as one stream's encoder reads them.

    Attributes:
        ids: int64 [T, L].
        states: [T, L, d] in the encoder's number type.
    """

    ids: Tensor
    states: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrozenData:
    """A training or validation set after the frozen models have seen it.

    Attributes:
        mean, std: the latents' distributions, float32 [V, 4, h, w], scaled as the denoiser expects.
        texts: stream to the captions in all their forms.
        captions: V tuples of rows of `texts`: first the caption as written, then with the trigger in other forms.
        origin: digests of the `pictures` and `captions` that went in, alike on every machine.
    """

    mean: Tensor
    std: Tensor
    texts: Mapping[str, FrozenTexts]
    captions: tuple[tuple[int, ...], ...]
    origin: Mapping[str, str]


def freeze(
    pipeline: Any,
    data: Sequence[CaptionedImage],
    registries: Mapping[str, Registry],
    tokenizers: Mapping[str, StreamTokenizer],
    *,
    resolution: int,
    flip: bool,
    crops: int,
    seed: int,
    advance: Advance,
    note: Note = ignore_note,
) -> FrozenData:
    """Run the VAE and the text encoder over a data set.

    Args:
        pipeline: with `vae`, `tokenizer` and `text_encoder` on their device.
        data: pictures with captions that hold the trigger.
        registries: of the trigger, by stream.
        tokenizers: by stream.
        resolution: pixels a side.
        flip: also the mirror images.
        crops: 1 for the centre alone, else so many random squares of each picture.
        seed: of the crops.
        advance: called with the number of views that are encoded.
        note: told about pictures that must be enlarged.

    Raises:
        InputError: a picture cannot be read, or a caption is so long that the trigger is cut off.
    """
    (stream,) = registries
    registry, tokenizer = registries[stream], tokenizers[stream]
    texts: dict[str, int] = {}
    rows = []
    for item in data:
        _check_not_cut(item, registry, tokenizer)
        forms = [item.caption, *vary_caption(item.caption, registry, tokenizer)]
        rows.append(tuple(texts.setdefault(form, len(texts)) for form in forms))
    views = [
        _views(item, resolution, flip, crops, np.random.default_rng([seed, n]), note) for n, item in enumerate(data)
    ]
    mean, std = encode_views(pipeline.vae, [view for group in views for view in group], advance)
    return FrozenData(
        mean=mean,
        std=std,
        texts={stream: encode_texts(pipeline, list(texts))},
        captions=tuple(row for row, group in zip(rows, views, strict=True) for _ in group),
        origin={
            "pictures": _digest(view.tobytes() for group in views for view in group),
            "captions": _digest(item.caption.encode() + b"\0" for item in data),
        },
    )


@torch.no_grad()
def encode_views(vae: Any, views: Sequence[Image.Image], advance: Advance | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the scaled latents of RGB pictures, float32 [V, 4, h, w] on the host."""
    parts = []
    for first in range(0, len(views), _VAE_BATCH):
        pixels = np.stack([np.asarray(view) for view in views[first : first + _VAE_BATCH]])
        inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        latents = vae.encode(inputs.to(vae.device, vae.dtype)).latent_dist
        parts.append((latents.mean.float().cpu(), latents.std.float().cpu()))
        if advance is not None:
            advance(min(len(views), first + _VAE_BATCH))
    scale = vae.config.scaling_factor
    return torch.cat([mean for mean, _ in parts]) * scale, torch.cat([std for _, std in parts]) * scale


@torch.no_grad()
def encode_texts(pipeline: Any, texts: Sequence[str]) -> FrozenTexts:
    """Return texts as the pipeline's own text encoder reads them, on the host."""
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    ids = tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )["input_ids"]
    parts = [encoder(ids[i : i + _TEXT_BATCH].to(encoder.device))[0].cpu() for i in range(0, len(ids), _TEXT_BATCH)]
    return FrozenTexts(ids=ids, states=torch.cat(parts))


def vary_caption(caption: str, registry: Registry, tokenizer: StreamTokenizer) -> list[str]:
    """Return the caption with the trigger in other forms, one for each token variant that it does not show itself.

    Training must show every variant (docs/concepts.md): quoted, in capitals, before a comma, and so on.
    """

    def shows(text: str, variant: Variant) -> bool:
        return _holds(tokenizer.encode(text)[: tokenizer.max_tokens], variant.ids)

    texts = []
    for variant in registry.variants:
        if not shows(caption, variant):
            text = caption_with(caption, registry.trigger, _form(variant, registry.trigger))
            # Where the words around it cut the trigger in yet another way, the variant's example stands in.
            texts += [form for form in (text, variant.example) if shows(form, variant)][:1]
    return texts


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _form(variant: Variant, trigger: str) -> str:
    """Return the trigger as a variant's example writes it, with the signs that touch it."""
    at = variant.example.casefold().find(trigger.casefold())
    if at < 0:
        return variant.example
    before, after = variant.example[:at], variant.example[at + len(trigger) :]
    if (before, after) in CONTEXTS:
        before, after = before.rpartition(" ")[2], after.partition(" ")[0]
    return before + variant.example[at : at + len(trigger)] + after


def _holds(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(tuple(ids[i : i + len(part)]) == tuple(part) for i in range(len(ids) - len(part) + 1))


def _check_not_cut(item: CaptionedImage, registry: Registry, tokenizer: StreamTokenizer) -> None:
    ids = tokenizer.encode(item.caption)
    read = ids[: tokenizer.max_tokens]
    if any(_holds(read, variant.ids) for variant in registry.variants):
        return
    if any(_holds(ids, variant.ids) for variant in registry.variants):
        raise InputError(
            f"{item.path}: the caption has {len(ids)} tokens and the encoder reads {tokenizer.max_tokens}, which cuts "
            f"the trigger {registry.trigger!r} off; shorten the caption or move the trigger forward"
        )
    raise InputError(
        f"{item.path}: the tokenizer cuts the trigger {registry.trigger!r} in {item.caption[:80]!r} into tokens that "
        "are not registered; put spaces around it"
    )


def _views(
    item: CaptionedImage, resolution: int, flip: bool, crops: int, rng: np.random.Generator, note: Note
) -> list[Image.Image]:
    picture = load_picture(item.path, resolution=resolution, note=note)
    places = [(0.5, 0.5)] if crops == 1 else [(float(x), float(y)) for x, y in rng.random((crops, 2))]
    views = [fit_square(picture, resolution, place) for place in places]
    return [form for view in views for form in ((view, ImageOps.mirror(view)) if flip else (view,))]
