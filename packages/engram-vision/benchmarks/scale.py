"""Many concepts in one file: what a pipeline pays for them, and whether each still does what it does alone.

Run through `run.py`. The trained concepts are those of `comparison`, learned here where they are missing; the rest has
triggers of seven words and vectors of the mean and spread of trained ones. Each file is merged in a process of its own
and tried out in another, so that memory is what a user of the file needs.
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from accumulation import ENGRAM
from comparison import LOOK, WORK
from crowds import draw_like
from lessons import open_model, read_cast
from measure import Outcome, Table
from memory import Memory
from paired import AGAIN, BARE, Call, Ratio, relate, time_rounds
from prompts import STREAM, Vocabulary
from questions import NEW, QUIET, Amount, ask_alone
from rows import Job, draw_questions, take_row
from synthetic import concept_name, cut_entries
from ways_to_learn import BASE, engram_file

from engram_core import Adapter, audit_lines, merge_files, open_adapter
from engram_core.concept import Concept, ConceptStream
from engram_vision.demo.characters import DemoCharacter
from engram_vision.loading import load_engram, pipeline_tokenizers, unload_engrams
from engram_vision.shipped import tiny_fingerprint

SIZES = (1, 5, 500, 10_000, 47_619)
"""Concepts in the file: one trained one, about 100 and 10,000 entries, 10,000 concepts, a million entries."""

ROUNDS, CHECKED, OPENED = 200, 200, 5
_MEGA = 1e6

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What one size costs and does.

    Attributes:
        concepts, entries: in the file.
        size: of the file, in bytes.
        merge_seconds: from the trained files and one of all others to the merged file.
        open_seconds, load_seconds: of `open_adapter`, and of `load_engram` with what it opened; medians of some times.
        memory: that a pipeline with the file needs more than without, in bytes.
        quiet, firing: time of an encoded prompt in relation to the bare pipeline's.
        again: the bare pipeline's in relation to itself.
        alone: pictures of a trained concept, and how many have the bytes of what its own file draws.
        base: pictures without a trigger, and how many have the bytes of the bare pipeline's.
        fired: triggers tried in sentences, and how many fired exactly once, for their own concept.
    """

    concepts: int
    entries: int
    size: int
    merge_seconds: float
    open_seconds: float
    load_seconds: float
    memory: int
    quiet: Ratio
    firing: Ratio
    again: Ratio
    alone: tuple[int, int]
    base: tuple[int, int]
    fired: tuple[int, int]


def run(*, quick: bool, device: str) -> Outcome:
    """Measure every size."""
    work = WORK / tiny_fingerprint("sd15")[:12]
    sizes, rounds = (SIZES[:3], 5) if quick else (SIZES, ROUNDS)
    cast, _, phrases = read_cast()
    jobs = [_job(one, phrases, work, device) for one in cast]
    for job in jobs:
        take_row(job)
    found = []
    for size in sizes:
        print(f"{size:,} concepts ...", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="engram-scale-") as name:
            file = Path(name) / "merged.safetensors"
            seconds = _call(merge, jobs, size, file)
            found.append(_call(measure, jobs, file, seconds, rounds, device))
    return Outcome(
        tables=[_costs(found), _deeds(found)],
        figures={"rounds": rounds, "threads": torch.get_num_threads(), "sizes": [asdict(scale) for scale in found]},
    )


