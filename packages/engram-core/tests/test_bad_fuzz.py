"""A short run of the fuzzer, and whether its judge would notice a fault of the library."""

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_hostile import Pieces, long_adapter, one, several
from core_judge import FindingError, judge
from core_mutants import make_mutant, sources

import engram_core.adapter
import engram_core.canonical
import engram_core.checks
import engram_core.layout
import engram_core.matcher
import engram_core.merge
from engram_core import Adapter

GOOD = one().to_bytes()
SEVERAL = several().to_bytes()
SEED = 1
PER_TEST = 250
RUN = Path(__file__).parents[1] / "fuzz" / "run.py"


@pytest.mark.parametrize("first", range(0, 2000, PER_TEST))
def test_damaged_files_are_refused_or_work(tmp_path, first):
    outcomes: Counter[str] = Counter()
    for number in range(first, first + PER_TEST):
        how, data = make_mutant(SEED, number)
        try:
            outcome, _ = judge(data, tmp_path, measure=number % 25 == 0)
        except FindingError as finding:
            pytest.fail(f"mutant {number} of seed {SEED}, {how}: {finding}")
        outcomes[outcome] += 1
    assert min(outcomes[outcome] for outcome in ("refused", "half refused", "accepted")) > 10


def test_good_files_are_accepted(tmp_path):
    for data in [*sources(), long_adapter(50, 8, "BF16")]:
        assert judge(data, tmp_path, measure=True)[0] == "accepted"


def test_a_mutant_is_the_same_whenever_it_is_made():
    assert [make_mutant(7, number) for number in range(100)] == [make_mutant(7, number) for number in range(100)]
    assert make_mutant(7, 0) != make_mutant(8, 0)


@pytest.mark.skipif(not RUN.exists(), reason="the script is not part of the package")
def test_the_script_reports_and_succeeds():
    command = [sys.executable, str(RUN), "--mutations", "20", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "20 mutants of seed 3" in done.stdout
    assert "0 finding" in done.stdout


# Who watches the judge: faults of the library that it must notice.


def never(*args: Any, **options: Any) -> None:
    """A check that checks nothing."""


def changed(name: str, index: Any, value: Any) -> bytes:
    pieces = Pieces.of(several("f32"))
    pieces.set(name, index, value)
    return pieces.pack()


def long_row() -> bytes:
    pieces = Pieces.of(several("f32"))
    pieces.put("t5.triggers.ids", np.concatenate([pieces.array("t5.triggers.ids"), np.zeros(5000)]))
    pieces.set("t5.triggers.offsets", -1, 5024)
    return pieces.pack()


def expect_finding(folder: Path, data: bytes, words: str) -> None:
    with pytest.raises(FindingError, match=words):
        judge(data, folder, measure=True)


@pytest.mark.parametrize(
    ("check", "data", "words"),
    [
        ("check_vectors", changed("t5.vectors", (0, 0), np.nan), "breaks the rule: vectors are finite"),
        ("check_ids", changed("t5.entries.ids", 0, -1), "breaks the rule: ids are in the vocabulary"),
        ("check_owners", changed("t5.triggers.concept", -1, 9), "IndexError|breaks the rule"),
        ("check_offsets", long_row(), "breaks the rule: 1..4096 ids a row"),
        ("check_ngram_order", changed("t5.entries.ids", slice(0, 4), [20, 21, 20, 21]), "breaks the rule: rows ascend"),
    ],
)
def test_a_check_that_is_missing_is_a_finding(tmp_path, monkeypatch, check, data, words):
    assert judge(data, tmp_path)[0] == "half refused"
    for module in (engram_core.adapter, engram_core.checks, engram_core.matcher):
        if hasattr(module, check):
            monkeypatch.setattr(module, check, never)
    expect_finding(tmp_path, data, words)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (IndexError("index 5 is out of bounds"), "check: IndexError: index 5 is out of bounds"),
        (MemoryError(), "check: MemoryError"),
        (RecursionError(), "check: RecursionError"),
        (RuntimeWarning("overflow"), "check: RuntimeWarning: overflow"),
        (SystemExit(), "SystemExit"),
        (BaseException("a panic"), "BaseException: a panic"),
    ],
)
def test_an_error_that_is_not_documented_is_a_finding(tmp_path, monkeypatch, error, words):
    def fail(adapter: Adapter) -> None:
        raise error

    monkeypatch.setattr(Adapter, "check", fail)
    expect_finding(tmp_path, GOOD, words)


def test_an_endless_loop_is_a_finding(tmp_path, monkeypatch):
    def loop(adapter: Adapter) -> None:
        while True:
            pass

    monkeypatch.setattr("core_judge.SECONDS", 0.05)
    monkeypatch.setattr(Adapter, "check", loop)
    expect_finding(tmp_path, GOOD, "takes more than 0.05 s")


def test_memory_out_of_proportion_is_a_finding(tmp_path, monkeypatch):
    check = Adapter.check
    monkeypatch.setattr(Adapter, "check", lambda adapter: (check(adapter), np.ones(1 << 20))[0])
    expect_finding(tmp_path, GOOD, "check: took 8[0-9]{6} bytes for a file of")


@pytest.mark.parametrize(
    ("module", "name", "replace", "words"),
    [
        (engram_core.layout, "quote", lambda value: str(value), "not one printable line"),
        (engram_core.layout, "quote", lambda value: repr(value) * 100, "the message has"),
    ],
)
def test_a_message_that_is_no_line_of_text_is_a_finding(tmp_path, monkeypatch, module, name, replace, words):
    pieces = Pieces.of(one())
    pieces.metadata["format"] = "two\nlines\x1b[31m"
    data = pieces.pack()
    assert judge(data, tmp_path)[0] == "refused"
    monkeypatch.setattr(module, name, replace)
    expect_finding(tmp_path, data, words)


def swapped(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: call(*args)[::-1]


def test_a_merge_that_mixes_concepts_up_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(engram_core.merge, "_find_runs", swapped(engram_core.merge._find_runs))
    expect_finding(tmp_path, SEVERAL, "merge|merging")
