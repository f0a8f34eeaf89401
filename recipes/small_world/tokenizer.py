"""A byte-pair tokenizer in CLIP's format, learned from the world's captions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

VOCABULARY = 1024
"""Tokens, special ones included; 512 of them are the bytes within and at the end of a word."""

MAX_LENGTH = 32
"""Tokens that the text encoder reads, special ones included."""

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
# How CLIP cuts text into words (openai/CLIP, simple_tokenizer.py).
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Learn merges from captions, write the tokenizer's files to a folder and return it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    learned = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    merges = learned[: VOCABULARY - 2 * len(letters) - 2]
    # CLIP's order: letters, letters that end a word, merges, special tokens.
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges), _BEGIN, _END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer
