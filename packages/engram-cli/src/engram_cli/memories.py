"""What `engram inspect` shows of a hashed memory."""

from __future__ import annotations

import json
from typing import Any

from engram_cli.messages import count, format_size, printable, show, show_columns, show_json
from engram_cli.overview import working_on
from engram_core import HashedMemory
from engram_core.memory import MEMORY_KIND, TABLE


def show_memory(memory: HashedMemory, *, quick: bool, as_json: bool) -> None:
    """Show what a memory belongs to, how large it is and how it was made."""
    identity = None
    if not quick:
        with working_on("checking", memory.nbytes()):
            memory.check()
            identity = memory.identity()
    if as_json:
        show_json(_describe(memory, identity))
        return
    manifest, record, settings = memory.manifest, memory.record, memory.settings
    tokenizer = manifest.streams["text"].tokenizer
    sizes = ", ".join(f"{size} for n = {n}" for n, size in enumerate(settings.engram_vocab_size, start=2))
    for name, value in (
        ("file", f"{memory.label} ({format_size(memory.nbytes())}, hashed memory)"),
        ("name", record.name),
        ("backbone", manifest.backbone),
        ("base model", manifest.base_model),
        ("fingerprint", manifest.base_fingerprint or "not recorded"),
        ("identity", identity or "not computed (--quick)"),
        ("tokenizer", f"{tokenizer.class_name}, {tokenizer.vocab_size} tokens"),
        ("licence", record.license or "-"),
        ("learned", f"{count(memory.n_parameters(), 'value')} for width {memory.width}"),
        ("n-grams", f"2 to {settings.max_ngram_size}, {count(settings.n_head_per_ngram, 'head')} each"),
        ("rows a head", f"{sizes}, or the primes that follow; width {settings.head_width}"),
        ("window", f"{count(settings.kernel_size, 'tap')} every {count(settings.dilation, 'position')}"),
        ("branches", str(settings.hc_mult)),
        ("hash", f"{settings.hashing}, seed {settings.seed}, left of the text is token {settings.pad_id}"),
    ):
        show(f"{name:<11}  {printable(value)}")
    show()
    rows = _count_rows(memory)
    show_columns(
        ("layer", ">rows", ">table", "type"),
        [(str(layer), str(n_rows), format_size(n_bytes), dtype) for layer, (n_rows, n_bytes, dtype) in rows.items()],
    )
    if record.training:
        show()
        show_columns(("training", "value"), [(name, _plain(value)) for name, value in sorted(record.training.items())])


def _count_rows(memory: HashedMemory) -> dict[int, tuple[int, int, str]]:
    """Return rows, bytes and type of each layer's table."""
    found = {}
    for layer in memory.settings.layer_ids:
        dtype, stored = memory.tensor(layer, TABLE)
        found[layer] = len(stored), stored.nbytes, dtype
    return found


def _describe(memory: HashedMemory, identity: str | None) -> dict[str, Any]:
    """Return everything `inspect` knows, as plain values."""
    return {
        "file": memory.label,
        "bytes": memory.nbytes(),
        "identity": identity,
        "kind": MEMORY_KIND,
        "manifest": memory.manifest.to_json(),
        **memory.record.to_json(),
        "parameters": memory.n_parameters(),
        "compressed_vocabulary": memory.hash.compressed_vocab_size,
        "tables": {
            str(layer): {"rows": n_rows, "bytes": n_bytes, "dtype": dtype}
            for layer, (n_rows, n_bytes, dtype) in _count_rows(memory).items()
        },
    }


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
