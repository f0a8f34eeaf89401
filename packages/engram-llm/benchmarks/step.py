"""A training step at Qwen3-0.6B's size: a memory beside LoRA, and beside engram-peft where that is installed.

What learns is float32, as is the frozen model, so that all do the same arithmetic. Hashing, clipping and the optimizer
are part of the step, as they are in training. Memory is measured in a process for each method. engram-peft needs
Python 3.12. Run through `run.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from measure import Bound, Outcome, Spread, Table
from memory import Memory
from paired import Ratio, time_call
from peft import LoraConfig, get_peft_model
from quiet import Others, wait_for_quiet
from sizes import N_TOKENS, SHAPES, make_memory, make_model
from torch import Tensor, nn

from engram_llm.attachment import Active, attach
from engram_llm.settings import TrainSettings
from engram_llm.training.loss import token_loss
from engram_llm.training.optimizer import clip_gradients, make_optimizer

LIMIT = 1 / 1.3  # engram-peft takes 1.3 times as long
BATCHES = ((1, 128), (1, 512))  # rows and tokens
ROUNDS = 10
# Tables of this size learn by sparse gradients unless a setting says otherwise.
OURS, OURS_DENSE, LORA, PEER = "engram", "engram, dense gradients", "LoRA, rank 16", "engram-peft"
SETTINGS = TrainSettings(data=Path(), output=Path("memory.safetensors"))

Step = Callable[[Tensor], None]


def run(*, quick: bool, device: str) -> Outcome:
    """Measure everything."""
    makers = _makers()
    notes = [] if PEER in makers else ["engram-peft is not installed here and was not measured."]
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {name: pool.apply(_peak, (name, quick, device)) for name in (None, *makers)}
    # A model each, which share their frozen weights: what learns is hooked into each in its own way.
    first = make_model(small=quick, dtype=torch.float32, device=device)
    steps = {name: make(_twin(first)) for name, make in makers.items()}
    rows, bounds, figures = [], [], {"threads": torch.get_num_threads()}
    for shape_of_batch in BATCHES[: 1 if quick else None]:
        seconds = _time(steps, shape_of_batch, first.config.vocab_size, 4 if quick else ROUNDS, device)
        for name in steps:
            ratio = Ratio.of([own / other for own, other in zip(seconds[name], seconds[OURS], strict=True)])
            what = f"{shape_of_batch[0]} × {shape_of_batch[1]}"
            rows.append((what, name, Spread.of(seconds[name]).show("ms"), ratio.show() if name != OURS else ""))
            figures[f"{what}, {name}"] = asdict(ratio) | {"seconds": Spread.of(seconds[name]).median}
            if name == PEER:
                bounds.append(Bound(what=f"engram against engram-peft, {what}", value=1 / ratio.median, limit=LIMIT))
    where = "GPU" if device == "cuda" else f"{torch.get_num_threads()} threads"
    title = f"A training step at Qwen3-0.6B's size, fp32, {where}: median of the ratios to engram (95 % interval)"
    mib = {name or "(a pass through the model alone)": peak / 2**20 for name, peak in peaks.items()}
    alone = peaks[None] / 2**20
    memory = [(name, f"{size:,.0f} MiB", f"{size - alone:+,.0f} MiB") for name, size in mib.items()]
    figures["peak MiB"] = mib
    return Outcome(
        tables=[
            Table(title=title, columns=("batch", "method", "a step", "ratio"), rows=rows),
            Table(
                title=f"Peak memory of three steps with {BATCHES[-1][1]} tokens, whole process",
                columns=("method", "peak", "against the model alone"),
                rows=memory,
            ),
        ],
        bounds=bounds,
        notes=notes,
        figures=figures,
    )


def _makers() -> dict[str, Callable[[Any], Step]]:
    shape = SHAPES["TinyEngram's biomedical run"]
    makers: dict[str, Callable[[Any], Step]] = {
        OURS: partial(_ours, shape, sparse=True),
        OURS_DENSE: partial(_ours, shape, sparse=False),
        LORA: _lora,
    }
    if find_spec("engram_peft"):
        makers[PEER] = partial(_engram_peft, shape)
    return makers


def _peak(name: str | None, quick: bool, device: str) -> int:
    """Return the most memory that three steps need, in bytes; without a name of a pass through the model alone."""
    model = make_model(small=quick, dtype=torch.float32, device=device)
    memory = Memory(device)
    ids = torch.randint(0, min(model.config.vocab_size, N_TOKENS), BATCHES[-1]).to(device)
    if name is None:
        with torch.no_grad():
            token_loss(model(input_ids=ids, use_cache=False), ids)
        return memory.peak()
    step = _makers()[name](model.train())
    for _ in range(3):
        step(ids)
    return memory.peak()


def _time(
    steps: Mapping[str, Step], shape: tuple[int, int], vocabulary: int, rounds: int, device: str
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    generator = torch.Generator().manual_seed(0)
    others = Others()
    number = -2  # rounds that warm up
    while number < rounds:
        ids = torch.randint(0, min(vocabulary, N_TOKENS), shape, generator=generator).to(device)
        others.restart()
        elapsed = {name: time_call(partial(step, ids), device) for name, step in steps.items()}
        if others.disturbed() and wait_for_quiet():
            continue
        if number >= 0:
            for name, value in elapsed.items():
                seconds[name].append(value)
        number += 1
    return seconds


def _twin(model: Any) -> Any:
    """Return a model of its own with the same weights in the same memory."""
    with torch.device("meta"):
        twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    twin.model.rotary_emb = model.model.rotary_emb  # its buffers are in no state dict
    return twin.train().requires_grad_(False)


def _finish(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, learned: list[nn.Parameter]) -> None:
    loss = token_loss(model(input_ids=ids, use_cache=False), ids)
    loss.backward()
    clip_gradients(learned, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _ours(shape: dict[str, Any], model: Any, *, sparse: bool) -> Step:
    memory = make_memory(shape, model).requires_grad_(True).train()
    for layer in memory.layers.values():
        layer.multi_head_embedding.embedding.sparse = sparse
        nn.init.zeros_(layer.short_conv.conv.weight)
        nn.init.zeros_(layer.value_proj.weight)
    attach(model, [Active(memory, 1.0)])
    optimizer = make_optimizer(memory.named_parameters(), SETTINGS, sparse=sparse)
    return lambda ids: _finish(model, optimizer, ids, list(memory.parameters()))


def _lora(model: Any) -> Step:
    wrapped = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    named = [(name, weight) for name, weight in wrapped.named_parameters() if weight.requires_grad]
    optimizer = make_optimizer(named, SETTINGS, sparse=False)
    return lambda ids: _finish(wrapped, optimizer, ids, [weight for _, weight in named])


def _engram_peft(shape: dict[str, Any], model: Any) -> Step:
    """Its model, hashing, optimizer and clipping with the same settings, as its own trainer has them."""
    from engram_peft import EngramConfig, get_engram_model
    from engram_peft.utils import compute_grad_norm

    heads = shape["n_head_per_ngram"]
    config = EngramConfig(
        engram_vocab_size_per_ngram=[size * heads for size in shape["engram_vocab_size"]],  # of all heads together
        ngram_sizes=list(range(2, shape["max_ngram_size"] + 1)),
        n_head_per_ngram=heads,
        embedding_dim=shape["n_embed_per_ngram"] * (shape["max_ngram_size"] - 1),
        enable_tokenizer_compression=False,
        target_layers=sorted({min(layer, model.config.num_hidden_layers - 1) for layer in shape["layer_ids"]}),
        hc_mult=1,
        pad_id=0,
        engram_dtype="float32",
    )
    wrapped = get_engram_model(model, config).train()
    optimizer = wrapped.create_optimizer(base_learning_rate=1e-3)
    learned = list(wrapped.engram_layers.parameters())

    def step(ids: Tensor) -> None:
        loss = token_loss(wrapped(input_ids=ids, use_cache=False), ids)
        loss.backward()
        norm = compute_grad_norm(learned)
        factor = torch.clamp(1.0 / (norm + 1e-6), max=1.0)
        for weight in learned:
            if weight.grad is not None:
                (weight.grad.coalesce().values() if weight.grad.is_sparse else weight.grad).mul_(factor)
        optimizer.step()
        optimizer.zero_grad()

    return step
