"""What a memory costs in a forward pass beside the bare model: reading a prompt, and one token at a time.

Run through `run.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from measure import Bound, Outcome, Spread, Table
from paired import AGAIN, BARE, Call, relate, time_rounds
from sizes import SHAPES, make_memory, make_model
from torch import Tensor, nn
from transformers import DynamicCache

from engram_llm.attachment import Active, attach, detach
from engram_llm.memory import Memory

LIMIT = 1.03
LENGTH = 256  # tokens of the prompt
BIG = {"engram_vocab_size": (400_000, 400_000)}  # rows a head: 6.4 M rows a layer, 0.8 GB in bfloat16


@torch.no_grad()
def run(*, quick: bool, device: str) -> Outcome:
    """Measure everything."""
    model = make_model(small=quick, dtype=torch.bfloat16, device=device)
    memories: dict[str, Memory] = {name: make_memory(shape, model) for name, shape in SHAPES.items()}
    first = next(iter(SHAPES.values()))
    memories["the first, tables on the host"] = make_memory(first, model, on_host=True)
    if not quick:
        changes = BIG | {"layer_ids": first["layer_ids"][:2]}
        memories["the first, two layers of large tables"] = make_memory(first, model, **changes)
        memories["the same, tables on the host"] = make_memory(first, model, on_host=True, **changes)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab_size // 2, (16, 1, LENGTH), generator=generator).to(device)
    passes = {
        f"{LENGTH} tokens of a prompt": (_prefill(model, memories, prompts), 10 if quick else 40),
        "one more token": (_decode(model, memories, prompts), 50 if quick else 200),
    }
    read = {f"{LENGTH} tokens of a prompt": _count(model.model.layers), "one more token": _count(model)}
    rows, bounds, figures = [], [], {"threads": torch.get_num_threads()}
    for what, (cases, rounds) in passes.items():
        seconds = time_rounds(cases, rounds, device)
        ratios = {case: relate(seconds, case) for case in seconds if case != BARE}
        rows.append((what, "none, once more", Spread.of(seconds[BARE]).show("ms"), ratios[AGAIN].show(), ""))
        floors = {name: 1 + _count(memory) / read[what] for name, memory in memories.items()}
        rows += [(what, name, "", ratios[name].show(), f"{floors[name]:.3f}") for name in memories]
        figures[what] = {str(case): asdict(ratio) for case, ratio in ratios.items()}
        figures[what]["bare_s"] = Spread.of(seconds[BARE]).median
        bounds += [Bound(what=f"{what}, {name}", value=ratios[name].median, limit=LIMIT) for name in SHAPES]
    detach(model)
    figures["parameters"] = {name: sum(p.numel() for p in memory.parameters()) for name, memory in memories.items()}
    where = "GPU" if device == "cuda" else f"{torch.get_num_threads()} threads"
    title = f"A forward pass at Qwen3-0.6B's size, bf16, {where}: median ratio to the bare model (95 % interval)"
    return Outcome(
        tables=[Table(title=title, columns=("pass", "memory", "bare", "ratio", "its weights"), rows=rows)],
        bounds=bounds,
        figures=figures,
    )


def _count(module: nn.Module) -> int:
    """Return the weights that every token is multiplied with: all but a memory's tables."""
    return sum(weight.numel() for name, weight in module.named_parameters() if "multi_head_embedding" not in name)


def _choose(model: Any, memory: Memory | None) -> None:
    if memory is None:
        detach(model)
    else:
        attach(model, [Active(memory, 1.0)])


def _cases(memories: Mapping[str, Memory], prepare: Callable[[Any, Memory | None, int], Call]) -> dict[Any, Any]:
    chosen: dict[Any, Memory | None] = {BARE: None, AGAIN: None, **memories}
    return {name: partial(prepare, name, memory) for name, memory in chosen.items()}


def _prefill(model: Any, memories: Mapping[str, Memory], prompts: Tensor) -> dict[Any, Any]:
    def prepare(_: Any, memory: Memory | None, number: int) -> Call:
        _choose(model, memory)
        return partial(model, prompts[number % len(prompts)], use_cache=True, logits_to_keep=1)

    return _cases(memories, prepare)


def _decode(model: Any, memories: Mapping[str, Memory], prompts: Tensor) -> dict[Any, Any]:
    caches: dict[Any, DynamicCache] = {}

    def prepare(name: Any, memory: Memory | None, number: int) -> Call:
        _choose(model, memory)
        if name not in caches:
            caches[name] = DynamicCache(config=model.config)
            model(prompts[0], past_key_values=caches[name], use_cache=True, logits_to_keep=1)
        surplus = caches[name].get_seq_length() - LENGTH
        if surplus:
            caches[name].crop(-surplus)
        token = prompts[number % len(prompts)][:, :1]
        return partial(model, token, past_key_values=caches[name], use_cache=True)

    return _cases(memories, prepare)
