"""What the frozen model makes of the training data, computed once: latents of pictures, states of captions.

Every part is on the device only while it works, one at a time: beside T5 there is no room for others.
Shapes: V views (pictures, mirrored and cropped), T texts, L positions, d width, p width of pooled states.
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
from engram_vision.conditions import prompt_length
from engram_vision.dataset import CaptionedImage, caption_with
from engram_vision.families import PENULTIMATE, SD35, Family
from engram_vision.images import Note, fit_square, ignore_note, load_picture
from engram_vision.quiet import quiet_libraries

__all__ = [
    "TEXTS_AT_ONCE",
    "FrozenData",
    "FrozenTexts",
    "TextReader",
    "encode_views",
    "freeze",
    "vary_caption",
    "views_at_once",
]

TEXTS_AT_ONCE = 16

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrozenTexts:
    """Texts as one stream's encoder reads them.

    Attributes:
        ids: int64 [T, L].
        states: [T, L, d] in the encoder's number type.
        pooled: [T, p], where the denoiser reads such.
    """

    ids: Tensor
    states: Tensor
    pooled: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrozenData:
    """A training or validation set after the frozen models have seen it.

    Attributes:
        mean, std: the latents' distributions, float32 [V, c, h, w], scaled as the denoiser expects.
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
    vae: Any,
    readers: Mapping[str, TextReader],
    data: Sequence[CaptionedImage],
    registries: Mapping[str, Registry],
    *,
    resolution: int,
    flip: bool,
    crops: int,
    seed: int,
    device: torch.device,
    advance: Advance,
    note: Note = ignore_note,
) -> FrozenData:
    """Run the VAE and the text encoders over a data set.

    Args:
        vae: the pipeline's.
        readers: the pipeline's text encoders, by stream.
        data: pictures with captions that hold the trigger.
        registries: of the trigger, by stream.
        resolution: pixels a side.
        flip: also the mirror images.
        crops: 1 for the centre alone, else so many random squares of each picture.
        seed: of the crops.
        device: where the VAE computes; it returns to the host.
        advance: called with the number of views that are encoded.
        note: told about pictures that must be enlarged.

    Raises:
        InputError: a picture cannot be read, or a caption is so long that the trigger is cut off.
    """
    texts: dict[str, int] = {}
    rows = []
    for item in data:
        forms = [item.caption]
        for stream, registry in registries.items():
            _check_not_cut(item, stream, registry, readers[stream].tokenizer)
            forms += vary_caption(item.caption, registry, readers[stream].tokenizer)
        rows.append(tuple(texts.setdefault(form, len(texts)) for form in dict.fromkeys(forms)))
    views = [
        _views(item, resolution, flip, crops, np.random.default_rng([seed, n]), note) for n, item in enumerate(data)
    ]
    mean, std = encode_views(vae, [view for group in views for view in group], device, advance)
    return FrozenData(
        mean=mean,
        std=std,
        texts={stream: reader.read(list(texts)) for stream, reader in readers.items()},
        captions=tuple(row for row, group in zip(rows, views, strict=True) for _ in group),
        origin={
            "pictures": _digest(view.tobytes() for group in views for view in group),
            "captions": _digest(item.caption.encode() + b"\0" for item in data),
        },
    )


def views_at_once(pixels: int) -> int:
    """Return how many pictures of some pixels a side the VAE encodes at once: of large ones a single one fills it."""
    return max(1, min(4, 4 * 512**2 // pixels**2))


@torch.no_grad()
def encode_views(
    vae: Any, views: Sequence[Image.Image], device: torch.device, advance: Advance | None = None
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the scaled latents of RGB pictures, float32 [V, c, h, w] on the host."""
    before, dtype = vae.device, vae.dtype
    # Some VAEs overflow in half precision and say so.
    with quiet_libraries():  # diffusers warns of every cast
        vae.to(device, torch.float32 if vae.config.force_upcast and dtype == torch.float16 else dtype)
    parts = []
    size = views_at_once(views[0].width)
    for first in range(0, len(views), size):
        pixels = np.stack([np.asarray(view) for view in views[first : first + size]])
        inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        latents = vae.encode(inputs.to(vae.device, vae.dtype)).latent_dist
        parts.append((latents.mean.float().cpu(), latents.std.float().cpu()))
        if advance is not None:
            advance(min(len(views), first + size))
    with quiet_libraries():
        vae.to(before, dtype)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    mean, std = (torch.cat(group) for group in zip(*parts, strict=True))
    return (mean - shift) * scale, std * scale


class TextReader:
    """One stream's tokenizer and frozen encoder."""

    def __init__(
        self, family: Family, pipeline: Any, stream: str, tokenizer: StreamTokenizer, device: torch.device
    ) -> None:
        """Take the stream's parts of a pipeline.

        Args:
            family: of the pipeline.
            pipeline: with the stream's encoder.
            stream: which one.
            tokenizer: the same tokenizer, as registries know it.
            device: where the encoder computes; it returns to where it was.
        """
        part = family.streams[stream]
        self.tokenizer = tokenizer
        self._words, self._encoder = getattr(pipeline, part.tokenizer), getattr(pipeline, part.encoder)
        self._penultimate, self._device = part.site == PENULTIMATE, device
        # Every CLIP of a pipeline reads as many positions as the first one's tokenizer says.
        clip_length = pipeline.tokenizer.model_max_length
        self._length = prompt_length(pipeline) if family is SD35 and stream == "t5" else clip_length

    @property
    def width(self) -> int:
        """Width of the states."""
        return int(self._encoder.config.hidden_size)

    @property
    def n_opening(self) -> int:
        """Special tokens before the text's own: CLIP's begin token, none for T5."""
        ids, own = list(self._words("a")["input_ids"]), list(self.tokenizer.encode("a"))
        return next(place for place in range(len(ids)) if ids[place : place + len(own)] == own)

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> FrozenTexts:
        """Return texts as the pipeline reads them, on the host."""
        rows = self._words(
            list(texts), padding="max_length", max_length=self._length, truncation=True, return_tensors="pt"
        )["input_ids"]
        before = self._encoder.device
        self._encoder.to(self._device)
        parts = [self._encode(rows[first : first + TEXTS_AT_ONCE]) for first in range(0, len(rows), TEXTS_AT_ONCE)]
        self._encoder.to(before)
        states = torch.cat([state for state, _ in parts])
        pooled = [pool for _, pool in parts if pool is not None]
        return FrozenTexts(ids=rows, states=states, pooled=torch.cat(pooled) if pooled else None)

    def _encode(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self._penultimate:
            return self._encoder(rows.to(self._device))[0].cpu(), None
        output = self._encoder(rows.to(self._device), output_hidden_states=True)
        pooled = getattr(output, "text_embeds", None)
        return output.hidden_states[-2].cpu(), None if pooled is None else pooled.cpu()


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


def _check_not_cut(item: CaptionedImage, stream: str, registry: Registry, tokenizer: StreamTokenizer) -> None:
    ids = tokenizer.encode(item.caption)
    read = ids[: tokenizer.max_tokens]
    if any(_holds(read, variant.ids) for variant in registry.variants):
        return
    if any(_holds(ids, variant.ids) for variant in registry.variants):
        raise InputError(
            f"{item.path}: the caption has {len(ids)} tokens and {stream} reads {tokenizer.max_tokens}, which cuts "
            f"the trigger {registry.trigger!r} off; shorten the caption or move the trigger forward"
        )
    raise InputError(
        f"{item.path}: the tokenizer of {stream} cuts the trigger {registry.trigger!r} in {item.caption[:80]!r} into "
        "tokens that are not registered; put spaces around it"
    )


def _views(
    item: CaptionedImage, resolution: int, flip: bool, crops: int, rng: np.random.Generator, note: Note
) -> list[Image.Image]:
    picture = load_picture(item.path, resolution=resolution, note=note)
    places = [(0.5, 0.5)] if crops == 1 else [(float(x), float(y)) for x, y in rng.random((crops, 2))]
    views = [fit_square(picture, resolution, place) for place in places]
    return [form for view in views for form in ((view, ImageOps.mirror(view)) if flip else (view,))]
