"""The compressed vocabulary: tokens whose text is the same but for case, accents and white space share an id.

The published rule (arXiv:2601.07372, section 2.2; TinyEngram, engram.py): NFKC, NFD, accents away, lower case, white
space collapsed. Ids are given in the order of the token ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, normalizers

__all__ = ["compress_vocabulary"]

_SPACE = "\ue000"  # stands for a token of nothing but white space while the ends are stripped
_BROKEN = "\ufffd"  # what decoding gives for bytes that are part of a letter


def compress_vocabulary(tokenizer: Any) -> npt.NDArray[np.int32]:
    """Return token id to compressed id, int32 [V].

    Args:
        tokenizer: a tokenizer of transformers with V tokens, added ones included.
    """
    normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _SPACE),
            normalizers.Strip(),
            normalizers.Replace(_SPACE, " "),
        ]
    )
    known: dict[str, int] = {}
    lookup = np.empty(len(tokenizer), np.int32)
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token], skip_special_tokens=False)
        key = str(tokenizer.convert_ids_to_tokens(token)) if _BROKEN in text else normalizer.normalize_str(text) or text
        lookup[token] = known.setdefault(key, len(known))
    return lookup
