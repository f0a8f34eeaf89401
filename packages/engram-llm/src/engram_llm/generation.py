"""`engram generate` for texts: prompts and seeds to texts, with and without memories.

Shapes: B texts at once, L positions, V token ids.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextStreamer

from engram_core import GeneratedText, InputError, TargetExistsError, TextReport, UsedAdapter, Watcher
from engram_core.container import open_target, write_all
from engram_llm.models import load_config, load_model, load_tokenizer, pick_device
from engram_llm.quiet import quiet_libraries
from engram_llm.selection import (
    beyond_vocabulary,
    check_models,
    load_selected,
    select_memories,
    variants,
    without_memories,
)
from engram_llm.settings import GenerateSettings

__all__ = ["Sampling", "generate"]

_LONGEST_PROMPTS = 1 << 24  # bytes of a file with prompts
_LONGEST_TITLE = 72


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One text to generate.

    Attributes:
        prompt: as the user wrote it.
        ids: what the model reads.
        seed: of the sampling.
    """

    prompt: str
    ids: tuple[int, ...]
    seed: int


def generate(settings: GenerateSettings, *, overwrite: bool = False, watcher: Watcher | None = None) -> TextReport:
    """Go on from every prompt with every seed.

    Greedy unless a temperature is set. A sampled text depends on its prompt and seed alone, up to rounding: not on
    what is generated in the same batch.

    Args:
        settings: what to generate.
        overwrite: replace the output file.
        watcher: hears how it goes, and with `batch_size` 1 the texts while they are generated.

    Raises:
        InputError: prompts, strengths or the model cannot be used.
        IncompatibleAdaptersError: a memory was made for another model.
        AdapterReadError, AdapterFormatError: a memory file cannot be used.
        AdapterWriteError: the output cannot be written; TargetExistsError: it exists and `overwrite` is false.
    """
    started = time.monotonic()
    watcher = watcher or Watcher()
    prompts = _read_prompts(settings)
    output = settings.output
    if output is not None and output.exists() and not overwrite:
        raise TargetExistsError(f"{output}: exists; pass --force to replace, or another --output")
    selected = select_memories(settings.adapters, settings.strengths)
    if not settings.force_base:
        check_models(selected, settings.model)
    device = pick_device(settings.device, settings.precision)
    tokenizer = load_tokenizer(settings.model)
    tasks = _read_tasks(prompts, settings, tokenizer, watcher)
    watcher.begin(f"loading {settings.model}")
    model = load_model(settings.model, settings.precision, device)
    load_selected(model, tokenizer, selected, host_tables=settings.host_tables, force=settings.force_base)
    watcher.end()

    chosen = variants(selected, base=settings.compare)
    writer = _Writer(model, tokenizer, settings)
    texts: list[GeneratedText] = []
    streams = settings.batch_size == 1
    if not streams:
        watcher.begin("generating", len(tasks) * len(chosen))
    for first in range(0, len(tasks), settings.batch_size):
        batch = tasks[first : first + settings.batch_size]
        found = []
        for adapters in chosen:
            hear = _hear(watcher, batch[0], adapters, settings, compared=len(chosen) > 1) if streams else None
            with without_memories(model, wanted=bool(adapters)):
                found.append(writer.write(batch, adapters, hear))
            if not streams:
                watcher.advance(first * len(chosen) + len(found) * len(batch))
        texts += [text for pair in zip(*found, strict=True) for text in pair]
    watcher.end()
    if output is not None:
        _write(output, texts, settings, overwrite=overwrite)
    return TextReport(texts=tuple(texts), output=output, seconds=time.monotonic() - started)


