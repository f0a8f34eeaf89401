"""The judge of what the library makes of damaged files; `fuzz/run.py` keeps it busy."""

import contextlib
import signal
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from core_builders import make_adapter, make_concept, with_sites
from core_hostile import Pieces, one
from core_rules import RuleError, check_file
from safetensors import safe_open

from engram_core import (
    Adapter,
    AdapterFormatError,
    ConceptNotFoundError,
    ConflictError,
    IncompatibleAdaptersError,
    InputError,
    Matcher,
    Residual,
    extract_concepts,
    extract_file,
    merge_adapters,
    merge_files,
    open_adapter,
)
from engram_core.storage import decode_vectors

SECONDS = 5.0
"""Longest a mutant may take."""

# JSON costs Python objects: nine bytes of text such as `{"a":{}},` become two dicts, and the text is held a few times
# besides. That is the worst case known, about 45 bytes for a byte of the file on Python 3.10 and 40 on later ones, and
# it ends at 256 KiB of text. NumPy's own work is in blocks, of a few bytes for each byte of the file at most.
MEMORY_FIXED = 1 << 16
MEMORY_FACTOR = 50
"""A mutant of n bytes may cost at most MEMORY_FIXED + MEMORY_FACTOR * n bytes in any one step."""

MESSAGE_LIMIT = 1000
"""Longest message, whatever a file holds."""


class FindingError(Exception):
    """The library did with a mutant what it must never do."""


class HangError(BaseException):
    """Not an Exception, so that no code under test can swallow it."""


@lru_cache(maxsize=8)
def _neighbour(sites: tuple[tuple[str, tuple[str, ...] | None], ...], dtype: str) -> Adapter:
    """Return a good adapter that merges with every unharmed source of those streams and that vector type."""
    if "t5" not in dict(sites):
        return with_sites(one(dtype, "zebra", 500), dict(sites))
    yak = make_concept("yak", (700, 701, 702), streams=("clip_l", "t5"), activation="spans")
    return with_sites(make_adapter(yak), dict(sites))


class Judge:
    """Takes one mutant through everything the library does with a file; raises FindingError."""

    def __init__(self, data: bytes, folder: Path, *, measure: bool = False) -> None:
        self.data = data
        self.path = folder / "mutant.safetensors"
        self.out = folder / "out.safetensors"
        self.measure = measure
        self.peak = 0

    def run(self) -> str:
        """Return `refused` (on opening), `half refused` (on checking) or `accepted`."""
        self.path.write_bytes(self.data)
        self.out.unlink(missing_ok=True)
        bad = (AdapterFormatError,)
        adapter = self.attempt("open", lambda: open_adapter(self.path), bad)
        twin = self.attempt("from_bytes", lambda: Adapter.from_bytes(self.data), bad)
        if isinstance(adapter, Exception) != isinstance(twin, Exception):
            raise FindingError(f"path and bytes differ: {adapter!r} against {twin!r}")
        if isinstance(adapter, Exception):
            self.attempt("merge_files", lambda: merge_files([self.path], self.out), bad, must_fail=True)
            return "refused"
        self.attempt("safe_open", self.open_with_safetensors, ())
        broken = isinstance(self.attempt("check", adapter.check, bad), Exception)
        self.compare_with_rules(broken)
        allowed = bad if broken else ()
        self.attempt("records", lambda: list(adapter.records()), allowed)
        names = self.attempt("names", adapter.names, allowed)
        self.attempt("anchored", adapter.anchored, allowed)
        self.attempt("absent", lambda: adapter.concept("absent"), (*allowed, ConceptNotFoundError))
        faulty = 0
        for index in range(len(adapter)):
            one = self.attempt(f"concept {index}", lambda i=index: adapter.concept(i), allowed)
            faulty += isinstance(one, Exception)
            if not broken:
                self.attempt("concept by name", lambda n=names[index]: adapter.concept(n), ())
        for stream in adapter.streams:
            self.use(adapter, stream, allowed)
        self.attempt("identity", adapter.identity, ())
        self.combine(adapter, broken)
        if self.out.parent.exists() and {p.name for p in self.out.parent.iterdir()} - {self.path.name, self.out.name}:
            raise FindingError("a temporary file is left over")
        return "half refused" if broken else "accepted"

    def attempt(
        self, step: str, call: Callable[[], Any], allowed: tuple[type[Exception], ...], *, must_fail: bool = False
    ) -> Any:
        """Return what the call returns, or the error it raises if that is allowed."""
        if self.measure:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
        try:
            result = call()
        except allowed as error:
            self.check_message(step, error)
            result = error
        except Exception as error:
            raise FindingError(f"{step}: {type(error).__name__}: {str(error)[:300]}") from error
        else:
            if must_fail:
                raise FindingError(f"{step}: succeeded with a file that is refused elsewhere")
        if self.measure:
            peak = tracemalloc.get_traced_memory()[1] - before
            self.peak = max(self.peak, peak)
            if peak > MEMORY_FIXED + MEMORY_FACTOR * len(self.data):
                raise FindingError(f"{step}: took {peak} bytes for a file of {len(self.data)}")
        return result

    def check_message(self, step: str, error: Exception) -> None:
        message = str(error)
        if isinstance(error, ConflictError):
            message = message.replace("\n", "")
        if not message.isprintable():
            raise FindingError(f"{step}: the message is not one printable line: {message[:300]!r}")
        if len(message) > MESSAGE_LIMIT + 2 * len(str(self.path)):
            raise FindingError(f"{step}: the message has {len(message)} characters: {message[:300]!r}")
        if isinstance(error, AdapterFormatError) and not message.startswith((str(self.path), "<memory>")):
            raise FindingError(f"{step}: the message does not name the file: {message[:300]!r}")

    def open_with_safetensors(self) -> None:
        with safe_open(str(self.path), framework="np") as file:
            if set(file.keys()) != set(open_adapter(self.path).container.tensors):
                raise FindingError("safetensors sees other tensors")

    def compare_with_rules(self, broken: bool) -> None:
        try:
            check_file(self.data)
        except RuleError as error:
            if not broken:
                raise FindingError(f"check: accepts a file that breaks the rule: {error}") from None
        else:
            if broken:
                raise FindingError("check: refuses a file that breaks no rule")

    def use(self, adapter: Adapter, stream: str, allowed: tuple[type[Exception], ...]) -> None:
        matcher = self.attempt(f"Matcher {stream}", lambda: Matcher(adapter, stream), allowed)
        if isinstance(matcher, Exception):
            return
        table = adapter.streams[stream]
        prompt = np.concatenate([table.trigger_ids[:60], table.ids[:60], np.arange(10, 40), [1 << 40, -(1 << 63)]])
        matches = self.attempt(f"match {stream}", lambda: matcher.match([prompt, [1, 2]]), allowed)
        if isinstance(matches, Exception):
            return
        self.attempt(f"find_addresses {stream}", lambda: matcher.find_addresses(prompt), allowed)
        hidden = np.ones((2, len(prompt), table.scales.shape[-1]), np.float32)
        site = (adapter.manifest.streams[stream].sites or (None,))[-1]
        measure, self.measure = self.measure, False  # the states are larger than any file here
        edited = self.attempt(
            f"apply {stream}", lambda: Residual(adapter, stream).apply(hidden, matches, site=site), allowed
        )
        self.measure = measure
        if isinstance(edited, Exception) or np.isfinite(edited).all():
            return
        stored = np.concatenate([decode_vectors(table.vectors, table.dtype).ravel(), table.scales.ravel()])
        if np.nanmax(np.abs(stored)) < 1e10:  # larger ones may well overflow
            raise FindingError(f"apply {stream}: gives NaN or infinity")

    def combine(self, adapter: Adapter, broken: bool) -> None:
        """Merge and extract: exact, reversible and idempotent if the file is good, refused if it is not."""
        bad = (AdapterFormatError,)
        sites = tuple((name, spec.sites) for name, spec in adapter.manifest.streams.items())
        neighbour = _neighbour(sites, next(iter(adapter.streams.values())).dtype)
        if broken:
            self.attempt("merge", lambda: merge_adapters([adapter]), bad, must_fail=True)
            # Small adapters are checked many at a time.
            for order in ([adapter, neighbour], [neighbour, adapter], [neighbour, adapter, neighbour]):
                self.attempt("merge with another", lambda order=order: merge_adapters(order), bad, must_fail=True)
            self.attempt("merge_files", lambda: merge_files([self.path], self.out), bad, must_fail=True)
            self.attempt("extract", lambda: extract_file(self.path, ["cat"], self.out), bad, must_fail=True)
            return
        names = adapter.names()
        alone = self.attempt("merge alone", lambda: merge_adapters([adapter]), ())
        self.attempt("check of the merge", alone.check, ())
        again = merge_adapters([alone, adapter])
        if again.to_bytes() != alone.to_bytes():
            raise FindingError("merging twice is not merging once")
        if [c.digest() for c in alone.concepts()] != [c.digest() for c in adapter.concepts()]:
            raise FindingError("merging changed a concept")
        part = self.attempt("extract", lambda: extract_concepts(adapter, names[:1]), ())
        self.attempt("check of the extract", part.check, ())
        if part.concept(0).digest() != adapter.concept(0).digest():
            raise FindingError("extracting changed a concept")
        self.attempt("extract_file", lambda: extract_file(self.path, names[:1], self.out), ())
        if self.out.read_bytes() != part.to_bytes():
            raise FindingError("extract_file and extract_concepts differ")
        refused = (IncompatibleAdaptersError, ConflictError)
        both = self.attempt("merge", lambda: merge_adapters([adapter, neighbour]), refused)
        if isinstance(both, ConflictError):
            both = self.attempt(
                "merge both", lambda: merge_adapters([adapter, neighbour], on_conflict="both"), (InputError,)
            )
        if isinstance(both, Exception):
            return
        self.attempt("check of the merge with another", both.check, ())
        if set(names) <= set(both.names()):
            back = extract_concepts(both, names)
            if Pieces.of(back).tensors != Pieces.of(alone).tensors:
                raise FindingError("extracting what was merged does not give it back")


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(data: bytes, folder: Path, *, measure: bool = False) -> tuple[str, int]:
    """Take a mutant through the library; return the outcome and, when measured, the peak of memory in bytes.

    Raises:
        FindingError: the library did what it must never do.
    """
    case = Judge(data, folder, measure=measure)
    if measure:
        tracemalloc.start()
    try:
        with warnings.catch_warnings(), _alarm(SECONDS):
            warnings.simplefilter("error")
            return case.run(), case.peak
    except HangError:
        raise FindingError(f"takes more than {SECONDS:g} s") from None
    except (FindingError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic of the safetensors library is no Exception
        raise FindingError(f"{type(error).__name__}: {str(error)[:300]}") from error
    finally:
        if measure:
            tracemalloc.stop()
