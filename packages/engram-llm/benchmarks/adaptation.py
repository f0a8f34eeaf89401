"""Adaptation against forgetting on the tiny checkpoint: a memory, LoRA, both, full fine-tuning, and controls.

Every method learns a domain that the checkpoint never saw, with the same texts, steps and batches, at several rates;
what counts is the whole frontier of its loss on the domain against its loss on everything else, on texts that nothing
was trained on. Nothing is chosen by these losses. Run through `run.py`; each run is kept in `build/adaptation`, so that
a stopped benchmark goes on.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any
from unittest import mock

import numpy as np
import torch
from measure import Outcome, Table
from peft import PeftModel
from transformers import Trainer, TrainingArguments

from engram_llm.data import Collator, pack_documents, read_documents
from engram_llm.loading import load_memory
from engram_llm.models import load_model, load_tokenizer
from engram_llm.quiet import quiet_libraries
from engram_llm.settings import TrainSettings
from engram_llm.shipped import TINY, glosses_file
from engram_llm.training.loss import evaluate_loss, padding_token, token_loss
from engram_llm.training.trainer import train

SEEDS = (0, 1, 2)
STEPS, BATCH, LENGTH, WARM_UP = 240, 4, 256, 20
WORK = Path("build/adaptation")
# About as many parameters as LoRA of rank 44 on all linear layers has; the larger one three times as many.
SMALL = {"engram_vocab_size": (2000, 2000), "layer_ids": (1, 2), "n_embed_per_ngram": 128, "n_head_per_ngram": 4}
LARGE = SMALL | {"engram_vocab_size": (8000, 8000)}
RANK = 44


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One method at one rate.

    Attributes:
        method: for the table.
        rate: learning rate; tables learn at five times it.
        settings: beside the common ones; None means full fine-tuning.
        one_slot: whether all tokens share a compressed id, so that every n-gram finds the same row.
    """

    method: str
    rate: float
    settings: dict[str, Any] | None
    one_slot: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a run came to: losses in nats a token, and the values that learned."""

    domain: float
    general: float
    parameters: int
    seconds: float


def cases() -> list[Case]:
    """Return all methods and rates."""
    lora = {"lora_rank": RANK, "lora_alpha": 2 * RANK, "output": Path("lora")}
    found = [Case(method="engram, 2,000 rows a head", rate=rate, settings=dict(SMALL)) for rate in (1e-3, 3e-3, 1e-2)]
    found += [Case(method="engram, 8,000 rows a head", rate=rate, settings=dict(LARGE)) for rate in (1e-3, 3e-3, 1e-2)]
    found += [Case(method="LoRA", rate=rate, settings=lora | {"method": "lora"}) for rate in (3e-4, 1e-3, 3e-3)]
    both = SMALL | {"method": "both", "lora_rank": RANK, "lora_alpha": 2 * RANK}
    found += [Case(method="engram, 2,000 rows, and LoRA", rate=rate, settings=both) for rate in (3e-4, 1e-3)]
    found += [Case(method="full fine-tuning", rate=rate, settings=None) for rate in (1.5e-4, 5e-4)]
    found += [
        Case(method="control: one row for all", rate=3e-3, settings=dict(SMALL), one_slot=True),
        Case(method="control: random tables, frozen", rate=3e-3, settings=SMALL | {"freeze_tables": True}),
    ]
    return found


def run(*, quick: bool, device: str) -> Outcome:
    """Measure everything."""
    steps, seeds = (4, SEEDS[:1]) if quick else (STEPS, SEEDS)
    base = _measure(load_model(TINY))
    rows = [("the base model", "", "0", f"{base[0]:.3f}", f"{base[1]:.3f}", "")]
    figures: dict[str, Any] = {"base": {"domain": base[0], "general": base[1]}, "steps": steps, "seeds": list(seeds)}
    for case in cases():
        results = [_run_once(case, seed, steps, device, keep=not quick) for seed in seeds]
        rows.append(
            (
                case.method,
                f"{case.rate:g}",
                f"{results[0].parameters / 1e6:.2f} M",
                _show([each.domain for each in results]),
                _show([each.general for each in results]),
                f"{mean(each.general for each in results) - base[1]:+.3f}",
            )
        )
        print("  ".join(rows[-1]), flush=True)
        figures[f"{case.method}, {case.rate:g}"] = [asdict(each) for each in results]
    columns = ("method", "rate", "learns", "domain loss", "general loss", "forgotten")
    title = (
        f"Adaptation on tiny, {steps} steps of {BATCH} × {LENGTH} tokens, evaluation losses in nats a token: mean "
        f"(lowest to highest) of {len(seeds)} seeds"
    )
    return Outcome(tables=[Table(title=title, columns=columns, rows=rows)], figures=figures)


def _run_once(case: Case, seed: int, steps: int, device: str, *, keep: bool) -> Result:
    file = WORK / f"{case.method}, {case.rate:g}, {steps}, {seed}.json"
    if keep and file.exists():
        return Result(**json.loads(file.read_text(encoding="utf-8")))
    started = monotonic()
    with tempfile.TemporaryDirectory(prefix="engram-adaptation-") as name:
        model, n_parameters = (_fine_tune if case.settings is None else _train)(case, seed, steps, device, Path(name))
        domain, general = _measure(model)
    result = Result(domain=domain, general=general, parameters=n_parameters, seconds=monotonic() - started)
    if keep:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(result)), encoding="utf-8")
    return result


def _train(case: Case, seed: int, steps: int, device: str, folder: Path) -> tuple[Any, int]:
    """Train a memory, LoRA or both, and return the model with it and the number of values that learned."""
    settings = TrainSettings(
        data=glosses_file("domain-train"),
        output=folder / "memory.safetensors",
        model=TINY,
        eval_fraction=0.0,
        evaluate_every=0,
        keep="last",
        steps=steps,
        batch_size=BATCH,
        max_length=LENGTH,
        warm_up=min(WARM_UP, steps),
        learning_rate=case.rate,
        precision="fp32",
        device=device,  # type: ignore[arg-type]
        seed=seed,
    )
    chosen = dict(case.settings or {})
    if "output" in chosen:
        chosen["output"] = folder / chosen["output"]
    settings = replace(settings, **chosen)
    one_row = mock.patch("engram_llm.training.preparation.compress_vocabulary", _compress_to_one)
    with one_row if case.one_slot else nullcontext():
        train(settings)
    model, n_parameters = load_model(TINY), 0
    if settings.method != "engram":
        lora = settings.output if settings.method == "lora" else settings.output.with_suffix(".lora")
        model = PeftModel.from_pretrained(model, lora)
        n_parameters += sum(weight.numel() for name, weight in model.named_parameters() if "lora_" in name)
    if settings.method != "lora":
        load_memory(model, settings.output)
        memory = _only_memory(model)
        tables = {id(layer.multi_head_embedding.embedding.weight) for layer in memory.layers.values()}
        frozen = tables if settings.freeze_tables else set()
        n_parameters += sum(weight.numel() for weight in memory.parameters() if id(weight) not in frozen)
    return model, n_parameters


def _fine_tune(case: Case, seed: int, steps: int, device: str, folder: Path) -> tuple[Any, int]:
    """Train every weight of the model with transformers' own Trainer."""
    tokenizer, model = load_tokenizer(TINY), load_model(TINY).requires_grad_(True)
    samples = pack_documents(read_documents(glosses_file("domain-train"), tokenizer), LENGTH)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=case.rate,
        warmup_steps=min(WARM_UP, steps),
        lr_scheduler_type="cosine",
        adam_beta2=0.95,
        weight_decay=0.0,
        seed=seed,
        use_cpu=device == "cpu",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    with quiet_libraries():
        Trainer(
            model=model,
            args=args,
            train_dataset=samples,
            data_collator=Collator(padding_token(tokenizer), packed=True),
            compute_loss_func=token_loss,
        ).train()
    return model.eval(), sum(weight.numel() for weight in model.parameters())


def _measure(model: Any) -> tuple[float, float]:
    """Return the losses on the domain and on everything else."""
    tokenizer = load_tokenizer(TINY)
    with torch.no_grad():
        domain, general = (
            evaluate_loss(model, tokenizer, glosses_file(name), max_length=LENGTH, batch_size=8, packing=True)[0]
            for name in ("domain-eval", "general-eval")
        )
    return domain, general


def _only_memory(model: Any) -> Any:
    from engram_llm.loading import list_memories

    (loaded,) = list_memories(model)
    return loaded.memory


def _compress_to_one(tokenizer: Any) -> Any:
    return np.zeros(len(tokenizer), np.int32)


def _show(values: Iterable[float]) -> str:
    found = sorted(values)
    return f"{mean(found):.3f} ({found[0]:.3f} to {found[-1]:.3f})"
