"""What engram needs to know of a tokenizer, and how to get it from the ones people have."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engram_core.canonical import dump_canonical
from engram_core.errors import InputError

# Texts whose ids reveal normalisation, merges and pre-tokenisation, which a vocabulary alone does not show.
_PROBES = (
    "a photo of Aldric Vortex-9 CyberNebula, 8k",
    'ALDRIC aldric Aldric\'s "Aldric" (Aldric) [x]',
    "Ünïcode ﬁ  double  space\ttab\nline 12345.678",
    "日本語 emoji 🙂 end",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec:
    """Identity of a tokenizer, as written in an adapter's manifest.

    Attributes:
        class_name: the tokenizer's class, for people.
        vocab_size: number of ids; every id in the adapter is below it.
        fingerprint: hex SHA-256 over vocabulary and probe texts; equal means interchangeable.
    """

    class_name: str
    vocab_size: int
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTokenizer:
    """A stream's tokenizer as engram uses it.

    Attributes:
        spec: identity, compared with an adapter's manifest.
        encode: text to token ids, without special tokens and without truncation.
        show: token ids to one short string each, for people.
        special_ids: ids that no trigger may contain (padding, unknown, begin, end).
        max_tokens: the most trigger and prompt tokens the encoder reads, special tokens not counted;
            None when unlimited.
    """

    spec: TokenizerSpec
    encode: Callable[[str], Sequence[int]]
    show: Callable[[Sequence[int]], list[str]]
    special_ids: frozenset[int]
    max_tokens: int | None


def fingerprint_tokenizer(vocabulary: Mapping[str, int], encode: Callable[[str], Sequence[int]]) -> str:
    """Return the hex SHA-256 that identifies a tokenizer by what it does.

    Args:
        vocabulary: token string to id, added tokens included.
        encode: text to ids, without special tokens.
    """
    probes = [[int(i) for i in encode(text)] for text in _PROBES]
    pairs = sorted((int(i), token) for token, i in vocabulary.items())
    return hashlib.sha256(dump_canonical([pairs, probes])).hexdigest()


def wrap_tokenizer(tokenizer: Any, *, max_length: int | None = None, class_name: str | None = None) -> StreamTokenizer:
    """Adapt a tokenizer of `transformers` or `tokenizers`; neither library is imported.

    Args:
        tokenizer: a `transformers` tokenizer, or a `tokenizers.Tokenizer`.
        max_length: ids the encoder reads, special tokens included; None means the tokenizer's own limit.
        class_name: name for people; None means the object's class.

    Raises:
        InputError: the object is neither.
    """
    if hasattr(tokenizer, "all_special_ids"):  # transformers
        encode: Callable[[str], Sequence[int]] = _TransformersEncode(tokenizer)
        show = tokenizer.convert_ids_to_tokens
        special = frozenset(int(i) for i in tokenizer.all_special_ids)
        specials_per_text = int(tokenizer.num_special_tokens_to_add())
        vocab_size = len(tokenizer)
        if max_length is None and tokenizer.model_max_length < 1_000_000:  # transformers: 1e30 means none
            max_length = int(tokenizer.model_max_length)
    elif hasattr(tokenizer, "get_added_tokens_decoder"):  # tokenizers.Tokenizer
        if tokenizer.truncation or tokenizer.padding:  # files often carry both; a copy does without
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.no_truncation()
            tokenizer.no_padding()
        encode = _TokenizersEncode(tokenizer)
        show = lambda ids: [tokenizer.id_to_token(int(i)) or "?" for i in ids]  # noqa: E731
        added = tokenizer.get_added_tokens_decoder()
        special = frozenset(int(i) for i, token in added.items() if token.special)
        specials_per_text = int(tokenizer.num_special_tokens_to_add(False))
        vocab_size = int(tokenizer.get_vocab_size())
    else:
        raise InputError(
            f"{type(tokenizer).__name__} is not a tokenizer of transformers or tokenizers; "
            "build an engram_core.StreamTokenizer from its encode function instead"
        )
    vocabulary = tokenizer.get_vocab()
    spec = TokenizerSpec(
        class_name=(class_name or type(tokenizer).__name__).removesuffix("Fast"),
        vocab_size=max(vocab_size, 1 + max(vocabulary.values(), default=0)),
        fingerprint=fingerprint_tokenizer(vocabulary, encode),
    )
    max_tokens = None if max_length is None else max_length - specials_per_text
    return StreamTokenizer(spec=spec, encode=encode, show=show, special_ids=special, max_tokens=max_tokens)


@dataclass(frozen=True, slots=True)
class _TransformersEncode:
    tokenizer: Any

    def __call__(self, text: str) -> list[int]:
        # verbose=False: texts longer than the model's limit are expected here, transformers would warn.
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


@dataclass(frozen=True, slots=True)
class _TokenizersEncode:
    tokenizer: Any

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids
