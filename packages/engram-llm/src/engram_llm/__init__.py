"""engram_llm: hashed n-gram memories for decoder language models in transformers, backbone `qwen3`.

    from engram_llm import load_memory, unload_memories

    load_memory(model, "papers.safetensors")  # any decoder of transformers
    unload_memories(model)                    # exactly as before

Names are imported when they are first used: the command line reads settings without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_llm.attachment import prepare_cache
    from engram_llm.evaluation import evaluate
    from engram_llm.generation import generate
    from engram_llm.loading import (
        LoadedMemory,
        disable_memories,
        enable_memories,
        list_memories,
        load_memory,
        set_strength,
        unload_memories,
    )
    from engram_llm.settings import EvaluateSettings, GenerateSettings, TrainSettings
    from engram_llm.training.trainer import train

__version__ = "0.1.0"

__all__ = [
    "EvaluateSettings",
    "GenerateSettings",
    "LoadedMemory",
    "TrainSettings",
    "__version__",
    "disable_memories",
    "enable_memories",
    "evaluate",
    "generate",
    "list_memories",
    "load_memory",
    "prepare_cache",
    "set_strength",
    "train",
    "unload_memories",
]

_HOMES = {
    "EvaluateSettings": "engram_llm.settings",
    "GenerateSettings": "engram_llm.settings",
    "LoadedMemory": "engram_llm.loading",
    "TrainSettings": "engram_llm.settings",
    "disable_memories": "engram_llm.loading",
    "enable_memories": "engram_llm.loading",
    "evaluate": "engram_llm.evaluation",
    "generate": "engram_llm.generation",
    "list_memories": "engram_llm.loading",
    "load_memory": "engram_llm.loading",
    "prepare_cache": "engram_llm.attachment",
    "set_strength": "engram_llm.loading",
    "train": "engram_llm.training.trainer",
    "unload_memories": "engram_llm.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
