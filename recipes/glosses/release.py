"""What ships: the checkpoint, and texts to adapt and to measure it with, each with WordNet's licence."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

from recipes.glosses.synsets import Synset
from recipes.glosses.texts import Corpus, sample, write_entry

NOTICE = "LICENSE-WordNet.txt"
REHEARSAL = 10_000
"""General texts that ship, for those who want the base to keep what it knows."""

_TAKEN_FROM = """\
Words and glosses of WordNet 3.0, as packaged by Debian (wordnet-base).
Changed: {change}
WordNet comes under the following licence.

"""


def write_checkpoint(model: Qwen3ForCausalLM, tokenizer: Path, notice: str, folder: Path) -> None:
    """Write the model in half precision, its tokenizer, and the licence of what both learned from.

    Args:
        model: changed to half precision too.
        tokenizer: folder of its tokenizer.
        notice: WordNet's licence.
        folder: that ships.
    """
    model.to(torch.float16).save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors lets only the owner read what it writes
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    head = _TAKEN_FROM.format(change="a language model was trained on them, and its tokenizer.")
    (folder / NOTICE).write_text(head + notice, encoding="utf-8")


def write_glosses(corpus: Corpus, notice: str, folder: Path) -> None:
    """Write the domain's texts, the held-out ones, and some general ones, as compressed JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "domain-train.jsonl.gz", corpus.domain)
    _write_lines(folder / "domain-eval.jsonl.gz", corpus.domain_held_out)
    _write_lines(folder / "general-eval.jsonl.gz", corpus.general_held_out)
    _write_lines(folder / "general-train-sample.jsonl.gz", sample(corpus.general, REHEARSAL))
    head = _TAKEN_FROM.format(change="each synset became one line, `WORD, WORD: gloss.`; relations were left out.")
    (folder / NOTICE).write_text(head + notice, encoding="utf-8")


def _write_lines(path: Path, synsets: Iterable[Synset]) -> None:
    lines = [json.dumps({"text": write_entry(synset)}, ensure_ascii=False) + "\n" for synset in synsets]
    # No clock and no name inside: the same texts are the same bytes.
    path.write_bytes(gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0))
