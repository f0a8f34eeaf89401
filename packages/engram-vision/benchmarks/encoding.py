"""Encoding prompts with concepts loaded, beside the bare text encoder; and what the hook itself takes.

Run through `run.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import make_second_encoder, make_t5_encoder, make_text_encoder
from measure import Bound, Outcome, Spread, Table
from paired import AGAIN, BARE, Call, relate, time_call, time_rounds
from prompts import SHOWN, STREAM, Vocabulary
from torch import Tensor, nn

from engram_core.torch import match_tensor
from engram_vision.families import PENULTIMATE, SD15
from engram_vision.hooks import TextEdit, attach, detach
from engram_vision.models import load_pipeline

SIZES = (1, 100, 10_000)
QUIET_LIMIT, FIRING_LIMIT = 1.005, 1.02
KINDS = ("nothing fires", "a trigger fires")
T5_LAYERS = 2  # of 24: a call of the whole would take twelve times as long, and the hook the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """A text encoder to measure.

    Attributes:
        label: for the table.
        vocabulary: makes its prompts and adapters.
        make: makes it, with random weights.
        dtype: of its weights.
        rounds: many where a call is short.
        bounded: whether the bounds are for it.
        hook: whether the hook is timed by itself too.
    """

    label: str
    vocabulary: Callable[[], Vocabulary]
    make: Callable[[], Any]
    dtype: torch.dtype
    rounds: int
    bounded: bool = True
    hook: bool = True


def _make_tiny() -> Any:
    return load_pipeline(SD15, "tiny").text_encoder


ENCODERS = (
    Encoder(
        label="CLIP-L's size, fp32",
        vocabulary=Vocabulary.clip,
        make=make_text_encoder,
        dtype=torch.float32,
        rounds=100,
    ),
    Encoder(
        label="CLIP-L's size, bf16",
        vocabulary=Vocabulary.clip,
        make=make_text_encoder,
        dtype=torch.bfloat16,
        rounds=240,
        hook=False,
    ),
    Encoder(
        label="CLIP-G's size, bf16",
        vocabulary=Vocabulary.clip_g,
        make=make_second_encoder,
        dtype=torch.bfloat16,
        rounds=120,
    ),
    Encoder(
        label=f"T5-XXL's width, {T5_LAYERS} of 24 layers, bf16",
        vocabulary=Vocabulary.t5,
        make=partial(make_t5_encoder, T5_LAYERS),
        dtype=torch.bfloat16,
        rounds=60,
    ),
    Encoder(
        label="tiny, fp32",
        vocabulary=Vocabulary.tiny,
        make=_make_tiny,
        dtype=torch.float32,
        rounds=1_000,
        bounded=False,
    ),
)
HOOK_ROUNDS = 500


class Ready(nn.Module):
    """An encoder that has its output ready, so that nothing is left to time but what is attached to it."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, input_ids: Tensor, **options: Any) -> Any:  # noqa: ARG002
        """Return the output."""
        return self._output


