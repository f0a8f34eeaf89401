"""Small adapters for tests, built by hand or drawn by Hypothesis.

Token ids come from a tiny vocabulary, so that triggers overlap, contain and repeat one another all the time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st

from engram_core import (
    Adapter,
    Concept,
    ConceptRecord,
    ConceptStream,
    Manifest,
    StreamSpec,
    StreamTokenizer,
    TokenizerSpec,
)
from engram_core.registry import ngram_spans
from engram_core.storage import decode_vectors, encode_vectors

Ngram = tuple[int, ...]

law = settings(deadline=None, max_examples=60)
"""Settings of a law: the machine that runs it may be slow, the law is not about time."""

VOCABULARY = 1000
WIDTHS = {"clip_l": 3, "t5": 5}
SMALL_IDS = st.integers(0, 3)
RULES = ("absolute", "absolute-tanh", "relative")
OVERLAPS = ("sum", "mean")
ACTIVATIONS = ("anchored", "spans")
DTYPES = ("f32", "f16", "bf16")


def make_spec(width: int, sites: tuple[str, ...] | None = None, **tokenizer: Any) -> StreamSpec:
    identity = {"class_name": "ToyTokenizer", "vocab_size": VOCABULARY, "fingerprint": "ab" * 32}
    spec = TokenizerSpec(**identity | tokenizer)
    return StreamSpec(width=width, site="last_hidden_state", tokenizer=spec, sites=sites)


def make_manifest(widths: Mapping[str, int] = WIDTHS, sites: tuple[str, ...] | None = None, **fields: Any) -> Manifest:
    streams = {name: make_spec(width, sites) for name, width in widths.items()}
    defaults = {"backbone": "sd15", "base_model": "toy/base", "base_fingerprint": "cd" * 32, "streams": streams}
    return Manifest(**defaults | fields)


MANIFEST = make_manifest()


def make_stream(
    *triggers: Ngram,
    entries: Sequence[Ngram] | None = None,
    vectors: npt.ArrayLike | None = None,
    scales: npt.ArrayLike | None = None,
    width: int = WIDTHS["clip_l"],
    seed: int = 0,
) -> ConceptStream:
    """A concept's memory in one stream: by default all registered spans of its triggers, with random vectors."""
    spans = entries if entries is not None else sorted({span for ids in triggers for span in ngram_spans(ids, 7)})
    rng = np.random.default_rng(seed)
    drawn = rng.normal(0, 0.5, (len(spans), width)) if vectors is None else vectors
    return ConceptStream(
        triggers=tuple(triggers),
        entries=tuple(spans),
        vectors=np.asarray(drawn, np.float32),
        scales=np.asarray(rng.normal(0, 0.5, width) if scales is None else scales, np.float32),
    )


def make_concept(name: str, *triggers: Ngram, streams: Sequence[str] = ("clip_l",), **fields: Any) -> Concept:
    """A concept with the same triggers in every stream; stream fields and record fields in any order."""
    for_stream = {key: fields.pop(key) for key in ("entries", "vectors", "scales", "seed") if key in fields}
    record = {"trigger": f"the {name}", "rule": "absolute"} | fields
    return Concept(
        record=ConceptRecord(name=name, **record),
        streams={stream: make_stream(*triggers, width=WIDTHS[stream], **for_stream) for stream in streams},
    )


def make_adapter(*concepts: Concept, manifest: Manifest = MANIFEST, label: str = "<memory>") -> Adapter:
    return Adapter.build(manifest, concepts, label)


def with_sites(adapter: Adapter, sites: Mapping[str, tuple[str, ...] | None]) -> Adapter:
    """The same concepts with other numbers at each site of some streams, which have none yet."""

    def widened(name: str, stream: ConceptStream) -> ConceptStream:
        if sites.get(name) is None:
            return stream
        factors = 1 - 0.25 * np.arange(len(sites[name] or ()), dtype=np.float32)[:, None]
        return replace(stream, vectors=stream.vectors[:, None] * factors, scales=stream.scales * factors)

    specs = {name: replace(spec, sites=sites.get(name)) for name, spec in adapter.manifest.streams.items()}
    concepts = [
        replace(concept, streams={name: widened(name, stream) for name, stream in concept.streams.items()})
        for concept in adapter.concepts()
    ]
    return make_adapter(*concepts, manifest=replace(adapter.manifest, streams=specs), label=adapter.label)


def only_site(adapter: Adapter, number: int) -> Adapter:
    """An adapter without sites that holds what all streams hold for one of theirs."""
    specs = {name: replace(spec, sites=None) for name, spec in adapter.manifest.streams.items()}
    concepts = [
        replace(
            concept,
            streams={
                name: replace(stream, vectors=stream.vectors[:, number], scales=stream.scales[number])
                for name, stream in concept.streams.items()
            },
        )
        for concept in adapter.concepts()
    ]
    return make_adapter(*concepts, manifest=replace(adapter.manifest, streams=specs), label=adapter.label)


def merge_of(adapter: Adapter, names: Iterable[str]) -> list[Concept]:
    return [adapter.concept(name) for name in names]


def stored(concept: Concept) -> dict[str, Any]:
    """Everything a concept holds, comparable with ==, floats by their bits; vectors as the file rounds them."""
    content: dict[str, Any] = {"record": concept.record}
    for name, stream in concept.streams.items():
        rounded = decode_vectors(encode_vectors(stream.vectors, concept.record.dtype), concept.record.dtype)
        order = sorted(range(len(stream.entries)), key=lambda k: (len(stream.entries[k]), stream.entries[k]))
        content[name] = (
            sorted(stream.triggers, key=lambda ids: (len(ids), ids)),
            [stream.entries[k] for k in order],
            [rounded[k].tobytes() for k in order],
            np.asarray(stream.scales, np.float32).tobytes(),
        )
    return content


def bits(array: npt.NDArray[Any]) -> bytes:
    """The exact content of an array, -0.0 and NaN payloads included."""
    return np.ascontiguousarray(array).tobytes()


# Drawn

_SPECIAL = np.array([0.0, -0.0, 1e-42, -1e-42, 1.0, 2.0**-24, -3.14159], np.float32)


@st.composite
def vectors(draw: st.DrawFn, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Normal values salted with zeros of both signs and subnormals."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    array = rng.normal(0, 1, shape).astype(np.float32)
    special = rng.random(shape) < 0.2
    array[special] = rng.choice(_SPECIAL, int(special.sum()))
    return array


def ngrams(min_size: int = 2, max_size: int = 5, ids: st.SearchStrategy[int] = SMALL_IDS) -> st.SearchStrategy[Ngram]:
    return st.lists(ids, min_size=min_size, max_size=max_size).map(tuple)


@st.composite
def concept_streams(
    draw: st.DrawFn, shape: tuple[int, ...], max_ngram: int, ids: st.SearchStrategy[int] = SMALL_IDS
) -> ConceptStream:
    triggers = draw(st.lists(ngrams(ids=ids), min_size=1, max_size=2, unique=True))
    entries = sorted({span for trigger in triggers for span in ngram_spans(trigger, max_ngram)})
    return ConceptStream(
        triggers=tuple(triggers),
        entries=tuple(entries),
        vectors=draw(vectors((len(entries), *shape))),
        scales=draw(vectors(shape)),
    )


@st.composite
def concepts(
    draw: st.DrawFn,
    name: str,
    *,
    ids: st.SearchStrategy[int] = SMALL_IDS,
    activations: Sequence[str] = ACTIVATIONS,
    rules: Sequence[str] = RULES,
    widths: Mapping[str, int] = WIDTHS,
    sites: tuple[str, ...] | None = None,
) -> Concept:
    """A concept with random triggers, in one stream or several."""
    max_ngram = draw(st.integers(2, 4))
    present = draw(st.lists(st.sampled_from(sorted(widths)), min_size=1, unique=True))
    record = ConceptRecord(
        name=name,
        trigger=draw(st.sampled_from(["the cat", "Elena Vance, the red-haired pilot", "日本 🙂"])),
        rule=draw(st.sampled_from(rules)),
        overlap=draw(st.sampled_from(OVERLAPS)),
        activation=draw(st.sampled_from(activations)),
        max_ngram=max_ngram,
        dtype=draw(st.sampled_from(DTYPES)),
        training=draw(st.sampled_from([{}, {"steps": 5000, "nested": {"lr": 1e-3, "list": [1, None, "é"]}}])),
        license=draw(st.sampled_from([None, "CC-BY-4.0"])),
    )
    shapes = {stream: make_spec(widths[stream], sites).shape for stream in present}
    return Concept(
        record=record,
        streams={stream: draw(concept_streams(shapes[stream], max_ngram, ids)) for stream in present},
    )


@st.composite
def adapters(
    draw: st.DrawFn, names: Sequence[str] = ("ant", "bee", "cat", "dog"), max_size: int = 4, **fields: Any
) -> Adapter:
    """An adapter of concepts named after some of `names`; `fields` as for `concepts`."""
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=max_size, unique=True))
    manifest = make_manifest(fields.get("widths", WIDTHS), fields.get("sites"))
    return make_adapter(*(draw(concepts(name, **fields)) for name in chosen), manifest=manifest)


@st.composite
def apart(draw: st.DrawFn, count: int, **fields: Any) -> list[Adapter]:
    """Adapters that never conflict: each has names and token ids of its own."""
    drawn = []
    for number in range(count):
        names = [f"{letter}{number}" for letter in "abc"]
        own = st.integers(10 * number, 10 * number + 3)
        drawn.append(draw(adapters(names=names, max_size=2, ids=own, **fields)))
    return drawn


def prompts(ids: st.SearchStrategy[int] = SMALL_IDS, max_rows: int = 3) -> st.SearchStrategy[list[list[int]]]:
    """Ragged batches of token ids."""
    return st.lists(st.lists(ids, max_size=12), min_size=1, max_size=max_rows)


@st.composite
def states(draw: st.DrawFn, rows: int, length: int, width: int) -> npt.NDArray[np.float32]:
    """Hidden states, salted with zeros of both signs."""
    return draw(vectors((rows, length, width)))


# Tokenizers


def make_tokenizer(
    encode: Any, *, vocab_size: int = VOCABULARY, special: Iterable[int] = (), max_tokens: int | None = None
) -> StreamTokenizer:
    return StreamTokenizer(
        spec=TokenizerSpec(class_name="ToyTokenizer", vocab_size=vocab_size, fingerprint="ab" * 32),
        encode=encode,
        show=lambda ids: [f"<{i}>" for i in ids],
        special_ids=frozenset(special),
        max_tokens=max_tokens,
    )


def byte_tokenizer(**fields: Any) -> StreamTokenizer:
    """One token a byte."""
    return make_tokenizer(lambda text: list(text.encode()), vocab_size=256, **fields)


def word_tokenizer(**fields: Any) -> StreamTokenizer:
    """One token a word, ids in the order in which words are first seen."""
    known: dict[str, int] = {}
    return make_tokenizer(lambda text: [known.setdefault(word, len(known)) for word in text.split()], **fields)


def with_record(concept: Concept, **fields: Any) -> Concept:
    return replace(concept, record=replace(concept.record, **fields))
