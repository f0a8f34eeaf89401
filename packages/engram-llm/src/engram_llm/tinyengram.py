"""TinyEngram's language models (github.com/AutoArk/TinyEngram, `engram.py`, `engram_qwen.py`) as memories.

Its trainer saves the whole model; the memory is `engram_layers.I.*` in it. The configuration lies in
`generation_config.json` as `engram_cfg`. Where it does not, table sizes tell most of it: they are primes that follow
from the settings. The longest n-gram stays unknown then. The scripts leave padding at id 2 and the seed at 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engram_core import AdapterFormatError, ConvertSettings, HashedMemory, InputError, MemoryRecord, MemorySettings
from engram_core.card import is_repo_id
from engram_core.container import Container
from engram_core.hashing import is_prime
from engram_core.memory import TABLE, Stored
from engram_llm.compression import compress_vocabulary
from engram_llm.foreign import ForeignLayer, check_shapes, check_sizes, expect_same, few, read_json
from engram_llm.models import describe_model, load_tokenizer

__all__ = ["convert_tinyengram"]

_CONFIG = "generation_config.json"
# Defaults of its EngramConfig, which none of its scripts changes.
_PAD_ID, _SEED = 2, 0
_LISTS = ("engram_vocab_size", "layer_ids")
_NUMBERS = ("max_ngram_size", "n_embed_per_ngram", "n_head_per_ngram", "pad_id", "seed", "kernel_size")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_LONGEST_NGRAM = 16
_QWEN3_06B = (1024, 28)  # width and layers of the model that it is trained on


def convert_tinyengram(
    source: Path,
    folder: Path,
    layers: Mapping[int, ForeignLayer],
    containers: Sequence[Container],
    settings: ConvertSettings,
    backbone: str,
    default_model: str,
) -> HashedMemory:
    """Return a checkpoint as a memory.

    Args:
        source: as the user named it.
        folder: where its configuration lies.
        layers: its memory.
        containers: its files.
        settings: what the user said.
        backbone: name of the backbone.
        default_model: of the backbone.

    Raises:
        AdapterFormatError: tensors are missing or do not fit one another.
        InputError: settings contradict the checkpoint, or must be told.
    """
    _refuse_lora(containers)
    width = _check_branches(layers)
    config = (read_json(folder / _CONFIG) or {}).get("engram_cfg")
    if config is None:
        memory = _infer(source, layers, settings)
    else:
        memory = _read_config(folder / _CONFIG, config, layers, settings)
    tensors = _check_tensors(layers, memory, width)
    model = _base_model(source, folder, config, settings, default_model)
    own = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    tokenizer = load_tokenizer(settings.model or (str(folder) if own else model))
    _check_vocabulary(containers, len(tokenizer))
    if memory.pad_id >= len(tokenizer):
        raise InputError(f"{source}: pad_id is {memory.pad_id}, the tokenizer has {len(tokenizer)} tokens")
    record = MemoryRecord(
        name=settings.name or source.resolve().stem,
        settings=memory,
        license=settings.license,
        training={"converted_from": "TinyEngram", "file": source.name},
    )
    manifest = describe_model(backbone, model, width, tokenizer)
    return HashedMemory.build(manifest, record, compress_vocabulary(tokenizer), tensors, str(source))


def _refuse_lora(containers: Sequence[Container]) -> None:
    for container in containers:
        for name in container.tensors:
            if ".lora_" in name:
                raise InputError(
                    f"{container.label}: {name}: the model was trained with LoRA as well, which a memory cannot hold; "
                    "only checkpoints whose base model stayed frozen can be imported"
                )


def _check_branches(layers: Mapping[int, ForeignLayer]) -> int:
    """Return the model's width, the same in all layers."""
    widths = set()
    for layer in layers.values():
        n_branches = sum(name.startswith("key_projs.") and name.endswith(".weight") for name in layer.tensors)
        if n_branches != 1:
            raise InputError(
                f"{layer.label}: has {n_branches} branches, each for a hyper-connection of its own; "
                "transformers' decoders have one"
            )
        widths.add(layer.shape("value_proj.weight", 2)[0])
    if len(widths) > 1:
        raise AdapterFormatError(f"{next(iter(layers.values())).label}: layers have the widths {sorted(widths)}")
    return widths.pop()


