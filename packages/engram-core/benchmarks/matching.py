"""Matching: what finding the entries of a prompt costs, beside a dictionary and beside TinyEngram's search.

Run through `run.py`.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

from measure import Bound, Outcome, Spread, Table, interleave
from synthetic import ENTRIES, TRIGGER, Ints, Prompts, cut_entries, draw_triggers, make_table

from engram_core import Matcher

SIZES = [1, 10, 100, 1_000, 10_000, 47_620]  # concepts; the last has 1,000,020 entries
ACTIVATIONS = ("anchored", "spans")
N_BATCHES = 256

Entry = tuple[int, ...]
Hits = list[tuple[int, int, int]]  # row, entry, start


def run(*, quick: bool) -> Outcome:
    """Measure everything."""
    sizes = SIZES[:4] if quick else SIZES
    few, many = sizes[0], sizes[-1]
    matchers, tables, figures = {}, [], {}
    for activation in ACTIVATIONS:
        for size in sizes:
            adapter = make_table(size, activation)
            start = perf_counter()
            matchers[activation, size] = Matcher(adapter, "clip_l")
            figures[f"{activation} {size * ENTRIES} build_s"] = perf_counter() - start
    dictionaries = {size: build_dictionary(size) for size in (few, many)}

    quiet = {
        "short": _quiet_batches(list(matchers.values()), 8, 40),
        "full": _quiet_batches(list(matchers.values()), 75, 75),
    }
    firing = {size: _firing_batches(quiet["short"], size) for size in sizes}
    for size, dictionary in dictionaries.items():
        _expect_agreement(matchers["spans", size], dictionary, firing[size])

    timed: dict[str, dict[Any, Spread]] = {}
    for kind, batches_of in (
        ("short", lambda _: quiet["short"]),
        ("full", lambda _: quiet["full"]),
        ("fires", firing.__getitem__),
    ):
        cases: dict[Any, Sequence[Callable[[], object]]] = {
            (activation, size): [partial(matcher.match, batch) for batch in batches_of(size)]
            for (activation, size), matcher in matchers.items()
        }
        for size, dictionary in dictionaries.items():
            rows = [[tuple(row) for row in batch.tolist()] for batch in batches_of(size)]
            cases["dictionary", size] = [partial(search_dictionary, batch, dictionary) for batch in rows]
        timed[kind] = interleave(cases, 2 if quick else 12)

    rows = []
    for which, size in timed["short"]:
        cells = [timed[kind][which, size].show() for kind in ("short", "full", "fires")]
        rows.append([which, f"{size * ENTRIES:,}", *cells])
        for kind in ("short", "full", "fires"):
            figures[f"{which} {size * ENTRIES} {kind}_s"] = timed[kind][which, size].median
    tables.append(
        Table(
            title="One call for a batch of 2 × 77 ids, median (10th to 90th percentile)",
            columns=("index", "entries", "nothing fires", "nothing fires, prompts full", "a trigger fires"),
            rows=rows,
        )
    )
    bounds = [
        Bound(
            what=f"{activation}, {what}: {many * ENTRIES:,} entries against {few * ENTRIES}",
            value=timed[kind][activation, many].median / timed[kind][activation, few].median,
            limit=3,
        )
        for activation in ACTIVATIONS
        for kind, what in (("short", "nothing fires"), ("full", "prompts full"), ("fires", "a trigger fires"))
    ]
    bounds += [
        Bound(
            what=f"{activation}, {what}: time against the dictionary's, {many * ENTRIES:,} entries",
            value=timed[kind][activation, many].median / timed[kind]["dictionary", many].median,
            limit=1,
        )
        for activation in ACTIVATIONS
        for kind, what in (("short", "nothing fires"), ("fires", "a trigger fires"))
    ]

    memory = []
    for (activation, size), matcher in matchers.items():
        each = matcher.nbytes / (size * ENTRIES)
        build = figures[f"{activation} {size * ENTRIES} build_s"]
        memory.append([activation, f"{size * ENTRIES:,}", f"{each:.1f}", f"{build * 1e3:,.1f} ms"])
        figures[f"{activation} {size * ENTRIES} bytes_per_entry"] = each
        if size == many:
            bounds.append(
                Bound(what=f"{activation}: index of {size * ENTRIES:,} entries", value=each, limit=48, unit="bytes")
            )
    del dictionaries, timed
    for size in (few, many):
        each, build = _weigh_dictionary(size)
        memory.append(["dictionary", f"{size * ENTRIES:,}", f"{each:.1f}", f"{build * 1e3:,.1f} ms"])
        figures[f"dictionary {size * ENTRIES} bytes_per_entry"] = each
        figures[f"dictionary {size * ENTRIES} build_s"] = build
    tables.append(
        Table(
            title="Memory of the index beyond the token ids, and time to build it",
            columns=("index", "entries", "bytes an entry", "build"),
            rows=memory,
        )
    )
    searched, notes = _measure_tensor_search(sizes, matchers, quiet["short"], firing, figures, quick=quick)
    return Outcome(tables=[*tables, *searched], bounds=bounds, notes=notes, figures=figures)


def build_dictionary(n_concepts: int) -> dict[Entry, int]:
    """Return entry -> number, numbered as in the adapter."""
    columns = [entries.tolist() for _, entries in cut_entries(draw_triggers(n_concepts))]
    rows = (tuple(ids) for concept in zip(*columns, strict=True) for spans in concept for ids in spans)
    return {ids: number for number, ids in enumerate(rows)}


def search_dictionary(rows: list[Entry], dictionary: dict[Entry, int]) -> Hits:
    """Look up every window of every row. The rows come as tuples, the fastest form for it."""
    hits = []
    get = dictionary.get
    for number, row in enumerate(rows):
        for n in range(2, TRIGGER + 1):
            for start in range(len(row) - n + 1):
                entry = get(row[start : start + n])
                if entry is not None:
                    hits.append((number, entry, start))
    return hits


def search_tensors(input_ids: Any, targets: list[Any]) -> Hits:
    """Search as TinyEngram does: for every entry, row and position, compare a slice of the ids."""
    import torch

    n_rows, length = input_ids.shape
    return [
        (row, entry, start)
        for entry, target in enumerate(targets)
        for row in range(n_rows)
        for start in range(length - target.shape[0] + 1)
        if torch.equal(input_ids[row, start : start + target.shape[0]], target)
    ]


def _quiet_batches(matchers: list[Matcher], shortest: int, longest: int) -> list[Ints]:
    """Return prompts in which no index finds anything."""
    prompts = Prompts(seed=shortest)
    batches: list[Ints] = []
    while len(batches) < N_BATCHES:
        batch = prompts.batch(shortest, longest)
        if not any(len(matcher.match(batch)) for matcher in matchers):
            batches.append(batch)
    return batches


def _firing_batches(batches: list[Ints], n_concepts: int) -> list[Ints]:
    """Put a trigger, each time another, into the first row of every batch."""
    triggers = draw_triggers(n_concepts)
    firing = [batch.copy() for batch in batches]
    for number, batch in enumerate(firing):
        batch[0, 3 : 3 + TRIGGER] = triggers[number * 7919 % n_concepts]
    return firing


def _expect_agreement(matcher: Matcher, dictionary: dict[Entry, int], batches: list[Ints]) -> None:
    for batch in batches:
        found = matcher.match(batch)
        ours = list(zip(found.row.tolist(), found.entry.tolist(), found.start.tolist(), strict=True))
        if sorted(search_dictionary([tuple(row) for row in batch.tolist()], dictionary)) != ours or not ours:
            raise ValueError("the dictionary and the matcher disagree")


def _weigh_dictionary(n_concepts: int) -> tuple[float, float]:
    """Return bytes an entry, the ids' own 4 bytes a token taken off, and seconds to build."""
    start = perf_counter()
    build_dictionary(n_concepts)
    elapsed = perf_counter() - start
    tracemalloc.start()
    try:
        dictionary = build_dictionary(n_concepts)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    ids = 4 * sum(map(len, dictionary))
    return (held - ids) / len(dictionary), elapsed


