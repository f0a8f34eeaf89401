"""A byte-level byte-pair tokenizer in Qwen's format, learned from general texts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from recipes.glosses.texts import BEGIN, END

VOCABULARY = 4096
"""Tokens, the three special ones included; 256 of them are the bytes."""

MAX_LENGTH = 1024
"""Tokens that the model's positions are meant for."""

STOP = "<|endoftext|>"
"""Ends a text, and pads."""

# How Qwen2 cuts text into words (transformers, tokenization_qwen2.py).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def train_tokenizer(texts: Iterable[str], folder: Path, *, size: int = VOCABULARY) -> Qwen2Tokenizer:
    """Learn merges from texts, write the tokenizer's files to a folder and return it.

    Args:
        texts: without special tokens.
        folder: for the files.
        size: of the vocabulary, special tokens included.
    """
    special = [STOP, BEGIN, END]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size - len(special), initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token=None,
        eos_token=STOP,
        pad_token=STOP,
        extra_special_tokens=[BEGIN, END],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer
