"""What `engram inspect` shows of adapters as such: contents of one, conflicts of several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engram_cli.messages import count, format_size, printable, show, show_columns, show_json, show_note
from engram_core import Adapter, StreamSpec

_FEW = 5  # cases of interference shown one by one
_SLOW = 1 << 26  # bytes that take a noticeable time to check


def show_adapter(adapter: Adapter, *, quick: bool, limit: int, as_json: bool) -> None:
    """Show an adapter's contents."""
    identity = None
    if not quick:
        with working_on("checking", adapter.nbytes()):
            adapter.check()
            identity = adapter.identity()
    if as_json:
        show_json(_describe(adapter, identity))
        return
    manifest = adapter.manifest
    for name, value in (
        ("file", f"{adapter.label} ({format_size(adapter.nbytes())}, {count(len(adapter), 'concept')})"),
        ("backbone", manifest.backbone),
        ("base model", manifest.base_model),
        ("fingerprint", manifest.base_fingerprint or "not recorded"),
        ("identity", identity or "not computed (--quick)"),
    ):
        show(f"{name:<11}  {printable(value)}")
    show()
    show_columns(
        ("stream", "site", ">width", ">entries", ">variants", ">vectors", "tokenizer"),
        [
            (
                name,
                _name_site(manifest.streams[name]),
                str(manifest.streams[name].width),
                str(len(table.concept)),
                str(len(table.trigger_concept)),
                f"{format_size(table.vectors.nbytes)} {table.dtype}",
                manifest.streams[name].tokenizer.class_name,
            )
            for name, table in adapter.streams.items()
        ],
    )
    show()
    shown = len(adapter) if limit == 0 else min(limit, len(adapter))
    show_columns(
        ("concept", "trigger", "activation", "rule", "overlap", ">entries", "license"),
        [_concept_row(adapter, index) for index in range(shown)],
    )
    if shown < len(adapter):
        show(f"and {len(adapter) - shown} more (--limit 0 lists all)")
    n_spans = int((~adapter.anchored()).sum())
    if n_spans:
        what = "this concept fires" if n_spans == len(adapter) == 1 else f"{n_spans} of {len(adapter)} concepts fire"
        show_note(f"{what} on any registered n-gram, in unrelated text too (activation spans); see --against")
    if not quick and len(adapter) > 1:
        _show_interference(adapter)


def _name_site(spec: StreamSpec) -> str:
    return spec.site if spec.sites is None else f"{spec.site}, {count(len(spec.sites), 'block')}"


def _concept_row(adapter: Adapter, index: int) -> tuple[str, ...]:
    record = adapter.record(index)
    rows = [table.entry_rows(index) for table in adapter.streams.values()]
    n_entries = sum(row.stop - row.start for row in rows)
    return (
        record.name,
        record.trigger,
        record.activation,
        record.rule,
        record.overlap,
        str(n_entries),
        record.license or "-",
    )


@contextlib.contextmanager
def working_on(title: str, n_bytes: int) -> Iterator[None]:
    """Show a spinner over what takes long enough to be worth importing Rich for."""
    if n_bytes < _SLOW:
        yield
        return
    from engram_cli.console import working

    with working(title):
        yield


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

    with working_on("comparing", sum(adapter.nbytes() for adapter in adapters)):
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
        show(f"{len(adapters)} adapters with {total} concepts merge without conflict", fg="green")
        return
    show_columns(
        ("first", "file", "second", "file", "share", "stream", "token ids"),
        [
            (
                conflict.first,
                conflict.first_label,
                conflict.second,
                conflict.second_label,
                conflict.kind,
                conflict.stream or "-",
                " ".join(map(str, conflict.ids)) or "-",
            )
            for conflict in conflicts
        ],
    )
    show(f"{count(len(conflicts), 'conflicting pair')}; engram merge --on-conflict settles them", fg="yellow")


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
