"""How well the model foretells texts that it never saw, and what it writes itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen3ForCausalLM

from recipes.glosses.packing import IGNORED
from recipes.glosses.synsets import Synset
from recipes.glosses.texts import END, Corpus, open_chat, sample, write_answer, write_entry, write_question
from recipes.glosses.tokenizer import STOP

BATCH = 32
LONGEST = 60
"""Tokens that an example may have."""

# General ones, then two that are held out, then two of the domain.
ENTRIES = ("teacher", "violin", "run away", "quickly", "irresponsible", "dirtiness, uncleanness", "sparrow", "granite")
QUESTIONS = (
    "What is a teacher?",
    "What is a violin?",
    "Define run away.",
    "What does quickly mean?",
    "What does irresponsible mean?",
    "Define dirtiness.",
    "What is a sparrow?",
)
TEMPERATURE = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A text to foretell: after what is given, the text, and that it ends there."""

    given: str
    text: str
    end: str


def sample_entries(synsets: Sequence[Synset]) -> list[Sample]:
    """Return synsets as entries of a dictionary, nothing given."""
    return [Sample(given="", text=write_entry(synset), end=STOP) for synset in synsets]


def sample_chats(synsets: Sequence[Synset]) -> list[Sample]:
    """Return a question for the first word of each synset as given, and its answer as the text."""
    return [
        Sample(given=open_chat(write_question(synset, 0, number % 2)), text=write_answer(synset), end=END)
        for number, synset in enumerate(synsets)
    ]


@torch.inference_mode()
def measure(model: Qwen3ForCausalLM, tokenizer: Any, samples: Sequence[Sample]) -> dict[str, float]:
    """Return the model's mean loss over samples, each read alone.

    The first token of a text cannot be foretold and does not count, so the figures for a word and a byte are those
    of a text whose first token is known.

    Args:
        model: to measure.
        tokenizer: of the model.
        samples: what to foretell.

    Returns:
        Losses in nats for a token, a word and a byte, the perplexity of a token, and what was counted.
    """
    stop = int(tokenizer.convert_tokens_to_ids(STOP))
    pairs = [(tokenizer(each.given).input_ids, tokenizer(each.text + each.end).input_ids) for each in samples]
    pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    total, tokens = 0.0, 0
    for at in range(0, len(pairs), BATCH):
        part = pairs[at : at + BATCH]
        longest = max(len(given) + len(rest) for given, rest in part)
        ids = torch.full((len(part), longest), stop)
        labels = torch.full((len(part), longest), IGNORED)
        for row, (given, rest) in enumerate(part):
            end = len(given) + len(rest)
            ids[row, :end] = torch.tensor([*given, *rest])
            labels[row, max(1, len(given)) : end] = ids[row, max(1, len(given)) : end]
        # What pads stands at the right, where no token of a text looks.
        logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
        following = labels[:, 1:].flatten()
        total += float(cross_entropy(logits[:, :-1].flatten(0, 1), following, ignore_index=IGNORED, reduction="sum"))
        tokens += int((following != IGNORED).sum())
    words = sum(len(each.text.split()) for each in samples)
    size = sum(len(each.text.encode()) for each in samples)
    return {
        "nats_per_token": round(total / tokens, 4),
        "perplexity": round(math.exp(total / tokens), 2),
        "nats_per_word": round(total / words, 4),
        "nats_per_byte": round(total / size, 4),
        "texts": len(samples),
        "tokens": tokens,
    }


def measure_all(model: Qwen3ForCausalLM, tokenizer: Any, corpus: Corpus) -> dict[str, dict[str, float]]:
    """Return the losses over general and domain texts that were held out, as entries and as answers.

    As many of the general entries for training are measured too: what they are better by was learned by heart.
    """
    seen = sample(corpus.general, len(corpus.general_held_out))
    return {
        "general, seen in training": measure(model, tokenizer, sample_entries(seen)),
        "general": measure(model, tokenizer, sample_entries(corpus.general_held_out)),
        "general, answers": measure(model, tokenizer, sample_chats(corpus.general_held_out)),
        "domain": measure(model, tokenizer, sample_entries(corpus.domain_held_out)),
        "domain, answers": measure(model, tokenizer, sample_chats(corpus.domain_held_out)),
    }


def share_answered(model: Qwen3ForCausalLM, tokenizer: Any, synsets: Sequence[Synset]) -> float:
    """Return to how many of the questions for synsets the likeliest text ends as an answer does, with a turn's end."""
    end = int(tokenizer.convert_tokens_to_ids(END))
    written = [_write(model, tokenizer, sample.given, do_sample=False) for sample in sample_chats(synsets)]
    return round(sum(ids[-1] == end and len(ids) > 1 for ids in written) / len(written), 4)


def write_examples(
    model: Qwen3ForCausalLM,
    tokenizer: Any,
    *,
    seed: int,
    entries: Sequence[str] = ENTRIES,
    questions: Sequence[str] = QUESTIONS,
) -> list[dict[str, str]]:
    """Return what the model writes for words and questions: the likeliest text and a drawn one.

    Args:
        model: that writes.
        tokenizer: of the model.
        seed: of the drawn texts.
        entries: words of a dictionary.
        questions: asked in a conversation.
    """
    prompts = [*((f"{word}:", f"{word}:") for word in entries), *((each, open_chat(each)) for each in questions)]

    def show(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip()

    examples = []
    for number, (name, prompt) in enumerate(prompts):
        torch.manual_seed(seed + number)
        examples.append(
            {
                "prompt": name,
                "greedy": show(_write(model, tokenizer, prompt, do_sample=False)),
                "sampled": show(_write(model, tokenizer, prompt, do_sample=True, temperature=TEMPERATURE, top_k=40)),
            }
        )
    return examples


@torch.inference_mode()
def _write(model: Qwen3ForCausalLM, tokenizer: Any, prompt: str, **settings: Any) -> list[int]:
    """Return the ids that the model writes after a prompt."""
    read = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**read, max_new_tokens=LONGEST, **settings)
    ids: list[int] = written[0, read.input_ids.shape[1] :].tolist()
    return ids