@torch.no_grad()
def run(*, quick: bool, device: str) -> Outcome:
    """Measure everything."""
    rows: list[tuple[str, ...]] = []
    hook_rows: list[tuple[str, ...]] = []
    bounds: list[Bound] = []
    figures: dict[str, Any] = {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory(prefix="engram-encoding-") as name:
        for number, each in enumerate(ENCODERS):
            label, vocabulary = each.label, each.vocabulary()
            torch.manual_seed(0)
            encoder = each.make().to(device, each.dtype)
            folder = Path(name) / str(number)
            edits = _prepare(folder, vocabulary)
            batches = _draw_batches(vocabulary, device)
            seconds = _time_encoding(encoder, edits, batches, 10 if quick else each.rounds, device)
            ratios = {case: relate(seconds, case) for case in seconds if case != BARE}
            bare = Spread.of(seconds[BARE])
            rows.append((label, "0, once more", bare.show("ms"), ratios[AGAIN].show(), ""))
            rows += [(label, f"{size:,}", "", *(ratios[size, kind].show() for kind in KINDS)) for size in SIZES]
            figures[label] = {"bare_s": bare.median, "noise": asdict(ratios[AGAIN])}
            figures[label] |= {f"{size} {kind}": asdict(ratios[size, kind]) for size in SIZES for kind in KINDS}
            if each.bounded:
                bounds += [
                    Bound(what=f"{label}, {kind}, up to {SIZES[-1]:,} concepts", value=worst, limit=limit)
                    for kind, limit in zip(KINDS, (QUIET_LIMIT, FIRING_LIMIT), strict=True)
                    for worst in [max(ratios[size, kind].median for size in SIZES)]
                ]
            if each.hook:
                hook = _time_hook(encoder, edits, batches, 50 if quick else HOOK_ROUNDS, device)
                for size, parts in hook.items():
                    hook_rows.append((label, f"{size:,}", *(part.show() for part in parts.values())))
                    figures[label] |= {f"{size} hook, {part}_s": spread.median for part, spread in parts.items()}
    where = "GPU" if device == "cuda" else f"{torch.get_num_threads()} threads"
    tables = [
        Table(
            title=f"Encoding two prompts, {where}: median of the ratios to the bare encoder (95 % confidence interval)",
            columns=("encoder", "concepts", "bare", *KINDS),
            rows=rows,
        ),
        Table(
            title="What the hook adds to a call, whatever the encoder takes: median (10th to 90th percentile)",
            columns=("encoder", "concepts", *KINDS, "of it matching", "of it editing", "a concept's first time"),
            rows=hook_rows,
        ),
    ]
    return Outcome(tables=tables, bounds=bounds, figures=figures)


def _prepare(folder: Path, vocabulary: Vocabulary) -> dict[int, TextEdit]:
    folder.mkdir()
    paths = {size: folder / f"{size}.safetensors" for size in SIZES}
    return {size: TextEdit.of(vocabulary.write_adapter(path, size), STREAM) for size, path in paths.items()}


def _draw_batches(vocabulary: Vocabulary, device: str) -> Mapping[Any, list[Tensor]]:
    """Return prompts in which nothing fires, and for each size others with triggers, no more than a few in turn."""
    triggers = vocabulary.draw_triggers(SHOWN)
    seeds = range(2 * SHOWN)
    quiet = [vocabulary.draw_batch(seed).to(device) for seed in seeds]
    firing = {
        size: [vocabulary.draw_batch(seed, triggers[seed % min(size, SHOWN)]).to(device) for seed in seeds]
        for size in SIZES
    }
    return {"quiet": quiet, **firing}


def _time_encoding(
    encoder: nn.Module, edits: Mapping[int, TextEdit], batches: Mapping[Any, list[Tensor]], rounds: int, device: str
) -> dict[Any, list[float]]:
    """Return the seconds of encoding: bare twice, and with each number of concepts."""

    options = _options(edits)

    def prepare(edit: TextEdit | None, chosen: list[Tensor], number: int) -> Call:
        if edit is None:
            detach(encoder)
        else:
            attach(encoder, edit)
        return partial(encoder, chosen[number % len(chosen)], **options)

    cases: dict[Any, Callable[[int], Call]] = {case: partial(prepare, None, batches["quiet"]) for case in (BARE, AGAIN)}
    for size, edit in edits.items():
        for kind, chosen in zip(KINDS, (batches["quiet"], batches[size]), strict=True):
            _expect(edit, chosen, fires=kind == KINDS[1])
            cases[size, kind] = partial(prepare, edit, chosen)
    seconds = time_rounds(cases, rounds, device)
    detach(encoder)
    return seconds


def _options(edits: Mapping[int, TextEdit]) -> dict[str, bool]:
    """Return what pipelines ask of an encoder."""
    return {"output_hidden_states": True} if next(iter(edits.values())).site == PENULTIMATE else {}


def _expect(edit: TextEdit, batches: list[Tensor], *, fires: bool) -> None:
    if any(bool(len(match_tensor(edit.matcher, batch))) != fires for batch in batches):
        raise ValueError(f"a prompt in which {KINDS[fires]} does the contrary")


def _time_hook(
    encoder: nn.Module, edits: Mapping[int, TextEdit], batches: Mapping[Any, list[Tensor]], rounds: int, device: str
) -> dict[int, dict[str, Spread]]:
    """Return what the hook takes by itself, its parts, and what it takes when a concept fires for the first time."""
    options = _options(edits)
    output = encoder(batches["quiet"][0], **options)
    ready, hidden = Ready(output), output.hidden_states[-2] if options else output[0]
    bare = Spread.of([time_call(partial(ready, batches["quiet"][0], **options), device) for _ in range(rounds)]).median
    found: dict[int, dict[str, Spread]] = {}
    for size, edit in edits.items():
        parts: dict[str, list[float]] = {part: [] for part in (*KINDS, "matching", "editing", "first")}
        for number in range(rounds):
            quiet, firing = (batches[key][number % len(batches[key])] for key in ("quiet", size))
            matches = match_tensor(edit.matcher, firing)
            attach(ready, edit)
            for kind, batch in zip(KINDS, (quiet, firing), strict=True):
                parts[kind].append(time_call(partial(ready, batch, **options), device) - bare)
            parts["matching"].append(time_call(partial(match_tensor, edit.matcher, firing), device))
            parts["editing"].append(time_call(partial(edit.residual.apply, hidden, matches), device))
            if number < 50:
                attach(ready, TextEdit.of(edit.adapter, STREAM))
                parts["first"].append(time_call(partial(ready, firing, **options), device) - bare)
        found[size] = {part: Spread.of(values) for part, values in parts.items()}
    return found