def _time(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def _measure_tensor_search(
    sizes: list[int],
    matchers: dict[tuple[str, int], Matcher],
    quiet: list[Ints],
    firing: dict[int, list[Ints]],
    figures: dict[str, float],
    *,
    quick: bool,
) -> tuple[list[Table], list[str]]:
    try:
        import torch
    except ImportError:
        return [], ["PyTorch is not installed: the comparison with TinyEngram's search was left out."]
    torch.set_num_threads(1)
    rows = []
    for size in sizes[: 2 if quick else 3]:
        targets = [torch.tensor(ids) for ids in build_dictionary(size)]
        matcher = matchers["spans", size]
        found = matcher.match(firing[size][0])
        ours = list(zip(found.row.tolist(), found.entry.tolist(), found.start.tolist(), strict=True))
        if sorted(search_tensors(torch.from_numpy(firing[size][0]), targets)) != ours:
            raise ValueError("the search over tensors and the matcher disagree")
        slow: list[float] = []
        fast: list[float] = []
        for batch in quiet[: max(5, 40 // size)]:
            slow.append(_time(partial(search_tensors, torch.from_numpy(batch), targets)))
            fast += [_time(partial(matcher.match, other)) for other in quiet]
        tensors, spans = Spread.of(slow), Spread.of(fast)
        figures[f"tensors {size * ENTRIES} short_s"] = tensors.median
        ratio = f"{tensors.median / spans.median:,.0f} times"
        rows.append([f"{size * ENTRIES:,}", tensors.show("ms"), spans.show("µs"), ratio])
    table = Table(
        title="TinyEngram's search, nothing fires",
        columns=("entries", "torch.equal on every slice", "spans", "dearer"),
        rows=rows,
    )
    return [table], []