def _read_config(
    file: Path, config: Any, layers: Mapping[int, ForeignLayer], settings: ConvertSettings
) -> MemorySettings:
    """Return the settings that the checkpoint records."""
    if not isinstance(config, dict):
        raise AdapterFormatError(f"{file}: field 'engram_cfg' is {type(config).__name__}, expected an object")
    for name in (*_LISTS, *_NUMBERS):
        value = config.get(name)
        numbers = value if name in _LISTS and isinstance(value, list) else [value]
        if not numbers or not all(type(number) is int for number in numbers):
            raise AdapterFormatError(f"{file}: engram_cfg.{name} is {value!r}, expected whole numbers")
    recorded = {"max_ngram": config["max_ngram_size"], "pad_id": config["pad_id"], "hash_seed": config["seed"]}
    expect_same(settings, recorded, str(file))
    if sorted(config["layer_ids"]) != sorted(layers):
        raise AdapterFormatError(
            f"{file}: engram_cfg.layer_ids is {config['layer_ids']}, the weights have layers {sorted(layers)}"
        )
    memory = MemorySettings(
        engram_vocab_size=tuple(config["engram_vocab_size"][: max(0, config["max_ngram_size"] - 1)]),
        max_ngram_size=config["max_ngram_size"],
        n_embed_per_ngram=config["n_embed_per_ngram"],
        n_head_per_ngram=config["n_head_per_ngram"],
        layer_ids=tuple(config["layer_ids"]),
        kernel_size=config["kernel_size"],
        dilation=config["max_ngram_size"],
        pad_id=config["pad_id"],
        seed=config["seed"],
    )
    check_sizes(memory, layers, str(file))
    return memory


def _infer(source: Path, layers: Mapping[int, ForeignLayer], settings: ConvertSettings) -> MemorySettings:
    """Return the settings that the weights tell; asks for the longest n-gram where several would do."""
    ordered = sorted(layers, key=lambda number: layers[number].sizes[0])  # in the order in which they took primes
    first = layers[ordered[0]]
    n_heads, head_width = len(first.sizes), first.shape(TABLE, 2)[1]
    fitting: dict[int, MemorySettings] = {}
    for longest in range(2, _LONGEST_NGRAM + 1) if settings.max_ngram is None else [settings.max_ngram]:
        if longest < 2 or n_heads % (longest - 1):
            continue
        heads = n_heads // (longest - 1)
        memory = MemorySettings(
            engram_vocab_size=_requested_sizes(first.sizes, heads),
            max_ngram_size=longest,
            n_embed_per_ngram=heads * head_width,
            n_head_per_ngram=heads,
            layer_ids=tuple(ordered),
            kernel_size=first.shape("short_conv.conv.weight", 3)[2],
            dilation=longest,
            pad_id=_PAD_ID if settings.pad_id is None else settings.pad_id,
            seed=_SEED if settings.hash_seed is None else settings.hash_seed,
        )
        primes = memory.hash(1, 0).primes
        if all(tuple(primes[number].reshape(-1).tolist()) == layers[number].sizes for number in ordered):
            fitting[longest] = memory
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if fitting:
        choices = " or ".join(
            f"{longest} ({memory.n_head_per_ngram} heads, sizes {few(memory.engram_vocab_size)})"
            for longest, memory in fitting.items()
        )
        raise InputError(
            f"{source}: does not record its longest n-gram, and its tables fit {choices}; pass it with --max-ngram "
            "(TinyEngram's default is 3)"
        )
    given = "" if settings.max_ngram is None else f" with --max-ngram {settings.max_ngram}"
    raise InputError(
        f"{source}: no settings{given} give the table sizes of its layers; layer {ordered[0]} has {n_heads} heads with "
        f"{few(first.sizes)} rows"
    )


def _requested_sizes(sizes: Sequence[int], heads: int) -> tuple[int, ...]:
    """Return sizes that give these primes: of those that do, the roundest."""
    requested = []
    for n in range(0, len(sizes), heads):
        prime, taken = sizes[n], set(sizes[:n])
        low = prime
        while low > 1 and (low - 1 in taken or not is_prime(low - 1)):
            low -= 1
        requested.append(max(range(low, prime + 1), key=lambda size: (_zeros(size), size)))
    return tuple(requested)


def _zeros(number: int) -> int:
    return len(str(number)) - len(str(number).rstrip("0"))


def _check_tensors(
    layers: Mapping[int, ForeignLayer], memory: MemorySettings, width: int
) -> dict[int, Mapping[str, Stored]]:
    """Return the tensors under our names, which are the same."""
    for layer in layers.values():
        check_shapes(layer, memory.shapes(width, sum(layer.sizes)), {})
    return {number: layer.tensors for number, layer in layers.items()}


def _base_model(source: Path, folder: Path, config: Any, settings: ConvertSettings, default_model: str) -> str:
    """Return the model that the memory belongs to."""
    if settings.model is not None:
        return settings.model
    own = read_json(folder / "config.json") or {}
    for named in (own.get("_name_or_path"), (config or {}).get("tokenizer_name_or_path")):
        if isinstance(named, str) and is_repo_id(named) and not Path(named).exists():
            return named
    if not own or (own.get("hidden_size"), own.get("num_hidden_layers")) == _QWEN3_06B:
        return default_model
    raise InputError(f"{source}: does not say which model it was trained on; pass it with --model")


def _check_vocabulary(containers: Sequence[Container], n_tokens: int) -> None:
    for container in containers:
        for name, info in container.tensors.items():
            if name.endswith("embed_tokens.weight") and info.shape and info.shape[0] < n_tokens:
                raise InputError(
                    f"{container.label}: {name}: has {info.shape[0]} rows, the tokenizer {n_tokens} tokens; pass "
                    "--model with the model it was trained on"
                )
