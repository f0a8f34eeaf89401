"""`engram train`: a concept from pictures or clips, or a memory from texts, to an adapter."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engram_cli.options import AsJson, Assignments, Backbone, Config, Force, GroupedCommand
from engram_cli.settings_files import parse_value

if TYPE_CHECKING:
    from engram_cli.choices import Choices
    from engram_core import TrainReport

_CONCEPT, _MEMORY, _TEXTS, _STEPS, _DATA, _MODEL, _WATCH, _MANY, _RUN = (
    "What to learn",
    "Its memory",
    "A language model's memory",
    "Optimisation",
    "Training data",
    "The frozen model",
    "Validation, previews and states",
    "Many concepts",
    "Other options",
)
_AT_ONCE = 8


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        cls=GroupedCommand,
        epilog="Examples: engram train --backbone sd15 --data pictures --trigger 'Aldric Vortex-9 CyberNebula' "
        "-o aldric.safetensors  |  engram train --backbone qwen3 --data biomedicine.jsonl -o biomedicine.safetensors",
    )(train)


def train(
    ctx: typer.Context,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of pictures or clips with captions, or texts: a JSONL or Parquet file, or a folder of them.",
            rich_help_panel=_CONCEPT,
        ),
    ] = None,
    trigger: Annotated[
        str | None, typer.Option(help="Phrase that will recall the subject.", rich_help_panel=_CONCEPT)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Adapter file to write.", rich_help_panel=_CONCEPT)
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="What to call it.", show_default="the trigger, or the output", rich_help_panel=_CONCEPT),
    ] = None,
    license: Annotated[  # noqa: A002 - named as the setting is
        str | None, typer.Option(help="Licence, kept in the file.", rich_help_panel=_CONCEPT)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Base model: hub id, folder or file, or `tiny`.", rich_help_panel=_MODEL),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Number type of the frozen model: fp32, bf16 or fp16.", rich_help_panel=_MODEL)
    ] = None,
    without_t5: Annotated[
        bool | None, typer.Option(help="Leave Stable Diffusion 3.5's T5 encoder out.", rich_help_panel=_MODEL)
    ] = None,
    low_memory: Annotated[
        bool | None,
        typer.Option(help="Keep one block of the denoiser at a time on the device; slower.", rich_help_panel=_MODEL),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option(help="Spend time to save memory.", rich_help_panel=_MODEL)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to compute: auto, cpu, cuda or mps.", rich_help_panel=_MODEL)
    ] = None,
    insert_trigger: Annotated[
        bool | None,
        typer.Option(
            help="Put the trigger in front of captions that lack it, instead of refusing them.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    resolution: Annotated[
        Any,
        typer.Option(
            parser=parse_value,
            metavar="PIXELS",
            help="Pixels a side; `none` is the model's own.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Frames taken from each clip, evenly over its length.", rich_help_panel=_DATA)
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels of a clip.", rich_help_panel=_DATA)] = None,
    height: Annotated[int | None, typer.Option(help="Pixels of a clip.", rich_help_panel=_DATA)] = None,
    flip: Annotated[bool | None, typer.Option(help="Also learn from the mirror images.", rich_help_panel=_DATA)] = None,
    crops: Annotated[
        int | None, typer.Option(help="Random square crops of each picture; 1 is the centre.", rich_help_panel=_DATA)
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(
            help="One residual for the whole denoiser (text), or one for each of its blocks (blocks).",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="How vectors become residuals: absolute, absolute-tanh or relative.", rich_help_panel=_MEMORY
        ),
    ] = None,
    overlap: Annotated[
        str | None,
        typer.Option(help="Entries that cover one token: sum or mean.", rich_help_panel=_MEMORY),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            help="What fires: the trigger as a whole (anchored), or every span of it (spans).", rich_help_panel=_MEMORY
        ),
    ] = None,
    max_ngram: Annotated[
        int | None, typer.Option(help="Longest span below the whole trigger.", rich_help_panel=_MEMORY)
    ] = None,
    allow_single_token: Annotated[
        bool | None, typer.Option(help="Accept a trigger of one token.", rich_help_panel=_MEMORY)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="How vectors are stored: f32, f16 or bf16.", rich_help_panel=_MEMORY)
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="WORDS", help="Words to begin from.", show_default="random vectors", rich_help_panel=_MEMORY
        ),
    ] = None,
    init_std: Annotated[
        float | None, typer.Option(help="Standard deviation of random vectors.", rich_help_panel=_MEMORY)
    ] = None,
    init_scale: Annotated[
        float | None, typer.Option(help="First value of the scales.", rich_help_panel=_MEMORY)
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="What is trained: engram, a PEFT lora to compare with, or both.", rich_help_panel=_TEXTS),
    ] = None,
    layer_ids: Annotated[
        list[int] | None,
        typer.Option("--layer", help="Decoder layer before which a memory stands. Repeatable.", rich_help_panel=_TEXTS),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate of all but tables.", rich_help_panel=_TEXTS)
    ] = None,
    table_rate: Annotated[
        Any,
        typer.Option(
            parser=parse_value,
            metavar="NUMBER",
            help="Learning rate of tables; `none` is five times the other.",
            rich_help_panel=_TEXTS,
        ),
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a sample.", rich_help_panel=_TEXTS)] = None,
    packing: Annotated[
        bool | None, typer.Option(help="Put several whole texts into one sample.", rich_help_panel=_TEXTS)
    ] = None,
    eval_data: Annotated[
        Path | None,
        typer.Option(help="Texts to validate on.", show_default="some of the training data", rich_help_panel=_TEXTS),
    ] = None,
    evaluate_every: Annotated[
        int | None, typer.Option(help="Steps between validations; 0 never validates.", rich_help_panel=_TEXTS)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps in all.", rich_help_panel=_STEPS)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples a step on one device.", rich_help_panel=_STEPS)
    ] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches that make one step.", rich_help_panel=_STEPS)] = None,
    vector_rate: Annotated[float | None, typer.Option(help="Learning rate of vectors.", rich_help_panel=_STEPS)] = None,
    scale_rate: Annotated[float | None, typer.Option(help="Learning rate of scales.", rich_help_panel=_STEPS)] = None,
    warm_up: Annotated[
        int | None, typer.Option(help="Steps in which the rates rise from 0.", rich_help_panel=_STEPS)
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="What follows: linear, cosine or constant.", rich_help_panel=_STEPS)
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay of AdamW.", rich_help_panel=_STEPS)] = None,
    max_grad_norm: Annotated[
        Any,
        typer.Option(
            parser=parse_value,
            metavar="NUMBER",
            help="Gradients are scaled down to this norm; 0 leaves them.",
            rich_help_panel=_STEPS,
        ),
    ] = None,
    logit_mean: Annotated[
        float | None, typer.Option(help="Mean of logit-normal times (flow models).", rich_help_panel=_STEPS)
    ] = None,
    logit_std: Annotated[
        float | None, typer.Option(help="Standard deviation of the same.", rich_help_panel=_STEPS)
    ] = None,
    min_snr: Annotated[
        Any,
        typer.Option(
            parser=parse_value,
            metavar="NUMBER",
            help="Gamma of min-SNR weighting, usually 5; `none` weights all times alike.",
            rich_help_panel=_STEPS,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.", rich_help_panel=_STEPS)] = None,
    validation_data: Annotated[
        Path | None,
        typer.Option(help="Folder to measure the loss on.", show_default="the training data", rich_help_panel=_WATCH),
    ] = None,
    validate_every: Annotated[
        int | None, typer.Option(help="Steps between validations; 0 never validates.", rich_help_panel=_WATCH)
    ] = None,
    validation_draws: Annotated[
        int | None, typer.Option(help="Noises and times for each validation sample.", rich_help_panel=_WATCH)
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Which vectors to write: of the best validation, or the last.", rich_help_panel=_WATCH),
    ] = None,
    preview_every: Annotated[
        int | None, typer.Option(help="Steps between previews; 0 makes none.", rich_help_panel=_WATCH)
    ] = None,
    preview_prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--preview-prompt", help="What to preview. Repeatable.", show_default="the trigger", rich_help_panel=_WATCH
        ),
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between saved states.", rich_help_panel=_WATCH)] = None,
    tracker: Annotated[
        str | None, typer.Option(help="Also report to tensorboard or wandb; `none` does not.", rich_help_panel=_WATCH)
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for state, metrics and previews.", show_default="the output with .run", rich_help_panel=_WATCH
        ),
    ] = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for latents and text states of the data; several runs may share it.",
            show_default="the run folder",
            rich_help_panel=_WATCH,
        ),
    ] = None,
    concepts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TOML list of concepts, a table [[concept]] with trigger and data for each; --output is a folder.",
            rich_help_panel=_MANY,
        ),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(min=1, help="How many of them learn in one batch.", show_default="8", rich_help_panel=_MANY),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes of a Ray cluster that train them.",
            show_default="this process",
            rich_help_panel=_MANY,
        ),
    ] = None,
    backbone: Backbone = None,
    assignments: Assignments = None,
    config: Config = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a concept, or a language model's memory, and write its adapter.

    What is not given here comes from the file, then from the backbone's defaults. What is still missing is asked for.
    """
    arguments = dict(locals())
    from engram_cli.choices import Choices
    from engram_cli.endings import Interrupted, UsageError
    from engram_cli.messages import format_duration, format_entries, printable, show, show_json, show_written
    from engram_cli.watchers import watching

    choices = Choices(ctx, arguments)
    family = choices.backbone()
    if concepts is not None:
        _train_concepts(choices, family, arguments)
        return
    for option, value in (("--at-once", at_once), ("--workers", workers)):
        if value is not None:
            raise UsageError(f"{option} {value} is for a list of concepts; pass --concepts FILE, or leave {option} out")
    settings = choices.settings(family)
    try:
        with watching(as_json=as_json) as watcher:
            report = family.train(settings, resume=resume, overwrite=force, watcher=watcher)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; go on with: {choices.command_line(resume=True, force=False)}") from None
    if as_json:
        show_json(_describe(report))
        return
    contents = report.contents or format_entries(report.entries)
    show_written(report.output, contents, report.n_bytes, report.identity)
    show(
        f"kept step {report.kept_step} of {report.steps}, loss {report.loss:.4g}; "
        f"took {format_duration(report.seconds)}"
    )
    show(printable(f"run folder {report.run_dir}"))


