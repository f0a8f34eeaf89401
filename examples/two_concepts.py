"""Build two concepts, merge them, look inside, and see what they do to text states. No model, no GPU.

The concepts are those of `concepts.json`. Nothing is trained here, so their vectors are seeded noise; all
that does not depend on the values is real: registry, file, merge, matching, and the locality of the edit.

Run: uv run python examples/two_concepts.py [folder for the files]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from engram_core import (
    Adapter,
    Concept,
    ConceptRecord,
    ConceptStream,
    Manifest,
    Matcher,
    Residual,
    StreamSpec,
    StreamTokenizer,
    build_registry,
    extract_concepts,
    open_adapter,
    wrap_tokenizer,
)

HERE = Path(__file__).parent
WIDTH = 64  # channels of the text states
TEXTS = [
    "a photo of a pilot in the snow, by the sea, at night",
    "a painting of the keeper of a lamp in a city of nine towers",
    "a portrait of a knight, a dragon and a fox under a nebula",
]


def main() -> None:
    """Do it all, saying what."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(os.path.relpath(HERE)) / "output"
    folder.mkdir(parents=True, exist_ok=True)

    say("A small tokenizer, as a text encoder would have")
    trained = train_tokenizer()
    trained.save(str(folder / "tokenizer.json"))
    tokenizer = wrap_tokenizer(trained, max_length=77)
    print(f"{tokenizer.spec.vocab_size} tokens, saved to {folder / 'tokenizer.json'}")

    say("Two concepts, one adapter each")
    files = []
    for item in json.loads((HERE / "concepts.json").read_text(encoding="utf-8")):
        adapter = build_adapter(item, tokenizer)
        files.append(folder / f"{item['name']}.safetensors")
        adapter.save(files[-1], overwrite=True)
        print(f"{files[-1]}: {len(adapter.streams['text'].concept)} entries for {item['trigger']!r}")

    say("Would they merge, and what comes out")
    both = folder / "both.safetensors"
    engram("inspect", *files)
    engram("merge", *files, "-o", both, "--force")
    engram("inspect", both)

    say("What fires")
    prompts = [
        "a photo of Aldric Vortex-9 CyberNebula and Brindle Fennimore, the lamp keeper",
        "a photo of a keeper of a lamp",
    ]
    asked = [part for prompt in prompts for part in ("--prompt", prompt)]
    engram("inspect", both, "--tokenizer", f"text={folder / 'tokenizer.json'}", *asked)

    say("What it does to text states")
    merged = open_adapter(both)
    matcher, residual = Matcher(merged, "text"), Residual(merged, "text")
    for prompt in prompts:
        ids = list(tokenizer.encode(prompt))
        states = np.random.default_rng(0).normal(size=(1, len(ids), WIDTH)).astype(np.float32)
        edited = residual.apply(states, matcher.match(ids))
        changed = int((edited != states).any(axis=2).sum())
        print(f"{prompt!r}: {changed} of {len(ids)} token states edited, same object: {edited is states}")

    say("Merging is reversible")
    for file in files:
        same = extract_concepts(merged, open_adapter(file).names()).to_bytes() == file.read_bytes()
        print(f"{file.name} taken out of the merge is {'the same' if same else 'NOT the same'}, byte for byte")
        if not same:
            sys.exit(1)


def train_tokenizer() -> Tokenizer:
    """Return a byte-level BPE tokenizer; invented names fall into several pieces, as they should."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def build_adapter(item: dict[str, object], tokenizer: StreamTokenizer) -> Adapter:
    """Return an adapter with one concept whose vectors are noise."""
    registry = build_registry(str(item["trigger"]), tokenizer)
    noise = np.random.default_rng(int(str(item["seed"])))
    slots = noise.normal(0, 0.02, size=(registry.n_slots, WIDTH)).astype(np.float32)
    stream = ConceptStream(
        triggers=tuple(variant.ids for variant in registry.variants),
        entries=registry.entries,
        vectors=slots[list(registry.slots)],  # variants of the trigger share vectors
        scales=np.full(WIDTH, 0.05, np.float32),
    )
    record = ConceptRecord(
        name=str(item["name"]),
        trigger=str(item["trigger"]),
        rule="absolute",
        training={"note": "not trained: vectors are seeded noise"},
        license=str(item["license"]),
    )
    manifest = Manifest(
        backbone="example",
        base_model="none",
        streams={"text": StreamSpec(width=WIDTH, site="last_hidden_state", tokenizer=tokenizer.spec)},
    )
    return Adapter.build(manifest, [Concept(record=record, streams={"text": stream})])


def engram(*arguments: object) -> None:
    """Run the engram command, showing it."""
    words = [str(argument) for argument in arguments]
    print("$ engram " + " ".join(f"'{word}'" if " " in word else word for word in words), flush=True)
    subprocess.run([sys.executable, "-m", "engram_cli", *words], check=True)


def say(title: str) -> None:
    """Print a heading."""
    print(f"\n== {title}", flush=True)


if __name__ == "__main__":
    main()
