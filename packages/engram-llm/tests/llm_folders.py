"""Models as folders in transformers layout with a real tokenizer, and memory files that fit them."""

from pathlib import Path
from typing import Any

import torch
from llm_builders import fill
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from engram_core import MemoryRecord, MemorySettings, write_memory
from engram_llm.compression import compress_vocabulary
from engram_llm.memory import Memory, stored_tensors
from engram_llm.models import describe_model, load_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Once upon a time there was a little lamp by the sea; its keeper was called Brindle.",
    "A fever is a rise in the temperature of the body above the usual range.",
    "Café, CAFÉ and cafe are one word. Ünïcödé, Ωmega, 東京.",
]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH, LAYERS, POSITIONS = 32, 4, 96


def make_tokenizer(*, chat: bool = True, vocabulary: int = 400) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT if chat else None,
    )


def make_folder(path: Path, *, seed: int = 0, chat: bool = True, width: int = WIDTH) -> Path:
    """Write a model with random weights that look at their context, and return its folder."""
    tokenizer = make_tokenizer(chat=chat)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 12,  # embeddings are often larger than the vocabulary
        hidden_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=POSITIONS,
        initializer_range=0.15,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config.suppress_tokens = None
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_memory_file(path: Path, model: Path, *, seed: int = 0, width: int = WIDTH, **fields: Any) -> Path:
    """Write a memory with random weights for a model's folder."""
    tokenizer = load_tokenizer(str(model))
    settings = MemorySettings(
        **{
            "engram_vocab_size": (97, 61),
            "max_ngram_size": 3,
            "n_embed_per_ngram": 12,
            "n_head_per_ngram": 3,
            "layer_ids": (1, 2),
            "kernel_size": 3,
            "dilation": 3,
            "pad_id": tokenizer.pad_token_id,
        }
        | fields
    )
    lookup = compress_vocabulary(tokenizer)
    memory = Memory(settings, lookup, width)
    fill(memory, seed)
    record = MemoryRecord(name=path.stem, settings=settings, license="CC0-1.0", training={"steps": seed})
    manifest = describe_model("qwen3", str(model), width, tokenizer)
    write_memory(path, manifest, record, lookup, stored_tensors(memory), overwrite=True)
    return path