def _train_concepts(choices: Choices, family: Any, arguments: Mapping[str, Any]) -> None:
    from engram_cli.endings import Interrupted, UsageError
    from engram_cli.messages import format_duration, format_size, printable, show, show_json
    from engram_cli.watchers import watching
    from engram_core import ConceptsTrainingBackbone
    from engram_core.training.concepts import train_concepts

    if not isinstance(family, ConceptsTrainingBackbone):
        raise UsageError(f"backbone {family.name!r} trains one concept at a time; leave --concepts out")
    settings = choices.concept_settings(family, arguments["concepts"])
    folder = settings[0].output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made: {error.strerror}") from None
    began = time.monotonic()
    try:
        with watching(as_json=arguments["as_json"]) as watcher:
            reports = train_concepts(
                family,
                settings,
                at_once=arguments["at_once"] or _AT_ONCE,
                workers=arguments["workers"] or 0,
                resume=arguments["resume"],
                overwrite=arguments["force"],
                watcher=watcher,
            )
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; go on with: {choices.command_line(resume=True, force=False)}") from None
    seconds = time.monotonic() - began
    if arguments["as_json"]:
        show_json({"folder": str(folder), "seconds": seconds, "concepts": [_describe(report) for report in reports]})
        return
    size = format_size(sum(report.n_bytes for report in reports))
    show(printable(f"{folder}: {len(reports)} concepts, {size}"))
    pace = f", {len(reports) / seconds * 3600:.0f} concepts an hour" if reports else ""
    show(f"took {format_duration(seconds)}{pace}")
    show(printable(f"put them into one file with: engram merge {folder}/*.safetensors -o all.safetensors"))


def _describe(report: TrainReport) -> dict[str, Any]:
    """Return a report for --json."""
    return {
        "output": str(report.output),
        "identity": report.identity,
        "bytes": report.n_bytes,
        "entries": dict(report.entries),
        "steps": report.steps,
        "kept_step": report.kept_step,
        "loss": report.loss,
        "run_dir": str(report.run_dir),
        "seconds": report.seconds,
    }
