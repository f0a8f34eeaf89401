"""What `engram inspect` shows of adapters as such: contents of one, conflicts of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from rich.table import Table

from engram_cli.console import format_size, out, plain, show_json, show_note, working
from engram_core import Adapter

_FEW = 5  # cases of interference shown one by one


def show_adapter(adapter: Adapter, *, quick: bool, limit: int, as_json: bool) -> None:
    """Show an adapter's contents."""
    identity = None
    if not quick:
        with working("checking"):
            adapter.check()
            identity = adapter.identity()
    if as_json:
        show_json(_describe(adapter, identity))
        return
    manifest = adapter.manifest
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    many = "concept" if len(adapter) == 1 else "concepts"
    for name, value in (
        ("file", f"{adapter.label} ({format_size(adapter.nbytes())}, {len(adapter)} {many})"),
        ("backbone", manifest.backbone),
        ("base model", manifest.base_model),
        ("fingerprint", manifest.base_fingerprint or "not recorded"),
        ("identity", identity or "not computed (--quick)"),
    ):
        facts.add_row(name, plain(value))
    out.print(facts)

    streams = _table("stream", "site", ">width", ">entries", ">variants", ">vectors", "tokenizer")
    for name, table in adapter.streams.items():
        spec = manifest.streams[name]
        streams.add_row(
            plain(name),
            plain(spec.site),
            str(spec.width),
            str(len(table.concept)),
            str(len(table.trigger_concept)),
            f"{format_size(table.vectors.nbytes)} {table.dtype}",
            plain(spec.tokenizer.class_name),
        )
    out.print()
    out.print(streams)

    concepts = _table("concept", "trigger", "activation", "rule", "overlap", ">entries", "license")
    shown = len(adapter) if limit == 0 else min(limit, len(adapter))
    for index in range(shown):
        record = adapter.record(index)
        rows = [table.entry_rows(index) for table in adapter.streams.values()]
        concepts.add_row(
            plain(record.name),
            plain(record.trigger),
            record.activation,
            record.rule,
            record.overlap,
            str(sum(row.stop - row.start for row in rows)),
            plain(record.license or "-"),
        )
    out.print()
    out.print(concepts)
    if shown < len(adapter):
        out.print(plain(f"and {len(adapter) - shown} more (--limit 0 lists all)"))
    n_spans = int((~adapter.anchored()).sum())
    if n_spans:
        what = "this concept fires" if n_spans == len(adapter) == 1 else f"{n_spans} of {len(adapter)} concepts fire"
        show_note(f"{what} on any registered n-gram, in unrelated text too (activation spans); see --against")
    if not quick and len(adapter) > 1:
        _show_interference(adapter)


def _show_interference(adapter: Adapter) -> None:
    """Point out concepts that fire inside the triggers of others."""
    from engram_core import find_interference

    found = [case for case in find_interference(adapter) if not case.resolved]
    for case in found[:_FEW]:
        ids = " ".join(map(str, case.ids))
        show_note(
            f"{case.concept!r} also fires inside the trigger of {case.inside!r}, in {case.stream} on tokens {ids}"
        )
    if len(found) > _FEW:
        show_note(f"and {len(found) - _FEW} more cases of one concept firing inside the trigger of another")


def show_conflicts(adapters: Sequence[Adapter], *, as_json: bool) -> None:
    """Show every pair of concepts that a merge would have to settle."""
    from engram_core import find_conflicts

    with working("comparing"):
        conflicts = find_conflicts(adapters)
    if as_json:
        show_json(
            [
                {
                    "kind": conflict.kind,
                    "stream": conflict.stream or None,
                    "ids": list(conflict.ids),
                    "first": {"name": conflict.first, "file": conflict.first_label},
                    "second": {"name": conflict.second, "file": conflict.second_label},
                }
                for conflict in conflicts
            ]
        )
        return
    total = sum(len(adapter) for adapter in adapters)
    if not conflicts:
        out.print(plain(f"{len(adapters)} adapters with {total} concepts merge without conflict", "green"))
        return
    table = _table("first", "file", "second", "file", "share", "stream", "token ids")
    for conflict in conflicts:
        table.add_row(
            plain(conflict.first),
            plain(conflict.first_label),
            plain(conflict.second),
            plain(conflict.second_label),
            conflict.kind,
            plain(conflict.stream or "-"),
            plain(" ".join(map(str, conflict.ids)) or "-"),
        )
    out.print(table)
    pairs = "pair" if len(conflicts) == 1 else "pairs"
    out.print(plain(f"{len(conflicts)} conflicting {pairs}; engram merge --on-conflict settles them", "yellow"))


def _describe(adapter: Adapter, identity: str | None) -> dict[str, Any]:
    """Return everything `inspect` knows, as plain values."""
    counts = [np.bincount(table.concept, minlength=len(adapter)) for table in adapter.streams.values()]
    return {
        "file": adapter.label,
        "bytes": adapter.nbytes(),
        "identity": identity,
        "kind": "concept-table",
        "manifest": adapter.manifest.to_json(),
        "streams": {
            name: {
                "entries": len(table.concept),
                "variants": len(table.trigger_concept),
                "dtype": table.dtype,
                "vector_bytes": table.vectors.nbytes,
            }
            for name, table in adapter.streams.items()
        },
        "concepts": [
            {
                "name": record.name,
                "trigger": record.trigger,
                "activation": record.activation,
                "rule": record.rule,
                "overlap": record.overlap,
                "max_ngram": record.max_ngram,
                "dtype": record.dtype,
                "license": record.license,
                "training": dict(record.training),
                "entries": {name: int(count[index]) for name, count in zip(adapter.streams, counts, strict=True)},
            }
            for index, record in enumerate(adapter.records())
        ],
    }


def _table(*columns: str) -> Table:
    """Return a plain table; a column that begins with > is right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold dim")
    for column in columns:
        side: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(column.removeprefix(">"), justify=side, overflow="fold")
    return table
