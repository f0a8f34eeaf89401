"""The settings study: one memory for each row of the published tables, trained and measured.

`python -m recipes.language.settings_study --steps N --warm-up M` goes on where it was stopped, row by row, and keeps
what it has measured in study.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from engram_core.settings import Layer, resolve_settings
from engram_llm.qwen3 import QWEN3
from engram_llm.settings import EvaluateSettings, TrainSettings

tomllib: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
RECIPE = Path(__file__).parent / "function-calls.toml"
TASKS = ("truthfulqa_mc1", "truthfulqa_mc2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of the published tables.

    Attributes:
        settings: what differs from the recipe.
        loss, mc1, mc2: validation loss and TruthfulQA as published.
    """

    settings: Mapping[str, Any]
    loss: float
    mc1: float
    mc2: float


_EARLY, _WIDE, _HEADS, _SMALL = (1, 2, 3, 4), 1024, 16, (500, 100, 100)


def _row(loss: float, mc1: float, mc2: float, **changes: Any) -> Row:
    settings: dict[str, Any] = {
        "layer_ids": _EARLY,
        "n_embed_per_ngram": _WIDE,
        "n_head_per_ngram": _HEADS,
        "engram_vocab_size": _SMALL,
    } | changes
    settings["max_ngram_size"] = len(settings["engram_vocab_size"]) + 1
    return Row(settings=settings, loss=loss, mc1=mc1, mc2=mc2)


# AutoArk/TinyEngram, doc/experiments/engram_parameters_tuning.md.
ROWS: Mapping[str, Row] = {
    "early": _row(0.1850, 0.2644, 0.4340),
    "middle": _row(0.1877, 0.2595, 0.4217, layer_ids=(5, 7, 13, 17)),
    "late": _row(0.3386, 0.2570, 0.4266, layer_ids=(21, 22, 23, 24)),
    "width-512": _row(0.2143, 0.2485, 0.4176, n_embed_per_ngram=512, n_head_per_ngram=8),
    "heads-8": _row(0.1901, 0.2546, 0.4202, n_head_per_ngram=8),
    "rows-500-100": _row(0.1982, 0.2656, 0.4337, engram_vocab_size=(500, 100)),
    "rows-500-500": _row(0.1913, 0.2558, 0.4198, engram_vocab_size=(500, 500)),
    "rows-1000-200": _row(0.1936, 0.2436, 0.4102, engram_vocab_size=(1000, 200)),
    "rows-500-500-500": _row(0.1823, 0.2521, 0.4184, engram_vocab_size=(500, 500, 500)),
}


def run_row(name: str, row: Row, folder: Path, options: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Train and measure one memory.

    Args:
        name: of the row.
        row: what differs.
        folder: for the memory and its run.
        options: settings stronger than the row's.
        tasks: of lm-evaluation-harness.

    Returns:
        Validation loss and the tasks' figures.
    """
    recipe = tomllib.loads(RECIPE.read_text(encoding="utf-8"))["train"]
    del recipe["backbone"]
    output = folder / f"{name}.safetensors"
    layers = [
        Layer(source=str(RECIPE), values=recipe),
        Layer(source=f"row {name}", values={**row.settings, "output": output, "name": name}),
        Layer(source="command line", values=options),
    ]
    settings = resolve_settings(TrainSettings, layers)
    resume = (folder / f"{name}.run").exists()
    figures: dict[str, Any] = {"loss": QWEN3.train(settings, resume=resume, overwrite=not resume).loss}
    if tasks:
        report = QWEN3.evaluate(
            EvaluateSettings(
                adapters=(str(output),),
                tasks=tuple(tasks),
                model=settings.model,
                precision=settings.precision,
                device=settings.device,
                base=False,
            )
        )
        figures |= {f"{measure.subject}, {measure.metric}": measure.values["engram"] for measure in report.measures}
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Go through the rows and write study.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder to write to")
    parser.add_argument("--row", choices=ROWS, action="append", help="only this row; repeatable")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warm-up", type=int, required=True)
    parser.add_argument("--no-tasks", action="store_true", help="measure the loss alone")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "study.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in options.row or ROWS:
        if name in found:
            continue
        row, stronger = ROWS[name], {"steps": options.steps, "warm_up": options.warm_up}
        found[name] = run_row(name, row, options.out, stronger, () if options.no_tasks else TASKS)
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: {found[name]}; published loss {row.loss}, MC1 {row.mc1}, MC2 {row.mc2}")  # noqa: T201


if __name__ == "__main__":
    main()