def _call(work: Callable[..., Result], *given: Any) -> Result:
    """Return what a function returns in a new process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def merge(jobs: Sequence[Job], size: int, target: Path) -> float:
    """Write a file of so many concepts; returns how long merging took."""
    files = _trained(jobs)[:size]
    if size == 1:
        shutil.copy(files[0], target)
        return 0.0
    others = target.with_name("others.safetensors")
    _invent(files, size - len(files), Vocabulary.tiny()).save(others)
    begun = perf_counter()
    merge_files([*files, others], target)
    return perf_counter() - begun


def measure(jobs: Sequence[Job], file: Path, merge_seconds: float, rounds: int, device: str) -> Scale:
    """Try out a file of many concepts."""
    trained, trigger = _trained(jobs)[0], jobs[0].characters[0].name
    pipeline, memory = open_model(device), Memory(device)
    load_engram(pipeline, open_adapter(trained), name="one")  # what is only done once is not counted
    _encode(pipeline, f"{trigger} in the snow")()
    unload_engrams(pipeline)
    _encode(pipeline, "a fox in the snow")()
    before, opening, loading, grown = memory.now(), list[float](), list[float](), 0
    for number in range(OPENED):
        unload_engrams(pipeline)
        begun = perf_counter()
        adapter = open_adapter(file)
        opened = perf_counter()
        load_engram(pipeline, adapter, name="many")
        opening.append(opened - begun)
        loading.append(perf_counter() - opened)
        if not number:
            _encode(pipeline, f"{trigger} in the snow")()
            grown = memory.now() - before
    ratios = _time(pipeline, adapter, trigger, rounds, device)
    alone, base = _compare(pipeline, adapter, jobs[0], trained)
    return Scale(
        concepts=len(adapter.names()),
        entries=sum(len(table.concept) for table in adapter.streams.values()),
        size=adapter.nbytes(),
        merge_seconds=merge_seconds,
        open_seconds=median(opening),
        load_seconds=median(loading),
        memory=grown,
        quiet=ratios["quiet"],
        firing=ratios["firing"],
        again=ratios[AGAIN],
        alone=alone,
        base=base,
        fired=_try_triggers(pipeline, adapter),
    )


def _trained(jobs: Sequence[Job]) -> list[Path]:
    return [engram_file(job.task(*job.characters).output) for job in jobs]


def _job(character: DemoCharacter, phrases: dict[str, str], work: Path, device: str) -> Job:
    questions = ask_alone(character, phrases, 0, Amount())
    return Job(
        method=ENGRAM,
        characters=(character,),
        questions=tuple(questions),
        look=LOOK,
        seed=0,
        steps=None,
        work=work,
        device=device,
    )


def _invent(files: Sequence[Path], count: int, vocabulary: Vocabulary) -> Adapter:
    """Return concepts with triggers of seven words, and values like those of trained ones."""
    adapters = [open_adapter(file) for file in files]
    like = [concept for adapter in adapters for concept in adapter.concepts()]
    known = np.concatenate([np.asarray(concept.streams[STREAM].vectors, np.float32) for concept in like])
    scales = np.stack([np.asarray(concept.streams[STREAM].scales, np.float32) for concept in like])
    random = np.random.default_rng(7)
    words = {number: word for word, number in vocabulary.words.items()}
    triggers = vocabulary.draw_triggers(count)
    spans = [(entries, n) for n, entries in cut_entries(triggers)]
    concepts = []
    for index, trigger in enumerate(triggers):
        entries = tuple(tuple(map(int, row)) for part, _ in spans for row in part[index])
        memory = ConceptStream(
            triggers=(tuple(map(int, trigger)),),
            entries=entries,
            vectors=draw_like(known, len(entries), random),
            scales=draw_like(scales, 1, random)[0],
        )
        text = " ".join(words[number] for number in trigger.tolist())
        record = replace(like[0].record, name=concept_name(index), trigger=text, training={"steps": 0})
        concepts.append(Concept(record=record, streams={STREAM: memory}))
    return Adapter.build(adapters[0].manifest, concepts)


def _encode(pipeline: Any, prompt: str) -> Call:
    return partial(
        pipeline.encode_prompt,
        prompt,
        device=pipeline.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
    )


def _time(pipeline: Any, adapter: Adapter, trigger: str, rounds: int, device: str) -> dict[str, Ratio]:
    """Return how long a prompt is encoded in relation to the bare pipeline, by what fires."""

    def prepare(with_adapter: bool, prompt: str, _number: int) -> Call:
        unload_engrams(pipeline)
        if with_adapter:
            load_engram(pipeline, adapter, name="many")
        return _encode(pipeline, prompt)

    quiet = "a red fox in the snow"
    cases: dict[Any, Any] = {case: partial(prepare, False, quiet) for case in (BARE, AGAIN)}
    cases["quiet"] = partial(prepare, True, quiet)
    cases["firing"] = partial(prepare, True, f"{trigger} in the snow")
    seconds = time_rounds(cases, rounds, device)
    return {case: relate(seconds, case) for case in (AGAIN, "quiet", "firing")}


def _compare(pipeline: Any, adapter: Adapter, job: Job, file: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the pictures of a trained concept as alone, and those without a trigger as the bare pipeline's."""
    drawn = {}
    for name, loaded in (("base", None), ("alone", open_adapter(file)), ("many", adapter)):
        unload_engrams(pipeline)
        if loaded is not None:
            load_engram(pipeline, loaded, name="many")
        drawn[name] = draw_questions(pipeline, replace(job, method=BASE))
    counts = []
    for group, other in ((NEW, "alone"), (QUIET, "base")):
        rows = [at for at, question in enumerate(job.questions) if question.group == group]
        same = [drawn["many"][at].tobytes() == drawn[other][at].tobytes() for at in rows]
        counts.append((len(same), sum(same)))
    return counts[0], counts[1]


def _try_triggers(pipeline: Any, adapter: Adapter) -> tuple[int, int]:
    """Return how many triggers were put into sentences, and how many of these fired once, for their own concept."""
    records = list(adapter.records())
    chosen = [records[at] for at in np.linspace(0, len(records) - 1, min(CHECKED, len(records))).astype(int)]
    fired: dict[int, list[tuple[str, int]]] = {}
    prompts = [f"a picture of {record.trigger} in the snow" for record in chosen]
    for firing in audit_lines(adapter, pipeline_tokenizers(pipeline), prompts):
        fired.setdefault(firing.line, []).append((firing.concept, len(firing.spans)))
    right = sum(fired.get(line) == [(record.name, 1)] for line, record in enumerate(chosen, start=1))
    return len(chosen), right


def _costs(found: Sequence[Scale]) -> Table:
    rows = [
        (
            f"{scale.concepts:,}",
            f"{scale.entries:,}",
            f"{scale.size / _MEGA:,.2f} MB",
            f"{scale.merge_seconds:,.2f} s" if scale.merge_seconds else "",
            f"{1000 * scale.open_seconds:,.1f} ms",
            f"{1000 * scale.load_seconds:,.1f} ms",
            f"{scale.memory / _MEGA:,.0f} MB",
            scale.again.show(),
            scale.quiet.show(),
            scale.firing.show(),
        )
        for scale in found
    ]
    columns = (
        "concepts",
        "entries",
        "file",
        "merging",
        "opening",
        "loading",
        "memory",
        "bare, once more",
        "nothing fires",
        "a trigger fires",
    )
    return Table(
        title="What they cost; an encoded prompt in relation to the bare pipeline (95 % confidence interval)",
        columns=columns,
        rows=rows,
    )


def _deeds(found: Sequence[Scale]) -> Table:
    rows = [
        (f"{scale.concepts:,}", *(f"{right} of {count}" for count, right in (scale.alone, scale.base, scale.fired)))
        for scale in found
    ]
    return Table(
        title="What they do",
        columns=("concepts", "pictures as alone", "pictures as the base model's", "triggers that fire once, and alone"),
        rows=rows,
    )