class Sampling(LogitsProcessor):  # type: ignore[misc]
    """Makes the likeliest token a sample, with random numbers of each row's own.

    A token drawn from a softmax is the greatest of the logits with Gumbel noise on them. A generator for the whole
    batch would give a text other numbers in another batch.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float) -> None:
        """Begin anew.

        Args:
            seeds: of each row [B].
            temperature: logits are divided by it; above 0.
            top_p: the likeliest tokens of this share take part.
        """
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature, self._top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - the base class's signature
        """Return logits [B, V] whose greatest is the sample."""
        logits = scores.float() / self._temperature
        if self._top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True)
            shares = ordered.softmax(-1)
            ordered = ordered.masked_fill(shares.cumsum(-1) - shares >= self._top_p, -torch.inf)
            logits = torch.empty_like(logits).scatter_(-1, order, ordered)
        size = scores.shape[-1]
        uniform = torch.stack([torch.rand(size, generator=one, dtype=torch.float64) for one in self._generators])
        noise = -(-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log()
        return logits + noise.to(logits.device, logits.dtype)


class _Writer:
    """Generates texts with one model."""

    def __init__(self, model: Any, tokenizer: Any, settings: GenerateSettings) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        own = model.generation_config
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        self._ends = sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None})
        known = (tokenizer.pad_token_id, own.pad_token_id, *self._ends, 0)
        self._pad = next(pad for pad in known if pad is not None)
        self._positions = _positions(model.config)
        # Nothing that a model's own settings add, such as penalties or sampling, is wanted here.
        model.generation_config = GenerationConfig(
            eos_token_id=self._ends or None, pad_token_id=self._pad, suppress_tokens=beyond_vocabulary(model, tokenizer)
        )

    def write(
        self, batch: Sequence[_Task], adapters: tuple[UsedAdapter, ...], hear: Callable[[str], None] | None
    ) -> list[GeneratedText]:
        """Generate a text for each task."""
        settings, length = self._settings, max(len(task.ids) for task in batch)
        ids = torch.full((len(batch), length), self._pad)
        mask = torch.zeros_like(ids)
        for row, task in enumerate(batch):  # padded on the left, so that all go on at one position
            ids[row, length - len(task.ids) :] = torch.tensor(task.ids)
            mask[row, length - len(task.ids) :] = 1
        processors = LogitsProcessorList()
        if settings.temperature:
            processors.append(Sampling([task.seed for task in batch], settings.temperature, settings.top_p))
        with torch.inference_mode(), quiet_libraries():
            found = self._model.generate(
                ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                do_sample=False,
                max_new_tokens=min(settings.max_new_tokens, self._positions - length),
                logits_processor=processors,
                streamer=None if hear is None else _Pieces(self._tokenizer, hear),
            )
        return [self._read(task, new, adapters) for task, new in zip(batch, found[:, length:].tolist(), strict=True)]

    def _read(self, task: _Task, new: Sequence[int], adapters: tuple[UsedAdapter, ...]) -> GeneratedText:
        end = next((place for place, token in enumerate(new) if token in self._ends), None)
        kept = new if end is None else new[: end + 1]
        return GeneratedText(
            prompt=task.prompt,
            seed=task.seed,
            text=self._tokenizer.decode(kept, skip_special_tokens=True),
            adapters=adapters,
            n_tokens=len(kept),
            stopped="length" if end is None else "end",
        )


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Hands on a text word by word."""

    def __init__(self, tokenizer: Any, hear: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._hear = hear

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._hear(text)
        if stream_end:
            self._hear("")


def _hear(
    watcher: Watcher, task: _Task, adapters: Sequence[UsedAdapter], settings: GenerateSettings, *, compared: bool
) -> Callable[[str], None]:
    words = " ".join(task.prompt.split())
    title = words if len(words) <= _LONGEST_TITLE else words[: _LONGEST_TITLE - 1] + "\N{HORIZONTAL ELLIPSIS}"
    if compared:
        title = f"{'engram' if adapters else 'base'}: {title}"
    if len(settings.seeds) > 1:
        title += f" (seed {task.seed})"
    return lambda piece: watcher.text(title, piece)


def _read_prompts(settings: GenerateSettings) -> list[str]:
    prompts, file = list(settings.prompts), settings.prompts_file
    if file is not None:
        try:
            if file.stat().st_size > _LONGEST_PROMPTS:
                raise InputError(f"{file}: has {file.stat().st_size} bytes; expected prompts, one a line")
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"{file}: is not UTF-8 text; expected prompts, one a line") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{file}: holds no prompt; write one a line")
    return prompts


def _read_tasks(prompts: Sequence[str], settings: GenerateSettings, tokenizer: Any, watcher: Watcher) -> list[_Task]:
    """Tokenise prompts, and refuse those that leave no place to go on."""
    positions = _positions(load_config(settings.model))
    longest, tasks = 0, []
    for prompt in prompts:
        ids = _encode(prompt, settings, tokenizer)
        if not ids:
            raise InputError(f"prompt {prompt!r} has no token; write something to go on from")
        if len(ids) >= positions:
            raise InputError(
                f"prompt {_shorten(prompt)!r} has {len(ids)} tokens, {settings.model} reads at most {positions} with "
                "what it generates; shorten it"
            )
        longest = max(longest, len(ids))
        tasks += [_Task(prompt=prompt, ids=ids, seed=seed) for seed in settings.seeds]
    if longest + settings.max_new_tokens > positions:
        watcher.note(
            f"{settings.model} reads at most {positions} tokens and a prompt has {longest}; at most "
            f"{positions - longest} are generated after it instead of {settings.max_new_tokens}"
        )
    return tasks


def _encode(prompt: str, settings: GenerateSettings, tokenizer: Any) -> tuple[int, ...]:
    if not settings.chat:
        return tuple(tokenizer(prompt)["input_ids"])
    if not tokenizer.chat_template:
        raise InputError(f"{settings.model}: its tokenizer has no chat template; leave out --chat")
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _positions(config: Any) -> int:
    return int(getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 1 << 30)


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST_TITLE else text[: _LONGEST_TITLE - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _write(output: Path, texts: Sequence[GeneratedText], settings: GenerateSettings, *, overwrite: bool) -> None:
    """Write one JSON object a line; the file appears whole or not at all."""
    how = {name: getattr(settings, name) for name in ("model", "chat", "temperature", "top_p", "max_new_tokens")}

    def lines() -> Iterator[str]:
        for text in texts:
            yield json.dumps(text.to_json() | how, ensure_ascii=False) + "\n"

    with open_target(output, overwrite=overwrite) as file:
        write_all(file, memoryview("".join(lines()).encode("utf-8", "surrogatepass")))
