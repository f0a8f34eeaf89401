"""Texts of the function-call adaptation from Glaive's data: `python -m recipes.language.function_calls FILE`.

The published experiment keeps conversations whose system message offers functions, of each the first answer that calls
one, and learns the whole text: offer, question and call.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]

from recipes.language.published import count_steps, load_rows, split_rows, write_texts

NO_FUNCTIONS = "no access to external functions"
CALLS = ("<functioncall>", "<tool_code>")
EPOCHS, LORA_EPOCHS, WARM_UP = 7, 5, 0.03


def find_call(row: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return offer, question and call of a conversation; None when nothing is called.

    Args:
        row: with `system` and `chat`, in which turns begin with USER:, ASSISTANT: and FUNCTION RESPONSE:.
    """
    system, chat = row.get("system") or "", row.get("chat") or ""
    if NO_FUNCTIONS in system:
        return None
    before, *answers = chat.split("ASSISTANT:")
    for answer in answers:
        if any(mark in answer for mark in CALLS) and "USER:" in before:
            call = answer.split("USER:")[0].split("FUNCTION RESPONSE")[0].strip().removesuffix("<|endoftext|>").strip()
            if any(mark in call for mark in (*CALLS, "{")):
                return system.strip(), before.rpartition("USER:")[2].strip(), call
            return None
        before = answer
    return None


def write_call(system: str, question: str, call: str) -> str:
    """Return the text that is learned, in ChatML."""
    turns = (("system", system), ("user", question), ("assistant", call))
    return "\n".join(f"<|im_start|>{role}\n{content}<|im_end|>" for role, content in turns)


def read_texts(rows: Dataset) -> Iterator[str]:
    """Yield the text of each row in which something is called."""
    for row in rows:
        found = find_call(row)
        if found is not None:
            yield write_call(*found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write train.jsonl and eval.jsonl, and say how to go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="JSON or Parquet files of glaive-function-calling-v2")
    parser.add_argument("--out", type=Path, default=Path("function-calls"), help="folder to write to")
    options = parser.parse_args(arguments)
    learned, others = split_rows(Dataset.from_dict({"text": list(read_texts(load_rows(options.files)))}))
    options.out.mkdir(parents=True, exist_ok=True)
    n_texts = write_texts(options.out / "train.jsonl", learned["text"])
    n_others = write_texts(options.out / "eval.jsonl", others["text"])
    print(f"wrote {options.out}: {n_texts} texts to learn, {n_others} to evaluate on; go on with")  # noqa: T201
    for file, epochs in (("function-calls.toml", EPOCHS), ("function-calls-lora.toml", LORA_EPOCHS)):
        steps = count_steps(n_texts, epochs, WARM_UP)
        print(  # noqa: T201
            f"engram train --config recipes/language/{file} --steps {steps['steps']} --warm-up {steps['warm_up']}"
        )


if __name__ == "__main__":
    main()
