"""engram_vision: memories for image generators in diffusers, backbones `sd15` and `sd35`.

    from engram_vision import load_engram, unload_engrams

    load_engram(pipeline, "zorbit.safetensors")  # a StableDiffusionPipeline
    unload_engrams(pipeline)                     # exactly as before

Names are imported when they are first used: the command line reads settings without loading torch.
`sd35` has its streams, its tokenizers and the import of TinyEngram checkpoints so far.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_vision.generation import generate
    from engram_vision.loading import LoadedEngram, list_engrams, load_engram, unload_engrams
    from engram_vision.settings import GenerateSettings, TrainSettings
    from engram_vision.training.trainer import train

__version__ = "0.1.0"

__all__ = [
    "GenerateSettings",
    "LoadedEngram",
    "TrainSettings",
    "__version__",
    "generate",
    "list_engrams",
    "load_engram",
    "train",
    "unload_engrams",
]

_HOMES = {
    "GenerateSettings": "engram_vision.settings",
    "LoadedEngram": "engram_vision.loading",
    "TrainSettings": "engram_vision.settings",
    "generate": "engram_vision.generation",
    "list_engrams": "engram_vision.loading",
    "load_engram": "engram_vision.loading",
    "train": "engram_vision.training.trainer",
    "unload_engrams": "engram_vision.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
