"""Tokens of rows, and which of them are learned.

Each part of a text is tokenised alone: what is given ends where a user's prompt ends, so that the answer's first token
in training is the one that the model is asked for when it answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt

from engram_core import InputError
from engram_core.errors import one_line
from engram_llm.data.forms import Chat, Content, Passage

__all__ = ["Encoder", "Tokens"]

Tokens = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]
"""Token ids of one document, and whether each is learned."""

_Part = tuple[str, bool]
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoder:
    """Turns rows into tokens with one model's tokenizer.

    Attributes:
        has_end: whether the tokenizer has a token that ends a text.
        has_split: whether a conversation was split into one document for each answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Look at the tokenizer's special tokens and template."""
        self._tokenizer = tokenizer
        end = tokenizer.eos_token_id
        self.has_end = end is not None
        self.has_split = False
        self._end = [] if end is None else [int(end)]
        self._begin = [token for token in self._encode([""], special=True)[0] if token not in self._end]
        template = tokenizer.chat_template
        self._has_template = template is not None
        self._is_marked = isinstance(template, str) and _MARKED.search(template) is not None

    def encode(self, contents: Sequence[Content]) -> list[list[Tokens] | str]:
        """Return the documents of each row, usually one; where a row cannot be used, the reason instead.

        Raises:
            InputError: there are conversations, and the tokenizer has no chat template.
        """
        found: list[list[Tokens] | str] = []
        waiting: list[tuple[int, list[_Part]]] = []  # (row, parts of one document), tokenised in one call
        for row, content in enumerate(contents):
            found.append([])
            if isinstance(content, Passage):
                given = [(content.prompt, False)] if content.prompt else []
                waiting.append((row, [*given, (content.text, True)]))
                continue
            if not self._has_template:
                raise InputError(
                    "the tokenizer has no chat template, which conversations need; give prompt and completion, or use "
                    "the model's instruction-tuned variant"
                )
            try:
                if self._is_marked and not content.first:
                    found[row] = [self._encode_marked(content)]
                else:
                    waiting += [(row, parts) for parts in self._cut(content)]
            except (ValueError, TypeError, KeyError, jinja2.TemplateError) as error:
                found[row] = f"the chat template refuses it: {one_line(error)}"
        ids = iter(self._encode([text for _, parts in waiting for text, _ in parts]))
        for row, parts in waiting:
            pieces = [(next(ids), learned) for _, learned in parts]
            if isinstance(contents[row], Passage):  # a template sets its own marks
                pieces = [(self._begin, False), *pieces, (self._end, True)]
            documents = found[row]
            if not isinstance(documents, str):
                documents.append(_join(pieces))
        return found

    def _cut(self, chat: Chat) -> list[list[_Part]]:
        """Return the parts of a conversation as one document, or, where the template forbids it, one an answer.

        Some templates show earlier answers otherwise than the newest one (Qwen3 drops their thoughts). Then each
        answer is learned in a document of its own, after the very text that the model sees when it is asked for it.
        """
        messages = list(chat.messages)
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        whole = self._render(messages)
        spans = []
        for place in answers:
            before, after = self._render(messages[:place], asks=True), self._render(messages[: place + 1])
            if not after.startswith(before):
                raise ValueError(
                    f"its text before the answer in message {place + 1} is not the beginning of its text with it"
                )
            spans.append((before, after, place >= chat.first))
        if all(whole.startswith(after) for _, after, _ in spans):
            parts: list[_Part] = []
            done = 0
            for before, after, learned in spans:
                parts += [(whole[done : len(before)], False), (whole[len(before) : len(after)], learned)]
                done = len(after)
            return [[part for part in parts if part[0]]]
        self.has_split = True
        return [[(before, False), (after[len(before) :], True)] for before, after, learned in spans if learned]

    def _render(self, messages: Sequence[Any], *, asks: bool = False) -> str:
        text: str = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks)
        return text

    def _encode_marked(self, chat: Chat) -> Tokens:
        """Encode with a template that itself says which tokens are the assistant's."""
        encoded = self._tokenizer.apply_chat_template(
            list(chat.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, learns = np.array(encoded["input_ids"], np.int32), np.array(encoded["assistant_masks"], np.bool_)
        if not learns.any():
            raise ValueError("it marks no token as the assistant's")
        return ids, learns

    def _encode(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        if not texts:
            return []
        # verbose: transformers would warn of texts that are longer than the model's limit.
        encoded = self._tokenizer(list(texts), add_special_tokens=special, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def _join(pieces: Sequence[tuple[Sequence[int], bool]]) -> Tokens:
    ids = np.concatenate([np.array(tokens, np.int32) for tokens, _ in pieces])
    learns = np.concatenate([np.full(len(tokens), learned) for tokens, learned in pieces])
    return ids, learns
