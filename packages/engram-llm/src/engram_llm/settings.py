"""What users can set for training, generating and evaluating; importing this imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engram_core import InputError, MemorySettings, VectorType

__all__ = ["Device", "EvaluateSettings", "GenerateSettings", "Method", "Precision", "TrainSettings"]

Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Method = Literal["engram", "lora", "both"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How a memory is trained. The shape follows TinyEngram's biomedical script and its settings study.

    Attributes:
        data: JSONL, Parquet or text file, or a folder of them (docs/language.md says which columns).
        output: file to write; a folder for LoRA's part.
        model: hub id or folder of the base model, or `tiny`.
        method: `engram`, a PEFT `lora` on the same data and budget, or `both` together.
        name: of the memory; None means the output's name.
        license: licence of the memory, kept in the file.
        run_dir: folder for checkpoints and metrics; None means the output's name with `.run`.
        engram_vocab_size: rows a head for n = 2, 3, ..., N.
        max_ngram_size: N.
        n_embed_per_ngram: channels of all heads of one n together.
        n_head_per_ngram: heads of each n.
        layer_ids: decoder layers before which a memory stands.
        kernel_size: taps of the convolution, `max_ngram_size` positions apart.
        hc_mult: branches with a gate each.
        pad_id: token id that stands left of the text; None means the tokenizer's padding, else its end of text.
        hash_seed: of the hash.
        init_std: standard deviation of the tables' first values.
        engram_warmup_steps: first steps, in which gates stay open; never while validating.
        engram_soft_constraint_steps: steps after those, in which gates are at least 0.1.
        freeze_tables: leave the tables at their random values; a control.
        dtype: how weights are stored.
        sparse: update the touched rows of tables alone; None does so where all tables together have more than 20
            million values.
        lora_rank, lora_alpha, lora_dropout: of LoRA on all linear layers of the decoder.
        text_column: column of plain texts.
        max_length: tokens of a sample.
        packing: put whole texts one after the other into samples of `max_length`; longer ones continue in samples of
            their own, without what came before. Else each text is a sample, and longer ones are cut.
        eval_data: what to validate on; None takes `eval_fraction` of the data away from training.
        eval_fraction: part of the data, chosen by content, that validates; 0 validates nothing.
        eval_samples: texts to validate on at most, chosen by content too.
        steps: optimizer steps in all.
        batch_size: samples a step on one device.
        accumulate: batches whose gradients add up to one step.
        learning_rate: peak rate of projections, norms, convolutions, and of LoRA.
        table_rate: peak rate of tables; None means five times `learning_rate`.
        warm_up: steps in which the rates rise from 0.
        schedule: what follows: `cosine` or `linear` decay to 0, or `constant`.
        weight_decay: of AdamW, for matrices; tables have none.
        adam_beta2: of AdamW.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        precision: `fp32`, or `bf16` for the frozen model and the passes; what learns is float32.
        gradient_checkpointing: spend time to save memory.
        device: where to train.
        seed: of everything random.
        evaluate_every: steps between validations; 0 never validates.
        patience: validations without a better one after which training ends; 0 never ends it early.
        keep: which weights are written at the end: of the `best` validation, or the `last`.
        save_every: steps between checkpoints.
        tracker: also report to TensorBoard or Weights & Biases.
    """

    data: Path
    output: Path
    model: str = "Qwen/Qwen3-0.6B"
    method: Method = "engram"
    name: str | None = None
    license: str | None = None
    run_dir: Path | None = None
    engram_vocab_size: tuple[int, ...] = (20000, 2000)
    max_ngram_size: int = 3
    n_embed_per_ngram: int = 512
    n_head_per_ngram: int = 8
    layer_ids: tuple[int, ...] = (1, 2, 3, 4)
    kernel_size: int = 4
    hc_mult: int = 1
    pad_id: int | None = None
    hash_seed: int = 0
    init_std: float = 0.02
    engram_warmup_steps: int = 0
    engram_soft_constraint_steps: int = 0
    freeze_tables: bool = False
    dtype: VectorType = "f32"
    sparse: bool | None = None
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    text_column: str = "text"
    max_length: int = 1024
    packing: bool = True
    eval_data: Path | None = None
    eval_fraction: float = 0.02
    eval_samples: int = 200
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-3
    table_rate: float | None = None
    warm_up: int = 20
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    precision: Precision = "bf16"
    gradient_checkpointing: bool = False
    device: Device = "auto"
    seed: int = 0
    evaluate_every: int = 100
    patience: int = 0
    keep: Literal["best", "last"] = "best"
    save_every: int = 100
    tracker: Literal["none", "tensorboard", "wandb"] = "none"

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the values."""
        low = {"lora_rank": 1, "lora_alpha": 1, "max_length": 8, "steps": 1, "batch_size": 1, "accumulate": 1}
        low |= {"save_every": 1, "eval_samples": 1, "warm_up": 0, "evaluate_every": 0, "patience": 0, "seed": 0}
        low |= {"engram_warmup_steps": 0, "engram_soft_constraint_steps": 0}
        for name, least in low.items():
            value = getattr(self, name)
            if value < least:
                yield f"{name} is {value}, expected at least {least}"
        for name in ("learning_rate", "table_rate", "weight_decay", "init_std", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                yield f"{name} is {value}, expected a finite number of at least 0"
        for name in ("eval_fraction", "lora_dropout", "adam_beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                yield f"{name} is {value}, expected a number from 0 to below 1"
        if self.patience and not self.evaluate_every:
            yield "patience needs validations; set evaluate_every"
        if self.method != "lora":
            if self.output.suffix != ".safetensors":
                yield f"output is {self.output}, expected a name that ends in .safetensors"
            try:
                self.memory_settings(self.pad_id or 0)
            except InputError as error:
                yield str(error)
        elif self.output.suffix == ".safetensors":
            yield f"output is {self.output}, expected the name of a folder, in which PEFT keeps LoRA"
        if self.precision == "fp16":
            yield "precision fp16 would need scaled losses; use bf16 or fp32"

    def memory_settings(self, pad_id: int) -> MemorySettings:
        """Return the shape of the memory.

        Args:
            pad_id: token id that stands left of the text.

        Raises:
            InputError: values do not fit one another.
        """
        return MemorySettings(
            engram_vocab_size=self.engram_vocab_size,
            max_ngram_size=self.max_ngram_size,
            n_embed_per_ngram=self.n_embed_per_ngram,
            n_head_per_ngram=self.n_head_per_ngram,
            layer_ids=self.layer_ids,
            kernel_size=self.kernel_size,
            dilation=self.max_ngram_size,
            hc_mult=self.hc_mult,
            pad_id=pad_id,
            seed=self.hash_seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSettings:
    """What to generate, and how.

    Attributes:
        adapters: memory files or hub repositories; `FILE@0.8` sets the strength. They act side by side.
        strengths: `NAME=X` for one memory, by its name, or `X` for all, on top of the adapters' own.
        prompts: what to go on from.
        prompts_file: text file with one prompt a line.
        chat: put each prompt into the model's chat template as a user's message.
        output: JSONL file for prompts and texts; None writes none.
        model: hub id or folder of the base model, or `tiny`.
        compare: also generate without memories.
        max_new_tokens: tokens to generate at most.
        temperature: of sampling; 0 takes the likeliest token.
        top_p: sample among the likeliest tokens of this share.
        seeds: each prompt is generated once with each.
        batch_size: texts at once; with 1 they are shown while they are generated.
        host_tables: leave tables in the mapped file.
        precision: number type of the model.
        device: where to generate.
        force_base: use memories that were trained on another model of the same width and vocabulary.
    """

    adapters: tuple[str, ...] = ()
    strengths: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    chat: bool = False
    output: Path | None = None
    model: str = "Qwen/Qwen3-0.6B"
    compare: bool = False
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seeds: tuple[int, ...] = (0,)
    batch_size: int = 1
    host_tables: bool = False
    precision: Precision = "bf16"
    device: Device = "auto"
    force_base: bool = False

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the values."""
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}, expected at least 1"
        if not 0 <= self.temperature < float("inf"):
            yield f"temperature is {self.temperature}, expected a finite number of at least 0"
        if not 0 < self.top_p <= 1:
            yield f"top_p is {self.top_p}, expected a number above 0, at most 1"
        if not self.prompts and self.prompts_file is None:
            yield "there is no prompt; give --prompt or --prompts-file"
        if not self.seeds or min(self.seeds) < 0:
            yield f"seeds are {list(self.seeds)}, expected at least one, none below 0"
        elif len(self.seeds) > 1 and not self.temperature:
            yield f"seeds are {list(self.seeds)}, but temperature 0 gives one text for all; set a temperature"
        if self.compare and not self.adapters:
            yield "compare needs a memory to compare with; give --adapter"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateSettings:
    """What to measure the base model and memories on, and how.

    Attributes:
        adapters: memory files or hub repositories; `FILE@0.8` sets the strength. They act side by side.
        strengths: `NAME=X` for one memory, by its name, or `X` for all, on top of the adapters' own.
        texts: files or folders whose perplexity is measured: a .txt is one document; .jsonl, .jsonl.gz and .parquet
            hold one a line or row.
        text_column: column of JSONL and Parquet files that holds the text.
        tasks: of lm-evaluation-harness, e.g. mmlu, pubmedqa, truthfulqa_mc1, truthfulqa_mc2.
        task_folder: folder with tasks of your own, as YAML files.
        limit: documents of each file, and samples of each task, at most.
        num_fewshot: examples before each sample of a task; None means as the task says.
        lora: folder of a PEFT adapter to measure as well, alone and, where there are memories, together with them.
        base: also measure the base model.
        model: hub id or folder of the base model, or `tiny`.
        window: tokens that the model reads at once in long documents; None means its positions, at most 1024.
        stride: tokens by which windows advance; None means half of the window.
        batch_size: windows or samples at once.
        output: JSON file for all figures; None writes none.
        host_tables: leave tables in the mapped file.
        precision: number type of the model.
        device: where to compute.
        force_base: use memories that were trained on another model of the same width and vocabulary.
    """

    adapters: tuple[str, ...] = ()
    strengths: tuple[str, ...] = ()
    texts: tuple[Path, ...] = ()
    text_column: str = "text"
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    lora: Path | None = None
    base: bool = True
    model: str = "Qwen/Qwen3-0.6B"
    window: int | None = None
    stride: int | None = None
    batch_size: int = 4
    output: Path | None = None
    host_tables: bool = False
    precision: Precision = "bf16"
    device: Device = "auto"
    force_base: bool = False

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the values."""
        for name, least in {"limit": 1, "num_fewshot": 0, "window": 2, "stride": 1, "batch_size": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"{name} is {value}, expected at least {least}"
        if self.window is not None and self.stride is not None and self.stride >= self.window:
            yield f"stride is {self.stride}, expected less than the window, which is {self.window}"
        if not self.texts and not self.tasks:
            yield "there is nothing to measure on; give --text or --tasks"
        if not self.base and not self.adapters and self.lora is None:
            yield "there is nothing to measure without the base model; give --adapter"
