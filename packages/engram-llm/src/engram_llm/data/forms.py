"""The forms that rows may have: a plain text, a prompt and its completion, an instruction, a conversation.

What is learned is the whole of a plain text, and the answers alone of everything else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from engram_core.errors import quote

__all__ = ["Chat", "Content", "Form", "Passage", "content_key", "find_form", "known_forms"]

_TEXT = "text"


@dataclass(frozen=True, slots=True)
class Passage:
    """Plain text.

    Attributes:
        prompt: what is given; empty for a text that is learned as a whole.
        text: what is learned.
    """

    prompt: str
    text: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; the answers of its assistant are learned.

    Attributes:
        messages: each with `role`, `content` and whatever else the chat template reads.
        first: answers before this message are given, not learned.
    """

    messages: tuple[Mapping[str, Any], ...]
    first: int = 0


Content = Passage | Chat


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A form of rows.

    Attributes:
        needs: columns that each row must have.
        read: returns what a row says; raises ValueError with what is wrong.
    """

    needs: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Content]


def known_forms(text_column: str) -> tuple[Form, ...]:
    """Return the forms in the order of preference; a text column that was named goes first."""
    plain = Form(needs=(text_column,), read=lambda values: Passage("", _read_text(values, text_column)))
    others = (
        Form(needs=("messages",), read=_read_messages),
        Form(needs=("prompt", "completion"), read=_read_completion),
        Form(needs=("instruction", "output"), read=_read_instruction),
    )
    return (*others, plain) if text_column == _TEXT else (plain, *others)


def find_form(columns: Collection[str], text_column: str) -> Form | None:
    """Return the form of rows with these columns; None when it is none that is known."""
    return next((form for form in known_forms(text_column) if all(name in columns for name in form.needs)), None)


def content_key(content: Content) -> bytes:
    """Return a digest of what a row says, 8 bytes: equal rows have equal ones."""
    if isinstance(content, Passage):
        value: list[Any] = [content.prompt, content.text]
    else:
        value = [list(content.messages), content.first]
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _read_messages(values: Mapping[str, Any]) -> Chat:
    return _check_chat(_read_list(values, "messages"), 0)


def _read_completion(values: Mapping[str, Any]) -> Content:
    if isinstance(values["prompt"], list) and isinstance(values["completion"], list):  # as TRL writes conversations
        prompt, completion = _read_list(values, "prompt"), _read_list(values, "completion")
        return _check_chat((*prompt, *completion), len(prompt))
    return Passage(_read_text(values, "prompt", may_be_empty=True), _read_text(values, "completion"))


def _read_instruction(values: Mapping[str, Any]) -> Chat:
    """Read what TinyEngram's scripts read: the instruction is the system's, the input the user's message."""
    instruction = _read_text(values, "instruction")
    question = "" if values.get("input") is None else _read_text(values, "input", may_be_empty=True)
    answer = {"role": "assistant", "content": _read_text(values, "output")}
    if question.strip():
        given = [{"role": "system", "content": instruction}, {"role": "user", "content": question}]
    else:
        given = [{"role": "user", "content": instruction}]
    return Chat((*given, answer), len(given))


def _read_text(values: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> str:
    return _check_text(values[name], name, may_be_empty=may_be_empty)


def _check_text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {quote(value)}, expected text")
    if not value.strip() and not may_be_empty:
        raise ValueError(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise ValueError(f"{name} has half a character at place {error.start + 1}") from None
    return value


def _read_list(values: Mapping[str, Any], name: str) -> tuple[Mapping[str, Any], ...]:
    messages = values[name]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name} is {quote(messages)}, expected a list of messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} is {quote(message)}, expected an object with role and content")
    # Parquet fills in what other rows have.
    return tuple({key: value for key, value in message.items() if value is not None} for message in messages)


def _check_chat(messages: tuple[Mapping[str, Any], ...], first: int) -> Chat:
    for number, message in enumerate(messages, start=1):
        calls = message.get("tool_calls")
        is_answer = message["role"] == "assistant"
        if "content" in message or not calls:
            name = f"{'the answer' if is_answer else 'the content'} in message {number}"
            _check_text(message.get("content"), name, may_be_empty=bool(calls) or not is_answer)
    if not any(message["role"] == "assistant" for message in messages[first:]):
        roles = ", ".join(str(message["role"]) for message in messages)
        raise ValueError(f"no message is the assistant's; the roles are {roles}")
    return Chat(messages, first)
