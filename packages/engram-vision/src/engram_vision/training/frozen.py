"""What the frozen model makes of the training data, computed once: latents of pictures or clips, states of captions.

Every part is on the device only while it works, one at a time: beside T5 there is no room for others.
Shapes: V views of the items (mirrored, cropped), T texts, L positions, d width, p width of pooled states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engram_core import InputError, Registry, StreamTokenizer, Variant
from engram_core.registry import CONTEXTS
from engram_vision.conditions import prompt_length
from engram_vision.dataset import caption_with
from engram_vision.families import PENULTIMATE, SD35, Family

__all__ = [
    "TEXTS_AT_ONCE",
    "Captioned",
    "FrozenData",
    "FrozenTexts",
    "Latents",
    "Store",
    "TextReader",
    "digest_parts",
    "freeze",
    "vary_caption",
]

TEXTS_AT_ONCE = 16


class Store(Protocol):
    """Keeps what the frozen models made; see `engram_vision.training.store`."""

    def fetch(
        self, files: Sequence[Path], captions: Sequence[Sequence[str]], make: Callable[[], FrozenData]
    ) -> FrozenData:
        """Return what is kept of a data set; make and keep it where there is nothing."""


class Captioned(Protocol):
    """A picture or a clip with its caption."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def caption(self) -> str:
        """What it shows, with the trigger."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrozenTexts:
    """Texts as one stream's encoder reads them.

    Attributes:
        ids: int64 [T, L].
        states: [T, L, d] in the encoder's number type.
        pooled: [T, p], where the denoiser reads such.
        lengths: int64 [T], tokens that the denoiser reads; None means all L.
    """

    ids: Tensor
    states: Tensor
    pooled: Tensor | None = None
    lengths: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrozenData:
    """A training or validation set after the frozen models have seen it.

    Attributes:
        mean, std: the latents' distributions, float32 [V, c, ...], scaled as the denoiser expects.
        texts: stream to the captions in all their forms.
        captions: V tuples of rows of `texts`: first the caption as written, then with the trigger in other forms.
        origin: digests of the `pictures` or `clips` and of the `captions` that went in, alike on every machine.
    """

    mean: Tensor
    std: Tensor
    texts: Mapping[str, FrozenTexts]
    captions: tuple[tuple[int, ...], ...]
    origin: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Latents:
    """Pictures or clips after the autoencoder.

    Attributes:
        mean, std: of their distributions, float32 [V, c, ...], scaled as the denoiser expects.
        owners: which item of the data set each belongs to, V numbers.
        digest: of the pixels that went in, alike on every machine.
        kind: what they are called, in the plural.
    """

    mean: Tensor
    std: Tensor
    owners: Sequence[int]
    digest: str
    kind: str


def freeze(
    readers: Mapping[str, TextReader],
    data: Sequence[Captioned],
    registries: Mapping[str, Registry],
    encode: Callable[[], Latents],
    store: Store | None = None,
) -> FrozenData:
    """Run the text encoders and the autoencoder over a data set, unless that was done before.

    Args:
        readers: the pipeline's text encoders, by stream.
        data: what is learned, with captions that hold the trigger.
        registries: of the trigger, by stream.
        encode: runs the autoencoder; called when all captions are found good.
        store: keeps the outcome; None makes it each time.

    Raises:
        InputError: a caption is so long that the trigger is cut off, or `encode` raises it.
        AdapterWriteError: the outcome cannot be kept.
    """
    captions = []
    for item in data:
        forms = [item.caption]
        for stream, registry in registries.items():
            _check_not_cut(item, stream, registry, readers[stream].tokenizer)
            forms += vary_caption(item.caption, registry, readers[stream].tokenizer)
        captions.append(tuple(dict.fromkeys(forms)))

    def run() -> FrozenData:
        latents = encode()
        rows = {form: row for row, form in enumerate(dict.fromkeys(form for forms in captions for form in forms))}
        return FrozenData(
            # In the order in which they come back from the disk: convolutions round by it.
            mean=latents.mean.contiguous(),
            std=latents.std.contiguous(),
            texts={stream: reader.read(list(rows)) for stream, reader in readers.items()},
            captions=tuple(tuple(rows[form] for form in captions[owner]) for owner in latents.owners),
            origin={
                latents.kind: latents.digest,
                "captions": digest_parts(item.caption.encode() + b"\0" for item in data),
            },
        )

    return run() if store is None else store.fetch([item.path for item in data], captions, run)


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
        self._reads_padding = part.reads_padding
        if family is SD35 and stream == "t5":
            self._length = prompt_length(pipeline)
        elif part.model_type == "clip_text_model":
            # Every CLIP of a pipeline reads as many positions as the first one's tokenizer says.
            self._length = pipeline.tokenizer.model_max_length
        else:
            self._length = part.read_length(self._words, self._encoder)

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
        words = self._words(
            list(texts), padding="max_length", max_length=self._length, truncation=True, return_tensors="pt"
        )
        rows, mask = words["input_ids"], None if self._reads_padding else words["attention_mask"]
        before = self._encoder.device
        self._encoder.to(self._device)
        slices = [slice(first, first + TEXTS_AT_ONCE) for first in range(0, len(rows), TEXTS_AT_ONCE)]
        parts = [self._encode(rows[part], None if mask is None else mask[part]) for part in slices]
        self._encoder.to(before)
        states = torch.cat([state for state, _ in parts])
        pooled = [pool for _, pool in parts if pool is not None]
        return FrozenTexts(
            ids=rows,
            states=states,
            pooled=torch.cat(pooled) if pooled else None,
            lengths=None if mask is None else mask.gt(0).sum(dim=1),
        )

    def _encode(self, rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if mask is not None:
            states = self._encoder(rows.to(self._device), mask.to(self._device))[0].cpu()
            return states * mask.gt(0).unsqueeze(-1), None  # the pipeline puts zeros in place of padding
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


def digest_parts(parts: Iterable[bytes]) -> str:
    """Return a short digest over parts, one after the other."""
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


def _check_not_cut(item: Captioned, stream: str, registry: Registry, tokenizer: StreamTokenizer) -> None:
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
