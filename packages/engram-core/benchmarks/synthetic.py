"""Synthetic adapters of any size, and prompts. Triggers have seven tokens, so a concept has 21 entries a stream.

Shapes: C concepts, K entries, d width.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from engram_core import Adapter, Concept, ConceptRecord, ConceptStream, Manifest, StreamSpec, TokenizerSpec
from engram_core.container import ContainerWriter
from engram_core.layout import pack_metadata, pack_offsets
from engram_core.registry import ngram_spans

VOCABULARY = 49408  # CLIP's
START, END = 49406, 49407  # its special tokens; END also pads
TRIGGER = 7  # tokens of a trigger
ENTRIES = 21  # of a concept in a stream: spans of 2..7 of 7 tokens
LENGTH = 77  # positions of a prompt

Ints = npt.NDArray[np.int64]

_PIECE = 1 << 22  # values written at a time


CLIP = TokenizerSpec(class_name="CLIPTokenizer", vocab_size=VOCABULARY, fingerprint="0" * 64)


def manifest(widths: Mapping[str, int], tokenizer: TokenizerSpec = CLIP, site: str = "last_hidden_state") -> Manifest:
    """Return a manifest with streams of these widths."""
    streams = {name: StreamSpec(width=width, site=site, tokenizer=tokenizer) for name, width in widths.items()}
    return Manifest(backbone="sd35" if len(widths) > 1 else "sd15", base_model="synthetic", streams=streams)


def draw_triggers(n_concepts: int, seed: int = 0) -> npt.NDArray[np.int32]:
    """Return int32 [C, 7]: triggers of words drawn evenly, as invented names are."""
    triggers = np.random.default_rng(seed).integers(320, START, (n_concepts, TRIGGER)).astype("<i4")
    if len(np.unique(triggers, axis=0)) < n_concepts:
        raise ValueError(f"two of {n_concepts} triggers are equal; choose another seed")
    return triggers


def cut_entries(triggers: npt.NDArray[np.int32]) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
    """Return for each span length n the entries of all concepts, in canonical order: int32 [C, 8 - n, n]."""
    for n in range(2, TRIGGER + 1):
        windows = np.lib.stride_tricks.sliding_window_view(triggers, n, axis=1)
        order = np.lexsort([windows[:, :, column] for column in reversed(range(n))], axis=1)
        yield n, np.take_along_axis(windows, order[:, :, None], axis=1)


def concept_name(index: int) -> str:
    """Return the name of a concept."""
    return f"concept {index:07d}"


def write_table(
    target: BinaryIO,
    n_concepts: int,
    widths: Mapping[str, int],
    activation: str = "anchored",
    *,
    rule: str = "relative",
    triggers: npt.NDArray[np.int32] | None = None,
    tokenizer: TokenizerSpec = CLIP,
    site: str = "last_hidden_state",
) -> None:
    """Write an adapter with many concepts without building each: the same triggers in every stream.

    Args:
        target: where to write.
        n_concepts: C.
        widths: stream to d.
        activation: of all concepts.
        rule: of all concepts.
        triggers: int32 [C, 7], no two alike; None draws them.
        tokenizer: whose ids they are.
        site: which states are edited.
    """
    triggers = draw_triggers(n_concepts) if triggers is None else triggers
    ids = np.concatenate([entries.reshape(n_concepts, -1) for _, entries in cut_entries(triggers)], axis=1)
    lengths = [n for n in range(2, TRIGGER + 1) for _ in range(TRIGGER + 1 - n)]
    records = [
        ConceptRecord(
            name=concept_name(index),
            trigger=f"trigger {index}",
            rule=rule,  # type: ignore[arg-type]
            activation=activation,  # type: ignore[arg-type]
        ).to_bytes()
        for index in range(n_concepts)
    ]
    number = np.arange(n_concepts, dtype="<i4")
    arrays: dict[str, tuple[str, npt.NDArray[Any]]] = {
        "concepts.json": ("U8", np.frombuffer(b"".join(records), np.uint8)),
        "concepts.offsets": ("I64", pack_offsets(map(len, records))),
    }
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, width in widths.items():
        arrays |= {
            f"{name}.entries.ids": ("I32", ids.reshape(-1)),
            f"{name}.entries.offsets": ("I64", pack_offsets(np.tile(lengths, n_concepts))),
            f"{name}.entries.concept": ("I32", number.repeat(ENTRIES)),
            f"{name}.triggers.ids": ("I32", triggers.reshape(-1)),
            f"{name}.triggers.offsets": ("I64", np.arange(n_concepts + 1) * TRIGGER),
            f"{name}.triggers.concept": ("I32", number),
        }
        shapes[f"{name}.vectors"] = "F32", (n_concepts * ENTRIES, width)
        shapes[f"{name}.scales"] = "F32", (n_concepts, width)
    values = list(shapes.items())
    shapes |= {key: (dtype, array.shape) for key, (dtype, array) in arrays.items()}
    writer = ContainerWriter(target, pack_metadata(manifest(widths, tokenizer, site)), shapes)
    for key, (_, array) in arrays.items():
        writer.write(key, np.ascontiguousarray(array))
    noise = np.random.default_rng(1).standard_normal(_PIECE, np.float32)
    for key, (_, (rows, width)) in values:
        for start in range(0, rows * width, _PIECE):
            writer.write(key, noise[: min(_PIECE, rows * width - start)], start * 4)


def make_table(n_concepts: int, activation: str) -> Adapter:
    """Return an adapter with many concepts in memory, for matching: its vectors have one channel."""
    buffer = io.BytesIO()
    write_table(buffer, n_concepts, {"clip_l": 1}, activation)
    return Adapter.from_bytes(buffer.getvalue())


def write_adapters(folder: Path, count: int, width: int, *, same_shape: bool = True) -> list[Path]:
    """Write adapters of one concept in three streams; unless `same_shape`, with triggers of 4 to 10 tokens."""
    random = np.random.default_rng(0)
    spec = manifest({"clip_g": width, "clip_l": width, "t5": width})
    paths = []
    for index in range(count):
        streams = {}
        for name in spec.streams:
            length = TRIGGER if same_shape else int(random.integers(4, 11))
            trigger = tuple(random.integers(320, START, length).tolist())
            entries = tuple(dict.fromkeys(ngram_spans(trigger, TRIGGER)))
            streams[name] = ConceptStream(
                triggers=(trigger,),
                entries=entries,
                vectors=random.standard_normal((len(entries), width), np.float32),
                scales=random.standard_normal(width, np.float32),
            )
        record = ConceptRecord(name=concept_name(index), trigger=f"trigger {index:07d}", rule="relative")
        paths.append(folder / f"{index:07d}.safetensors")
        paths[-1].write_bytes(Adapter.build(spec, [Concept(record=record, streams=streams)]).to_bytes())
    return paths


class Prompts:
    """Random prompts of words as frequent as in language: the r-th most common word has a share of about 1/r."""

    def __init__(self, seed: int) -> None:
        words = np.random.default_rng(99).permutation(np.arange(320, START))
        share = 1 / np.arange(1, len(words) + 1)
        self._words, self._share = words, share / share.sum()
        self._random = np.random.default_rng(seed)

    def batch(self, shortest: int, longest: int) -> Ints:
        """Return int64 [2, 77]: start, some words, and padding."""
        ids = np.full((2, LENGTH), END)
        ids[:, 0] = START
        for row in ids:
            n_words = int(self._random.integers(shortest, longest + 1))
            row[1 : 1 + n_words] = self._random.choice(self._words, n_words, p=self._share)
        return ids
