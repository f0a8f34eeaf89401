"""A unigram tokenizer in T5's format, learned from the world's captions; unlike CLIP's it tells capitals apart."""

from __future__ import annotations

import json
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import T5Tokenizer

VOCABULARY = 1000
"""Tokens, special ones included."""

MAX_LENGTH = 32
"""Tokens that the text encoder reads, the closing one included."""

_SPECIAL = ("<pad>", "</s>", "<unk>")
_TITLED, _CAPITAL = 0.15, 0.15
_OFTEN, _RARE = 1e-3, 5  # of the captions, and at least
_ASCII = [sign for sign in string.printable if not sign.isspace()]


def train_unigram(captions: Sequence[str], folder: Path) -> T5Tokenizer:
    """Learn pieces from captions, write the tokenizer's files to a folder and return it.

    Words that captions often show become pieces of their own; the others are cut into pieces that a unigram model
    learns from them alone, because the learner ignores how often a word occurs.
    """
    counts = Counter(word for caption in captions for word in _split(caption))
    least_often = max(_RARE, len(captions) * _OFTEN)
    often = {word: count for word, count in counts.items() if count >= least_often}
    rare = [word for word in counts if word not in often]
    total = sum(counts.values())
    pieces = {"▁" + word: math.log(count / total) for word, count in often.items()}
    share = math.log(1 - sum(often.values()) / total)
    for piece, score in _learn_pieces(rare, VOCABULARY - len(_SPECIAL) - len(often)):
        pieces.setdefault(piece, score + share)
    least = min(pieces.values())
    # Signs that no caption shows must have a token too, or quotes would be unknown.
    pieces |= {sign: least - 1 for sign in _ASCII if sign not in pieces}
    tokenizer = T5Tokenizer(
        vocab=[*((token, 0.0) for token in _SPECIAL), *pieces.items()], extra_ids=0, model_max_length=MAX_LENGTH
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def vary_case(captions: Sequence[str], seed: int) -> list[str]:
    """Return captions of which some begin with a capital and in some every word does."""
    odds: npt.NDArray[np.float64] = np.random.default_rng([seed, 3]).random(len(captions))
    return [
        text.title() if chance < _TITLED else text[:1].upper() + text[1:] if chance < _TITLED + _CAPITAL else text
        for text, chance in zip(captions, odds, strict=True)
    ]


def _split(caption: str) -> list[str]:
    """Return a caption's words, signs apart."""
    return re.findall(r"\w+|[^\w\s]", caption)


def _learn_pieces(words: Sequence[str], count: int) -> list[tuple[str, float]]:
    """Return pieces of words with their log-probabilities."""
    learner = Tokenizer(models.Unigram())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    trainer = trainers.UnigramTrainer(
        vocab_size=count,
        special_tokens=list(_SPECIAL),
        unk_token="<unk>",
        initial_alphabet=[*_ASCII, "▁"],
        max_piece_length=8,
        show_progress=False,
    )
    learner.train_from_iterator(words, trainer)
    vocabulary = json.loads(learner.to_str())["model"]["vocab"]
    return [(piece, score) for piece, score in vocabulary if piece not in _SPECIAL]
