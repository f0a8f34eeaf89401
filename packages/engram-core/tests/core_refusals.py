"""Takes a bad file through everything that reads one, and checks what each step says."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from core_builders import make_adapter, make_concept
from core_hostile import Pieces, canonical, join, names_in, several, split

from engram_core import (
    Adapter,
    AdapterFormatError,
    Matcher,
    extract_concepts,
    extract_file,
    find_conflicts,
    merge_adapters,
    merge_files,
    open_adapter,
)

GOOD = several()
DATA = GOOD.to_bytes()
HEADER_STOP = 8 + int.from_bytes(DATA[:8], "little")
REMOVED = object()
OTHER = make_adapter(make_concept("zebra", (900, 901), streams=("clip_l", "t5")))

OPENING = {"open", "merge", "extract"}
CHECKING = {"check", "merge", "extract", "merge in memory", "extract in memory", "conflicts"}


def refusals(path: Path) -> dict[str, str]:
    """Take a file through everything that reads one; return what each step that refuses it says."""
    messages: dict[str, str] = {}

    def attempt(step: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except AdapterFormatError as error:
            messages.setdefault(step, str(error))
            return None

    out = path.with_name("out.safetensors")
    adapter = attempt("open", lambda: open_adapter(path))
    attempt("merge", lambda: merge_files([path], out, overwrite=True))
    attempt("extract", lambda: extract_file(path, ["ant"], out, overwrite=True))
    assert set(names_in(path.parent)) - {out.name} == {path.name}
    if adapter is not None:
        attempt("check", adapter.check)
        attempt("merge in memory", lambda: merge_adapters([OTHER, adapter]))
        attempt("extract in memory", lambda: extract_concepts(adapter, ["ant"]))
        attempt("conflicts", lambda: find_conflicts([OTHER, adapter]))
        for index in range(len(adapter)):
            attempt("concept", partial(adapter.concept, index))
        for stream in adapter.streams:
            attempt("matcher", partial(Matcher, adapter, stream))
    for message in messages.values():
        assert message.isprintable(), "one line, without control characters"
        assert len(message) < 800
        assert message.startswith(f"{path}: ")
    return messages


def expect_refusal(path: Path, data: bytes, steps: set[str], words: tuple[str, ...]) -> None:
    path.write_bytes(data)
    found = refusals(path)
    assert set(found) == steps
    for message in found.values():
        for word in words:
            assert word in message
    if "open" in steps:  # the same file held in memory
        with pytest.raises(AdapterFormatError) as caught:
            Adapter.from_bytes(data, str(path))
        assert str(caught.value) == found["open"]


def changed_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    header, body = split(DATA)
    change(header)
    return join(json.dumps(header).encode(), body)


def with_record(index: int, **fields: Any) -> Pieces:
    pieces = Pieces.of(DATA)
    record = json.loads(pieces.records[index])
    for field, value in fields.items():
        if value is REMOVED:
            del record[field]
        else:
            record[field] = value
    records = pieces.records
    records[index] = canonical(record).encode("utf-8", "surrogatepass")
    pieces.records = records
    return pieces
