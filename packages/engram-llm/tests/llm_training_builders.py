"""A model folder small enough to train in a moment, data sets that it can learn, and what watches the training."""

import contextlib
import gc
import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from engram_core import Watcher
from engram_core.settings import Layer, resolve_settings
from engram_llm.settings import TrainSettings

WIDTH, LAYERS, LENGTH = 32, 4, 64
"""Of the hidden states, in the decoder, and the most tokens it reads."""

END = "<|endoftext|>"

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen2's."""

MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Says itself which tokens are the assistant's."""

FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Shows the newest answer otherwise than earlier ones, as Qwen3's."""

ANIMALS = ["badger", "heron", "lynx", "newt", "otter", "raven", "stoat", "viper", "weasel", "wren"]
PLACES = ["bog", "cave", "field", "ford", "glade", "heath", "marsh", "moor", "reed bed", "wood"]


@cache
def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that knows a few words."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END, "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    bpe.train_from_iterator(texts(), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END, model_max_length=LENGTH)
    made.chat_template = template
    return made


def build_model(seed: int = 0, **fields) -> Qwen3ForCausalLM:
    """Return a model with random weights."""
    fields.setdefault("vocab_size", 310)  # more than the tokenizer's, as is usual
    config = Qwen3Config(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=LENGTH,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        **fields,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).requires_grad_(False).eval()


def save_model(folder: Path, template: str | None = TEMPLATE, **fields) -> Path:
    """Write a model and its tokenizer to a folder."""
    build_model(**fields).save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def many_runs():
    """Compute on one thread, so that sums are made in one order; and without much ado between runs.

    The Trainer collects garbage in each of them, and goes through everything that imports have made.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


def texts() -> list[str]:
    """Return a hundred short texts."""
    return [f"The {animal} of the {place} sleeps by day." for animal in ANIMALS for place in PLACES]


def lengthen(count: int) -> list[dict[str, str]]:
    """Return rows with texts of different lengths."""
    return [{"text": " ".join(texts()[number : number + 1 + number % 3])} for number in range(count)]


def write_rows(path: Path, rows) -> Path:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_texts(path: Path, chosen=None) -> Path:
    """Write texts as JSONL."""
    return write_rows(path, [{"text": text} for text in (texts() if chosen is None else chosen)])


def train_settings(folder: Path, place: Path, /, **values) -> TrainSettings:
    """Return settings of a short run on a small memory."""
    fields = {
        "data": folder / "data.jsonl",
        "output": folder / ("out" if values.get("method") == "lora" else "out.safetensors"),
        "model": str(place),
        "engram_vocab_size": [53, 47],
        "n_embed_per_ngram": 8,
        "n_head_per_ngram": 2,
        "layer_ids": [1, 2],
        "max_length": 48,
        "steps": 8,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "warm_up": 2,
        "lora_rank": 4,
        "precision": "fp32",
        "device": "cpu",
        "eval_fraction": 0.1,
        "evaluate_every": 4,
        "save_every": 4,
    }
    return resolve_settings(TrainSettings, [Layer(source="test", values=fields | values)])


class Log(Watcher):
    """Keeps what it hears, and acts at some steps of the training."""

    def __init__(self, actions=None):
        self.works, self.notes, self.figures, self.steps = [], [], {}, []
        self._actions = actions or {}

    def begin(self, title, total=None, done=0):
        self.works.append((title, total, done))

    def advance(self, done, figures=None):
        if self.works[-1][0] == "training":
            self.steps.append(done)
            if figures:
                self.figures[done] = dict(figures)
            if done in self._actions:
                self._actions[done]()

    def note(self, message):
        self.notes.append(message)
