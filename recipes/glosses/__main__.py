"""Make everything that ships as `--model tiny` of the backbone `qwen3`: `uv run python -m recipes.glosses`.

Needs Debian's package `wordnet-base`. The training keeps its state in the work folder, so that the command goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3ForCausalLM

from recipes.glosses.base import LENGTH, ROWS, train_base
from recipes.glosses.evaluate import (
    ENTRIES,
    QUESTIONS,
    measure,
    measure_all,
    sample_chats,
    sample_entries,
    share_answered,
    write_examples,
)
from recipes.glosses.lessons import Lessons
from recipes.glosses.release import write_checkpoint, write_glosses
from recipes.glosses.synsets import WORDNET, read_wordnet
from recipes.glosses.texts import divide, sample, write_entry
from recipes.glosses.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "packages/engram-llm/src/engram_llm/tiny"
STEPS = 5_600
ASKED = 200  # questions for held-out words


def report(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)  # noqa: T201 - a script for people at a terminal


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not trained yet, write what ships, and measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build/glosses", help="folder for the state")
    parser.add_argument("--out", type=Path, default=TARGET, help="folder that ships")
    parser.add_argument("--wordnet", type=Path, default=WORDNET, help="folder of WordNet's data files")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--eager", action="store_true", help="do without a C++ compiler; takes longer")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    work, out, seed, steps = options.work, options.out, options.seed, options.steps
    work.mkdir(parents=True, exist_ok=True)

    wordnet = read_wordnet(options.wordnet)
    corpus = divide(wordnet.synsets)
    report(f"{len(corpus.general)} general synsets, {len(corpus.domain)} of the domain")
    if not (work / "tokenizer" / "tokenizer.json").exists():
        train_tokenizer(map(write_entry, corpus.general), work / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    lessons = Lessons(corpus.general, tokenizer, rows=ROWS, length=LENGTH, seed=seed)
    few = sample(corpus.general_held_out, 400)

    def preview(model: Qwen3ForCausalLM, step: int) -> None:
        entries, chats = (measure(model, tokenizer, samples) for samples in (sample_entries(few), sample_chats(few)))
        report(f"step {step}: held out {entries['nats_per_token']}, answers {chats['nats_per_token']}")
        for example in write_examples(model, tokenizer, seed=seed, entries=ENTRIES[:2], questions=QUESTIONS[:2]):
            report(f"  {example['prompt']} {example['greedy']} | {example['sampled']}")

    settings = {"steps": steps, "seed": seed, "compiled": not options.eager}
    model = train_base(lessons, tokenizer, work, **settings, report=report, preview=preview)
    write_checkpoint(model, work / "tokenizer", wordnet.notice, out / "qwen3")
    write_glosses(corpus, wordnet.notice, out / "glosses")

    # As it ships: its weights rounded to half precision.
    model = Qwen3ForCausalLM.from_pretrained(out / "qwen3", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "qwen3")
    figures = {
        "command": f"python -m recipes.glosses --steps {steps} --seed {seed}",
        "seed": seed,
        "steps": steps,
        "tokens_learned": lessons.count_tokens(steps),
        "parameters": model.num_parameters(),
        "synsets": {
            "general": len(corpus.general),
            "general, held out": len(corpus.general_held_out),
            "domain": len(corpus.domain),
            "domain, held out": len(corpus.domain_held_out),
        },
        "wordnet_sha256": wordnet.digest,
        "losses": measure_all(model, tokenizer, corpus),
        "answered": share_answered(model, tokenizer, sample(corpus.general_held_out, ASKED)),
        "examples": write_examples(model, tokenizer, seed=seed),
    }
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    (out / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    report(text)


if __name__ == "__main__":
    main()
